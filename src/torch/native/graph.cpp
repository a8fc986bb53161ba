// CUDA graphs: what a stream is given between begin and end is recorded, and replayed
// with one launch. Work before the recording runs on the same side stream, as PyTorch's
// notes on CUDA graphs ask for. The headers need CUDA's own, so this is built only where
// libtorch has CUDA; scripts/test checks its types everywhere.

#include "guarded.hpp"

#ifdef TB_CUDA

#include <ATen/cuda/CUDAGraph.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

// Declared in headers that need all of CUDA's libraries.
namespace at::cuda {
TORCH_CUDA_CPP_API void clearCublasWorkspaces();
}

// One stream for all recordings: cuBLAS keeps 32 MiB for every stream that it sees.
static at::cuda::CUDAStream recording_stream() {
  static const auto stream = at::cuda::getStreamFromPool();
  return stream;
}

extern "C" {

struct tb_graph {
  at::cuda::CUDAGraph graph;
  at::cuda::CUDAStream side = recording_stream();
  std::optional<at::cuda::CUDAStream> before;
};

int tb_graph_new(tb_graph** out) {
  return guarded([&] { *out = new tb_graph(); });
}

void tb_graph_free(tb_graph* g) {
  guarded([&] { delete g; });
}

// Makes the side stream current, after all earlier work.
int tb_graph_enter(tb_graph* g) {
  return guarded([&] {
    at::detail::getCUDAHooks().deviceSynchronize(0);
    g->before = at::cuda::getCurrentCUDAStream();
    at::cuda::setCurrentCUDAStream(g->side);
  });
}

// A recording allocates from a pool of its own: what the warm-up has left cached would stand beside it,
// as torch.cuda.graph knows too.
int tb_graph_begin(tb_graph* g) {
  return guarded([&] {
    at::detail::getCUDAHooks().deviceSynchronize(0);
    at::getDeviceAllocator(at::kCUDA)->emptyCache();
    g->graph.capture_begin();
  });
}

int tb_graph_end(tb_graph* g) {
  return guarded([&] { g->graph.capture_end(); });
}

int tb_graph_leave(tb_graph* g) {
  return guarded([&] {
    at::detail::getCUDAHooks().deviceSynchronize(0);
    if (g->before) at::cuda::setCurrentCUDAStream(*g->before);
    g->before.reset();
  });
}

int tb_graph_replay(tb_graph* g) {
  return guarded([&] { g->graph.replay(); });
}

// Frees what earlier cases made cuBLAS keep, so that a peak is its own case's.
int tb_drop_workspaces() {
  return guarded([] { at::cuda::clearCublasWorkspaces(); });
}

}  // extern "C"

#else

struct tb_graph {};

static int tb_no_graphs() {
  last_error = "this libtorch was built without CUDA graphs";
  return -1;
}

extern "C" {

int tb_graph_new(tb_graph**) { return tb_no_graphs(); }
void tb_graph_free(tb_graph*) {}
int tb_graph_enter(tb_graph*) { return tb_no_graphs(); }
int tb_graph_begin(tb_graph*) { return tb_no_graphs(); }
int tb_graph_end(tb_graph*) { return tb_no_graphs(); }
int tb_graph_leave(tb_graph*) { return tb_no_graphs(); }
int tb_graph_replay(tb_graph*) { return tb_no_graphs(); }
int tb_drop_workspaces() { return 0; }

}  // extern "C"

#endif

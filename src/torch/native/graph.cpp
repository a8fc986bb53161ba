// CUDA graphs: work that a stream receives between begin and end is captured, and replayed with one launch.
// The warm-up runs on the same side stream (https://docs.pytorch.org/docs/stable/notes/cuda.html). The headers
// include those of CUDA, so this is compiled only if libtorch has CUDA. scripts/test checks its types on any machine.

#include "guarded.hpp"

#ifdef TB_CUDA

#include <ATen/cuda/CUDAGraph.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

// Its header includes those of all CUDA libraries.
namespace at::cuda {
TORCH_CUDA_CPP_API void clearCublasWorkspaces();
}

// All captures share a stream, because cuBLAS allocates a workspace of 32 MiB per stream.
static at::cuda::CUDAStream capture_stream() {
  static const auto stream = at::cuda::getStreamFromPool();
  return stream;
}

extern "C" {

struct tb_graph {
  at::cuda::CUDAGraph graph;
  at::cuda::CUDAStream side = capture_stream();
  std::optional<at::cuda::CUDAStream> previous;
};

int tb_graph_new(tb_graph** out) {
  return guarded([&] { *out = new tb_graph(); });
}

void tb_graph_free(tb_graph* g) {
  guarded([&] { delete g; });
}

// Waits for earlier work and makes the side stream the current one.
int tb_graph_enter(tb_graph* g) {
  return guarded([&] {
    at::detail::getCUDAHooks().deviceSynchronize(0);
    g->previous = at::cuda::getCurrentCUDAStream();
    at::cuda::setCurrentCUDAStream(g->side);
  });
}

// Begins the capture. A capture allocates from a separate pool, so the cached blocks of the warm-up are freed
// first, as in torch.cuda.graph.
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
    if (g->previous) at::cuda::setCurrentCUDAStream(*g->previous);
    g->previous.reset();
  });
}

int tb_graph_replay(tb_graph* g) {
  return guarded([&] { g->graph.replay(); });
}

// Frees cuBLAS workspaces of earlier cases, which would count in the peak memory of the next one.
int tb_clear_cublas_workspaces() {
  return guarded([] { at::cuda::clearCublasWorkspaces(); });
}

}  // extern "C"

#else

struct tb_graph {};

static int tb_no_graphs() {
  last_error = "this program was built without CUDA graphs: run ./scripts/setup, then build again";
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
int tb_clear_cublas_workspaces() { return 0; }

}  // extern "C"

#endif

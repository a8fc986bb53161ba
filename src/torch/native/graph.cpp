// CUDA graphs: what a stream is given between begin and end is recorded, and replayed
// with one launch. Work before the recording runs on the same side stream, as PyTorch's
// notes on CUDA graphs ask for. The headers need CUDA's own, so this is built only where
// libtorch has CUDA; scripts/test checks its types everywhere.

#include "guarded.hpp"

#ifdef TB_CUDA

#include <ATen/cuda/CUDAGraph.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

extern "C" {

struct tb_graph {
  at::cuda::CUDAGraph graph;
  at::cuda::CUDAStream side = at::cuda::getStreamFromPool();
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

int tb_graph_begin(tb_graph* g) {
  return guarded([&] { g->graph.capture_begin(); });
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

}  // extern "C"

#endif

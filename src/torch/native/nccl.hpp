// NCCL's C interface (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html), found
// in the library that libtorch's CUDA part has loaded.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#ifdef TB_CUDA

#include <c10/core/Event.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/env.h>
#include <dlfcn.h>

class Nccl {
 public:
  static constexpr int ID = 128;

  // A byte a number.
  static std::vector<float> id() {
    Id made;
    check(function<int(Id*)>("ncclGetUniqueId")(&made), "ncclGetUniqueId");
    return {made.bytes, made.bytes + ID};
  }

  Nccl(const std::vector<float>& id, int rank, int size) : stream_(c10::cuda::getStreamFromPool(true)) {
    Id made;
    for (int i = 0; i < ID; ++i) made.bytes[i] = static_cast<signed char>(id[i]);
    // A step is one recording with nothing beside it: NCCL need not provide for calls meanwhile, which
    // took 0.7 % of a recorded step of 3.8 ms on two H100s. Before NCCL reads it; the user's own stays.
    c10::utils::set_env("NCCL_GRAPH_MIXING_SUPPORT", "0", false);
    check(function<int(void**, int, Id, int)>("ncclCommInitRank")(&communicator_, size, made, rank),
          "ncclCommInitRank");
    all_reduce_ = function<AllReduce>("ncclAllReduce");
    group_start_ = function<int()>("ncclGroupStart");
    group_end_ = function<int()>("ncclGroupEnd");
  }

  // What follows begins when the current stream has come so far, on a stream of its own.

  // In place.
  void sum(const at::Tensor& tensor) {
    behind(stream_, c10::cuda::getCurrentCUDAStream());
    all_reduce(tensor, tensor, SUM);
  }

  // The means of several tensors in as many others, launched as one.
  void mean(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& means) {
    behind(stream_, c10::cuda::getCurrentCUDAStream());
    check(group_start_(), "ncclGroupStart");
    for (size_t i = 0; i < tensors.size(); ++i) all_reduce(tensors[i], means[i], AVERAGE);
    check(group_end_(), "ncclGroupEnd");
  }

  // The current stream goes on when all that began is done.
  void wait() { behind(c10::cuda::getCurrentCUDAStream(), stream_); }

 private:
  struct Id {
    signed char bytes[ID];
  };
  using AllReduce = int(const void*, void*, size_t, int, int, void*, cudaStream_t);

  // ncclRedOp_t and ncclDataType_t of nccl.h.
  enum { SUM = 0, AVERAGE = 4 };
  static int type(const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case at::kHalf:
        return 6;
      case at::kFloat:
        return 7;
      case at::kBFloat16:
        return 9;
      default:
        TORCH_CHECK(false, "no exchange of ", tensor.scalar_type());
    }
  }

  template <typename F>
  static F* function(const char* name) {
    static void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_GLOBAL);
    TORCH_CHECK(library, "NCCL does not load: ", dlerror());
    void* found = dlsym(library, name);
    TORCH_CHECK(found, "this NCCL has no ", name);
    return reinterpret_cast<F*>(found);
  }

  static void check(int status, const char* what) {
    if (status == 0) return;
    TORCH_CHECK(false, what, ": ", function<const char*(int)>("ncclGetErrorString")(status), ", ",
                function<const char*(void*)>("ncclGetLastError")(nullptr));
  }

  static void behind(c10::Stream waiting, c10::Stream earlier) {
    c10::Event event(c10::kCUDA);
    event.record(earlier);
    event.block(waiting);
  }

  void all_reduce(const at::Tensor& from, const at::Tensor& to, int operation) {
    check(all_reduce_(from.const_data_ptr(), to.mutable_data_ptr(), from.numel(), type(from), operation,
                      communicator_, stream_),
          "ncclAllReduce");
  }

  void* communicator_ = nullptr;
  AllReduce* all_reduce_ = nullptr;
  int (*group_start_)() = nullptr;
  int (*group_end_)() = nullptr;
  c10::cuda::CUDAStream stream_;
};

#else

class Nccl {
 public:
  static constexpr int ID = 128;
  static std::vector<float> id() { return std::vector<float>(ID); }
  Nccl(const std::vector<float>&, int, int) { TORCH_CHECK(false, "built without CUDA"); }
  void sum(const at::Tensor&) {}
  void mean(const std::vector<at::Tensor>&, const std::vector<at::Tensor>&) {}
  void wait() {}
};

#endif

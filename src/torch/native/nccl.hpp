// NCCL's C interface (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html), from the library that
// libtorch_cuda has loaded.
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

  // Returns the bytes of a new unique id, one per float.
  static std::vector<float> id() {
    Id unique;
    check(function<int(Id*)>("ncclGetUniqueId")(&unique), "ncclGetUniqueId");
    return {unique.bytes, unique.bytes + ID};
  }

  Nccl(const std::vector<float>& id, int rank, int size) : stream_(c10::cuda::getStreamFromPool(true)) {
    Id unique;
    for (int i = 0; i < ID; ++i) unique.bytes[i] = static_cast<signed char>(id[i]);
    // Collectives of a graph and others never run at the same time here, so NCCL need not support that. The support
    // took 0.7 % of a captured step of 3.8 ms on two H100s. A value that the user set has priority.
    c10::utils::set_env("NCCL_GRAPH_MIXING_SUPPORT", "0", false);
    check(function<int(void**, int, Id, int)>("ncclCommInitRank")(&communicator_, size, unique, rank),
          "ncclCommInitRank");
    all_reduce_ = function<AllReduce>("ncclAllReduce");
    group_start_ = function<int()>("ncclGroupStart");
    group_end_ = function<int()>("ncclGroupEnd");
  }

  // Sums a tensor in place. Collectives run on their own stream, after the work that the current stream has now.
  void sum(const at::Tensor& tensor) {
    order(c10::cuda::getCurrentCUDAStream(), stream_);
    all_reduce(tensor, tensor, SUM);
  }

  // Writes the mean of each tensor to `means`, with one launch.
  void mean(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& means) {
    order(c10::cuda::getCurrentCUDAStream(), stream_);
    check(group_start_(), "ncclGroupStart");
    for (size_t i = 0; i < tensors.size(); ++i) all_reduce(tensors[i], means[i], AVERAGE);
    check(group_end_(), "ncclGroupEnd");
  }

  // Makes the current stream wait for the collectives.
  void wait() { order(stream_, c10::cuda::getCurrentCUDAStream()); }

 private:
  struct Id {
    signed char bytes[ID];
  };
  using AllReduce = int(const void*, void*, size_t, int, int, void*, cudaStream_t);

  // Values of ncclRedOp_t and ncclDataType_t in nccl.h.
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
        TORCH_CHECK(false, "no all-reduce of ", tensor.scalar_type());
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

  // Makes work that `second` receives later wait for the present work of `first`.
  static void order(c10::Stream first, c10::Stream second) {
    c10::Event event(c10::kCUDA);
    event.record(first);
    event.block(second);
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

// All-reduce between the ranks of a step, through the backends that PyTorch uses. On the CPU this is c10d's Gloo. On
// CUDA it is libtorch's NCCL through the C interface that ProcessGroupNCCL calls, because that class's header includes
// those of all CUDA libraries. MPS has no backend, so its gradients go through the CPU.

#define USE_C10D_GLOO

#include <ATen/ATen.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <memory>
#include <vector>

#include "guarded.hpp"
#include "nccl.hpp"

namespace {

struct ProcessGroup {
  int size = 1;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
  // For ranks on GPUs.
  std::unique_ptr<Nccl> nccl;
};
ProcessGroup process_group;

ProcessGroup& group() {
  TORCH_CHECK(process_group.gloo, "this process is not a rank");
  return process_group;
}

c10::intrusive_ptr<c10d::Work> start_sum_on_cpu(at::Tensor values) {
  std::vector<at::Tensor> one{std::move(values)};
  return group().gloo->allreduce(one);
}

void sum_on_cpu(at::Tensor values) { start_sum_on_cpu(std::move(values))->wait(); }

// Replaces a tensor by its mean over all ranks.
void mean(at::Tensor& tensor) {
  if (tensor.is_cuda()) {
    group().nccl->mean({tensor}, {tensor});
    group().nccl->wait();
    return;
  }
  auto on_cpu = tensor.is_cpu() ? tensor : tensor.cpu();
  sum_on_cpu(on_cpu.div_(group().size));
  if (!tensor.is_cpu()) tensor.copy_(on_cpu);
}

struct Bucket {
  // Buffer for all gradients of the bucket, unless they are all-reduced as separate tensors.
  at::Tensor flat;
  // Mean of each gradient: a view of the buffer, or a separate tensor.
  std::vector<at::Tensor> means;
  // Gradients of this step. All of them are ready before the all-reduce starts.
  std::vector<at::Tensor> gradients;
  // Number of gradients that are not ready.
  size_t pending = 0;
  c10::intrusive_ptr<c10d::Work> work;
};

}  // namespace

// Buckets of gradients, in the order in which a backward pass computes them. The all-reduce of a bucket starts when all
// of its gradients are ready. The hooks belong to tensors, because autograd::grad does not run the hooks of
// AccumulateGrad, which c10d's Reducer uses.
struct tb_buckets {
  std::vector<at::Tensor> parameters;
  std::vector<std::pair<at::Tensor, unsigned>> hooks;
  std::vector<Bucket> buckets;
  // Bucket of each parameter, and its index there.
  std::vector<std::pair<size_t, size_t>> location;
  bool no_sync;
  // True in the backward passes of all micro-batches but the last one. Hooks then do nothing.
  bool paused = false;
  // Sums of the gradients of earlier micro-batches, by parameter. Empty without any.
  std::vector<at::Tensor> sums;

  // `bucket_of` has the bucket of each parameter. Buckets are filled in their order, and from the last parameter.
  tb_buckets(std::vector<at::Tensor> all, const size_t* bucket_of, bool copied, bool no_sync)
      : parameters(std::move(all)), no_sync(no_sync) {
    location.resize(parameters.size());
    std::vector<std::vector<size_t>> members;
    for (size_t i = parameters.size(); i-- > 0;) {
      if (bucket_of[i] == members.size()) members.emplace_back();
      auto& own = members.at(bucket_of[i]);
      location[i] = {bucket_of[i], own.size()};
      own.push_back(i);
    }
    bool gpu = !parameters.empty() && parameters[0].is_cuda();
    for (const auto& own : members) {
      Bucket bucket;
      auto options = parameters[own[0]].options().requires_grad(false).device(gpu ? at::kCUDA : at::kCPU);
      int64_t count = 0, start = 0;
      for (size_t i : own) count += parameters[i].numel();
      if (copied || !gpu) bucket.flat = at::empty({count}, options);
      for (size_t i : own) {
        auto shape = parameters[i].sizes();
        bucket.means.push_back(bucket.flat.defined()
                                   ? bucket.flat.narrow(0, start, parameters[i].numel()).view(shape)
                                   : at::empty(shape, options));
        start += parameters[i].numel();
      }
      bucket.gradients.resize(own.size());
      bucket.pending = own.size();
      buckets.push_back(std::move(bucket));
    }
    for (size_t i = 0; i < parameters.size() && parameters[i].requires_grad(); ++i) {
      unsigned id = parameters[i].register_hook([this, i](const at::Tensor& g) {
        if (!paused) mark_ready(i, sums.empty() ? g : (g + sums[i]).to(g.scalar_type()));
      });
      hooks.emplace_back(parameters[i], id);
    }
  }

  ~tb_buckets() {
    for (auto& [tensor, id] : hooks) tensor.remove_hook(id);
  }

  void mark_ready(size_t i, const at::Tensor& gradient) {
    auto& bucket = buckets[location[i].first];
    bucket.gradients[location[i].second] = gradient;
    if (--bucket.pending == 0) start_all_reduce(bucket);
  }

  void start_all_reduce(Bucket& bucket) {
    at::NoGradGuard no_grad;
    if (!bucket.flat.defined()) {
      // NCCL needs contiguous tensors.
      for (auto& gradient : bucket.gradients) gradient = gradient.contiguous();
      if (no_sync) {
        bucket.means = bucket.gradients;
      } else {
        group().nccl->mean(bucket.gradients, bucket.means);
      }
      return;
    }
    at::_foreach_copy_(bucket.means, bucket.gradients);
    if (no_sync) return;
    if (bucket.flat.is_cuda()) {
      group().nccl->mean({bucket.flat}, {bucket.flat});
    } else {
      bucket.work = start_sum_on_cpu(bucket.flat.div_(group().size));
    }
  }

  // Waits for all buckets and returns the means. The next step overwrites them.
  std::vector<at::Tensor> wait() {
    for (auto& bucket : buckets) {
      TORCH_CHECK(bucket.pending == 0, "a parameter has no gradient, so its bucket was not all-reduced");
      if (bucket.work) bucket.work->wait();
      bucket.work.reset();
      for (auto& gradient : bucket.gradients) gradient.reset();
      bucket.pending = bucket.gradients.size();
    }
    if (!no_sync && !parameters.empty() && parameters[0].is_cuda()) group().nccl->wait();
    sums.clear();
    std::vector<at::Tensor> all(parameters.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      all[i] = buckets[location[i].first].means[location[i].second].to(parameters[i].device());
    }
    return all;
  }
};

extern "C" {

// Connects the ranks. With port 0, they are on one machine and `address` is a file that only they use. Otherwise rank 0
// serves the port of host `address`, unless the launcher already does (`agent_store`). Fails if a rank does not answer
// within `seconds`.
int tb_init_process_group(int rank, int size, const char* address, int port, bool agent_store, int seconds) {
  return guarded([&] {
    // Errors have the reason. c10d would also log each of them with its C++ stack.
    FLAGS_caffe2_log_level = c10::GLOG_FATAL;
    const std::chrono::milliseconds timeout(1000LL * seconds);
    c10::intrusive_ptr<c10d::Store> store;
    if (port == 0) {
      store = c10::make_intrusive<c10d::FileStore>(address, size);
    } else {
      c10d::TCPStoreOptions options;
      options.port = static_cast<uint16_t>(port);
      options.isServer = rank == 0 && !agent_store;
      if (!agent_store) options.numWorkers = size;
      options.timeout = timeout;
      store = c10::make_intrusive<c10d::TCPStore>(address, options);
    }
    store->setTimeout(timeout);
    store = c10::make_intrusive<c10d::PrefixStore>("transformer-bench", store);
    using Options = c10d::ProcessGroupGloo::Options;
    // Between hosts, GLOO_SOCKET_IFNAME chooses the network interface, as for all programs of torchrun.
    auto options = port == 0 ? Options::create(timeout) : Options::create_default(timeout);
    // Ranks of one machine use the loopback interface, whatever the host name resolves to.
    if (port == 0) options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    process_group.gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options);
    process_group.size = size;
    sum_on_cpu(at::ones({1}));
  });
}

// Connects the GPUs of the ranks, after tb_init_process_group. Each rank sees only its own GPU.
int tb_init_nccl(int rank) {
  return guarded([&] {
    // All ranks use the unique id of rank 0. The sum over the ranks broadcasts it, because the others send zeros.
    auto id = rank == 0 ? Nccl::id() : std::vector<float>(Nccl::ID, 0.0f);
    auto shared = at::from_blob(id.data(), {Nccl::ID}, at::kFloat).clone();
    sum_on_cpu(shared);
    std::vector<float> values(shared.data_ptr<float>(), shared.data_ptr<float>() + Nccl::ID);
    process_group.nccl = std::make_unique<Nccl>(values, rank, group().size);
  });
}

// Sums numbers over all ranks, in place.
int tb_all_reduce_floats(float* values, int64_t count) {
  return guarded([&] { sum_on_cpu(at::from_blob(values, {count}, at::kFloat)); });
}

// Sums a tensor over all ranks, in place, `times` times in a row.
int tb_all_reduce(at::Tensor* tensor, uint64_t times) {
  return guarded([&] {
    if (tensor->is_cuda()) {
      for (uint64_t i = 0; i < times; ++i) group().nccl->sum(*tensor);
      group().nccl->wait();
      return;
    }
    for (uint64_t i = 0; i < times; ++i) {
      auto on_cpu = tensor->is_cpu() ? *tensor : tensor->cpu();
      sum_on_cpu(on_cpu);
      if (!tensor->is_cpu()) tensor->copy_(on_cpu);
    }
  });
}

// Replaces each tensor by its mean over all ranks, one after the other.
int tb_all_reduce_mean(at::Tensor** tensors, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    for (auto& tensor : list(tensors, count)) mean(tensor);
  });
}

int tb_buckets_new(at::Tensor** parameters, const size_t* bucket_of, size_t count, bool copied, bool no_sync,
                   tb_buckets** out) {
  return guarded([&] { *out = new tb_buckets(list(parameters, count), bucket_of, copied, no_sync); });
}

void tb_buckets_free(tb_buckets* buckets) {
  guarded([&] { delete buckets; });
}

// Prepares the hooks for the backward pass of a micro-batch. `sums` has the gradients of earlier ones, or is empty.
int tb_buckets_start(tb_buckets* buckets, bool paused, at::Tensor** sums, size_t count) {
  return guarded([&] {
    buckets->paused = paused;
    buckets->sums = list(sums, count);
  });
}

// Fills the buckets with gradients that no hook has seen.
int tb_buckets_fill(tb_buckets* buckets, at::Tensor** gradients, size_t count) {
  return guarded([&] {
    for (size_t i = count; i-- > 0;) buckets->mark_ready(i, *gradients[i]);
  });
}

// Waits for the all-reduce. `means` receives a new tensor for each parameter.
int tb_buckets_wait(tb_buckets* buckets, at::Tensor** means) {
  return guarded([&] { return_tensors(buckets->wait(), means); });
}

}  // extern "C"

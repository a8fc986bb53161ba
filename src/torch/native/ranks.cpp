// Exchange between the processes that share a step, by PyTorch's own engines: c10d's Gloo
// on the CPU; on CUDA the NCCL that libtorch brings, by the C interface that
// ProcessGroupNCCL calls, whose own header needs those of all of CUDA's libraries. No engine
// serves MPS: gradients go by way of the CPU.

#define USE_C10D_GLOO

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <memory>
#include <optional>
#include <vector>

#include "guarded.hpp"
#include "nccl.hpp"

namespace {

// This process's place among the others; made once.
struct Group {
  int size = 1;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
  // Where there are GPUs.
  std::unique_ptr<Nccl> nccl;
};
Group group;

Group& joined() {
  TORCH_CHECK(group.gloo, "this process is no rank");
  return group;
}

void sum_on_cpu(at::Tensor values) {
  std::vector<at::Tensor> one{std::move(values)};
  joined().gloo->allreduce(one)->wait();
}

// The mean over all ranks in place, when the current stream is through.
void mean(at::Tensor& tensor) {
  if (tensor.is_cuda()) {
    joined().nccl->mean({tensor}, {tensor});
    joined().nccl->wait();
    return;
  }
  auto here = tensor.is_cpu() ? tensor : tensor.cpu();
  sum_on_cpu(here.div_(joined().size));
  if (!tensor.is_cpu()) tensor.copy_(here);
}

struct Bucket {
  // A copy of all gradients, where they are exchanged as one piece.
  at::Tensor flat;
  // Of each gradient; parts of the copy where there is one.
  std::vector<at::Tensor> means;
  // The gradients of this step; those of one bucket all come before it is sent.
  std::vector<at::Tensor> gradients;
  size_t missing = 0;
  c10::intrusive_ptr<c10d::Work> work;
};

}  // namespace

// Gradients in buckets, in the order in which a backward pass finds them, each sent as soon as
// its last has come. Hooks of tensors run under autograd::grad; those of c10d's Reducer, which
// are AccumulateGrad's, never do.
struct tb_buckets {
  std::vector<at::Tensor> parameters;
  std::vector<std::pair<at::Tensor, unsigned>> hooks;
  std::vector<Bucket> buckets;
  std::vector<std::pair<size_t, size_t>> place;
  bool silent;

  // `bucket_of` tells it of each parameter; they are filled from the first on.
  tb_buckets(std::vector<at::Tensor> all, const size_t* bucket_of, bool copied, bool silent)
      : parameters(std::move(all)), silent(silent) {
    place.resize(parameters.size());
    std::vector<std::vector<size_t>> members;
    for (size_t i = parameters.size(); i-- > 0;) {
      if (bucket_of[i] == members.size()) members.emplace_back();
      auto& own = members.at(bucket_of[i]);
      place[i] = {bucket_of[i], own.size()};
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
      bucket.missing = own.size();
      buckets.push_back(std::move(bucket));
    }
    for (size_t i = 0; i < parameters.size() && parameters[i].requires_grad(); ++i) {
      unsigned id = parameters[i].register_hook([this, i](const at::Tensor& g) { arrived(i, g); });
      hooks.emplace_back(parameters[i], id);
    }
  }

  ~tb_buckets() {
    for (auto& [tensor, id] : hooks) tensor.remove_hook(id);
  }

  void arrived(size_t i, const at::Tensor& gradient) {
    auto& bucket = buckets[place[i].first];
    bucket.gradients[place[i].second] = gradient;
    if (--bucket.missing == 0) send(bucket);
  }

  void send(Bucket& bucket) {
    at::NoGradGuard no_grad;
    if (!bucket.flat.defined()) {
      // NCCL reads what lies dense.
      for (auto& gradient : bucket.gradients) gradient = gradient.contiguous();
      if (silent) {
        bucket.means = bucket.gradients;
      } else {
        joined().nccl->mean(bucket.gradients, bucket.means);
      }
      return;
    }
    at::_foreach_copy_(bucket.means, bucket.gradients);
    if (silent) return;
    if (bucket.flat.is_cuda()) {
      joined().nccl->mean({bucket.flat}, {bucket.flat});
      return;
    }
    bucket.flat.div_(joined().size);
    std::vector<at::Tensor> one{bucket.flat};
    bucket.work = joined().gloo->allreduce(one);
  }

  // The means, once all have come; the next step overwrites them.
  std::vector<at::Tensor> finish() {
    std::vector<at::Tensor> all(parameters.size());
    for (auto& bucket : buckets) {
      TORCH_CHECK(bucket.missing == 0, "a parameter has no gradient: its bucket was never sent");
      if (bucket.work) bucket.work->wait();
      bucket.work.reset();
      for (auto& gradient : bucket.gradients) gradient.reset();
      bucket.missing = bucket.gradients.size();
    }
    if (!silent && !parameters.empty() && parameters[0].is_cuda()) joined().nccl->wait();
    for (size_t i = 0; i < parameters.size(); ++i) {
      const auto& mean = buckets[place[i].first].means[place[i].second];
      all[i] = mean.device() == parameters[i].device() ? mean : mean.to(parameters[i].device());
    }
    return all;
  }
};

extern "C" {

// Meets the other ranks: by a file that is theirs alone, or at a host's port, which the first
// serves unless its launcher does. Waits for none of them longer than `seconds`.
int tb_ranks_join(int rank, int size, const char* place, int port, bool served, int seconds) {
  return guarded([&] {
    const std::chrono::milliseconds patience(1000LL * seconds);
    c10::intrusive_ptr<c10d::Store> store;
    if (port == 0) {
      store = c10::make_intrusive<c10d::FileStore>(place, size);
    } else {
      c10d::TCPStoreOptions told;
      told.port = static_cast<uint16_t>(port);
      told.isServer = rank == 0 && !served;
      if (!served) told.numWorkers = size;
      told.timeout = patience;
      store = c10::make_intrusive<c10d::TCPStore>(place, told);
    }
    store->setTimeout(patience);
    store = c10::make_intrusive<c10d::PrefixStore>("transformer-bench", store);
    using Options = c10d::ProcessGroupGloo::Options;
    // Of several hosts GLOO_SOCKET_IFNAME names the interface, as for torchrun's own programs.
    auto options = port == 0 ? Options::create(patience) : Options::create_default(patience);
    // Ranks of one machine talk over its loopback, whatever its name resolves to.
    if (port == 0) options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    group.gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options);
    group.size = size;
    auto one = at::ones({1});
    sum_on_cpu(one);
  });
}

// The same for GPUs, of which each rank sees its own alone; after tb_ranks_join.
int tb_ranks_join_gpus(int rank) {
  return guarded([&] {
    // Of NCCL's random id the first rank's is everybody's, a byte a number.
    auto id = rank == 0 ? Nccl::id() : std::vector<float>(Nccl::ID, 0.0f);
    auto shared = at::from_blob(id.data(), {Nccl::ID}, at::kFloat).clone();
    sum_on_cpu(shared);
    std::vector<float> values(shared.data_ptr<float>(), shared.data_ptr<float>() + Nccl::ID);
    group.nccl = std::make_unique<Nccl>(values, rank, joined().size);
  });
}

// Adds up the numbers over all ranks, in place.
int tb_ranks_sum(float* values, int64_t count) {
  return guarded([&] { sum_on_cpu(at::from_blob(values, {count}, at::kFloat)); });
}

// Adds up a buffer over all ranks, in place, so many times in a row.
int tb_ranks_all_reduce(at::Tensor* buffer, uint64_t times) {
  return guarded([&] {
    if (buffer->is_cuda()) {
      for (uint64_t i = 0; i < times; ++i) joined().nccl->sum(*buffer);
      joined().nccl->wait();
      return;
    }
    for (uint64_t i = 0; i < times; ++i) {
      auto here = buffer->is_cpu() ? *buffer : buffer->cpu();
      sum_on_cpu(here);
      if (!buffer->is_cpu()) buffer->copy_(here);
    }
  });
}

// Each tensor becomes its mean over all ranks, one after the other.
int tb_ranks_mean(at::Tensor** tensors, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    for (auto& tensor : list(tensors, count)) mean(tensor);
  });
}

int tb_buckets_new(at::Tensor** parameters, const size_t* bucket_of, size_t count, bool copied, bool silent,
                   tb_buckets** out) {
  return guarded([&] { *out = new tb_buckets(list(parameters, count), bucket_of, copied, silent); });
}

void tb_buckets_free(tb_buckets* buckets) {
  guarded([&] { delete buckets; });
}

// Puts gradients in, where no hook does.
int tb_buckets_fill(tb_buckets* buckets, at::Tensor** gradients, size_t count) {
  return guarded([&] {
    for (size_t i = count; i-- > 0;) buckets->arrived(i, *gradients[i]);
  });
}

// After a backward pass: `gradients` receives the means, a new tensor for each parameter.
int tb_buckets_finish(tb_buckets* buckets, at::Tensor** gradients) {
  return guarded([&] {
    auto all = buckets->finish();
    for (size_t i = 0; i < all.size(); ++i) gradients[i] = new at::Tensor(std::move(all[i]));
  });
}

}  // extern "C"

// Functions that tch does not wrap: synchronization and memory statistics for any device, autocast,
// matmul precision, gradients with an upstream gradient, and AdamW as in torch.optim. They are all in
// libtorch_cpu, which reaches CUDA and MPS through their hooks.
//
// Functions that return int return 0, or -1 with the reason in tb_last_error().

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/version.h>

#include <vector>

#include "gradients.hpp"
#include "guarded.hpp"

namespace {

c10::DeviceType device_type(int device) {
  switch (device) {
    case 1:
      return c10::kMPS;
    case 2:
      return c10::kCUDA;
    default:
      return c10::kCPU;
  }
}

// Returns the random generator that the operations of a device draw from.
at::Generator generator(int device) {
  auto type = device_type(device);
  return at::globalContext().defaultGenerator(type == c10::kCPU ? at::Device(type) : at::Device(type, 0));
}

using Stat = c10::CachingAllocator::StatType;

}  // namespace

extern "C" {

// The same fields as `AdamW` in src/fixture.rs.
struct tb_adamw_options {
  double lr, beta1, beta2, eps, weight_decay;
};

const char* tb_last_error() { return last_error.c_str(); }

const char* tb_version() { return TORCH_VERSION; }

// Returns libtorch's description of its BLAS, instruction set and threads.
const char* tb_configuration() {
  static thread_local std::string text;
  text = at::show_config() + "\nCPU capability: " + at::get_cpu_capability();
  return text.c_str();
}

int tb_synchronize(int device) {
  return guarded([&] {
    if (device_type(device) == c10::kMPS) at::detail::getMPSHooks().deviceSynchronize();
    if (device_type(device) == c10::kCUDA) at::detail::getCUDAHooks().deviceSynchronize(0);
  });
}

// Sets whether products of f32 matrices may round their inputs to TF32.
int tb_allow_tf32(bool allow) {
  return guarded([&] {
    at::globalContext().setFloat32MatmulPrecision(allow ? "high" : "highest");
    at::globalContext().setAllowTF32CuDNN(allow);
  });
}

int tb_autocast_begin(int device) {
  return guarded([&] {
    auto type = device_type(device);
    at::autocast::increment_nesting();
    at::autocast::set_autocast_dtype(type, at::kBFloat16);
    at::autocast::set_autocast_enabled(type, true);
  });
}

// Also drops the cached bf16 copies of the parameters, which are valid for one step.
int tb_autocast_end(int device) {
  return guarded([&] {
    at::autocast::set_autocast_enabled(device_type(device), false);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  });
}

// Copies tensors pairwise and converts their types.
int tb_foreach_copy(at::Tensor** to, at::Tensor** from, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(list(to, count), list(from, count));
  });
}

// Adds tensors pairwise to `sums`, which keep their types.
int tb_foreach_add(at::Tensor** sums, at::Tensor** others, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_add_(list(sums, count), list(others, count));
  });
}

// Multiplies tensors by a number, in place.
int tb_foreach_mul(at::Tensor** tensors, double factor, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(tensors, count), factor);
  });
}

// Computes the gradients of `output` with respect to `inputs`, as torch.autograd.grad does. `upstream` is the
// gradient of `output`; null means 1, for a scalar. `gradients` receives `count` new tensors. With `allow_unused`, those
// of inputs that `output` does not depend on are undefined.
int tb_grad(at::Tensor* output, at::Tensor* upstream, at::Tensor** inputs, size_t count, bool allow_unused,
            at::Tensor** gradients) {
  return guarded([&] {
    torch::autograd::variable_list upstreams;
    if (upstream) upstreams.push_back(*upstream);
    auto all = torch::autograd::grad({*output}, list(inputs, count), upstreams, /*retain_graph=*/std::nullopt,
                                     /*create_graph=*/false, allow_unused);
    return_tensors(std::move(all), gradients);
  });
}

// Returns the state of a device's random generator as a tensor in host memory.
int tb_random_state(int device, at::Tensor** state) {
  return guarded([&] {
    auto random = generator(device);
    std::lock_guard<std::mutex> lock(random.mutex());
    *state = new at::Tensor(random.get_state());
  });
}

int tb_set_random_state(int device, at::Tensor* state) {
  return guarded([&] {
    auto random = generator(device);
    std::lock_guard<std::mutex> lock(random.mutex());
    random.set_state(*state);
  });
}

// Runs an AdamW step in place, with the order of operations of torch.optim.AdamW. As its defaults do, it runs
// tensor by tensor on the CPU and with `_foreach_` operators on an accelerator.
int tb_adamw(at::Tensor** parameters, at::Tensor** gradients, at::Tensor** first,
             at::Tensor** second, size_t count, int64_t step, tb_adamw_options s, bool foreach) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const double correction1 = 1 - std::pow(s.beta1, step);
    const double root2 = std::sqrt(1 - std::pow(s.beta2, step));
    const double decay = 1 - s.lr * s.weight_decay;
    auto all = in_type_of(list(parameters, count), list(gradients, count));
    if (foreach) {
      auto p = list(parameters, count), g = all;
      auto m = list(first, count), v = list(second, count);
      at::_foreach_mul_(p, decay);
      at::_foreach_lerp_(m, g, 1 - s.beta1);
      at::_foreach_mul_(v, s.beta2);
      at::_foreach_addcmul_(v, g, g, 1 - s.beta2);
      auto denominator = at::_foreach_sqrt(v);
      at::_foreach_div_(denominator, root2);
      at::_foreach_add_(denominator, s.eps);
      at::_foreach_addcdiv_(p, m, denominator, -s.lr / correction1);
      return;
    }
    for (size_t i = 0; i < count; ++i) {
      auto &p = *parameters[i], &g = all[i], &m = *first[i], &v = *second[i];
      p.mul_(decay);
      m.lerp_(g, 1 - s.beta1);
      v.mul_(s.beta2).addcmul_(g, g, 1 - s.beta2);
      p.addcdiv_(m, (v.sqrt() / root2).add_(s.eps), -s.lr / correction1);
    }
  });
}

// Runs a fused AdamW step in place, with one kernel per batch of tensors. `steps` counts the steps on the device.
int tb_fused_adamw(at::Tensor** parameters, at::Tensor** gradients, at::Tensor** first,
                   at::Tensor** second, at::Tensor** steps, size_t count, tb_adamw_options s) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto t = list(steps, count);
    at::_foreach_add_(t, 1);
    auto p = list(parameters, count);
    at::_fused_adamw_(p, in_type_of(p, list(gradients, count)), list(first, count),
                      list(second, count), {}, t, s.lr, s.beta1, s.beta2, s.weight_decay, s.eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}

// Returns the peak of the allocated bytes since the reset. Fails if the device has no caching allocator.
int tb_peak_memory(int device, uint64_t* bytes) {
  return guarded([&] {
    auto stats = at::getDeviceAllocator(device_type(device))->getDeviceStats(0);
    *bytes = stats.allocated_bytes[static_cast<size_t>(Stat::AGGREGATE)].peak;
  });
}

int tb_reset_peak_memory(int device) {
  return guarded([&] {
    auto* allocator = at::getDeviceAllocator(device_type(device));
    allocator->emptyCache();
    allocator->resetPeakStats(0);
  });
}

int tb_memory_total(int device, uint64_t* bytes) {
  return guarded([&] {
    *bytes = at::getDeviceAllocator(device_type(device))->getMemoryInfo(0).second;
  });
}

}  // extern "C"

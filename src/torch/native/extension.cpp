// What tch does not wrap: device-independent synchronisation and memory statistics,
// autocast with a device and a type, matmul precision, gradients from a given upstream
// gradient, and AdamW as torch.optim writes it. This file serves every device: all of it is
// in libtorch_cpu, which reaches CUDA and MPS through their hooks.
//
// Every function returns 0, or -1 with the reason in tb_last_error().

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

using Stat = c10::CachingAllocator::StatType;

// The gradients in the parameters' type, converted in one launch where they are not.
std::vector<at::Tensor> in_type_of(const std::vector<at::Tensor>& parameters,
                                   std::vector<at::Tensor> gradients) {
  if (gradients.empty() || gradients[0].scalar_type() == parameters[0].scalar_type()) return gradients;
  std::vector<at::Tensor> converted;
  for (const auto& p : parameters) converted.push_back(at::empty_like(p));
  at::_foreach_copy_(converted, gradients);
  return converted;
}

}  // namespace

extern "C" {

struct tb_adamw_setting {
  double lr, beta1, beta2, eps, weight_decay;
};

const char* tb_last_error() { return last_error.c_str(); }

const char* tb_version() { return TORCH_VERSION; }

// libtorch's own account of its BLAS, instruction set and threads.
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

// Whether products of f32 matrices may round their inputs to TF32.
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

// Also drops the casted copies of the parameters, which live for one step.
int tb_autocast_end(int device) {
  return guarded([&] {
    at::autocast::set_autocast_enabled(device_type(device), false);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  });
}

// Copies each tensor's values into another's, converting where the types differ.
int tb_copy(at::Tensor** to, at::Tensor** from, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(list(to, count), list(from, count));
  });
}

// d(root)/d(inputs), with `upstream` arriving at the root (null: 1, for a scalar).
// Nothing is accumulated into the inputs' .grad. `gradients` receives `count` new tensors.
int tb_gradients(at::Tensor* root, at::Tensor* upstream, at::Tensor** inputs, size_t count,
                 at::Tensor** gradients) {
  return guarded([&] {
    torch::autograd::variable_list upstreams;
    if (upstream) upstreams.push_back(*upstream);
    auto all = torch::autograd::grad({*root}, list(inputs, count), upstreams);
    for (size_t i = 0; i < count; ++i) gradients[i] = new at::Tensor(std::move(all[i]));
  });
}

// One AdamW step in place, in the order of operations of torch.optim.AdamW: one tensor
// after the other on a CPU, one call over all of them on an accelerator, as its defaults.
int tb_adamw(at::Tensor** parameters, at::Tensor** gradients, at::Tensor** first,
             at::Tensor** second, size_t count, int64_t step, tb_adamw_setting s, bool foreach) {
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

// The same in one kernel a batch of tensors; `steps` counts on the device.
int tb_fused_adamw(at::Tensor** parameters, at::Tensor** gradients, at::Tensor** first,
                   at::Tensor** second, at::Tensor** steps, size_t count, tb_adamw_setting s) {
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

// Peak of the device allocator's allocated bytes since the reset. Fails where the
// device keeps none.
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

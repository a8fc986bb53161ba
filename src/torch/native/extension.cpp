// What tch does not wrap: device-independent synchronisation and memory statistics,
// autocast with a device and a type, matmul precision, gradients from a given upstream
// gradient, AdamW as torch.optim writes it, and two layers with backward passes of their
// own. This file serves every device: all of
// it is in libtorch_cpu, which reaches CUDA and MPS through their hooks.
//
// Every function returns 0, or -1 with the reason in tb_last_error().

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/AutogradState.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/version.h>

#include <optional>
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

// A second stream for work that nothing waits for until the step's end.
struct Side {
  std::optional<c10::Stream> stream;
  // What the side stream reads; kept from reuse until the main stream has waited for it.
  std::vector<at::Tensor> held;
};
thread_local Side side;

void wait_for(c10::Stream waiting, c10::Stream earlier) {
  c10::Event event(earlier.device_type());
  event.record(earlier);
  event.block(waiting);
}

// Runs `body` on the side stream, behind everything that the main stream was given so
// far; what it reads is held until tb_join. Little of a GPU is busy with a parameter's
// gradient, and only the input's is on the way to the layer below, so both at once take
// not much longer than one.
template <typename F>
void beside(const at::Tensor& gradient, std::initializer_list<at::Tensor> reads, F&& body) {
  c10::impl::VirtualGuardImpl device(gradient.device().type());
  if (!side.stream) side.stream = device.getNewStream(gradient.device());
  wait_for(*side.stream, device.getStream(gradient.device()));
  side.held.insert(side.held.end(), reads);
  c10::StreamGuard on_side(*side.stream);
  body();
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A linear layer with its weight's and bias's gradients on the side stream. `ones` has at
// least as many elements as x has rows: rows are summed as a product with it, which takes
// half of the time that sum(0) does.
struct SideLinear : torch::autograd::Function<SideLinear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias, const at::Tensor& ones) {
    ctx->save_for_backward({x, weight, ones});
    return at::linear(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    auto saved = ctx->get_saved_variables();
    auto gradient = gradients[0].contiguous();
    auto g = gradient.flatten(0, -2), x = saved[0].flatten(0, -2);
    at::Tensor weight, bias, input;
    beside(gradient, {g, x}, [&] {
      weight = g.t().mm(x);
      bias = g.t().mv(saved[2].narrow(0, 0, g.size(0)));
    });
    if (ctx->needs_input_grad(0)) input = at::matmul(gradient, saved[1]);
    return {input, weight, bias, at::Tensor()};
  }
};

// Layer norm over the last dimension with its parameters' gradients on the side stream,
// as products with `ones` again: the kernel that native_layer_norm_backward has for them
// leaves most of a GPU idle, and takes five times as long where rows are many.
struct SideNorm : torch::autograd::Function<SideNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& bias, const at::Tensor& ones, double eps) {
    auto [y, mean, rstd] = at::native_layer_norm(x, weight.sizes(), weight, bias, eps);
    ctx->save_for_backward({x, mean, rstd, weight, bias, ones});
    ctx->saved_data["eps"] = eps;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &weight = saved[3];
    auto gradient = gradients[0].contiguous();
    auto g = gradient.flatten(0, -2);
    variable_list out(5);
    beside(gradient, {g, x}, [&] {
      auto ones = saved[5].narrow(0, 0, g.size(0));
      auto normal = std::get<0>(
          at::native_layer_norm(x, weight.sizes(), {}, {}, ctx->saved_data["eps"].toDouble()));
      out[1] = normal.mul_(gradient).flatten(0, -2).t().mv(ones);
      out[2] = g.t().mv(ones);
    });
    out[0] = std::get<0>(at::native_layer_norm_backward(gradient, x, weight.sizes(), saved[1], saved[2],
                                                        weight, saved[4], {true, false, false}));
    return out;
  }
};

// Mean cross-entropy of hidden·weightᵀ, [M, D] and [V, D], against target [M], in f32.
// The logits' gradient, softmax − one-hot, is written in the forward pass: the [M, V]
// arrays are the largest of the model, and the backward passes of log_softmax and
// nll_loss would read and write them again.
struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& target) {
    auto logits = hidden.mm(weight.t());
    auto index = target.unsqueeze(1);
    at::Tensor loss, slope;
    if (logits.scalar_type() == at::kBFloat16) {
      // softmax computes in f32 and rounds once, each probability by a share of itself. So
      // where the target's p is near 1, 1 − p is the sum of the others, which rounding p
      // would lose; elsewhere p itself, since bf16 has the range of f32. No f32 array of the
      // logits' size is made.
      slope = at::softmax(logits, -1);
      auto p = slope.gather(1, index).to(at::kFloat);
      slope.scatter_(1, index, 0);
      auto others = slope.sum({-1}, /*keepdim=*/true, at::kFloat);
      loss = at::where(p > 0.5, at::log1p(-others), at::log(p)).mean().neg();
      slope.scatter_(1, index, others.neg().to(slope.scalar_type()));
    } else {
      auto log_p = at::log_softmax(logits, -1, at::kFloat);
      loss = at::nll_loss(log_p, target);
      slope = at::empty_like(logits);
      at::exp_out(slope, log_p);
      auto one = at::full({1, 1}, -1, hidden.options()).expand({target.size(0), 1});
      slope.scatter_add_(1, index, one);
    }
    ctx->save_for_backward({hidden, weight, slope});
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    auto saved = ctx->get_saved_variables();
    const auto &hidden = saved[0], &weight = saved[1], &slope = saved[2];
    auto scale = (gradients[0] / hidden.size(0)).to(hidden.scalar_type());
    return {slope.mm(weight).mul_(scale), slope.t().mm(hidden * scale), at::Tensor()};
  }
};

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

// x·weightᵀ + bias through SideLinear.
int tb_side_linear(at::Tensor* x, at::Tensor* weight, at::Tensor* bias, at::Tensor* ones, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(SideLinear::apply(*x, *weight, *bias, *ones)); });
}

// Layer norm over the last dimension through SideNorm.
int tb_side_norm(at::Tensor* x, at::Tensor* weight, at::Tensor* bias, at::Tensor* ones, double eps,
                 at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(SideNorm::apply(*x, *weight, *bias, *ones, eps)); });
}

int tb_linear_cross_entropy(at::Tensor* hidden, at::Tensor* weight, at::Tensor* target, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(LinearCrossEntropy::apply(*hidden, *weight, *target)); });
}

// Copies each tensor's values into another's, converting where the types differ.
int tb_copy(at::Tensor** to, at::Tensor** from, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(list(to, count), list(from, count));
  });
}

// Makes the current stream wait for what runs beside it.
int tb_join(int device) {
  return guarded([&] {
    if (!side.stream) return;
    c10::impl::VirtualGuardImpl guard(device_type(device));
    wait_for(guard.getStream(side.stream->device()), *side.stream);
    side.held.clear();
  });
}

// d(root)/d(inputs), with `upstream` arriving at the root (null: 1, for a scalar).
// Nothing is accumulated into the inputs' .grad. `gradients` receives `count` new tensors.
// `here`: the backward pass runs on the calling thread.
int tb_gradients(at::Tensor* root, at::Tensor* upstream, at::Tensor** inputs, size_t count,
                 at::Tensor** gradients, bool here) {
  return guarded([&] {
    // Else the engine has a thread of its own for each accelerator, which would not know
    // this thread's side stream.
    auto& state = c10::AutogradState::get_tls_state();
    const bool threads = state.get_multithreading_enabled();
    if (here) state.set_multithreading_enabled(false);
    auto restore = c10::make_scope_exit([&] { state.set_multithreading_enabled(threads); });
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

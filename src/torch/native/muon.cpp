// Muon, with the order of operations of torch.optim.Muon. libtorch has no function for it.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "gradients.hpp"
#include "guarded.hpp"

// The same fields as `Muon` in src/fixture/hyperparameters.rs.
struct tb_muon_options {
  double lr, momentum, weight_decay, eps;
  double coefficients[3];
  uint32_t iterations;
};

namespace {

// Returns matrices [.., rows, columns] whose singular values are about 1, by Newton-Schulz iterations in `type`. The norm
// is computed in f32: MLX would add its squares up in bf16, where a long sum stops growing.
at::Tensor orthogonalize(at::Tensor x, at::ScalarType type, const tb_muon_options& s) {
  const bool tall = x.size(-2) > x.size(-1);
  if (tall) x = x.mT();
  x = x.to(type);
  const auto norm = at::linalg_vector_norm(x, 2, at::IntArrayRef{-2, -1}, /*keepdim=*/true, at::kFloat);
  x = x.div(norm.clamp_min(s.eps)).to(type);
  const auto [a, b, c] = std::make_tuple(s.coefficients[0], s.coefficients[1], s.coefficients[2]);
  // beta * m + alpha * x * y
  const auto add_product = [](const at::Tensor& m, const at::Tensor& x, const at::Tensor& y, double beta, double alpha) {
    return m.dim() == 3 ? at::baddbmm(m, x, y, beta, alpha) : at::addmm(m, x, y, beta, alpha);
  };
  for (uint32_t i = 0; i < s.iterations; ++i) {
    const auto gram = at::matmul(x, x.mT());
    x = add_product(x, add_product(gram, gram, gram, b, c), x, a, 1);
  }
  return tall ? x.mT() : x;
}

// Returns the learning rate of a matrix.
double rate(const at::Tensor& p, const tb_muon_options& s) {
  return s.lr * std::sqrt(std::max(1.0, double(p.size(0)) / double(p.size(1))));
}

// Orthogonalizes matrices in one batch for each size. A tall matrix is in the batch of its transpose.
std::vector<at::Tensor> orthogonalize_stacked(const std::vector<at::Tensor>& all, at::ScalarType type,
                                              const tb_muon_options& s) {
  std::map<std::pair<int64_t, int64_t>, std::vector<size_t>> groups;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto [short_side, long_side] = std::minmax(all[i].size(0), all[i].size(1));
    groups[{short_side, long_side}].push_back(i);
  }
  std::vector<at::Tensor> results(all.size());
  for (const auto& [sides, members] : groups) {
    std::vector<at::Tensor> wide;
    for (auto i : members) wide.push_back(all[i].size(0) == sides.first ? all[i] : all[i].mT());
    const auto parts = orthogonalize(at::stack(wide), type, s).unbind(0);
    for (size_t at = 0; at < members.size(); ++at) {
      const auto i = members[at];
      results[i] = all[i].size(0) == sides.first ? parts[at] : parts[at].mT();
    }
  }
  return results;
}

}  // namespace

extern "C" {

// Runs a Muon step in place on matrices, one after the other or stacked. `moments` has one matrix for each.
int tb_muon(at::Tensor** parameters, at::Tensor** gradients, at::Tensor** moments, size_t count, tb_muon_options s,
            bool bf16, bool stacked) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = list(parameters, count), m = list(moments, count);
    const auto g = in_type_of(p, list(gradients, count));
    const auto type = bf16 ? at::kBFloat16 : p[0].scalar_type();
    const double decay = 1 - s.lr * s.weight_decay;
    if (!stacked) {
      for (size_t i = 0; i < count; ++i) {
        m[i].lerp_(g[i], 1 - s.momentum);
        const auto update = orthogonalize(g[i].lerp(m[i], s.momentum), type, s);
        p[i].mul_(decay).add_(update, -rate(p[i], s));
      }
      return;
    }
    at::_foreach_lerp_(m, g, 1 - s.momentum);
    const auto updates = orthogonalize_stacked(at::_foreach_lerp(g, m, s.momentum), type, s);
    at::_foreach_mul_(p, decay);
    for (size_t i = 0; i < count; ++i) p[i].add_(updates[i], -rate(p[i], s));
  });
}

}  // extern "C"

// Lets mlx-c compile with later releases of MLX than the one that it is written for.
// Force-included by scripts/setup before every mlx-c source.
#pragma once

#ifdef __cplusplus
#include "mlx/ops.h"
#include "mlx/version.h"

// MLX 0.32.3 added a parameter before the last two.
#if MLX_VERSION_NUMERIC >= 32003
namespace mlx::core {
inline array gather_qmm(
    const array& x,
    const array& w,
    const array& scales,
    const std::optional<array>& biases,
    std::optional<array> lhs_indices,
    std::optional<array> rhs_indices,
    bool transpose,
    std::optional<int> group_size,
    std::optional<int> bits,
    const std::string& mode,
    bool sorted_indices,
    StreamOrDevice s) {
  return gather_qmm(
      x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, mode, std::nullopt, sorted_indices, s);
}
} // namespace mlx::core
#endif
#endif

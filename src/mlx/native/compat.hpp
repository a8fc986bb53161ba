// Lets mlx-c, which upstream builds on Apple alone, compile with gcc on Linux.
// Force-included by scripts/setup before every mlx-c source and by bindgen.
#pragma once

// mlx-c declares its half types on Arm only; libmlx has them everywhere. The
// C interface passes them as 16-bit patterns.
#if !defined(__aarch64__)
#include <stdint.h>
#define HAS_FLOAT16
#define HAS_BFLOAT16
typedef uint16_t float16_t;
typedef uint16_t bfloat16_t;
#endif

// gcc before 13 has no <format>; fmt implements the same interface.
#if defined(__cplusplus) && !__has_include(<format>)
#define FMT_HEADER_ONLY 1
#include <fmt/format.h>
namespace std {
using fmt::format;
}
#endif

// Errors and lists of tensors across the C interface.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>
#include <vector>

inline thread_local std::string last_error;

// Runs `body`. Returns 0, or -1 with the reason in tb_last_error().
template <typename F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    // Objective-C exceptions of MPS, which would otherwise end the process.
    last_error = "libtorch raised an exception without a message, for example of Objective-C";
  }
  return -1;
}

inline std::vector<at::Tensor> list(at::Tensor** tensors, size_t count) {
  std::vector<at::Tensor> all;
  all.reserve(count);
  for (size_t i = 0; i < count; ++i) all.push_back(*tensors[i]);
  return all;
}

// Moves tensors to the caller, which owns them.
inline void return_tensors(std::vector<at::Tensor> all, at::Tensor** out) {
  for (size_t i = 0; i < all.size(); ++i) out[i] = new at::Tensor(std::move(all[i]));
}

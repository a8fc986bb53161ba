// Errors across the C interface: 0, or -1 with the reason in tb_last_error().
#pragma once

#include <c10/util/Exception.h>

#include <string>

inline thread_local std::string last_error;

template <typename F>
int guarded(F&& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return -1;
}

// Gradients of an optimizer.
#pragma once

#include <ATen/ATen.h>

#include <vector>

// Returns the gradients in the type of the parameters. One launch converts all of them if the types differ.
inline std::vector<at::Tensor> in_type_of(const std::vector<at::Tensor>& parameters,
                                          std::vector<at::Tensor> gradients) {
  if (gradients.empty() || gradients[0].scalar_type() == parameters[0].scalar_type()) return gradients;
  std::vector<at::Tensor> converted;
  for (const auto& p : parameters) converted.push_back(at::empty_like(p));
  at::_foreach_copy_(converted, gradients);
  return converted;
}

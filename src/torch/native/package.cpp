// Packages that AOTInductor made: a shared library, loaded and run by libtorch's own runner for the
// device. CUDA's is registered when libtorch's CUDA part is loaded.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>

#include <memory>

#include "guarded.hpp"

using Runner = torch::inductor::AOTIModelContainerRunner;

extern "C" {

struct tb_package {
  std::unique_ptr<Runner> runner;
};

// `device` as libtorch names it; `folder` holds what the library looks for.
int tb_package_load(const char* library, const char* device, const char* folder, tb_package** out) {
  return guarded([&] {
    // One run at a time: nothing is synchronised between runs, which a recording could not hold.
    constexpr bool single = true;
    auto& known = torch::inductor::getAOTIModelRunnerRegistry();
    auto found = known.find(device);
    TORCH_CHECK(found != known.end(), "this libtorch runs no packages on ", device);
    *out = new tb_package{found->second(library, 1, device, folder, single)};
  });
}

void tb_package_free(tb_package* package) {
  guarded([&] { delete package; });
}

// Runs the package; `results` receives `expected` new tensors.
int tb_package_run(tb_package* package, at::Tensor** inputs, size_t count, at::Tensor** results, size_t expected) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto made = package->runner->run(list(inputs, count));
    TORCH_CHECK(made.size() == expected, "the package gives ", made.size(), " tensors, not ", expected);
    for (size_t i = 0; i < expected; ++i) results[i] = new at::Tensor(std::move(made[i]));
  });
}

}  // extern "C"

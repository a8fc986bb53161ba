// Packages of AOTInductor: shared libraries that libtorch's runner for the device loads and runs. Loading
// libtorch_cuda registers the runner for CUDA.

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

// `device` is libtorch's name of the device. `folder` has the files that the library loads.
int tb_package_load(const char* library, const char* device, const char* folder, tb_package** out) {
  return guarded([&] {
    // Without it, runs synchronize with each other, which a CUDA graph cannot capture.
    constexpr bool run_single_threaded = true;
    auto& runners = torch::inductor::getAOTIModelRunnerRegistry();
    auto found = runners.find(device);
    TORCH_CHECK(found != runners.end(), "this libtorch cannot run packages on ", device);
    *out = new tb_package{found->second(library, 1, device, folder, run_single_threaded)};
  });
}

void tb_package_free(tb_package* package) {
  guarded([&] { delete package; });
}

// Runs the package; `results` receives `expected` new tensors.
int tb_package_run(tb_package* package, at::Tensor** inputs, size_t count, at::Tensor** results, size_t expected) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto all = package->runner->run(list(inputs, count));
    TORCH_CHECK(all.size() == expected, "the package returns ", all.size(), " tensors instead of ", expected);
    return_tensors(std::move(all), results);
  });
}

}  // extern "C"

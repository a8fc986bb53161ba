// A device "mps" that computes nothing. With it, PyTorch on Linux can trace steps for a Mac and generate their code.
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto TYPE = c10::DeviceType::MPS;

// The device has the index 0 and is always the current one. It has one stream, whose work is always complete.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  using Stream = c10::Stream;
  c10::Device getDevice() const override { return {TYPE, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  Stream getStream(c10::Device) const noexcept override { return Stream(Stream::DEFAULT, {TYPE, 0}); }
  Stream exchangeStream(Stream) const noexcept override { return getStream({TYPE, 0}); }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::MPSHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize() const override {}
};

C10_REGISTER_GUARD_IMPL(MPS, Guard)

}  // namespace

namespace at {
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, ::Hooks)
}

"""The supported platforms, and which of them this machine is."""
import os
import platform
import re
import subprocess
from dataclasses import dataclass

from shared import SetupError


@dataclass(frozen=True)
class Target:
    triple: str
    # Platform tags for pip, if its own choice could be wrong. Each has the oldest version of the system that can
    # use it. The newest comes first.
    wheels: tuple = ()
    library: str = "lib{}.so"
    # PyPI's package of MLX.
    mlx: str = "mlx-cpu"
    # The folder of a library in its search path for others.
    origin: str = "$ORIGIN"

    @property
    def linux(self):
        return "linux" in self.triple

    def file_name(self, library):
        return self.library.format(library)


LINUX = {machine: Target(f"{machine}-unknown-linux-gnu") for machine in ("x86_64", "aarch64")}
# The wheel for macOS 26 needs 26.2, although its tag says 26.0 (LC_BUILD_VERSION in libmlx).
MAC = Target(
    "aarch64-apple-darwin",
    wheels=(((26, 2), "macosx_26_0_arm64"), ((15, 0), "macosx_15_0_arm64"), ((14, 0), "macosx_14_0_arm64")),
    library="lib{}.dylib",
    mlx="mlx-metal",
    origin="@loader_path",
)
# The oldest system that the wheels of PyTorch and MLX support.
OLDEST_MACOS = "14.0"
# PyTorch has one wheel for all versions of macOS.
MAC_TORCH = "macosx_14_0_arm64"


def current_target():
    """Returns the target of this machine.

    Raises SetupError if the frameworks do not support it.
    """
    system, machine = platform.system(), platform.machine()
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    if system == "Linux" and machine in LINUX:
        return LINUX[machine]
    if system == "Darwin" and machine == "aarch64":
        return MAC
    if system == "Darwin" and sysctl("hw.optional.arm64") == "1":
        raise SetupError("this Python runs under Rosetta, which emulates Intel CPUs: use an arm64 Python, /usr/bin/python3")
    raise SetupError(
        f"{system} on {machine} is not supported: MLX needs Linux (x86-64, arm64) or macOS on Apple silicon"
    )


def sysctl(name):
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True)
    return done.stdout.strip()


def mac_version():
    """Returns (major, minor) of macOS. A Python that was built with an old SDK gets another version from the
    platform module."""
    done = subprocess.run(["sw_vers", "-productVersion"], capture_output=True, text=True,
                          env={**os.environ, "SYSTEM_VERSION_COMPAT": "0"})
    match = re.match(r"(\d+)(?:\.(\d+))?", done.stdout.strip())
    if not match:
        raise SetupError("sw_vers does not print the version of macOS")
    return int(match[1]), int(match[2] or 0)


def mlx_platform(target):
    """Returns the platform tag of MLX's wheel, or None if pip chooses it."""
    if not target.wheels:
        return None
    version = mac_version()
    for least, tag in target.wheels:
        if version >= least:
            return tag
    raise SetupError(f"macOS {version[0]}.{version[1]} is too old: PyTorch and MLX need macOS {OLDEST_MACOS.split('.')[0]} or newer")


def deployment_target(target, tag):
    """Returns the oldest macOS that runs MLX's wheel with a platform tag. The linker warns about older binaries that
    use the wheel."""
    return next(".".join(map(str, least)) for least, name in target.wheels if name == tag)

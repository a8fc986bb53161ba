"""Which machine this is, and what differs between systems: a small table."""
import os
import platform
import re
import subprocess
from dataclasses import dataclass

from shared import Stop


@dataclass(frozen=True)
class Target:
    triple: str
    # What pip is told to download for, where its own choice could be wrong; the most
    # demanding first, with the version of the system from which on it is taken.
    wheels: tuple = ()
    library: str = "lib{}.so"
    # PyPI's package of MLX for this system.
    mlx: str = "mlx-cpu"
    # Where libraries look for those beside them.
    origin: str = "$ORIGIN"

    @property
    def linux(self):
        return "linux" in self.triple

    def name(self, library):
        return self.library.format(library)


LINUX = {machine: Target(f"{machine}-unknown-linux-gnu") for machine in ("x86_64", "aarch64")}
# The wheel of macOS 26 asks for 26.2, though its tag says 26.0 (LC_BUILD_VERSION in libmlx).
MAC = Target(
    "aarch64-apple-darwin",
    wheels=(((26, 2), "macosx_26_0_arm64"), ((15, 0), "macosx_15_0_arm64"), ((14, 0), "macosx_14_0_arm64")),
    library="lib{}.dylib",
    mlx="mlx-metal",
    origin="@loader_path",
)
# The oldest system that PyTorch's and MLX's libraries run on, as their wheels say.
MAC_OLDEST = "14.0"
# PyTorch has one wheel for all of them.
MAC_TORCH = "macosx_14_0_arm64"


def target():
    """This machine's row.

    Raises Stop where the frameworks do not exist for it.
    """
    system, machine = platform.system(), platform.machine()
    machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)
    if system == "Linux" and machine in LINUX:
        return LINUX[machine]
    if system == "Darwin" and machine == "aarch64":
        return MAC
    if system == "Darwin" and asks_for("hw.optional.arm64") == "1":
        raise Stop("this Python runs under Rosetta, for Intel's processors: use the arm64 one, /usr/bin/python3")
    raise Stop(
        f"{system} on {machine} is not supported: MLX needs Linux (x86-64, arm64) or macOS on Apple silicon"
    )


def asks_for(name):
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True)
    return done.stdout.strip()


def mac_version():
    """(major, minor) of macOS. Asked of the system: a Python that was built with an old SDK
    is told another version."""
    done = subprocess.run(["sw_vers", "-productVersion"], capture_output=True, text=True,
                          env={**os.environ, "SYSTEM_VERSION_COMPAT": "0"})
    match = re.match(r"(\d+)(?:\.(\d+))?", done.stdout.strip())
    if not match:
        raise Stop("sw_vers does not tell the version of macOS")
    return int(match[1]), int(match[2] or 0)


def mlx_platform(row):
    """What pip is told to download MLX for; None where pip may choose."""
    if not row.wheels:
        return None
    version = mac_version()
    for least, tag in row.wheels:
        if version >= least:
            return tag
    raise Stop(f"macOS {version[0]}.{version[1]} is too old: PyTorch and MLX need macOS {MAC_OLDEST.split('.')[0]} or newer")

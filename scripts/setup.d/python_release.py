"""Releases of PyTorch and MLX for Python, each in a cached folder for PYTHONPATH.

`python_release.py FRAMEWORK RELEASE FILE` downloads one, completely or not at all, and writes the variables of its
processes into FILE, in the syntax of a shell.
"""
import re
import shlex
import subprocess
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import inductor  # noqa: E402
import torch  # noqa: E402
from pypi import PYTHON, install  # noqa: E402
from shared import InputError, SetupError, check_disk, component, say, write_atomic  # noqa: E402
from target import current_target  # noqa: E402

NAMES = {"torch": "PyTorch", "mlx": "MLX"}


def number(release):
    return tuple(map(int, release.split(".")))


def published(framework):
    """Returns the final releases that PyPI has for this Python and platform, the oldest first."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", framework]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listed = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if done.returncode or not listed:
        lines = done.stderr.strip().splitlines()
        raise SetupError(f"pip lists no releases of {NAMES[framework]}: {lines[-1] if lines else 'check the network'}")
    final = [release for release in listed[1].split(", ") if re.fullmatch(r"\d+(\.\d+)+", release)]
    return sorted(final, key=number)


def releases_between(framework, text, available=None):
    """Returns the releases from A to B, for the text A..B."""
    match = re.fullmatch(r"(\d+(?:\.\d+)+)\.\.(\d+(?:\.\d+)+)", text)
    if not match:
        raise InputError(f"'{text}' is not a range of releases such as 2.9.1..2.13.0")
    available = published(framework) if available is None else available
    for release in match.groups():
        if release not in available:
            near = ", ".join(available[-8:])
            raise InputError(f"{NAMES[framework]} {release} is not on PyPI for Python {PYTHON}: the newest are {near}")
    chosen = available[available.index(match[1]):available.index(match[2]) + 1]
    if len(chosen) < 2:
        raise InputError(f"'{text}' does not go from a release to a later one")
    return chosen


def folder(framework, release):
    """Returns the folder with a release, as pip installs it. Without an NVIDIA GPU, PyTorch lacks its CUDA part."""
    target = current_target()
    cuda = torch.has_nvidia()
    if framework == "torch" and not cuda:
        check_disk(3)
        return inductor.python_torch(target, release, torch.cpu_libtorch(target, release))
    check_disk(8 if cuda else 1)
    library = "mlx-cuda-13" if cuda else target.mlx
    packages = [f"torch=={release}"] if framework == "torch" else [f"mlx=={release}", f"{library}=={release}"]

    def build(work):
        say(f"installing {' and '.join(packages)}")
        install(packages, work)

    return component(f"python-release-{framework}", [*packages, target.triple, PYTHON], build)


def main():
    framework, release, file = sys.argv[1:]
    write_atomic(Path(file), f"PYTHONPATH={shlex.quote(str(folder(framework, release)))}\n")


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

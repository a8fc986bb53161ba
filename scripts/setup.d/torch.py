"""PyTorch: libtorch from PyPI's wheel or from the user, and the CUDA packages."""
import platform
import re
import shutil
import zipfile
from pathlib import Path

from libraries import needed
from pypi import PYTHON, pip, unpack, wheel
from shared import InputError, SetupError, component, run, say
from target import MAC_TORCH


def version_in(file, pattern):
    match = re.search(pattern, file.read_text())
    if not match:
        raise SetupError(f"no framework version found in {file}: scripts/setup does not support this version of the crate")
    return match.group(1)


def version(torch_sys):
    return version_in(torch_sys / "build.rs", r'TORCH_VERSION: &str = "([\d.]+)"')


def custom_libtorch(path, expected):
    """Checks the user's libtorch and returns its folder, or None if `path` is empty.

    Raises SetupError if it is incomplete or has another version.
    """
    if not path:
        return None
    folder = Path(path).expanduser().resolve()
    if not any((folder / "lib").glob("libtorch_cpu.*")) or not (folder / "include/torch").is_dir():
        raise InputError(f"LIBTORCH={path} has no lib/libtorch_cpu and include/torch: "
                         "correct it, or run 'LIBTORCH= scripts/setup'")
    for name, pattern in (("build-version", r"([\d.]+)"), ("version.py", r"__version__ = '([\d.]+)")):
        if (folder / name).exists():
            found = version_in(folder / name, pattern)
            if found != expected:
                raise InputError(f"LIBTORCH={path} is version {found}, and the locked tch needs {expected}: "
                                 "install that version, or run 'LIBTORCH= scripts/setup'")
    return folder


# Libraries outside the CPU part: CUDA, and those of Python.
NOT_CPU = re.compile(r"lib(torch_cuda|c10_cuda|torch_nvshmem|caffe2_nvrtc|torch_python|shm)")


def cpu_libtorch(target, version):
    """Returns the folder of libtorch from PyPI's wheel.

    On Linux that wheel is a CUDA build. Its CPU part runs with two small CUDA libraries next to it.
    """

    def wanted(name):
        if name.startswith("torch/lib/"):
            return not NOT_CPU.match(Path(name).name)
        return name.startswith(("torch/include/", "torch.libs/"))

    def build(work):
        path = wheel(f"torch=={version}", None if target.linux else MAC_TORCH)
        say("unpacking libtorch")
        unpack(path, work, wanted)
        lib = work / "torch" / "lib"
        (work / "torch" / "build-version").write_text(version + "\n")
        if not target.linux:
            return
        for library in needed(lib / "libtorch_cpu.so"):
            match = re.match(r"lib(cudart|cupti)\.so\.(\d+)$", library)
            if match and not (lib / library).exists():
                name = {"cudart": "nvidia-cuda-runtime", "cupti": "nvidia-cuda-cupti"}[match[1]]
                major = int(match[2])
                name += "" if major >= 13 else f"-cu{major}"
                with zipfile.ZipFile(wheel(f"{name}>={major},<{major + 1}")) as archive:
                    inside = next(n for n in archive.namelist() if n.endswith("/" + library))
                    (lib / library).write_bytes(archive.read(inside))
        # The wheel's libtorch.so has no code, but loads the CUDA part.
        (lib / "libtorch.so").unlink()
        run(["cc", "-shared", "-o", lib / "libtorch.so", "-Wl,-soname,libtorch.so", "-Wl,--no-as-needed",
             f"-L{lib}", "-ltorch_cpu", "-lc10", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"])

    return component("libtorch", [version, target.triple, "cut 1"], build) / "torch"


def has_nvidia():
    return platform.system() == "Linux" and (
        Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None)


def cuda_headers(target, libtorch):
    """Returns the folder of the headers of CUDA and CUPTI, or None if there are none for this libtorch.

    PyTorch's headers of CUDA graphs include them.
    """
    if target.triple != "x86_64-unknown-linux-gnu":
        return None
    major = next((m[1] for m in map(re.compile(r"libcudart\.so\.(\d+)$").match,
                                    needed(libtorch / "lib" / "libtorch_cpu.so")) if m), None)
    if major is None or int(major) < 13:
        return None

    def build(work):
        for name in ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cupti"):
            unpack(wheel(f"{name}>={major},<{int(major) + 1}"), work, lambda n: "/include/" in n)

    folder = component("cuda-headers", [major, "with cupti"], build)
    return next(folder.glob("nvidia/*/include"))


def cuda_packages(target, torch, mlx):
    """Returns the folder of the CUDA builds of PyTorch and MLX with NVIDIA's libraries, as pip installs them."""
    major = 13
    mlx_package = f"mlx-cuda-{major}=={mlx}"

    def build(work):
        say("downloading the CUDA builds of PyTorch and MLX (several GB)")
        pip(
            ["install", "--target", work, "--only-binary=:all:", "--python-version", PYTHON,
             "--implementation", "cp", f"torch=={torch}", mlx_package, "nvidia-cuda-crt>=13,<14"],
            "installing the CUDA builds from PyPI",
        )
        (work / "torch" / "build-version").write_text(torch + "\n")

    return component("cuda", [torch, mlx, target.triple, "cuda 2"], build)

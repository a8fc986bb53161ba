"""PyTorch: libtorch out of PyPI's wheel, or one of the user's own; and what CUDA needs."""
import platform
import re
import shutil
import zipfile
from pathlib import Path

from libraries import needed
from pypi import PYTHON, pip, unpack, wheel
from shared import Stop, component, run, say
from target import MAC_TORCH


def version_in(file, pattern):
    match = re.search(pattern, file.read_text())
    if not match:
        raise Stop(f"no framework version found in {file}: this crate version is not known to scripts/setup")
    return match.group(1)


def version(torch_sys):
    return version_in(torch_sys / "build.rs", r'TORCH_VERSION: &str = "([\d.]+)"')


def of_the_user(given, wanted):
    """A libtorch of the user's own, checked; None where there is none."""
    if not given:
        return None
    folder = Path(given).expanduser().resolve()
    if not any((folder / "lib").glob("libtorch_cpu.*")) or not (folder / "include/torch").is_dir():
        raise Stop(f"LIBTORCH={given} holds no lib/libtorch_cpu and include/torch: correct it, or run 'LIBTORCH= scripts/setup'")
    for name, pattern in (("build-version", r"([\d.]+)"), ("version.py", r"__version__ = '([\d.]+)")):
        if (folder / name).exists():
            found = version_in(folder / name, pattern)
            if found != wanted:
                raise Stop(f"LIBTORCH={given} is version {found}, and the locked tch needs {wanted}: install that one, or run 'LIBTORCH= scripts/setup'")
    return folder


# Not of the CPU's part: CUDA, and what Python imports.
LEFT_OUT = re.compile(r"lib(torch_cuda|c10_cuda|torch_nvshmem|caffe2_nvrtc|torch_python|shm)")


def cut(row, version):
    """libtorch out of PyPI's wheel. On x86-64 Linux that wheel is a CUDA build, of which
    the CPU part runs alone with two small CUDA libraries beside it."""

    def wanted(name):
        if name.startswith("torch/lib/"):
            return not LEFT_OUT.match(Path(name).name)
        return name.startswith(("torch/include/", "torch.libs/"))

    def build(work):
        path = wheel(f"torch=={version}", None if row.linux else MAC_TORCH)
        say("unpacking libtorch")
        unpack(path, work, wanted)
        lib = work / "torch" / "lib"
        (work / "torch" / "build-version").write_text(version + "\n")
        if not row.linux:
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
        # The wheel's libtorch.so also asks for the CUDA part; it holds no code.
        (lib / "libtorch.so").unlink()
        run(["cc", "-shared", "-o", lib / "libtorch.so", "-Wl,-soname,libtorch.so", "-Wl,--no-as-needed",
             f"-L{lib}", "-ltorch_cpu", "-lc10", "-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"])

    return component("libtorch", [version, row.triple, "cut 1"], build) / "torch"


def has_nvidia():
    return platform.system() == "Linux" and (
        Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None)


def cuda_headers(row, libtorch):
    """CUDA's own headers, which those of CUDA graphs include, and CUPTI's; None off x86-64 Linux."""
    if row.triple != "x86_64-unknown-linux-gnu":
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


def cuda_site(row, torch, mlx):
    """The full CUDA builds with NVIDIA's libraries, as PyPI lays them out."""
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

    return component("cuda", [torch, mlx, row.triple, "cuda 2"], build)

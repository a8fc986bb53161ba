"""The cargo configuration: .cargo/config.toml."""
import json
import sys

from shared import ROOT
from target import deployment_target

CARGO_CONFIG = ROOT / ".cargo" / "config.toml"
MARK = "# Written by scripts/setup; edits are lost.\n"


def toml(value):
    return json.dumps(str(value))


def text(target, libtorch, mlx, library_paths, headers=None, cuda=False, python=None, reason=None, mlx_wheel=None):
    """Returns the configuration of a target.

    `library_paths` are the folders of its libraries. `python` is the folder of the Python torch that compiles
    steps. Without one, `reason` says why. `mlx_wheel` is the platform tag of MLX's wheel for macOS.
    """
    linker = [f"-Wl,-rpath,{path}" for path in library_paths]
    if target.linux:
        # RPATH, unlike RUNPATH, also applies to the libraries of libraries.
        linker.insert(0, "-Wl,--disable-new-dtags")
    if cuda:
        # The dependencies of the CUDA libraries are found when they are loaded.
        linker.append("-Wl,--allow-shlib-undefined")
    flags = ", ".join(toml(f"-Clink-arg={flag}") for flag in linker)
    lines = [f"[env]\nLIBTORCH = {toml(libtorch)}\n"]
    if headers:
        lines.append(f"TRANSFORMER_BENCH_CUDA_INCLUDE = {toml(headers)}\n")
    if python:
        lines.append(f"TRANSFORMER_BENCH_PYTHON = {toml(sys.executable)}\n")
        lines.append(f"TRANSFORMER_BENCH_PYTHONPATH = {toml(python)}\n")
    elif reason:
        lines.append(f"TRANSFORMER_BENCH_NO_INDUCTOR = {toml(reason)}\n")
    if mlx_wheel:
        # Without the first, C++ targets the newest system and Rust an old one.
        lines.append(f"MACOSX_DEPLOYMENT_TARGET = {toml(deployment_target(target, mlx_wheel))}\n")
        lines.append(f"TRANSFORMER_BENCH_MLX_WHEEL = {toml(mlx_wheel)}\n")
    lines.append(f"\n[target.{target.triple}]\nrustflags = [{flags}]\n")
    lines.append(
        f"\n[target.{target.triple}.mlx]\n"
        f"rustc-link-search = [{toml(mlx / 'mlx' / 'lib')}]\n"
        'rustc-link-lib = ["mlxc", "mlx"]\n'
        f"rustc-env = {{ OUT_DIR = {toml(mlx)} }}\n"
    )
    return MARK + "".join(lines)

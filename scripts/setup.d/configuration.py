"""What cargo is told: .cargo/config.toml."""
import json
import sys

from shared import ROOT
from target import MAC_OLDEST

CARGO_CONFIG = ROOT / ".cargo" / "config.toml"
MARK = "# Written by scripts/setup; edits are lost.\n"


def toml(value):
    return json.dumps(str(value))


def text(row, libtorch, mlx, library_paths, headers=None, cuda=False, python=None, reason=None):
    """The configuration of a target whose libraries lie in `library_paths`; `python` is where the torch
    lies that compiles steps, or `reason` why there is none."""
    linker = [f"-Wl,-rpath,{path}" for path in library_paths]
    if row.linux:
        # RPATH, unlike RUNPATH, also serves the libraries of libraries.
        linker.insert(0, "-Wl,--disable-new-dtags")
    if cuda:
        # What the CUDA libraries need in turn is found when they are loaded.
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
    if not row.linux:
        # As the wheels: else C++ is compiled for the newest system and Rust for an old one.
        lines.append(f"MACOSX_DEPLOYMENT_TARGET = {toml(MAC_OLDEST)}\n")
    lines.append(f"\n[target.{row.triple}]\nrustflags = [{flags}]\n")
    lines.append(
        f"\n[target.{row.triple}.mlx]\n"
        f"rustc-link-search = [{toml(mlx / 'mlx' / 'lib')}]\n"
        'rustc-link-lib = ["mlxc", "mlx"]\n'
        f"rustc-env = {{ OUT_DIR = {toml(mlx)} }}\n"
    )
    return MARK + "".join(lines)

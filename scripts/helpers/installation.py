"""The layout of an installed wheel, in which the scripts of compare-python are data of a Python package.

`src/installation.rs` describes the same layout for the executables.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# In a checkout, cargo builds the programs. In a wheel, they are in this folder.
PROGRAMS = ROOT / "bin"
INSTALLED = (ROOT / "installation.json").is_file()
# The interpreter of the Python counterparts, unless the user names one.
PYTHON = sys.executable if INSTALLED else "python3"
# OpenBLAS for MLX on Linux (scripts/wheel.d/blas.py).
BLAS = PROGRAMS / "libtransformer_bench_blas.so"


def command(name):
    """Returns the command line that starts a script, for messages."""
    return f"transformer-bench {name}" if INSTALLED else f"scripts/{name}"


def words(text):
    """Returns a text with the commands of an installation instead of scripts/NAME."""
    return re.sub(r"(\./)?\bscripts/([a-z][a-z-]*)", lambda found: command(found[2]), text) if INSTALLED else text

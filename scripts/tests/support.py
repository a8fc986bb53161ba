"""Helpers of the script tests: the built programs, and a worker that reports times instead of measuring them."""
import atexit
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target/release/transformer-bench"
# The Python torch that compiles steps. It is missing on Python 3.9, which torch does not support.
TORCH_PYTHON = ROOT / ".deps" / "torch-python"
sys.dont_write_bytecode = True
# The variable that names the folder of `shared_folder`.
SHARED_FOLDER = "TRANSFORMER_BENCH_TEST_FOLDER"
# The request for a parity check. Workers of older revisions know it by this name.
CHECK_PARITY = "prove"


def needs_quiet_machine(test):
    """Marks a test that compares times: run.py runs it alone, after all others."""
    test.needs_quiet_machine = True
    return test


def uses_all_cores(test):
    """Marks a test that computes rather than waits: run.py runs one of them at a time."""
    test.uses_all_cores = True
    return test


def needs_compile(test):
    """Marks a test of PyTorch's variant -compile, which is skipped if set-up did not prepare it."""
    prepared = TORCH_PYTHON.exists() and sys.version_info >= (3, 10)
    return unittest.skipUnless(prepared, "set-up prepared no torch for this Python")(test)


def load(name):
    """Imports a script that has no `.py` in its name."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def run(*command, env=None):
    """Runs a command in the project's root. Returns its exit code and all that it printed."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **(env or {})})
    return done.returncode, (done.stdout + done.stderr).strip()


@functools.lru_cache(None)
def build():
    """Builds the command `transformer-bench`, once per process."""
    subprocess.run(["cargo", "build", "--quiet", "--release", "--locked", "--bins"], cwd=ROOT, check=True)


@functools.lru_cache(None)
def executables():
    """Builds both bench targets, once per process, and returns their paths by framework."""
    return load("compare-python").executables()


@functools.lru_cache(None)
def shared_folder():
    """Returns a folder that all tests of a run share. run.py names it to its processes."""
    if os.environ.get(SHARED_FOLDER):
        return Path(os.environ[SHARED_FOLDER])
    folder = tempfile.TemporaryDirectory(prefix="transformer-bench tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def wheel():
    """Builds the wheel, once per run of the tests, and returns its path."""
    folder = shared_folder() / "wheel"
    with open(shared_folder() / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            code, text = run("scripts/wheel", "--out", folder)
            assert code == 0, text
    return next(folder.glob("*.whl"))


def process_ends(process):
    """Waits until a process has ended or is a zombie. Returns False after five seconds."""
    for _ in range(50):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.1)
    return False


def temporary_folder(test):
    """Returns a folder that is removed after `test`."""
    folder = tempfile.TemporaryDirectory()
    test.addCleanup(folder.cleanup)
    return Path(folder.name)


def fake_worker(path, case, script="", parity="now 0.5", step=200_000):
    """Writes a worker that reports times instead of measuring them: `step` nanoseconds, with a noise of 0.1 %.

    `script` runs before each answer. `parity` is the answer to a request for a parity check.
    """
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"""#!/usr/bin/env python3
import os, sys, random
for line in sys.stdin:
    word = line.split()[0]
    step = {step}
    {script or 'pass'}
    if word == "cases":
        print("{case}")
    elif word == "case":
        print("ready")
    elif word == "version":
        print(4)
    elif word == "work":
        print(0)
    elif word == "verify":
        print("verified")
    elif word == "{CHECK_PARITY}":
        print({parity!r})
    else:
        print(int(int(word) * step * random.gauss(1, 0.001)))
    sys.stdout.flush()
""")
    path.chmod(0o755)


class CompareCase(unittest.TestCase):
    """Comparisons of workers that report times instead of measuring them."""

    CASE = "forward/torch-cpu/f32/indicator-tiny-b2"

    @classmethod
    def setUpClass(cls):
        build()
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)

    def side(self, name, script="", parity="now 0.5"):
        """Returns a side of a comparison with a worker that reports 0.2 ms per step."""
        folder = self.folder / name
        fake_worker(folder / "torch", self.CASE, script, parity)
        return f"dir:{folder}"

    def compare(self, *arguments, env=None):
        """Runs `transformer-bench compare` with its own folder for results."""
        return run(PROGRAM, "compare", *arguments, env={"TRANSFORMER_BENCH_RESULTS": str(self.folder), **(env or {})})

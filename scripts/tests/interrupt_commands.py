#!/usr/bin/env python3
"""Interrupts the suite's commands at random moments, and checks that no data is lost and no process is left.

Usage: scripts/tests/interrupt_commands.py [COUNT [SEED]]

Each interrupt takes a few seconds. The default is 100 of them with seed 1.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support import PROGRAM, ROOT, build, executables

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# A model whose steps are short, so that a run goes through all phases in seconds.
MODEL = """name = "tiny"
tokens = 16
width = 32
layers = 2
heads = 2
ffn-width = 64
vocabulary = 64
norm = { layer = {} }
norm-order = "pre-norm"
position = "learned"
activation = "gelu"
bias = { qkv = true, out = true, feed-forward = true }
causal = true
input = "tokens"
output = "tied"
"""


class Workspace:
    """A folder with a saved baseline, and with everything that the commands write."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        self.results, self.cache = self.folder / "results", self.folder / "cache"
        (self.folder / "criterion-baselines").mkdir()
        self.side = self.folder / "side"
        self.side.mkdir()
        for name, executable in executables().items():
            shutil.copy(executable, self.side / name)
        self.env = {**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.results),
                    "CRITERION_HOME": str(self.folder / "criterion"), "TRANSFORMER_BENCH_SET": "smoke"}
        self.model = self.folder / "tiny.toml"
        self.model.write_text(MODEL)
        assert self.start([self.side / "torch", "--bench", "^copy-peak/torch-cpu"]).wait() == 0
        self.baseline("save", "saved")
        # A run with both frameworks, which the interleaved rounds read.
        self.of_model = {"TRANSFORMER_BENCH_RESULTS": str(self.folder / "results-tiny"), "TRANSFORMER_BENCH_SET": "quick"}
        assert self.start(self.bench_model("^train-step/.*-cpu/f32(-tuned)?/tiny"), env=self.of_model).wait() == 0

    def bench_model(self, cases):
        return [PROGRAM, "bench", "--executables", self.side, "--model", self.model, "--batch", "2", cases]

    def start(self, command, cwd=None, env=None):
        return subprocess.Popen([str(part) for part in command], cwd=cwd or self.folder, env={**self.env, **(env or {})},
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def baseline(self, *arguments):
        done = subprocess.run([PROGRAM, "baseline", *arguments], cwd=self.folder, env=self.env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commands(self):
        """Returns the commands with the seconds within which they are interrupted, and their other variables."""
        side = f"dir:{self.side}"
        cache = {**self.of_model, "XDG_CACHE_HOME": str(self.cache)}
        steps = "^train-step/.*-cpu/f32(-tuned)?/tiny"
        return {
            "bench": ([self.side / "torch", "--bench", "/torch-cpu/f32/"], 1.5, {}),
            "bench one": ([self.side / "mlx", "--bench", "^copy-peak/mlx-cpu"], 1.5, {}),
            "bench both": ([PROGRAM, "bench", "--executables", self.side, "^copy-peak/.*-cpu/"], 1.5, {}),
            "all phases": (self.bench_model(steps), 25, self.of_model),
            "rounds": ([PROGRAM, "interleave", "--executables", self.side], 6, self.of_model),
            "compile": (self.bench_model("^train-step/torch-cpu/f32-compile/tiny"), 40, cache),
            "ranks": ([self.side / "torch", "--bench", "^train-step/torch-cpu/f32/.*-dp2"], 6, {}),
            "compare": ([PROGRAM, "compare", side, side, "^(copy|matmul)-peak/.*-cpu/f32/", "--set", "smoke"], 1.5, {}),
            "save": ([PROGRAM, "baseline", "save", "saved", "--force"], 1.5, {}),
            "report": ([PROGRAM, "report"], 1.5, {}),
            "setup": ([ROOT / "scripts/setup", "--force"], 1.5, {}),
        }

    def check(self):
        """Checks that every file is complete and that no process is left."""
        text = self.baseline("list")
        for line in text.splitlines():
            assert " cases at " in line, line
        for results in (self.results, self.folder / "results-tiny"):
            for part in (results / "run").glob("*.json"):
                json.loads(part.read_text())
            for name in ("results.json", "comparison.json", "env-effects.json", "interleaved.json"):
                if (results / name).exists():
                    json.loads((results / name).read_text())
        # Processes have 5 s to end.
        for _ in range(50):
            running = self.running()
            if not running:
                return
            time.sleep(0.1)
        raise AssertionError(f"still running: {running}")

    def running(self):
        """Returns the command lines of running processes that use the folder."""
        commands = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if str(self.folder) in command and not zombie:
                commands.append(command)
        return commands


def main(count, seed):
    build()
    workspace = Workspace()
    dice, counts = random.Random(seed), {}
    try:
        for _ in range(count):
            name = dice.choice(list(workspace.commands()))
            command, seconds, env = workspace.commands()[name]
            process = workspace.start(command, ROOT if name == "setup" else None, env)
            time.sleep(dice.uniform(0, seconds))
            process.send_signal(dice.choice(SIGNALS))
            process.wait(timeout=30)
            workspace.check()
            counts[name] = counts.get(name, 0) + 1
        subprocess.run([ROOT / "scripts/setup", "--quiet"], check=True)
        # What was left does not prevent a complete run. Two makers of a package do not disturb each other.
        command, _, env = workspace.commands()["compile"]
        makers = [workspace.start(command, env={**env, "TRANSFORMER_BENCH_RESULTS": str(workspace.folder / f"maker-{i}")})
                  for i in range(2)]
        assert [maker.wait() for maker in makers] == [0, 0]
    finally:
        shutil.rmtree(workspace.folder)
    print(f"{count} interrupts (seed {seed}), no data lost and no process left: "
          + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, int(sys.argv[2]) if len(sys.argv) > 2 else 1)

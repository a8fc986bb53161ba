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
        assert self.start([self.side / "torch", "--bench", "^copy-peak/torch-cpu"]).wait() == 0
        self.baseline("save", "saved")

    def start(self, command, cwd=None):
        return subprocess.Popen([str(part) for part in command], cwd=cwd or self.folder, env=self.env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def baseline(self, *arguments):
        done = subprocess.run([PROGRAM, "baseline", *arguments], cwd=self.folder, env=self.env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commands(self):
        side = f"dir:{self.side}"
        return {
            "bench": ([self.side / "torch", "--bench", "/torch-cpu/f32/"], None),
            "bench one": ([self.side / "mlx", "--bench", "^copy-peak/mlx-cpu"], None),
            "bench both": ([PROGRAM, "bench", "--executables", self.side, "^copy-peak/.*-cpu/"], None),
            "compare": ([PROGRAM, "compare", side, side, "^(copy|matmul)-peak/.*-cpu/f32/", "--set", "smoke"], None),
            "save": ([PROGRAM, "baseline", "save", "saved", "--force"], None),
            "report": ([PROGRAM, "report"], None),
            "setup": ([ROOT / "scripts/setup", "--force"], ROOT),
        }

    def check(self):
        """Checks that every file is complete and that no process is left."""
        text = self.baseline("list")
        for line in text.splitlines():
            assert " cases at " in line, line
        for part in (self.results / "run").glob("*.json"):
            json.loads(part.read_text())
        for name in ("results.json", "comparison.json", "env-effects.json", "interleaved.json"):
            if (self.results / name).exists():
                json.loads((self.results / name).read_text())
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
            command, cwd = workspace.commands()[name]
            process = workspace.start(command, cwd)
            time.sleep(dice.uniform(0, 1.5))
            process.send_signal(dice.choice(SIGNALS))
            process.wait(timeout=30)
            workspace.check()
            counts[name] = counts.get(name, 0) + 1
        subprocess.run([ROOT / "scripts/setup", "--quiet"], check=True)
    finally:
        shutil.rmtree(workspace.folder)
    print(f"{count} interrupts (seed {seed}), no data lost and no process left: "
          + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, int(sys.argv[2]) if len(sys.argv) > 2 else 1)

#!/usr/bin/env python3
"""Kills the suite's commands at random moments, again and again: nothing may be lost and nothing
may be left running. Usage: scripts/tests/kills.py [COUNT [SEED]]. Takes some seconds a kill."""
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

ROOT = Path(__file__).resolve().parent.parent.parent
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


class Ground:
    """A folder with a baseline in it, and everything that the commands write."""

    def __init__(self, executables):
        self.folder = Path(tempfile.mkdtemp())
        self.results, self.cache = self.folder / "results", self.folder / "cache"
        (self.folder / "criterion-baselines").mkdir()
        self.side = self.folder / "side"
        self.side.mkdir()
        for name, executable in executables.items():
            shutil.copy(executable, self.side / name)
        self.env = {**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.results), "CRITERION_HOME": str(self.folder / "criterion"),
                    "TRANSFORMER_BENCH_SET": "smoke"}
        self.program = str(ROOT / "target/release/transformer-bench")
        assert self.start([self.side / "torch", "--bench", "^copy-peak/torch-cpu"]).wait() == 0
        self.baseline("save", "kept")
        self.kept = self.file("kept").read_bytes()

    def start(self, command, cwd=None):
        return subprocess.Popen([str(part) for part in command], cwd=cwd or self.folder, env=self.env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def baseline(self, *arguments):
        done = subprocess.run([self.program, "baseline", *arguments], cwd=self.folder, env=self.env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def file(self, name):
        return next((self.folder / "criterion-baselines").glob(f"*/{name}/baseline.json"))

    def commands(self):
        side = f"dir:{self.side}"
        return {
            "bench": ([self.side / "torch", "--bench", "/torch-cpu/f32/"], None),
            "bench one": ([self.side / "mlx", "--bench", "^copy-peak/mlx-cpu"], None),
            "compare": ([self.program, "compare", side, side, "^(copy|matmul)-peak/.*-cpu/f32/", "--set", "smoke"], None),
            "save": ([self.program, "baseline", "save", "kept", "--force"], None),
            "report": ([self.program, "report"], None),
            "setup": ([ROOT / "scripts/setup", "--force"], ROOT),
        }

    def check(self):
        """What must hold after every kill."""
        text = self.baseline("list")
        for line in text.splitlines():
            assert " cases at " in line, line
        for part in (self.results / "run").glob("*.json"):
            json.loads(part.read_text())
        for name in ("results.json", "comparison.json", "settings.json"):
            if (self.results / name).exists():
                json.loads((self.results / name).read_text())
        # A process has a moment to end.
        for _ in range(50):
            left = self.running()
            if not left:
                return
            time.sleep(0.1)
        raise AssertionError(f"still running: {left}")

    def running(self):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if str(self.folder) in command and not zombie:
                found.append(command)
        return found


def main(count, seed):
    sys.path.insert(0, str(ROOT / "scripts"))
    listed = subprocess.run(["cargo", "bench", "--no-run", "--locked", "--bench", "torch", "--bench", "mlx", "--message-format=json"],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    messages = [json.loads(line) for line in listed.splitlines()]
    ground = Ground({m["target"]["name"]: m["executable"] for m in messages
                     if m.get("executable") and m["target"]["kind"] == ["bench"]})
    dice, tally = random.Random(seed), {}
    try:
        for _ in range(count):
            name = dice.choice(list(ground.commands()))
            command, cwd = ground.commands()[name]
            process = ground.start(command, cwd)
            time.sleep(dice.uniform(0, 1.5))
            process.send_signal(dice.choice(SIGNALS))
            process.wait(timeout=30)
            ground.check()
            tally[name] = tally.get(name, 0) + 1
        subprocess.run([ROOT / "scripts/setup", "--quiet"], check=True)
    finally:
        shutil.rmtree(ground.folder)
    print(f"{count} kills (seed {seed}), nothing lost and nothing left running: "
          + ", ".join(f"{name} {n}" for name, n in sorted(tally.items())))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, int(sys.argv[2]) if len(sys.argv) > 2 else 1)

"""Saved baselines: damaged ones, ones of a killed run, and one compared with its own code."""
import json
import os
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from support import ROOT, load


class Baseline(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        (self.folder / "criterion-baselines").mkdir()
        self.built = load("reference").executables()
        self.env = {**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder / "results"),
                    "CRITERION_HOME": str(self.folder / "criterion")}

    def command(self, *arguments):
        done = subprocess.run([str(ROOT / "target/release/transformer-bench"), *arguments], cwd=self.folder, env=self.env,
                              text=True, capture_output=True)
        return done.returncode, done.stdout, done.stderr

    def bench(self, framework, *arguments, **options):
        return subprocess.Popen([self.built[framework], "--bench", *arguments], cwd=self.folder, env={**self.env, **options},
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def test_one_that_is_compared_at_once_with_its_own_code_is_no_regression(self):
        side = self.folder / "side"
        side.mkdir()
        for name, executable in self.built.items():
            (side / name).symlink_to(executable)
        # Who shares the machine can slow it down between the two; what is wrong with the suite
        # shows every time.
        for attempt in range(3):
            for framework in ("torch", "mlx"):
                self.assertEqual(self.bench(framework, "^(attention|feed-forward)/.*-cpu/f32/").wait(), 0)
            code, _, error = self.command("baseline", "save", "now", "--force")
            self.assertEqual(code, 0, error)
            # A checkout with changes is one of the differences that --anyway allows.
            code, out, error = self.command("compare", "baseline:now", f"dir:{side}", "--anyway", "--json")
            cases = json.loads(out)["cases"]
            self.assertEqual(len(cases), 4, error)
            slower = [case for case in cases if case["verdict"] == "slower"]
            self.assertEqual(code == 1, bool(slower), error)
            if not slower:
                return
        self.fail(f"slower than itself, three times: {slower}")

    def test_a_run_that_is_killed_is_saved_with_force_alone(self):
        process = self.bench("torch", "/torch-cpu/f32/", TRANSFORMER_BENCH_SET="smoke")
        part = self.folder / "results/run/torch.json"
        while not part.exists() or len(json.loads(part.read_text())["cases"]) < 2:
            self.assertIsNone(process.poll(), "it ended before it was killed")
            time.sleep(0.05)
        process.kill()
        process.wait()
        code, _, error = self.command("baseline", "save", "cut")
        self.assertEqual(code, 2)
        self.assertIn("cut off", error)
        code, out, error = self.command("baseline", "save", "cut", "--force")
        self.assertEqual(code, 0, error)

    def test_damaged_baselines(self):
        folder = self.folder / "project" / "criterion-baselines" / "m" / "bad"
        folder.mkdir(parents=True)
        for text, word in [("", "empty"), ("{", "damaged"), ("{}", "no baseline"),
                           ('{"format": "transformer-bench baseline",\n"version": 99,\n"checksum": "0"}', "update"),
                           ('{"format": "transformer-bench baseline",\n"version": 1,\n"checksum": "0",\n"cases": []}', "changed after")]:
            (folder / "baseline.json").write_text(text)
            for command in (["baseline", "show", "bad"], ["baseline", "restore", "bad"], ["compare", "baseline:bad"]):
                done = subprocess.run([str(ROOT / "target/release/transformer-bench"), *command],
                                      cwd=folder.parent.parent.parent, text=True, capture_output=True)
                self.assertEqual(done.returncode, 2, done.stdout)
                self.assertIn(word, done.stderr)
                self.assertEqual(len(done.stderr.strip().splitlines()), 1)


if __name__ == "__main__":
    unittest.main()

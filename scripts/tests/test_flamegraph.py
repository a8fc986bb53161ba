"""Profiles of cases."""
import platform
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path
from xml.etree import ElementTree

from support import ROOT, run


class Flamegraph(unittest.TestCase):
    def test_a_case_of_each_framework(self):
        for framework, operators in [("torch", "at::"), ("mlx", "mlx::core::")]:
            home = Path(tempfile.mkdtemp())
            self.addCleanup(shutil.rmtree, home)
            code, text = run("cargo", "bench", "--quiet", "--locked", "--bench", framework, "--", "--profile-time", "3",
                             f"^forward-backward/{framework}-cpu/f32/indicator",
                             env={"CRITERION_HOME": str(home), "TRANSFORMER_BENCH_SET": "smoke"})
            self.assertEqual(code, 0, text)
            self.assertIn("sampling changed the step by", text)
            folder = next(home.glob("**/profile"))
            ElementTree.parse(folder / "flamegraph.svg")
            self.assertGreater((folder / "profile.pb").stat().st_size, 100)
            stacks = [line.rpartition(" ") for line in (folder / "flamegraph.folded").read_text().splitlines()]
            weight = sum(int(count) for _, _, count in stacks)
            self.assertGreater(weight, 100)
            share = lambda holds: sum(int(count) for stack, _, count in stacks if holds(stack)) / weight
            self.assertGreater(share(lambda stack: operators in stack), 0.25, text)
            # macOS keeps its own libraries in no file: there the last name before an address is told.
            named = 0.8 if platform.system() == "Darwin" else 0.95
            self.assertGreater(share(lambda stack: not stack.rpartition(";")[2].startswith("[")), named, text)

    def test_wrong_input(self):
        subprocess.run(["cargo", "build", "--quiet", "--release", "--locked", "--bins"], cwd=ROOT, check=True)
        for arguments, word in [(["["], "no regular expression"), (["zzz"], "no case"), (["--slowest", "0"], "at least 1")]:
            code, text = run("target/release/transformer-bench", "flamegraph", *arguments)
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()

"""Help and wrong options of every script."""
import os
import subprocess
import unittest

from support import ROOT, run


class Options(unittest.TestCase):
    # A wrong option, the nearest, the exit code.
    NEAR = {"bench": ("--ful", "--full", 2), "test": ("--halp", "--help", 2), "setup": ("--cpuu", "--cpu", 1), "check-mac": ("--lnk", "--link", 1),
            "reference": ("--round", "--rounds", 1), "baseline": ("--hlp", "--help", 2),
            "compare": ("--treshold", "--threshold", 2), "flamegraph": ("--slowst", "--slowest", 2),
            "report": ("--hlp", "--help", 2), "selftest": ("--minuts", "--minutes", 2),
            "calibrate": ("--minuts", "--minutes", 2), "list": ("--flps", "--flops", 2),
            "publish": ("--chek", "--check", 2)}

    def scripts(self):
        return sorted(p.name for p in (ROOT / "scripts").iterdir() if p.is_file() and os.access(p, os.X_OK))

    def test_every_script_names_the_nearest(self):
        self.assertEqual(self.scripts(), sorted(self.NEAR))
        for script, (wrong, near, expected) in self.NEAR.items():
            code, text = run(f"scripts/{script}", wrong)
            self.assertEqual(code, expected, script)
            self.assertIn(wrong, text)
            self.assertIn(near, text)
            if script in ("bench", "test", "setup", "reference", "check-mac"):
                self.assertEqual(len(text.splitlines()), 1, script)

    def test_every_script_explains_itself(self):
        for script in self.scripts():
            code, text = run(f"scripts/{script}", "--help")
            self.assertEqual(code, 0, script)
            # The self-test of the comparison goes by two names.
            self.assertIn(f"scripts/{script.replace('selftest', 'calibrate')}", text, script)

    def test_examples_run_as_printed(self):
        """Those that only read what is there."""
        examples = []
        for script in ("list", "report", "publish"):
            _, text = run(f"scripts/{script}", "--help")
            lines = text.split("Examples:")[1].splitlines()
            examples += [line.split("  ")[0] for line in map(str.strip, lines) if line.startswith("scripts/")]
        tried = [example for example in examples if "list" in example or "/quick" in example or "--check" in example]
        self.assertGreaterEqual(len(tried), 4, examples)
        for example in tried:
            code, text = run(*example.split())
            self.assertEqual(code, 0, f"{example}: {text[-300:]}")

    def test_every_case_is_listed_with_its_cost(self):
        code, text = run("scripts/list", "full")
        self.assertEqual(code, 0, text)
        rows = [line.split() for line in text.splitlines() if line.count("/") == 3]
        self.assertGreater(len(rows), 500)
        for case, flops, moved, memory in rows:
            self.assertGreater(int(moved), 0, case)
            if not case.startswith(("optimizer-step", "copy-peak", "all-reduce")):
                self.assertGreater(int(flops), 0, case)

    def test_one_command_has_them_all(self):
        subprocess.run(["cargo", "build", "--quiet", "--release", "--locked", "--bins"], cwd=ROOT, check=True)
        code, text = run("target/release/transformer-bench", "--help")
        self.assertEqual(code, 0)
        for name in ("baseline", "compare", "flamegraph", "report", "list", "calibrate", "publish"):
            self.assertRegex(text, f"(?m)^  {name} +[A-Z]")


if __name__ == "__main__":
    unittest.main()

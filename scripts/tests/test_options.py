"""Help and wrong options of every script."""
import os
import re
import shutil
import unittest

from support import PROGRAM, ROOT, build, run, temporary_folder


class Options(unittest.TestCase):
    # A wrong option of each script, and the most similar one.
    SIMILAR = {"bench": ("--ful", "--full"), "test": ("--halp", "--help"), "setup": ("--cpuu", "--cpu"),
               "check-mac": ("--lnk", "--link"), "compare-python": ("--round", "--rounds"), "baseline": ("--hlp", "--help"),
               "compare": ("--treshold", "--threshold"), "flamegraph": ("--secnds", "--seconds"),
               "fit": ("--tokns", "--tokens"), "explain": ("--jsn", "--json"), "energy": ("--secnds", "--seconds"),
               "first-step": ("--jsn", "--json"),
               "report": ("--hlp", "--help"), "calibrate": ("--minuts", "--minutes"), "list": ("--flps", "--flops"),
               "publish": ("--chek", "--check"), "wheel": ("--targt", "--target")}

    def scripts(self):
        return sorted(p.name for p in (ROOT / "scripts").iterdir() if p.is_file() and os.access(p, os.X_OK))

    def test_every_script_suggests_the_most_similar_option(self):
        self.assertEqual(self.scripts(), sorted(self.SIMILAR))
        for script, (wrong, similar) in self.SIMILAR.items():
            code, text = run(f"scripts/{script}", wrong)
            self.assertEqual(code, 2, script)
            self.assertIn(wrong, text)
            self.assertIn(similar, text)
            if script in ("test", "setup", "compare-python", "check-mac", "wheel"):
                self.assertEqual(len(text.splitlines()), 1, script)

    def test_every_script_explains_itself(self):
        for script in self.scripts():
            code, text = run(f"scripts/{script}", "--help")
            self.assertEqual(code, 0, script)
            self.assertIn(f"scripts/{script}", text, script)

    def test_examples_run_as_printed(self):
        """Only the examples that read saved results are run."""
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
        rows = [re.split(r"  +", line) for line in text.splitlines() if line.count("/") == 3]
        self.assertGreater(len(rows), 500)
        for case, flops, moved, memory in rows:
            for quantity, unit in ((flops, "FLOP"), (moved, "B"), (memory, "B")):
                self.assertRegex(quantity, rf"^[\d,.]+ [kMGT]?{unit}$", case)
            self.assertNotEqual(moved, "0 B", case)
            if not case.startswith(("optimizer-step", "copy-peak", "all-reduce")):
                self.assertNotEqual(flops, "0 FLOP", case)

    def test_the_command_lists_every_subcommand(self):
        build()
        code, text = run(PROGRAM, "--help")
        self.assertEqual(code, 0)
        for name in ("bench", "baseline", "compare", "compare-python", "flamegraph", "report", "list", "interleave", "calibrate", "publish"):
            self.assertRegex(text, f"(?m)^  {name} +[A-Z]")


    def test_a_wrong_argument_costs_no_build(self):
        """The cargo of this test builds nothing."""
        build()
        folder = temporary_folder(self)
        cargo = folder / "cargo"
        cargo.write_text(f'#!/bin/sh\n[ "$1" = metadata ] || {{ echo "cargo $1 was called" >&2; exit 99; }}\n'
                         f'exec {shutil.which("cargo")} "$@"\n')
        cargo.chmod(0o755)
        env = {"PATH": f"{folder}:{os.environ['PATH']}"}
        for command, code, word in (("list quick zzz", 2, "no case"), ("list --flps", 2, "--flops"), ("list quick", 0, "FLOPs"),
                                    ("bench zzz", 2, "no case"), ("bench [", 2, "not a regular expression"),
                                    ("bench --tokens 70000", 2, "need --model"), ("bench --mlx 0.1", 2, "choose MLX"),
                                    ("compare --torch 2.9.1 2.13.0", 2, "choose PyTorch"), ("compare no-such-revision", 2, "not a revision"),
                                    ("flamegraph zzz", 2, "no case"), ("calibrate --cases 0", 2, "at least 1")):
            name, *arguments = command.split()
            found, text = run(f"scripts/{name}", *arguments, env=env)
            self.assertEqual(found, code, text)
            self.assertIn(word, text)
            self.assertNotIn("was called", text)

    def test_scripts_are_found_through_links_and_in_spite_of_cdpath(self):
        folder = temporary_folder(self)
        (folder / "scripts").mkdir()
        for script in ("bench", "test", "setup", "compare-python", "list"):
            (folder / script).symlink_to(ROOT / "scripts" / script)
            code, text = run(folder / script, "--nonsense")
            self.assertEqual(code, 2, text)
            self.assertIn("--nonsense", text)
            self.assertNotIn("No such file", text)
            code, text = run(f"scripts/{script}", "--nonsense", env={"CDPATH": str(folder)})
            self.assertEqual(code, 2, text)
            self.assertNotIn(str(folder), text)

    def test_results_that_cannot_be_written_are_reported_in_one_line(self):
        build()
        for path in (str(ROOT / "README.md"), "/proc/x"):
            code, text = run(PROGRAM, "bench", "--executables", "/nonexistent", env={"TRANSFORMER_BENCH_RESULTS": path})
            self.assertEqual(code, 2, text)
            self.assertIn(path, text)
            self.assertEqual(len(text.splitlines()), 1, text)


if __name__ == "__main__":
    unittest.main()

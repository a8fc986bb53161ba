"""Flame graphs of cases."""
import platform
import unittest
from xml.etree import ElementTree

from support import PROGRAM, build, needs_quiet_machine, run, temporary_folder


class Flamegraph(unittest.TestCase):
    @needs_quiet_machine
    def test_a_profile_has_the_operators_of_the_framework(self):
        for framework, operators in [("torch", "at::"), ("mlx", "mlx::core::")]:
            home = temporary_folder(self)
            code, text = run("cargo", "bench", "--quiet", "--locked", "--bench", framework, "--", "--profile-time", "3",
                             f"^forward-backward/{framework}-cpu/f32/indicator",
                             env={"CRITERION_HOME": str(home), "TRANSFORMER_BENCH_SET": "smoke"})
            self.assertEqual(code, 0, text)
            self.assertIn("sampling changed the step time by", text)
            folder = next(home.glob("**/profile"))
            ElementTree.parse(folder / "flamegraph.svg")
            self.assertGreater((folder / "profile.pb").stat().st_size, 100)
            stacks = [line.rpartition(" ") for line in (folder / "flamegraph.folded").read_text().splitlines()]
            weight = sum(int(count) for _, _, count in stacks)
            self.assertGreater(weight, 100)
            share = lambda matches: sum(int(count) for stack, _, count in stacks if matches(stack)) / weight
            self.assertGreater(share(lambda stack: operators in stack), 0.25, text)
            # The system libraries of macOS are not files, so only the last name before an address is known.
            named = 0.8 if platform.system() == "Darwin" else 0.95
            self.assertGreater(share(lambda stack: not stack.rpartition(";")[2].startswith("[")), named, text)

    def test_wrong_arguments_are_refused(self):
        build()
        for arguments, word in [(["["], "not a regular expression"), (["zzz"], "no case"), (["--top", "0"], "at least 1")]:
            code, text = run(PROGRAM, "flamegraph", *arguments)
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()

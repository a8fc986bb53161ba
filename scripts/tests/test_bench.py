"""`scripts/bench` and `cargo bench`: selection, results, wrong input."""
import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path

from support import ROOT, run


class Bench(unittest.TestCase):
    def test_unknown_option(self):
        code, text = run("scripts/bench", "--fast")
        self.assertEqual(code, 2)
        self.assertIn("--fast", text)

    def test_two_filters(self):
        code, text = run("scripts/bench", "a", "b")
        self.assertEqual(code, 2)
        self.assertIn("one filter", text)

    def test_a_filter_that_matches_nothing(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "torch", "--", "train-stepp")
        self.assertNotEqual(code, 0)
        self.assertIn("no case of the quick set matches 'train-stepp'", text)

    def test_an_unknown_set(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "mlx", "--", "copy",
                         env={"TRANSFORMER_BENCH_SET": "huge"})
        self.assertNotEqual(code, 0)
        self.assertIn("smoke, compare, quick, full", text)

    def test_a_filtered_run_adds_to_the_last_one(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        env = {"CRITERION_HOME": str(folder / "criterion"), "TRANSFORMER_BENCH_RESULTS": str(folder), "TRANSFORMER_BENCH_SET": "smoke"}
        ids = lambda: [c["id"].split("/")[0] for c in json.loads((folder / "run/torch.json").read_text())["cases"]]
        bench = lambda *words: run("cargo", "bench", "--quiet", "--locked", "--bench", "torch", "--", *words, "--sample-size", "10", env=env)
        self.assertEqual(bench("copy-peak/torch-cpu/f32")[0], 0)
        self.assertEqual(bench("matmul-peak/torch-cpu/f32")[0], 0)
        self.assertEqual(ids(), ["copy-peak", "matmul-peak"])
        # What fits nothing touches nothing.
        self.assertNotEqual(bench("nosuchcase")[0], 0)
        self.assertNotEqual(bench("[")[0], 0)
        self.assertEqual(ids(), ["copy-peak", "matmul-peak"])

    def test_a_second_run_says_that_one_is_running(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        (folder / "bench.lock").mkdir()
        (folder / "bench.lock/process").write_text(str(os.getpid()))
        (folder / "run").mkdir()
        code, text = run("scripts/bench", "copy-peak", env={"TRANSFORMER_BENCH_RESULTS": str(folder)})
        self.assertEqual(code, 2, text)
        self.assertIn("another run", text.splitlines()[-1])
        self.assertTrue((folder / "run").exists())

    def test_a_filter_that_fits_nothing_or_is_wrong(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        (folder / "run").mkdir()
        for wrong, word in (("nosuchcase", "no case of the quick set"), ("[", "no regular expression")):
            code, text = run("scripts/bench", wrong, env={"TRANSFORMER_BENCH_RESULTS": str(folder)})
            self.assertEqual(code, 2, text)
            self.assertIn(word, text.splitlines()[-1])
            self.assertTrue((folder / "run").exists())

    def test_a_link_to_a_script_works(self):
        folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, folder)
        for name, word in (("bench", "Usage"), ("list", "quick")):
            (folder / name).symlink_to(ROOT / "scripts" / name)
            code, text = run(folder / name, "--help")
            self.assertEqual(code, 0, text)
            self.assertIn(word, text)

    def test_what_is_printed_may_have_no_reader_and_no_room(self):
        code, text = run("bash", "-c", "set -o pipefail; target/release/transformer-bench list full | head -1")
        self.assertEqual((code, len(text.splitlines())), (0, 1), text)
        if Path("/dev/full").exists():
            code, text = run("bash", "-c", "target/release/transformer-bench list full >/dev/full")
            self.assertEqual((code, len(text.splitlines())), (2, 1), text)
            self.assertIn("No space", text)

    def test_what_criterion_would_die_of_is_refused(self):
        for arguments, word in ((("--sample-size", "1"), "--sample-size"), (("--save-baseline", "../../x"), "no name"),
                                (("--save-baseline", "new"), "Criterion uses")):
            code, text = run("cargo", "bench", "--quiet", "--locked", "--bench", "mlx", "--", *arguments, "copy")
            self.assertNotEqual(code, 0)
            self.assertIn(word, text)
            self.assertNotIn("panicked", text)

    def test_list_shows_ids(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "mlx", "--", "--list", "attention/.*/f32/")
        self.assertEqual(code, 0)
        self.assertIn("attention/mlx-cpu/f32/b16-h8-n111-d32: benchmark", text)
        self.assertNotIn("feed-forward", text)


if __name__ == "__main__":
    unittest.main()

"""`scripts/bench` and `cargo bench`: selection, results, wrong input."""
import fcntl
import json
import os
import signal
import subprocess
import time
import unittest
from pathlib import Path

from support import PROGRAM, ROOT, build, process_ends, run, temporary_folder, uses_all_cores


class Bench(unittest.TestCase):
    def test_an_unknown_option_is_refused(self):
        code, text = run("scripts/bench", "--fast")
        self.assertEqual(code, 2)
        self.assertIn("--fast", text)

    def test_a_second_filter_is_refused(self):
        code, text = run("scripts/bench", "a", "b")
        self.assertEqual(code, 2)
        self.assertIn("unexpected argument 'b'", text)

    def test_a_filter_that_matches_nothing_is_an_error(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "torch", "--", "train-stepp")
        self.assertNotEqual(code, 0)
        self.assertIn("no case of the quick set matches 'train-stepp'", text)

    def test_an_unknown_set_is_an_error(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "mlx", "--", "copy",
                         env={"TRANSFORMER_BENCH_SET": "huge"})
        self.assertNotEqual(code, 0)
        self.assertIn("smoke, compare, quick, full", text)

    @uses_all_cores
    def test_a_filtered_run_adds_to_the_last_run(self):
        folder = temporary_folder(self)
        env = {"CRITERION_HOME": str(folder / "criterion"), "TRANSFORMER_BENCH_RESULTS": str(folder), "TRANSFORMER_BENCH_SET": "smoke"}
        ids = lambda: [c["id"].split("/")[0] for c in json.loads((folder / "run/torch.json").read_text())["cases"]]
        bench = lambda *words: run("cargo", "bench", "--quiet", "--locked", "--bench", "torch", "--", *words, "--sample-size", "10", env=env)
        self.assertEqual(bench("copy-peak/torch-cpu/f32")[0], 0)
        self.assertEqual(bench("matmul-peak/torch-cpu/f32")[0], 0)
        self.assertEqual(ids(), ["copy-peak", "matmul-peak"])
        # A filter without a match changes nothing.
        self.assertNotEqual(bench("nosuchcase")[0], 0)
        self.assertNotEqual(bench("[")[0], 0)
        self.assertEqual(ids(), ["copy-peak", "matmul-peak"])

    def test_a_second_run_reports_the_running_one(self):
        folder = temporary_folder(self)
        (folder / "run").mkdir()
        with open(folder / "run.lock", "w") as lock:
            print(os.getpid(), file=lock, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, text = run("scripts/bench", "copy-peak", env={"TRANSFORMER_BENCH_RESULTS": str(folder)})
        self.assertEqual(code, 2, text)
        self.assertIn(f"another run (process {os.getpid()})", text.splitlines()[-1])
        self.assertTrue((folder / "run").exists())

    def test_a_wrong_filter_leaves_the_last_run_untouched(self):
        folder = temporary_folder(self)
        (folder / "run").mkdir()
        for wrong, word in (("nosuchcase", "no case of the quick set"), ("[", "not a regular expression")):
            code, text = run("scripts/bench", wrong, env={"TRANSFORMER_BENCH_RESULTS": str(folder)})
            self.assertEqual(code, 2, text)
            self.assertIn(word, text.splitlines()[-1])
            self.assertTrue((folder / "run").exists())

    def test_a_link_to_a_script_works(self):
        folder = temporary_folder(self)
        for name, word in (("bench", "Usage"), ("list", "quick")):
            (folder / name).symlink_to(ROOT / "scripts" / name)
            (folder / f"another-{name}").symlink_to(name)
            for link in (name, f"another-{name}"):
                code, text = run(folder / link, "--help", env={"CDPATH": "/:/usr"})
                self.assertEqual(code, 0, text)
                self.assertIn(word, text)

    def test_paths_are_relative_to_the_callers_folder(self):
        folder = temporary_folder(self)
        (folder / "here").mkdir()
        done = subprocess.run([ROOT / "scripts/report", "--from", "here"], cwd=folder, text=True, capture_output=True)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn(f"{folder}/here could not be read: it is a folder", done.stderr)

    def test_a_closed_pipe_is_fine_and_a_full_disk_is_an_error(self):
        build()
        code, text = run("bash", "-c", f"set -o pipefail; '{PROGRAM}' list full | head -1")
        self.assertEqual((code, len(text.splitlines())), (0, 1), text)
        if Path("/dev/full").exists():
            code, text = run("bash", "-c", f"'{PROGRAM}' list full >/dev/full")
            self.assertEqual((code, len(text.splitlines())), (2, 1), text)
            self.assertIn("No space", text)

    def test_arguments_that_make_criterion_panic_are_refused(self):
        for arguments, word in ((("--sample-size", "1"), "--sample-size"), (("--save-baseline", "../../x"), "not a valid baseline name"),
                                (("--save-baseline", "new"), "Criterion uses")):
            code, text = run("cargo", "bench", "--quiet", "--locked", "--bench", "mlx", "--", *arguments, "copy")
            self.assertNotEqual(code, 0)
            self.assertIn(word, text)
            self.assertNotIn("panicked", text)

    def test_list_shows_ids(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "mlx", "--", "--list", "attention/.*/f32/")
        self.assertEqual(code, 0)
        self.assertIn("attention/mlx-cpu/f32/b16-h8-t111-d32: benchmark", text)
        self.assertNotIn("feed-forward", text)


class Executables(unittest.TestCase):
    """The command with executables that record their arguments instead of measuring."""

    def setUp(self):
        build()
        self.folder = temporary_folder(self)
        self.results = self.folder / "results"

    def executable(self, name, script):
        path = self.folder / "side" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def start(self, *arguments):
        command = [PROGRAM, "bench", "--executables", self.folder / "side", *arguments]
        return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE,
                                env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.results)})

    def test_the_second_framework_runs_if_the_first_fails(self):
        for name, code in (("torch", 1), ("mlx", 0)):
            self.executable(name, f'echo "{name} $* $TRANSFORMER_BENCH_SET" >>{self.folder}/calls; exit {code}')
        process = self.start("--full", "copy-peak/")
        _, error = process.communicate(timeout=60)
        self.assertEqual(process.returncode, 1, error)
        self.assertIn("torch ended with exit status: 1", error)
        self.assertEqual(sorted((self.folder / "calls").read_text().splitlines()),
                         ["mlx --bench copy-peak/ full", "torch --bench copy-peak/ full"])

    def test_only_a_run_without_a_filter_replaces_the_last_one(self):
        self.executable("torch", "")
        (self.results / "run").mkdir(parents=True)
        for arguments, remains in ((["copy-peak/"], True), (["["], True), ([], False)):
            self.start(*arguments).communicate(timeout=60)
            self.assertEqual((self.results / "run").exists(), remains, arguments)

    def test_no_signal_leaves_a_process_or_a_lock(self):
        started = self.folder / "started"
        self.executable("torch", f"sleep 1000 & echo $$ $! >{started}.partial; mv {started}.partial {started}; wait")
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)):
            process = self.start("copy-peak/")
            self.addCleanup(process.kill)
            while not started.exists():
                self.assertIsNone(process.poll())
                time.sleep(0.05)
            process.send_signal(number)
            _, error = process.communicate(timeout=20)
            self.assertEqual(process.returncode, code, error)
            for child in started.read_text().split():
                self.assertTrue(process_ends(int(child)), number)
            with open(self.results / "run.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            started.unlink()


if __name__ == "__main__":
    unittest.main()

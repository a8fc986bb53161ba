"""`transformer-bench compare`: verdicts, exit codes, and processes that must not outlive it."""
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import CompareCase, ROOT


class Compare(CompareCase):
    def test_what_is_not_proven_is_not_timed(self):
        code, text = self.compare(self.side("base"), self.side("head", prove="wrong loss: error 1"), "--set", "smoke")
        self.assertEqual(code, 1, text)
        self.assertIn("loss: error 1", text)
        # A revision from before proofs is compared, and the comparison says so.
        code, text = self.compare(self.side("base", prove="failed: 'prove x' is no request"), self.side("head"), "--set", "smoke")
        self.assertEqual(code, 0, text)
        self.assertIn("proves nothing at these shapes", text)

    def test_a_finished_comparison_by_another_threshold(self):
        code, text = self.compare(self.side("base"), self.side("head", "step *= 1.05"), "--set", "smoke")
        self.assertEqual(code, 1, text)
        code, text = self.compare("--from", "--threshold", "10")
        self.assertEqual(code, 0, text)
        self.assertIn("equivalent", text)
        self.assertIn("nothing was measured now", text)
        code, text = self.compare("--from", "/no/such/file")
        self.assertEqual(code, 2, text)
        self.assertEqual(len(text.splitlines()), 1, text)

    def test_equal_and_slower_and_faster_sides(self):
        for script, verdict, code in [("", "equivalent", 0), ("step *= 1.05", "slower", 1), ("step *= 0.95", "faster", 0)]:
            done = subprocess.run(
                ["target/release/transformer-bench", "compare", self.side("base"), self.side("head", script), "--set", "smoke", "--json"],
                cwd=ROOT, text=True, capture_output=True, env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder)})
            self.assertEqual(done.returncode, code, done.stderr)
            case = json.loads(done.stdout)["cases"][0]
            self.assertEqual((case["id"], case["verdict"]), (self.CASE, verdict))
            self.assertLess(case["ci"][0], case["ratio"])

    def test_what_a_setting_brings_is_kept_for_the_report(self):
        side = self.side("setting", 'step *= 2 if os.environ.get("SLOWLY") else 1')
        code, text = self.compare(side, side, "--set", "smoke", "--env", "SLOWLY=1")
        self.assertEqual(code, 1, text)
        kept = json.loads((self.folder / "settings.json").read_text())
        self.assertEqual([(s["setting"], s["id"]) for s in kept], [("SLOWLY=1", self.CASE)])
        self.assertAlmostEqual(kept[0]["ratio"], 2, delta=0.1)

    def test_markdown_for_a_pull_request(self):
        code, text = self.compare(self.side("base"), self.side("head"), "--set", "smoke", "--markdown")
        self.assertEqual(code, 0)
        self.assertIn(f"| {self.CASE} |", text)

    def test_a_case_that_crashes_on_one_side(self):
        crash = 'if word.isdigit(): sys.exit("the kernel is broken")'
        code, text = self.compare(self.side("base"), self.side("head", crash), "--set", "smoke")
        self.assertEqual(code, 1)
        self.assertIn("failed", text)
        self.assertIn("the kernel is broken", text)

    def test_an_inconclusive_case_fails_only_when_strict(self):
        noisy = "step *= random.Random(os.getpid()).choice([0.5, 2])"
        arguments = (self.side("base"), self.side("head", noisy), "--set", "smoke", "--budget", "0.05")
        code, text = self.compare(*arguments, "--strict")
        self.assertEqual(code, 3, text)
        self.assertIn("inconclusive", text)
        self.assertIn("budget", text)

    def test_a_case_that_only_one_side_has(self):
        other = 'if word == "cases": print("forward/torch-cpu/bf16/indicator-tiny-b2", end=" ")'
        code, text = self.compare(self.side("base", other), self.side("head"), "--set", "smoke")
        self.assertEqual(code, 0)
        self.assertRegex(text, r"gone .*bf16")
        code, text = self.compare(self.side("base"), self.side("head", other), "--set", "smoke")
        self.assertRegex(text, r"new .*bf16")

    def test_ctrl_c_leaves_no_process(self):
        slow = f'open("{self.folder}/pid", "w").write(str(os.getpid())); import time; time.sleep(0.1)'
        process = subprocess.Popen(
            ["target/release/transformer-bench", "compare", self.side("base"), self.side("head", slow), "--set", "smoke"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder)})
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130)
        self.assertIn("interrupted", text)
        worker = int((self.folder / "pid").read_text())
        with self.assertRaises(ProcessLookupError):
            os.kill(worker, 0)

    def hanging(self):
        """A side whose process never answers."""
        folder = self.folder / "hanging"
        folder.mkdir(exist_ok=True)
        (folder / "torch").write_text(f"#!/bin/sh\necho $$ >{self.folder}/hanging-pid\nexec sleep 1000\n")
        (folder / "torch").chmod(0o755)
        (self.folder / "hanging-pid").unlink(missing_ok=True)
        return f"dir:{folder}"

    def gone(self):
        """Waits for the hanging process to be over."""
        process = int((self.folder / "hanging-pid").read_text())
        for _ in range(50):
            try:
                os.kill(process, 0)
                # A zombie is over, too.
                if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return True
            except (ProcessLookupError, FileNotFoundError):
                return True
            time.sleep(0.1)
        return False

    def start(self, *arguments):
        process = subprocess.Popen(["target/release/transformer-bench", "compare", *arguments], cwd=ROOT, text=True,
                                   stderr=subprocess.PIPE, env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder)})
        self.addCleanup(process.stderr.close)
        for _ in range(100):
            if (self.folder / "hanging-pid").exists() and (self.folder / "hanging-pid").read_text():
                break
            time.sleep(0.05)
        return process

    def test_a_worker_that_never_answers_ends_with_the_budget(self):
        start = time.monotonic()
        code, text = self.compare(self.hanging(), self.side("head"), "--set", "smoke", "--budget", "0.02")
        self.assertEqual(code, 2, text)
        self.assertIn("no answer", text)
        self.assertLess(time.monotonic() - start, 40)
        self.assertTrue(self.gone())

    def test_term_and_kill_leave_no_process(self):
        for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
            if number == signal.SIGKILL and platform.system() != "Linux":
                continue
            process = self.start(self.hanging(), self.side("head"), "--set", "smoke")
            process.send_signal(number)
            self.assertEqual(process.wait(timeout=10), code)
            self.assertTrue(self.gone(), number)

    def test_a_damaged_settings_file_is_told_before_measuring(self):
        side = self.side("setting")
        results = self.folder / "damaged-settings"
        results.mkdir(exist_ok=True)
        (results / "settings.json").write_text("{")
        start = time.monotonic()
        code, text = self.compare(side, side, "--set", "smoke", "--env", "A=1", env={"TRANSFORMER_BENCH_RESULTS": str(results)})
        self.assertEqual(code, 2)
        self.assertIn("damaged", text)
        self.assertLess(time.monotonic() - start, 2)
        self.assertEqual((results / "settings.json").read_text(), "{")

    def test_sides_that_are_none(self):
        for arguments, word in [
            ((), "scripts/compare main"),
            (("no-such-revision",), "no revision"),
            (("baseline:never",), "no baseline 'never'"),
            ((f"dir:{self.folder}/nowhere",), "holds no executable"),
            (("worktree", "--threshold", "0"), "--threshold"),
            (("worktree", "--budget", "0"), "--budget"),
            (("worktree", "--budget", "1e18"), "--budget"),
            (("worktree", "--threshold", "-5"), "--threshold -5"),
            (("worktree", "--env", "=x"), "NAME=VALUE"),
            (("worktree", "["), "no regular expression"),
            (("worktree", "--env", "X"), "NAME=VALUE"),
            (("worktree", "--backends", "torch-cpu", "torch-cpuu"), "unknown backend"),
        ]:
            code, text = self.compare(*arguments)
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)

    def test_a_filter_that_matches_nothing(self):
        code, text = self.compare(self.side("base", 'if word == "cases": print(); sys.stdout.flush(); continue'),
                                  self.side("head", 'if word == "cases": print(); sys.stdout.flush(); continue'), "zzz")
        self.assertEqual(code, 2)
        self.assertIn("no case", text)


if __name__ == "__main__":
    unittest.main()

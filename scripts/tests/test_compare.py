"""`transformer-bench compare`: verdicts, exit codes, and processes that must end with it."""
import json
import os
import platform
import signal
import subprocess
import time
import unittest

from support import PROGRAM, ROOT, CompareCase, process_ends, temporary_folder


class Compare(CompareCase):
    def test_a_case_that_fails_its_parity_check_is_not_timed(self):
        code, text = self.compare(self.side("base"), self.side("head", parity="wrong loss: error 1"), "--set", "smoke")
        self.assertEqual(code, 1, text)
        self.assertIn("loss: error 1", text)
        # A revision from before parity checks is compared, with a remark.
        code, text = self.compare(self.side("base", parity="failed: unknown request"), self.side("head"), "--set", "smoke")
        self.assertEqual(code, 0, text)
        self.assertIn("can't check its cases", text)

    def test_a_finished_comparison_is_evaluated_with_another_threshold(self):
        code, text = self.compare(self.side("base"), self.side("head", "step *= 1.05"), "--set", "smoke")
        self.assertEqual(code, 1, text)
        code, text = self.compare("--from", "--threshold", "10")
        self.assertEqual(code, 0, text)
        self.assertIn("equivalent", text)
        self.assertIn("nothing was measured now", text)
        code, text = self.compare("--from", "/no/such/file")
        self.assertEqual(code, 2, text)
        self.assertEqual(len(text.splitlines()), 1, text)

    def test_equal_slower_and_faster_sides_get_their_verdicts(self):
        for script, verdict, code in [("", "equivalent", 0), ("step *= 1.05", "slower", 1), ("step *= 0.95", "faster", 0)]:
            process = self.start(self.side("base"), self.side("head", script), "--set", "smoke", "--json")
            output, errors = process.communicate()
            self.assertEqual(process.returncode, code, errors)
            case = json.loads(output)["cases"][0]
            self.assertEqual((case["id"], case["verdict"]), (self.CASE, verdict))
            self.assertLess(case["ci"][0], case["ratio"])

    def test_the_effect_of_a_variable_is_saved_for_the_report(self):
        side = self.side("setting", 'step *= 2 if os.environ.get("SLOWLY") else 1')
        code, text = self.compare(side, side, "--set", "smoke", "--env", "SLOWLY=1")
        self.assertEqual(code, 1, text)
        effects = json.loads((self.folder / "env-effects.json").read_text())
        self.assertEqual([(effect["variables"], effect["id"]) for effect in effects], [("SLOWLY=1", self.CASE)])
        self.assertAlmostEqual(effects[0]["ratio"], 2, delta=0.1)

    def test_markdown_has_a_row_per_case(self):
        code, text = self.compare(self.side("base"), self.side("head"), "--set", "smoke", "--markdown")
        self.assertEqual(code, 0)
        self.assertIn(f"| {self.CASE} |", text)

    def test_a_case_that_crashes_on_one_side_fails(self):
        crash = 'if word.isdigit(): sys.exit("the kernel is broken")'
        code, text = self.compare(self.side("base"), self.side("head", crash), "--set", "smoke")
        self.assertEqual(code, 1)
        self.assertIn("failed", text)
        self.assertIn("the kernel is broken", text)

    def test_processes_of_two_speeds_are_no_regression(self):
        """PyTorch on Metal: 40 % of the processes take 2.5 times as long."""
        numbers = temporary_folder(self)
        # Processes take their speeds in turn, because random ones are all equal by chance in some runs.
        claim = f"open(f'{numbers}/{{os.getpid()}}', 'w').close(); factor = [1, 2.5, 1, 1, 2.5][len(os.listdir('{numbers}')) % 5]"
        side = self.side("bimodal", f"if 'factor' not in globals(): {claim}\n    step *= factor")
        code, text = self.compare(side, side, "--set", "smoke", "--minutes", "0.2")
        # Not 1, a regression.
        self.assertEqual(code, 3, text)
        self.assertIn("inconclusive", text)

    def test_steps_that_stop_computing_fail(self):
        idle = 'if word == "verify": print("failed: no work", flush=True); continue'
        code, text = self.compare(self.side("base"), self.side("head", idle), "--set", "smoke")
        self.assertEqual(code, 1, text)
        self.assertIn("head: no work", text)

    def test_an_inconclusive_case_fails_only_when_strict(self):
        noisy = "step *= random.Random(os.getpid()).choice([0.5, 2])"
        arguments = (self.side("base"), self.side("head", noisy), "--set", "smoke", "--minutes", "0.05")
        code, text = self.compare(*arguments, "--strict")
        self.assertEqual(code, 3, text)
        self.assertIn("inconclusive", text)
        self.assertIn("--minutes", text)

    def test_a_case_of_only_one_side_is_new_or_removed(self):
        other = 'if word == "cases": print("forward/torch-cpu/bf16/indicator-tiny-b2", end=" ")'
        code, text = self.compare(self.side("base", other), self.side("head"), "--set", "smoke")
        self.assertEqual(code, 0)
        self.assertRegex(text, r"removed .*bf16")
        code, text = self.compare(self.side("base"), self.side("head", other), "--set", "smoke")
        self.assertRegex(text, r"new .*bf16")

    def test_ctrl_c_leaves_no_process(self):
        slow = f'open("{self.folder}/pid", "w").write(str(os.getpid())); import time; time.sleep(0.1)'
        process = self.start(self.side("base"), self.side("head", slow), "--set", "smoke")
        self.wait_for("pid")
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 130)
        self.assertIn("interrupted", text)
        worker = int((self.folder / "pid").read_text())
        with self.assertRaises(ProcessLookupError):
            os.kill(worker, 0)

    def hanging(self):
        """Returns a side whose worker never answers."""
        folder = self.folder / "hanging"
        folder.mkdir(exist_ok=True)
        (folder / "torch").write_text(f"#!/bin/sh\necho $$ >{self.folder}/hanging-pid\nexec sleep 1000\n")
        (folder / "torch").chmod(0o755)
        (self.folder / "hanging-pid").unlink(missing_ok=True)
        return f"dir:{folder}"

    def hanging_process_ends(self):
        return process_ends(int((self.folder / "hanging-pid").read_text()))

    def start(self, *arguments):
        process = subprocess.Popen([PROGRAM, "compare", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder)})
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        return process

    def wait_for(self, name):
        """Waits until a worker has written its process id into a file."""
        for _ in range(400):
            if (self.folder / name).exists() and (self.folder / name).read_text():
                return
            time.sleep(0.05)
        self.fail(f"no worker wrote {name}")

    def test_a_worker_that_never_answers_ends_with_the_time_limit(self):
        start = time.monotonic()
        code, text = self.compare(self.hanging(), self.side("head"), "--set", "smoke", "--minutes", "0.02")
        self.assertEqual(code, 2, text)
        self.assertIn("no answer", text)
        self.assertLess(time.monotonic() - start, 40)
        self.assertTrue(self.hanging_process_ends())

    def test_term_and_kill_leave_no_process(self):
        for number, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
            if number == signal.SIGKILL and platform.system() != "Linux":
                continue
            process = self.start(self.hanging(), self.side("head"), "--set", "smoke")
            self.wait_for("hanging-pid")
            process.send_signal(number)
            process.communicate(timeout=10)
            self.assertEqual(process.returncode, code)
            self.assertTrue(self.hanging_process_ends(), number)

    def test_a_damaged_file_of_effects_is_reported_before_measuring(self):
        side = self.side("setting")
        results = self.folder / "damaged"
        results.mkdir(exist_ok=True)
        (results / "env-effects.json").write_text("{")
        start = time.monotonic()
        code, text = self.compare(side, side, "--set", "smoke", "--env", "A=1", env={"TRANSFORMER_BENCH_RESULTS": str(results)})
        self.assertEqual(code, 2)
        self.assertIn("damaged", text)
        self.assertLess(time.monotonic() - start, 2)
        self.assertEqual((results / "env-effects.json").read_text(), "{")

    def test_wrong_arguments_are_refused(self):
        for arguments, word in [
            ((), "scripts/compare main"),
            (("no-such-revision",), "is not a revision"),
            (("baseline:never",), "no baseline 'never'"),
            ((f"dir:{self.folder}/nowhere",), "has no executable"),
            (("worktree", "--threshold", "0"), "--threshold"),
            (("worktree", "--minutes", "0"), "--minutes"),
            (("worktree", "--minutes", "1e18"), "--minutes"),
            (("worktree", "--threshold", "-5"), "'-5' for '--threshold"),
            (("worktree", "--env", "=x"), "NAME=VALUE"),
            (("worktree", "["), "not a regular expression"),
            (("worktree", "--env", "X"), "NAME=VALUE"),
            (("worktree", "--backends", "torch-cpu", "torch-cpuu"), "unknown backend"),
        ]:
            code, text = self.compare(*arguments)
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)

    def test_a_filter_that_matches_nothing_is_an_error(self):
        code, text = self.compare(self.side("base", 'if word == "cases": print(); sys.stdout.flush(); continue'),
                                  self.side("head", 'if word == "cases": print(); sys.stdout.flush(); continue'), "zzz")
        self.assertEqual(code, 2)
        self.assertIn("no case", text)


if __name__ == "__main__":
    unittest.main()

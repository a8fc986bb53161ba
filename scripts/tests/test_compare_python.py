"""`scripts/compare-python`: saved rows and wrong input."""
import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import types
import unittest
from pathlib import Path

from support import ROOT, load, run, temporary_folder

sys.path.insert(0, str(ROOT / "scripts" / "helpers"))
import timing  # noqa: E402


class ComparePython(unittest.TestCase):
    def test_saved_groups_replace_those_of_the_same_steps(self):
        script = load("compare-python")
        case = "train-step/torch-cpu/f32/indicator-b16"
        row = {"case": case, "program": script.SUITE, "ms": 600.4, "low": 590.0, "high": 610.0}
        group = [row, {**row, "program": "eager", "ms": 640.0}]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "machine" / "python.csv"
            with contextlib.redirect_stdout(io.StringIO()):
                script.save(path, [group, [{**row, "case": case.replace("torch", "mlx")}]])
                script.save(path, [[row, {**group[1], "ms": 650.0}]])
            rows = path.read_text().splitlines()
        self.assertEqual(rows[0], "date,group,case,program,ms,low,high")
        self.assertEqual(len(rows), 4)
        self.assertIn("mlx-cpu/f32/indicator-b16,this suite,600.4,590,610", rows[1])
        self.assertIn("/torch-cpu/f32/indicator-b16,eager,650,590,610", rows[3])

    def test_steps_of_one_group_are_timed_in_the_same_rounds(self):
        script = load("compare-python")
        folder = temporary_folder(self)
        log = folder / "log"
        built = {}
        for name, milliseconds in (("torch", 10), ("mlx", 40)):
            built[name] = folder / name
            built[name].write_text(f"""#!/usr/bin/env python3
import sys
print("ready", flush=True)
for line in sys.stdin:
    open("{log}", "a").write("{name} ")
    print(int(line) * {milliseconds}_000_000, 0, 0, flush=True)
""")
            built[name].chmod(0o755)
        steps = [script.Step(f"train-step/{name}-cpu/f32/indicator-b16", "{}") for name in built]
        arguments = types.SimpleNamespace(python=None, model=None, rounds=8)
        rows, missing = script.compare(steps, built, arguments)
        self.assertEqual(([round(row["ms"], 6) for row in rows], missing), ([10, 40], []))
        # One step each to choose the number of steps, then the rounds.
        names = log.read_text().split()[2:]
        pairs = {tuple(names[i:i + 2]) for i in range(0, len(names), 2)}
        self.assertEqual(pairs, {("torch", "mlx"), ("mlx", "torch")})
        self.assertEqual(script.frameworks_sentence(rows), "MLX time / PyTorch time: 4.00 in this suite")

    def test_the_interval_of_a_median_holds_it_as_often_as_it_says(self):
        dice = random.Random(1)
        for count in (6, 15, 40):
            held = 0
            for _ in range(2000):
                _, low, high = timing.median_with_interval([dice.gauss(5, 1) for _ in range(count)])
                held += low <= 5 <= high
            self.assertGreaterEqual(held, 1880, count)

    def test_wrong_input_is_refused_before_anything_is_built(self):
        case = "train-step/mlx-cpu/f32/indicator-b1"
        start = time.monotonic()
        for arguments, word in (
                (["train-step"], "workload/backend/precision/shape"),
                (["--rounds", "0"], "--rounds"),
                (["--rounds"], "--rounds"),
                (["--variants", "tuned", case], "not a variant"),
                (["--batch", "4"], "--model"),
                (["--parity"], "--model"),
                (["--parity", "--model", "src/model/indicator.toml"], "config.json"),
                (["--model", "/no/such/config.json"], "no such file"),
                (["--flops", "--save", "file.csv"], "not allowed"),
                (["--executables", "src"], "torch and mlx"),
                (["--rounds", "abc"], "--rounds"),
                (["a/b/c/d"], "not a case id"),
                (["forward/keras-cpu/f32/indicator-b1"], "not a case id"),
                (["--save", "README.md"], "columns"),
                (["--save", "/dev/null"], "not a regular file"),
                (["--model", "/dev/zero", "--parity"], "regular file"),
                (["--python", "/no/such/python", case], "no such interpreter")):
            with self.subTest(" ".join(arguments)):
                code, text = run("scripts/compare-python", *arguments)
                self.assertEqual(code, 2, text)
                self.assertIn(word, text)
                self.assertEqual(len(text.splitlines()), 1, text)
        self.assertLess(time.monotonic() - start, 20)

    def test_a_full_disk_and_a_closed_pipe_cause_no_traceback(self):
        command = [str(ROOT / "scripts/compare-python"), "--help"]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
        self.assertIn("No space left", done.stderr)
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_a_damaged_file_of_rows_is_refused_before_anything_is_measured(self):
        script = load("compare-python")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "python.csv"
            for content in (b"", b"\xff", b"\0", b"a,b\n1,2\n", (",".join(script.CSV_FIELDS) + "\n1,2\n").encode()):
                path.write_bytes(content)
                with self.assertRaises(script.InputError):
                    script.read_saved(path)
                self.assertEqual(path.read_bytes(), content)

    def test_a_case_that_does_not_exist_is_refused(self):
        code, text = run("scripts/compare-python", "train-step/torch-cpu/f32/no-such-model")
        self.assertEqual(code, 2, text)
        # cargo's progress can precede the error.
        errors = [line for line in text.splitlines() if not line.lstrip().startswith(("Finished", "Compiling", "Blocking"))]
        self.assertEqual(len(errors), 1, text)
        self.assertIn("unknown shape 'no-such-model'", errors[0])

    def test_python_without_frameworks_is_an_error(self):
        code, text = run("scripts/compare-python", "--python", shutil.which("false"), "--rounds", "1",
                         "train-step/torch-cpu/f32/indicator-b1")
        self.assertEqual(code, 1)
        self.assertIn("needs torch or mlx", text)
        self.assertNotIn("Traceback", text)


if __name__ == "__main__":
    unittest.main()

"""`scripts/compare-python`: saved rows and wrong input."""
import contextlib
import io
import os
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

from support import ROOT, load, run


class ComparePython(unittest.TestCase):
    def test_saved_rows_replace_those_of_the_same_case(self):
        script = load("compare-python")
        row = {"case": "train-step/torch-cpu/f32/indicator-b16", "variant": "eager", "suite_ms": 600.4, "python_ms": 640.0,
               "ratio": 0.938, "low": 0.9, "high": 0.95}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "machine" / "python.csv"
            with contextlib.redirect_stdout(io.StringIO()):
                script.save(path, [row, {**row, "case": row["case"].replace("torch", "mlx"), "variant": "compile"}])
                script.save(path, [{**row, "ratio": 0.5}])
            rows = path.read_text().splitlines()
        self.assertEqual(rows[0], "date,case,python,suite_ms,python_ms,ratio,low,high")
        self.assertEqual(len(rows), 3)
        self.assertIn("/mlx-cpu/f32/indicator-b16,mx.compile,600.4,640,0.938,0.900,0.950", rows[1])
        self.assertIn("/torch-cpu/f32/indicator-b16,eager,600.4,640,0.500", rows[2])

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

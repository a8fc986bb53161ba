"""`scripts/compare-python`: saved rows and wrong input."""
import contextlib
import io
import shutil
import tempfile
import unittest
from pathlib import Path

from support import load, run


class ComparePython(unittest.TestCase):
    def test_saved_rows_replace_those_of_the_same_case(self):
        reference = load("reference")
        row = {"case": "train-step/torch-cpu/f32/indicator-b16", "variant": "eager", "ours_ms": 600.4, "python_ms": 640.0,
               "ratio": 0.938, "middle half": (0.9, 0.95)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "machine" / "python.csv"
            with contextlib.redirect_stdout(io.StringIO()):
                reference.save(path, [row, {**row, "case": row["case"].replace("torch", "mlx"), "variant": "compile"}])
                reference.save(path, [{**row, "ratio": 0.5}])
            rows = path.read_text().splitlines()
        self.assertEqual(rows[0], "date,case,python,ours_ms,python_ms,ratio,low,high")
        self.assertEqual(len(rows), 3)
        self.assertIn("/mlx-cpu/f32/indicator-b16,mx.compile,600.4,640,0.938,0.900,0.950", rows[1])
        self.assertIn("/torch-cpu/f32/indicator-b16,eager,600.4,640,0.500", rows[2])

    def test_parity_needs_a_model_of_hugging_face(self):
        code, text = run("scripts/reference", "--parity")
        self.assertEqual(code, 1)
        self.assertIn("--model", text)
        code, text = run("scripts/reference", "--parity", "--model", "src/model/indicator.toml")
        self.assertEqual(code, 1)
        self.assertIn("config.json", text)

    def test_no_python_framework(self):
        for python in (shutil.which("false"), "/no/such/python"):
            code, text = run("scripts/reference", "--python", python, "--rounds", "1",
                             "train-step/torch-cpu/f32/indicator-b1")
            self.assertEqual(code, 1)
            self.assertIn("needs torch or mlx", text)
            self.assertNotIn("Traceback", text)

    def test_a_wrong_id(self):
        code, text = run("scripts/reference", "train-step")
        self.assertEqual(code, 1)
        self.assertIn("workload/backend/precision/shape", text)


if __name__ == "__main__":
    unittest.main()

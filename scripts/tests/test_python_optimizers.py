"""Muon in the Python counterpart of PyTorch's steps."""
import json
import os
import subprocess
import sys
import unittest

from support import ROOT, TORCH_PYTHON, executables, needs_compile, uses_all_cores

# Checks a step, and checks it again with a fault. The fault is a line of Python, or empty.
CHECK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, torch_counterpart, torch_optimizers
case, variant, fault = json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
exec(fault)
print(*torch_counterpart.check(case, variant))
"""
BF16_ITERATIONS = """
class Narrow(torch_optimizers.Optimizers):
    def __init__(self, case, *others):
        super().__init__(case, *others)
        self.is_wide = case["precision"] == "f64"
torch_counterpart.Optimizers = Narrow
"""
FOUR_ITERATIONS = """
class Four(torch.optim.Muon):
    def __init__(self, parameters, **options):
        parameters = list(parameters)
        super().__init__(parameters, ns_steps=5 if parameters[0].dtype == torch.float64 else 4, **options)
torch.optim.Muon = Four
"""
PACKED_AS_ONE = """
rows = torch_optimizers.matrix_rows
torch_optimizers.matrix_rows = lambda m, name, p: rows(m, name, p) if p.dtype == torch.float64 else [p.shape[0]]
"""


class PythonOptimizers(unittest.TestCase):
    def check(self, case, variant, fault=""):
        """Returns the largest error of a step as a share of its tolerance, and the name of that tensor."""
        executable = executables()["torch"]
        described = subprocess.run([executable, "--bench", "--worker"], input=f"describe {case}\n", text=True, check=True,
                                   capture_output=True).stdout
        self.assertEqual(json.loads(described)["optimizer"], "muon")
        folder = ROOT / "scripts" / "python_counterparts"
        done = subprocess.run([sys.executable, "-c", CHECK, folder, described, variant, fault], text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(TORCH_PYTHON)})
        self.assertEqual(done.returncode, 0, done.stderr)
        share, name = done.stdout.split(" ", 1)
        return float(share), name.strip()

    @needs_compile
    @uses_all_cores
    def test_a_step_with_muon_agrees_with_f64(self):
        for method in ("f32", "bf16", "mixed"):
            for variant in ("eager", "tuned"):
                share, name = self.check(f"train-step/torch-cpu/{method}/indicator-tiny-b2-muon", variant)
                self.assertLessEqual(share, 1, f"{method} {variant}: {name}")

    @needs_compile
    @uses_all_cores
    def test_a_fault_in_muon_is_found(self):
        case = "train-step/torch-cpu/f32/indicator-tiny-b2-muon"
        for variant, fault in (("eager", BF16_ITERATIONS), ("eager", FOUR_ITERATIONS), ("tuned", PACKED_AS_ONE)):
            share, name = self.check(case, variant, fault)
            self.assertGreater(share, 1, fault)
            self.assertIn("update of blocks", name)


if __name__ == "__main__":
    unittest.main()

"""The compiled steps of MPS, whose code can be generated on Linux."""
import json
import os
import subprocess
import sys
import unittest

from support import ROOT, TORCH_PYTHON, executables, load, needs_compile, temporary_folder, uses_all_cores

METAL = ROOT / "scripts" / "tests" / "metal"
# Metal's limit of buffers per kernel (Metal Feature Set Tables).
MAX_BUFFERS = 31
CASES = ["forward-backward/torch-mps/f32-compile/indicator-tiny-b2", "forward-backward/torch-mps/mixed-compile/gpt2-tiny-b2-t16"]


class Metal(unittest.TestCase):
    @needs_compile
    @unittest.skipUnless(sys.platform == "linux", "a Mac compiles these steps itself")
    @uses_all_cores
    def test_steps_for_mps_can_be_generated(self):
        folder, torch = temporary_folder(self), (ROOT / ".deps" / "torch").resolve()
        hooks = folder / "hooks.so"
        subprocess.run(["c++", "-std=c++20", "-w", "-shared", "-fPIC", f"-I{torch / 'include'}", METAL / "hooks.cpp", "-o", hooks,
                        f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"], check=True)
        script = load("compare-python")
        requests = [script.query_worker(executables()["torch"], f"describe {case}")[0] for case in CASES]
        done = subprocess.run(
            [sys.executable, METAL / "lower.py", hooks, folder], input="\n".join(requests), capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src/torch/inductor'}:{TORCH_PYTHON.resolve()}", "TMPDIR": str(folder),
                 "PYTHONDONTWRITEBYTECODE": "1"})
        self.assertEqual(done.returncode, 0, done.stderr[-800:])
        all_facts = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len(all_facts), len(CASES))
        for case, facts in zip(CASES, all_facts):
            with self.subTest(case):
                # MPS has no f64, and operators that run on the CPU would copy every tensor.
                self.assertEqual((facts["wide"], facts["fallbacks"]), ([], []))
                self.assertGreater(facts["kernels"], 20)
                self.assertGreater(facts["products"], 20)
                self.assertTrue(1 < facts["buffers"] <= MAX_BUFFERS, facts)


if __name__ == "__main__":
    unittest.main()

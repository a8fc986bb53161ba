"""The bench executables as workers: what they load, what they answer, and the memory that they reuse."""
import platform
import subprocess
import unittest
from pathlib import Path

from support import executables, load, run


class Worker(unittest.TestCase):
    def test_an_executable_loads_one_framework(self):
        """Asked of the loader, for the executables that measure."""
        reference = load("reference")
        for name, executable in reference.executables().items():
            loader = ["otool", "-L"] if platform.system() == "Darwin" else ["ldd"]
            libraries = subprocess.run([*loader, executable], text=True, capture_output=True).stdout
            self.assertEqual("libtorch_cpu" in libraries, name == "torch", libraries)
            self.assertEqual("libmlx" in libraries, name == "mlx", libraries)

    def test_the_worker_counts_steps(self):
        reference = load("reference")
        executable = reference.executables()["torch"]
        worker = reference.Worker([executable, "--bench", "--worker", "copy-peak/torch-cpu/f32/m1"])
        self.addCleanup(worker.process.stdout.close)
        self.addCleanup(worker.process.stderr.close)
        self.assertGreater(worker.time(3), 0)
        worker.close()
        with self.assertRaises(reference.Stop):
            reference.Worker([executable, "--bench", "--worker", "copy-peak/torch-mps/f32/m1"])


class Heap(unittest.TestCase):
    """One step takes one time, whatever the process did before it."""

    CASES = {"torch": "attention-grad/torch-cpu/f32/b16-h8-n111-d32", "mlx": "attention-grad/mlx-cpu/f32/b16-h8-n111-d32"}
    OTHERS = ["forward/{}-cpu/f32/indicator-b1", "feed-forward-grad/{}-cpu/f32/b16-n111-d256-f1024"]

    def measure(self, framework, before=(), env=None):
        """Milliseconds and page faults of a step, after other cases in the same process."""
        worker = self.workers.Worker([self.built[framework], "--bench", "--worker", self.CASES[framework]], env)
        try:
            for case in [*before, self.CASES[framework]]:
                worker.process.stdin.write(f"case {case}\n")
                worker.process.stdin.flush()
                self.assertEqual(worker.read(), "ready")
                worker.time(3)
            faults = lambda: int(Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[7])
            times, each = [], []
            for _ in range(12):
                before = faults()
                times.append(1e3 * worker.time(1))
                each.append(faults() - before)
            # The heap grows in some of the first steps.
            return sorted(times)[len(times) // 4], sorted(each)[len(each) // 2]
        finally:
            worker.close()
            worker.process.stdout.close()
            worker.process.stderr.close()

    def setUp(self):
        if not Path("/proc/self/stat").exists():
            self.skipTest("page faults of a process are read from /proc, which this system lacks")
        self.workers = load("reference")
        self.built = self.workers.executables()

    def test_first_and_last_case_take_the_same_time(self):
        for framework in self.CASES:
            others = [case.format(framework) for case in self.OTHERS]
            ratios = []
            for _ in range(3):
                (first, faults), (last, later) = self.measure(framework), self.measure(framework, others)
                # At 1.5 µs each, as measured on a virtual machine, 100 are 0.15 ms of over 30.
                self.assertLess(max(faults, later), 100, framework)
                ratios.append(last / first)
            # Faults made it 1.7 to 1.9 times; two runs on a shared machine differ by up to a quarter.
            self.assertLess(abs(sorted(ratios)[1] - 1), 0.25, f"{framework}: {ratios}")

    def test_the_systems_way_faults(self):
        """What the test above holds down is there without it."""
        _, faults = self.measure("mlx", env={"TRANSFORMER_BENCH_HEAP": "system"})
        self.assertGreater(faults, 1000)

    def test_a_wrong_word(self):
        code, text = run(self.built["mlx"], "--bench", "--list", env={"TRANSFORMER_BENCH_HEAP": "never"})
        self.assertEqual((code, len(text.splitlines())), (2, 1), text)
        self.assertIn("kept", text)


if __name__ == "__main__":
    unittest.main()

"""`transformer-bench interleave`: the rounds behind the first sentence of the report."""
import json
import re
import unittest

from support import PROGRAM, build, executables, fake_worker, load, run, temporary_folder

TORCH, MLX = (f"train-step/{backend}/f32/indicator-b16" for backend in ("torch-cpu", "mlx-cpu"))
# Of the processes, 40 % take 2.5 times as long for their whole life.
BIMODAL = "step *= random.Random(os.getpid()).choice([1, 1, 1, 2.5, 2.5])"


def record(case, nanoseconds):
    workload, backend, precision, shape = case.split("/")
    return {"id": case, "workload": workload, "backend": backend, "precision": precision, "shape": shape,
            "status": "measured", "reason": "", "median_ns": nanoseconds, "samples": 10, "peak_bytes": None,
            "ci_ns": [0.99 * nanoseconds, 1.01 * nanoseconds], "rss_peak_bytes": None,
            "throughput": {"value": 16e9 / nanoseconds, "unit": "samples/s"}}


class Interleave(unittest.TestCase):
    """Rounds of workers that report times instead of measuring them: 40 ms for PyTorch and 80 ms for MLX."""

    def setUp(self):
        build()
        self.folder = temporary_folder(self)

    def interleave(self, torch="", mlx="step *= 2"):
        """Compares two workers. Returns the exit code, the report and the records."""
        results = self.folder / "results"
        (results / "run").mkdir(parents=True, exist_ok=True)
        [machine] = load("compare-python").query_worker(executables()["torch"], "machine")
        for name, case, script in (("torch", TORCH, torch), ("mlx", MLX, mlx)):
            fake_worker(self.folder / "side" / name, case, script, step=40_000_000)
            part = {"framework": name, "executable": "1", "selections": [{"set": "quick", "filter": ""}], "selected": 1,
                    "version": 4, "machine": json.loads(machine), "cases": [record(case, 60e6)]}
            (results / "run" / f"{name}.json").write_text(json.dumps(part))
        env = {"TRANSFORMER_BENCH_RESULTS": str(results)}
        code, text = run(PROGRAM, "interleave", "--executables", self.folder / "side", env=env)
        report_code, report = run(PROGRAM, "report", env=env)
        self.assertEqual(report_code, 0, report)
        return code, text + report, json.loads((results / "results.json").read_text())

    def test_the_ratio_of_the_report_is_that_of_its_speeds(self):
        code, text, results = self.interleave()
        self.assertEqual(code, 0, text)
        found = re.search(r"PyTorch trains indicator (\S+) times as fast as MLX \(95 % CI (\S+) to (\S+) between processes, "
                          r"8 interleaved rounds\): (\S+) samples/s with f32 and (\S+) samples/s", text)
        ratio, low, high, torch, mlx = map(float, found.groups())
        self.assertAlmostEqual(ratio, torch / mlx, delta=0.02)
        self.assertAlmostEqual(ratio, 2, delta=0.02)
        self.assertTrue(low <= ratio <= high, text)
        self.assertRegex(text, rf"PyTorch CPU +\| +{torch:.0f} .*8 rounds")
        # Criterion's median would be 267 samples/s.
        self.assertAlmostEqual(torch, 400, delta=5)
        self.assertEqual(len(results["interleaved"][0]["round_ns"]), 8)

    def test_processes_of_two_speeds_widen_the_interval_and_name_no_winner(self):
        code, text, results = self.interleave(torch=BIMODAL, mlx=BIMODAL)
        self.assertEqual(code, 0, text)
        self.assertIn("neither framework is clearly faster", text)
        low, high = results["interleaved"][0]["ratio_ci"]
        self.assertGreater(high / low, 1.3)
        self.assertTrue(low < 1 < high)

    def test_steps_that_stop_computing_are_an_error(self):
        code, text, results = self.interleave(mlx='if word == "verify": print("failed: no work", flush=True); continue')
        self.assertEqual(code, 1, text)
        self.assertIn(f"bench: {MLX}: interleaved rounds: no work", text)
        self.assertNotIn("times as fast", text)
        failed = [case for case in results["cases"] if case["status"] == "error"]
        self.assertEqual([case["id"] for case in failed], [MLX])


if __name__ == "__main__":
    unittest.main()

"""Cases that several processes share: what is wrong is caught, what fails is named, nothing is left running."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_scripts import ROOT, load  # noqa: E402

FRAMEWORKS = ("torch", "mlx")
# What a user waits at most until a lost rank is named.
SOON = 30


def group_of(process):
    """The processes of a session that was started for a test."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, group, state in rows if int(group) == process.pid and not state.startswith("Z")]


class Ranks(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.executables = load("reference").executables()

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def start(self, framework, *arguments, name="", **env):
        own = {"TRANSFORMER_BENCH_RESULTS": str(self.folder / f"results-{framework}{name}"),
               "CRITERION_HOME": str(self.folder / f"criterion-{framework}{name}"), "TRANSFORMER_BENCH_SET": "smoke"}
        return subprocess.Popen([self.executables[framework], "--bench", *arguments], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                env={**os.environ, **own, **env})

    def asked(self, framework, *requests, name="", **env):
        """A worker's answers, how long they took, and what still runs behind its end."""
        process = self.start(framework, "--worker", name=name, **env)
        start = time.monotonic()
        output, _ = process.communicate("".join(f"{r}\n" for r in requests), timeout=120)
        took = time.monotonic() - start
        return output.splitlines(), took, group_of(process)

    def step(self, framework, precision="f32"):
        return f"train-step/{framework}-cpu/{precision}/indicator-tiny-b2-r2"

    def test_a_wrong_exchange_is_caught(self):
        for framework in FRAMEWORKS:
            cases = [self.step(framework, precision) for precision in ("f32", "f32-overlap", "f32-opt")]
            for fault, word in (("", "now"), ("silent", "the ranks differ in grad/"), ("sum", "error 1.00e0"), ("same", "error")):
                with self.subTest(f"{framework}, {fault or 'none'}"):
                    answers, _, left = self.asked(framework, *(f"prove {case}" for case in cases), name=fault,
                                                  TRANSFORMER_BENCH_RANK_FAULT=fault)
                    self.assertEqual([answer.split()[0] for answer in answers], ["wrong" if fault else "now"] * 3, answers)
                    self.assertTrue(all(word in answer for answer in answers), answers)
                    self.assertEqual(left, [])

    def test_a_lost_rank_is_named_in_time(self):
        """Beside each other: most of it is waiting."""
        faults = {"hang 1": "rank 1 did not answer 'steps 1'", "absent 0": "rank 0 did not answer 'join'",
                  "die 1": "rank 1: the process ended with signal: 6", "die 0": "rank 0: the process ended with signal: 6"}

        def lost(framework, fault):
            case = self.step(framework)
            return self.asked(framework, f"case {case}", f"case {case.removesuffix('-r2')}", "1",
                              name=fault.replace(" ", "-"), TRANSFORMER_BENCH_RANK_FAULT=fault)

        with ThreadPoolExecutor(4) as pool:
            found = {(framework, fault): pool.submit(lost, framework, fault) for fault in faults for framework in FRAMEWORKS}
        for (framework, fault), future in found.items():
            with self.subTest(f"{framework}, {fault}"):
                (said, other, time_of_it), _, left = future.result()
                self.assertIn(faults[fault], said)
                self.assertIn("all ranks were stopped", said)
                for waited in re.findall(r"within (\d+) s", said):
                    self.assertLessEqual(int(waited), SOON)
                self.assertEqual(other, "ready")
                self.assertRegex(time_of_it, r"^\d+ \d+ \d+$")
                self.assertEqual(left, [])

    def test_a_run_goes_on_behind_it(self):
        process = self.start("torch", "--test", "train-step/torch-cpu/f32/indicator-tiny-b2(-r2)?$",
                             TRANSFORMER_BENCH_RANK_FAULT="die 1")
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        self.assertIn("torch: 1 cases ran, 1 failed", output)
        self.assertRegex(errors, r"-r2: error, .*rank 1: the process ended with signal: 6")

    def test_the_first_rank_is_profiled(self):
        for framework in FRAMEWORKS:
            with self.subTest(framework):
                process = self.start(framework, "--profile-time", "2", f"^{self.step(framework, 'f32-overlap')}$")
                output, errors = process.communicate(timeout=120)
                self.assertEqual(process.returncode, 0, errors)
                self.assertRegex(output, r"-r2: \d+ samples")
                profile = self.folder / f"criterion-{framework}/train-step/{framework}-cpu_f32-overlap/indicator-tiny-b2-r2/profile"
                stacks = (profile / "flamegraph.folded").read_text().splitlines()
                own = sum(int(line.rsplit(" ", 1)[1]) for line in stacks if line.startswith("step;"))
                # The process that conducts only waits: its steps leave next to no samples.
                self.assertGreater(own, 50, stacks[:5])
                self.assertEqual(group_of(process), [])

    def test_more_ranks_than_devices_are_skipped(self):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        batch = 2 * (cores + 1)
        (said,), _, _ = self.asked("torch", f"case train-step/torch-cpu/f32/indicator-b{batch}-r{cores + 1}")
        self.assertIn(f"{cores + 1} ranks take a device each, and this machine has {cores} cores", said)

    def test_a_comparison_on_one_core_leaves_them_out(self):
        done = subprocess.run(["scripts/compare", "worktree", "--set", "smoke", "torch-cpu/f32/indicator-tiny-b2-r2$"],
                              cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)
        self.assertIn("1 cases of several devices: --threads all compares them", done.stderr)

    def test_who_conducts_may_be_killed(self):
        for framework in FRAMEWORKS:
            with self.subTest(framework):
                process = self.start(framework, "--worker")
                process.stdin.write(f"case {self.step(framework)}\n")
                process.stdin.flush()
                self.assertEqual(process.stdout.readline().strip(), "ready")
                self.assertEqual(len(group_of(process)), 3)
                process.kill()
                process.communicate()
                until = time.monotonic() + 10
                while group_of(process) and time.monotonic() < until:
                    time.sleep(0.1)
                self.assertEqual(group_of(process), [])

    def measured(self, framework):
        part = json.loads((self.folder / f"results-{framework}" / "run" / f"{framework}.json").read_text())
        return {case["id"]: case["status"] for case in part["cases"]}

    def test_torchrun_starts_them(self):
        torch = ROOT / ".deps" / "torch-python"
        if not torch.exists():
            self.skipTest("set-up prepared no torch for Python")
        case = "all-reduce/torch-cpu/f32/m1-r2"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node", "2",
             self.executables["torch"], "--bench", f"^{case}$"], capture_output=True, text=True, timeout=120, env={
                **os.environ, "PYTHONPATH": str(torch), "TRANSFORMER_BENCH_SET": "smoke",
                "TRANSFORMER_BENCH_RESULTS": str(self.folder / "results-torch"), "CRITERION_HOME": str(self.folder / "criterion")})
        self.assertEqual(done.returncode, 0, done.stderr[-500:])
        self.assertEqual(self.measured("torch"), {case: "measured"})

    def hosts(self, ports):
        file = self.folder / "hosts.json"
        file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        return str(file)

    def free(self):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            return one.getsockname()[1]

    def test_mlx_launch_s_variables_start_them(self):
        hosts, case = self.hosts([self.free(), self.free()]), "all-reduce/mlx-cpu/f32/m1-r2"
        both = [self.start("mlx", f"^{case}$", MLX_RANK=str(rank), MLX_HOSTFILE=hosts) for rank in range(2)]
        for process in both:
            _, errors = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 0, errors[-500:])
        self.assertEqual(self.measured("mlx"), {case: "measured"})

    def test_a_port_that_is_taken(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            hosts = self.hosts([taken.getsockname()[1], self.free()])
            process = self.start("mlx", "^all-reduce/mlx-cpu/f32/m1-r2$", MLX_RANK="0", MLX_HOSTFILE=hosts)
            _, errors = process.communicate(timeout=SOON)
            self.assertEqual(process.returncode, 1, errors)
            self.assertIn("MLX's ring did not bring rank 0 to the others", errors)

    def test_a_launched_rank_that_hangs_ends_the_leader(self):
        """MLX's ring itself would wait for ever."""
        hosts = self.hosts([self.free(), self.free()])
        leader, other = (
            self.start("mlx", "^train-step/mlx-cpu/f32/indicator-tiny-b2-r2$", name=str(rank), MLX_RANK=str(rank),
                       MLX_HOSTFILE=hosts, TRANSFORMER_BENCH_RANK_FAULT="hang 1") for rank in range(2))
        try:
            _, errors = leader.communicate(timeout=SOON + 20)
            self.assertEqual(leader.returncode, 2, errors[-500:])
            self.assertIn("a rank is gone or hangs: 'steps 1'", errors)
        finally:
            os.killpg(other.pid, signal.SIGKILL)
            other.communicate()


if __name__ == "__main__":
    unittest.main()

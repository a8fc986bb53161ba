"""Data-parallel cases: a wrong all-reduce is found, a failed rank is reported, and no process outlives a run."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from support import CHECK_PARITY, ROOT, TORCH_PYTHON, executables, needs_compile, needs_quiet_machine, run, temporary_folder, uses_all_cores

FRAMEWORKS = ("torch", "mlx")
# Seconds until a lost rank is reported, at most.
REPORT_TIMEOUT = 30


def group_of(process):
    """Returns the running processes of the process group that a test has started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for pid, group, state in rows if int(group) == process.pid and not state.startswith("Z")]


class Ranks(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.executables = executables()

    def setUp(self):
        self.folder = temporary_folder(self)

    def start(self, framework, *arguments, name="", **env):
        own = {"TRANSFORMER_BENCH_RESULTS": str(self.folder / f"results-{framework}{name}"),
               "CRITERION_HOME": str(self.folder / f"criterion-{framework}{name}"), "TRANSFORMER_BENCH_SET": "smoke"}
        return subprocess.Popen([self.executables[framework], "--bench", *arguments], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                                env={**os.environ, **own, **env})

    def query(self, framework, *requests, name="", **env):
        """Returns a worker's answers, and the processes that run after its end."""
        process = self.start(framework, "--worker", name=name, **env)
        output, _ = process.communicate("".join(f"{r}\n" for r in requests), timeout=120)
        return output.splitlines(), group_of(process)

    def step(self, framework, precision="f32"):
        return f"train-step/{framework}-cpu/{precision}/indicator-tiny-b2-dp2"

    @uses_all_cores
    def test_a_wrong_all_reduce_is_found(self):
        faults = {"": "now", "no-sync": "the ranks differ in grad/", "sum": "error 5.00e-1", "same": "error"}

        def check(framework, fault):
            cases = [self.step(framework, method) for method in ("f32", "f32-overlap", "f32-tuned")]
            return self.query(framework, *(f"{CHECK_PARITY} {case}" for case in cases), name=fault,
                              TRANSFORMER_BENCH_RANK_FAULT=fault)

        for (framework, fault), (answers, running) in self.run_with_faults(check, faults, 2):
            with self.subTest(f"{framework}, {fault or 'none'}"):
                self.assertEqual([answer.split()[0] for answer in answers], ["wrong" if fault else "now"] * 3, answers)
                self.assertTrue(all(faults[fault] in answer for answer in answers), answers)
                self.assertEqual(running, [])

    def run_with_faults(self, run, faults, threads):
        """Calls `run` with each framework and fault, several at a time. Returns the arguments with the results."""
        arguments = [(framework, fault) for fault in faults for framework in FRAMEWORKS]
        with ThreadPoolExecutor(threads) as pool:
            return list(zip(arguments, pool.map(lambda pair: run(*pair), arguments)))

    @uses_all_cores
    def test_a_lost_rank_is_reported_in_time(self):
        faults = {"hang 1": "rank 1 did not answer 'steps 1'", "absent 0": "rank 0 did not answer 'join'",
                  "die 1": "rank 1: the process ended with signal: 6", "die 0": "rank 0: the process ended with signal: 6"}

        def query_with_fault(framework, fault):
            case = self.step(framework)
            return self.query(framework, f"case {case}", f"case {case.removesuffix('-dp2')}", "1",
                              name=fault.replace(" ", "-"), TRANSFORMER_BENCH_RANK_FAULT=fault)

        # Most of the time is waiting.
        for (framework, fault), (answers, running) in self.run_with_faults(query_with_fault, faults, 4):
            with self.subTest(f"{framework}, {fault}"):
                failure, next_case, times = answers
                self.assertIn(faults[fault], failure)
                self.assertIn("all ranks were stopped", failure)
                for waited in re.findall(r"within (\d+) s", failure):
                    self.assertLessEqual(int(waited), REPORT_TIMEOUT)
                self.assertRegex(next_case, r"^ready \d+$")
                self.assertRegex(times, r"^\d+ \d+ \d+$")
                self.assertEqual(running, [])

    @uses_all_cores
    def test_a_run_continues_after_a_lost_rank(self):
        process = self.start("torch", "--test", "train-step/torch-cpu/f32/indicator-tiny-b2(-dp2)?$",
                             TRANSFORMER_BENCH_RANK_FAULT="die 1")
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        self.assertIn("torch: 1 passed, 1 failed", output)
        self.assertRegex(errors, r"-dp2 failed: .*rank 1: the process ended with signal: 6")

    @uses_all_cores
    def test_the_first_rank_is_profiled(self):
        for framework in FRAMEWORKS:
            with self.subTest(framework):
                process = self.start(framework, "--profile-time", "2", f"^{self.step(framework, 'f32-overlap')}$")
                output, errors = process.communicate(timeout=120)
                self.assertEqual(process.returncode, 0, errors)
                self.assertRegex(output, r"-dp2: \d+ samples")
                profile = self.folder / f"criterion-{framework}/train-step/{framework}-cpu_f32-overlap/indicator-tiny-b2-dp2/profile"
                stacks = (profile / "flamegraph.folded").read_text().splitlines()
                own = sum(int(line.rsplit(" ", 1)[1]) for line in stacks if line.startswith("step;"))
                # The controlling process only waits, and has almost no samples.
                self.assertGreater(own, 50, stacks[:5])
                self.assertEqual(group_of(process), [])

    def test_more_ranks_than_devices_are_skipped(self):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        batch = 2 * (cores + 1)
        (reason,), _ = self.query("torch", f"case train-step/torch-cpu/f32/indicator-b{batch}-dp{cores + 1}")
        self.assertIn(f"needs one device for each of {cores + 1} ranks, and this machine has {cores} cores", reason)

    def test_a_comparison_on_one_core_leaves_out_data_parallel_cases(self):
        code, text = run("scripts/compare", "worktree", "--set", "smoke", "torch-cpu/f32/indicator-tiny-b2-dp2$",
                         env={"TRANSFORMER_BENCH_RESULTS": str(self.folder)})
        self.assertEqual(code, 2)
        self.assertIn("cases on several devices need --threads all: 1 left out", text)

    def test_ranks_end_when_the_controlling_process_is_killed(self):
        for framework in FRAMEWORKS:
            with self.subTest(framework):
                process = self.start(framework, "--worker")
                process.stdin.write(f"case {self.step(framework)}\n")
                process.stdin.flush()
                self.assertRegex(process.stdout.readline(), r"^ready \d+$")
                self.assertEqual(len(group_of(process)), 3)
                process.kill()
                process.communicate()
                deadline = time.monotonic() + 10
                while group_of(process) and time.monotonic() < deadline:
                    time.sleep(0.1)
                self.assertEqual(group_of(process), [])

    def statuses(self, framework):
        part = json.loads((self.folder / f"results-{framework}" / "run" / f"{framework}.json").read_text())
        return {case["id"]: case["status"] for case in part["cases"]}

    @needs_compile
    def test_torchrun_starts_ranks(self):
        case = "all-reduce/torch-cpu/f32/1mib-dp2"
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node", "2",
             self.executables["torch"], "--bench", f"^{case}$"], capture_output=True, text=True, timeout=120, env={
                **os.environ, "PYTHONPATH": str(TORCH_PYTHON), "TRANSFORMER_BENCH_SET": "smoke",
                "TRANSFORMER_BENCH_RESULTS": str(self.folder / "results-torch"), "CRITERION_HOME": str(self.folder / "criterion")})
        self.assertEqual(done.returncode, 0, done.stderr[-500:])
        self.assertEqual(self.statuses("torch"), {case: "measured"})

    def write_hosts(self, ports, name="hosts"):
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        return str(file)

    def free_ports(self, count):
        """Returns different ports. They are bound together, because a released port can be given out again."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for each in sockets:
                each.bind(("127.0.0.1", 0))
            return [each.getsockname()[1] for each in sockets]

    def test_the_variables_of_mlx_launch_start_ranks(self):
        hosts, case = self.write_hosts(self.free_ports(2)), "all-reduce/mlx-cpu/f32/1mib-dp2"
        both = [self.start("mlx", f"^{case}$", MLX_RANK=str(rank), MLX_HOSTFILE=hosts) for rank in range(2)]
        for process in both:
            _, errors = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 0, errors[-500:])
        self.assertEqual(self.statuses("mlx"), {case: "measured"})

    def test_a_port_in_use_is_an_error(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            hosts = self.write_hosts([taken.getsockname()[1], *self.free_ports(1)])
            process = self.start("mlx", "^all-reduce/mlx-cpu/f32/1mib-dp2$", MLX_RANK="0", MLX_HOSTFILE=hosts)
            _, errors = process.communicate(timeout=REPORT_TIMEOUT)
            self.assertEqual(process.returncode, 1, errors)
            self.assertIn("MLX's ring did not connect rank 0 with the others", errors)

    @needs_quiet_machine
    def test_a_launched_rank_that_stays_alone_ends_in_time_with_one_line(self):
        free = self.free_ports(8)

        def run_alone(framework, rank):
            ports = [free.pop(), free.pop()]
            variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": self.write_hosts(ports, f"{framework}{rank}")} \
                if framework == "mlx" else \
                {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
            process = self.start(framework, f"^all-reduce/{framework}-cpu/f32/1mib-dp2$", name=str(rank), **variables)
            start = time.monotonic()
            try:
                _, errors = process.communicate(timeout=2 * REPORT_TIMEOUT)
            finally:
                process.kill()
            return process.returncode, errors, time.monotonic() - start

        # The programs start in a few seconds, four at a time.
        for (framework, rank), (code, errors, seconds) in self.run_with_faults(run_alone, (0, 1), 4):
            with self.subTest(f"{framework}, rank {rank}"):
                self.assertIn(code, (1, 2), errors)
                self.assertLess(seconds, REPORT_TIMEOUT + 10)
                lines = [line for line in errors.splitlines() if not line.startswith(("note:", "rank 0 waits"))]
                self.assertLessEqual(len(lines), 2, errors)

    def test_wrong_variables_of_a_launcher_are_refused(self):
        hosts = self.folder / "hosts.json"
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
        for framework, change, word in (
                ("torch", {"MASTER_PORT": "abc"}, "MASTER_PORT=abc: use a port"),
                ("torch", {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: use a port"),
                ("torch", {"MASTER_ADDR": ""}, "MASTER_ADDR is not set: start the ranks with torchrun"),
                ("torch", {"RANK": "x"}, "RANK=x is not a number"),
                ("torch", {"LOCAL_RANK": "x"}, "LOCAL_RANK=x is not a number"),
                ("torch", {"WORLD_SIZE": str(2**64 - 1)}, "too large"),
                ("mlx", {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}, "not a list of hosts"),
                ("mlx", {"MLX_RANK": "0", "MLX_HOSTFILE": str(pipe)}, "not a regular file"),
                ("mlx", {"MLX_RANK": "0", "MLX_WORLD_SIZE": "2"}, "start the ranks with mlx.launch")):
            with self.subTest(f"{framework}, {change}"):
                hosts.write_text("[1, 2]")
                process = self.start(framework, "^all-reduce/", **{**(two if framework == "torch" else {}), **change})
                _, errors = process.communicate(timeout=REPORT_TIMEOUT)
                self.assertEqual(process.returncode, 2, errors)
                self.assertIn(word, errors)
                self.assertEqual(len(errors.splitlines()), 1, errors)

    def test_a_launched_rank_that_hangs_ends_the_leader(self):
        """MLX's ring has no time-out of its own."""
        hosts = self.write_hosts(self.free_ports(2))
        leader, other = (
            self.start("mlx", "^train-step/mlx-cpu/f32/indicator-tiny-b2-dp2$", name=str(rank), MLX_RANK=str(rank),
                       MLX_HOSTFILE=hosts, TRANSFORMER_BENCH_RANK_FAULT="hang 1") for rank in range(2))
        try:
            _, errors = leader.communicate(timeout=REPORT_TIMEOUT + 20)
            self.assertEqual(leader.returncode, 2, errors[-500:])
            self.assertIn("a rank ended or hangs: 'steps 1'", errors)
        finally:
            os.killpg(other.pid, signal.SIGKILL)
            other.communicate()


if __name__ == "__main__":
    unittest.main()

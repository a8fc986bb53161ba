"""Comparisons of releases and of Python environments, and the search for the first slower one."""
import concurrent.futures
import fcntl
import json
import os
import subprocess
import sys
import unittest
from pathlib import Path
from unittest import mock

from support import CHECK_PARITY, PROGRAM, ROOT, CompareCase, run, temporary_folder, uses_all_cores

sys.path[:0] = [str(ROOT / "scripts" / name) for name in ("helpers", "setup.d")]
import python_release  # noqa: E402
import python_sides  # noqa: E402
import shared  # noqa: E402

MACHINE = {"cpu": "", "cores": 2, "memory_bytes": 0, "os": "", "arch": "", "gpus": [], "driver": "", "commit": "",
           "dirty": False}
# A cargo and a set-up of a checkout whose benchmarks only report times. A log has a line for each call.
FAKE_CARGO = """#!/usr/bin/env python3
import json, re, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import fake_worker
version = re.search('version = "=([^"]+)"', Path("src/torch/Cargo.toml").read_text())[1]
with open({log!r}, "a") as log:
    log.write(sys.argv[1] + " " + version + "\\n")
if sys.argv[1] == "bench":
    time.sleep(0.3)
    for name, case in (("torch", {case!r}), ("mlx", "")):
        path = Path({folder!r}) / version / name
        fake_worker(path, case, "step *= 1.05" if version == "0.26.0" else "")
        print(json.dumps({{"executable": str(path), "target": {{"name": name, "kind": ["bench"]}}}}))
"""
FAKE_SETUP = """#!/usr/bin/env python3
from pathlib import Path
Path(".cargo").mkdir()
Path(".cargo/config.toml").write_text(Path("src/torch/Cargo.toml").read_text())
"""


class Releases(CompareCase):
    def checkout(self):
        """Returns a checkout and the environment in which it builds at once."""
        folder = temporary_folder(self)
        checkout, tools = folder / "checkout", folder / "tools"
        for name in ("src/compare", "src/torch", "src/mlx", "scripts", "benches"):
            (checkout / name).mkdir(parents=True)
        for name in ("src/compare/revisions.rs", "Cargo.toml", "Cargo.lock", "build.rs"):
            (checkout / name).touch()
        (checkout / "src/torch/Cargo.toml").write_text('[dependencies]\ntch = { version = ">=0.24, <0.27" }\n')
        (checkout / "src/mlx/Cargo.toml").write_text('[dependencies]\nmlx-rs = "0.33"\nmlx-sys = "0.7"\n')
        tools.mkdir()
        cargo = FAKE_CARGO.format(tests=str(ROOT / "scripts/tests"), log=str(folder / "log"), folder=str(folder / "built"),
                                  case=self.CASE)
        (folder / "built").mkdir()
        for path, text in ((tools / "cargo", cargo), (checkout / "scripts/setup", FAKE_SETUP)):
            path.write_text(text)
            path.chmod(0o755)
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache"),
               "TRANSFORMER_BENCH_RESULTS": str(folder / "results")}
        return folder, checkout, env

    def start(self, checkout, env, *arguments):
        return subprocess.Popen([PROGRAM, "compare", *arguments, "--set", "smoke", "--json"], cwd=checkout, env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def test_two_releases_are_built_once_and_compared(self):
        folder, checkout, env = self.checkout()
        for _ in range(2):
            process = self.start(checkout, env, "--torch", "2.11.0", "2.13.0")
            output, errors = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 1, errors)
            found = json.loads(output)
            self.assertIn("PyTorch 2.11.0 in working tree", found["base"])
            self.assertIn("PyTorch 2.13.0 in working tree", found["head"])
            self.assertEqual([case["verdict"] for case in found["cases"]], ["slower"])
        log = (folder / "log").read_text().split("\n")
        self.assertEqual([log.count(f"bench {version}") for version in ("0.24.0", "0.26.0")], [1, 1], log)
        self.assertEqual(list((folder / "cache/transformer-bench/compare").glob("tree-*")), [])
        # A changed source is built again.
        (checkout / "src/lib.rs").write_text("// changed\n")
        self.start(checkout, env, "--torch", "2.11.0", "2.11.0").communicate(timeout=120)
        self.assertEqual((folder / "log").read_text().count("bench 0.24.0"), 2)

    def test_two_comparisons_of_releases_at_once_share_the_builds(self):
        folder, checkout, env = self.checkout()
        both = [self.start(checkout, env, "--torch", "2.11.0", "2.13.0") for _ in range(2)]
        for process in both:
            output, errors = process.communicate(timeout=120)
            self.assertEqual(process.returncode, 1, errors)
        self.assertEqual((folder / "log").read_text().count("bench"), 2)

    def test_the_build_waits_for_another_one(self):
        folder, checkout, env = self.checkout()
        lock = folder / "cache/transformer-bench/compare/lock"
        lock.parent.mkdir(parents=True)
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            process = self.start(checkout, env, "--torch", "2.11.0", "2.13.0")
            self.assertIn("waiting for another comparison", process.stderr.readline())
            self.assertFalse((folder / "log").exists())
        process.communicate(timeout=120)
        self.assertEqual(process.returncode, 1)

    def test_a_release_that_cannot_be_fetched_leaves_nothing(self):
        folder, checkout, env = self.checkout()
        (folder / "tools/cargo").write_text("#!/bin/sh\necho 'error: no network' >&2\nexit 101\n")
        process = self.start(checkout, env, "--torch", "2.11.0", "2.13.0")
        output, errors = process.communicate(timeout=60)
        self.assertEqual((process.returncode, output), (2, ""))
        self.assertEqual(errors.splitlines(), ["compare: PyTorch 2.11.0: its crates could not be fetched: error: no network"])
        self.assertEqual([path.name for path in (folder / "cache/transformer-bench/compare").iterdir()], ["lock"])

    def test_the_search_builds_only_the_releases_that_it_compares(self):
        folder, checkout, env = self.checkout()
        process = self.start(checkout, env, "--bisect", "2.11.0..2.13.0")
        output, errors = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 1, errors)
        found = json.loads(output)
        self.assertIn("PyTorch 2.13.0", found["first_slower"])
        self.assertEqual(len(found["comparisons"]), 1)

    def test_releases_without_crates_are_refused_in_one_line(self):
        for arguments, word in (
                (("--torch", "2.9.1", "2.13.0"), "choose PyTorch 2.11.0 or 2.13.0"),
                (("--mlx", "0.31.2", "0.32.2"), "choose MLX 0.32.2 or 0.32.3 or 0.32.4"),
                (("--bisect", "2.9.1..2.13.0"), "PyTorch 2.11.0 or 2.13.0, MLX 0.32.2 or 0.32.3 or 0.32.4"),
                (("--bisect", "2.13.0..2.11.0"), "to a later one"),
                (("--bisect", "baseline:a,worktree"), "a baseline does not"),
                (("--torch", "2.11.0", "2.13.0", "baseline:a"), "not from executables or a baseline"),
                (("--torch", "2.11.0", "2.13.0", "HEAD", "x", "y"), "takes one side and a filter"),
                (("--torch", "2.11.0", "2.13.0", "--from"), "cannot be used with")):
            with self.subTest(" ".join(arguments)):
                code, text = self.compare(*arguments)
                self.assertEqual(code, 2, text)
                self.assertIn(word, text)
        code, text = run(PROGRAM, "bench", "--torch", "2.9.1")
        self.assertEqual(code, 2, text)
        self.assertIn("choose PyTorch 2.11.0 or 2.13.0", text)


class Search(CompareCase):
    def sides(self, name, scripts):
        """Returns sides whose `prepare` leaves a mark."""
        sides = [self.side(f"{name}-{index}", script) for index, script in enumerate(scripts)]
        for side in map(Path, (side[len("dir:"):] for side in sides)):
            (side / "name").write_text(f"release {side.name}\n")
            (side / "prepare").write_text(f"#!/bin/sh\ntouch {side}/prepared\n")
            (side / "prepare").chmod(0o755)
        return sides

    def search(self, sides, *arguments):
        code, text = self.compare("--bisect", ",".join(sides), "--set", "smoke", *arguments)
        return code, text

    def test_a_planted_slower_release_is_found_among_five(self):
        for first in range(1, 6):
            scripts = ["step *= 1.05" if index >= first else "" for index in range(5)]
            sides = self.sides(f"planted-{first}", scripts)
            code, text = self.search(sides)
            if first == 5:
                self.assertEqual(code, 0, text)
                self.assertIn("none is slower than release planted-5-0 by 2 %", text)
            else:
                self.assertEqual(code, 1, text)
                self.assertIn(f"first slower: release planted-{first}-{first}: by ", text)
                self.assertIn(f"release planted-{first}-{first - 1} is not slower", text)
            compared = text.count("base: ")
            self.assertLessEqual(compared, 3, text)
            # Only the base and the compared sides were prepared.
            prepared = [(Path(side[len("dir:"):]) / "prepared").exists() for side in sides]
            self.assertEqual(sum(prepared), compared + 1)

    def test_an_undecided_side_ends_the_search(self):
        crash = 'if word.isdigit(): sys.exit("the kernel is broken")'
        code, text = self.search(self.sides("crash", ["", "", crash, "", ""]))
        self.assertEqual(code, 3, text)
        self.assertIn("undecided: release crash-2 is failed. The first slower one comes after release crash-0", text)

    def test_the_search_follows_one_case(self):
        other = 'if word == "cases": print("forward/torch-cpu/bf16/indicator-tiny-b2", end=" ")'
        code, text = self.search(self.sides("many", [other, other]))
        self.assertEqual(code, 2, text)
        self.assertIn("selects 2", text)

    def test_a_side_that_cannot_be_prepared_is_an_error(self):
        sides = self.sides("unprepared", ["", ""])
        prepare = Path(sides[1][len("dir:"):]) / "prepare"
        prepare.write_text("#!/bin/sh\necho 'error: no such release' >&2\nexit 1\n")
        code, text = self.compare(*sides, "--set", "smoke")
        self.assertEqual(code, 2, text)
        self.assertIn("release unprepared-1 could not be prepared: error: no such release", text)

    def test_other_libraries_are_listed_under_the_verdict(self):
        def describe(**versions):
            machine = json.dumps({**MACHINE, "versions": list(versions.items())})
            return f'if word == "machine": print({machine!r}, flush=True); continue'
        sides = (self.side("old", describe(PyTorch="1", BLAS="MKL 1")), self.side("new", describe(PyTorch="2", BLAS="MKL 2")))
        code, text = self.compare(*sides, "--set", "smoke")
        self.assertEqual(code, 0, text)
        self.assertIn("these differ too (base / head): BLAS: MKL 1 / MKL 2\n", text + "\n")


# A counterpart whose step computes for longer if a variable says so.
COUNTERPART = """
import os

def build_step(description, variant):
    print("a library prints this")
    count = int(description["rounds"] * float(os.environ.get("SLOWDOWN", 1)))
    def step():
        for _ in range(count):
            pass
    return step

def check(description, variant):
    return (0.5, "loss") if "WRONG" not in os.environ else (float("nan"), "loss")

def versions():
    return {"PyTorch": os.environ.get("SLOWDOWN", "1"), "BLAS": os.environ.get("BLAS", "a")}
"""


class Pythons(CompareCase):
    def write_sides(self, environments):
        folder = temporary_folder(self)
        (folder / "fake_counterpart.py").write_text(COUNTERPART)
        steps = {"torch": {self.CASE: {"description": {"rounds": 40_000}, "variant": "eager"}}}
        for index, variables in enumerate(environments):
            side = folder / str(index)
            python_sides.write_side(side, f"release {index}", sys.executable, {"torch": "fake_counterpart"}, steps)
            lines = {"PYTHONPATH": folder, **variables}
            (side / "environment").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return [folder / str(index) for index in range(len(environments))]

    def compare_sides(self, environments, *options):
        return self.compare(*python_sides.compare_command(self.write_sides(environments), options)[1:])

    @uses_all_cores
    def test_a_planted_slower_environment_is_found_among_five(self):
        slow = {"SLOWDOWN": "1.5"}
        code, text = self.compare_sides([{}, {}, {}, slow, slow], "--threshold=20")
        self.assertEqual(code, 1, text)
        self.assertIn("first slower: release 3: by ", text)

    @uses_all_cores
    def test_an_environment_that_computes_wrongly_fails(self):
        code, text = self.compare_sides([{}, {"WRONG": "1", "BLAS": "b"}])
        self.assertEqual(code, 1, text)
        self.assertIn("release 1: loss: nan times its tolerance", text)
        self.assertIn("these differ too (base / head): BLAS: a / b", text)

    def test_the_requests_are_answered(self):
        [side] = self.write_sides([{}])
        requests = ["version", "cases smoke .", f"case {self.CASE}", "5", f"{CHECK_PARITY} {self.CASE}", "verify", "case a/b/c/d", "work 10"]
        done = subprocess.run([side / "torch", "--bench", "--worker"], input="".join(f"{r}\n" for r in requests), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        patterns = ["4", self.CASE, r"ready \d+", r"\d+ \d+ \d+", "now 0.5", "failed: 'verify' is not a request",
                    "failed: a/b/c/d is not a case of this side", r"\d+"]
        answers = done.stdout.splitlines()
        self.assertEqual(len(answers), len(patterns), done.stdout + done.stderr)
        for answer, pattern in zip(answers, patterns):
            self.assertRegex(answer, f"^{pattern}$")


class PythonReleases(unittest.TestCase):
    AVAILABLE = ["2.9.0", "2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.12.1", "2.13.0"]

    def test_a_range_has_the_published_releases(self):
        between = lambda text: python_release.releases_between("torch", text, self.AVAILABLE)
        self.assertEqual(between("2.9.1..2.12.0"), ["2.9.1", "2.10.0", "2.11.0", "2.12.0"])
        for text, word in (("2.8.0..2.13.0", "2.8.0 is not on PyPI"), ("2.13.0..2.9.1", "to a later one"),
                           ("2.13.0..2.13.0", "to a later one"), ("main..dev", "is not a range")):
            with self.assertRaises(shared.InputError) as caught:
                between(text)
            self.assertIn(word, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))

    def install_into(self, folder, install):
        for patch in (mock.patch.object(shared, "CACHE", folder), mock.patch.object(python_release, "install", install)):
            patch.start()
            self.addCleanup(patch.stop)

    def test_a_failed_download_leaves_nothing(self):
        folder = temporary_folder(self)

        def install(packages, work):
            (work / "partial").touch()
            raise shared.SetupError("no network")

        self.install_into(folder, install)
        with self.assertRaises(shared.SetupError):
            python_release.folder("mlx", "0.31.2")
        self.assertEqual(list(folder.iterdir()), [])

    def test_two_installations_at_once_give_one_complete_folder(self):
        folder = temporary_folder(self)

        def install(packages, work):
            for name in packages:
                (work / name).touch()

        self.install_into(folder, install)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = set(pool.map(lambda _: python_release.folder("mlx", "0.31.2"), range(4)))
        self.assertEqual([path.name for path in folder.iterdir()], [path.name for path in found])
        self.assertIn("mlx==0.31.2", [path.name for path in found.pop().iterdir()])

    def test_wrong_arguments_are_refused_before_anything_is_built(self):
        case, python = "train-step/torch-cpu/f32/indicator-b1", sys.executable
        for arguments, word in (
                (["--python", python, "--python", python], "name the cases"),
                (["--python", python, "--python", "/no/such", case], "no such interpreter"),
                (["--bisect", "2.9.1..2.13.0"], "name the cases"),
                (["--bisect", "2.9.1..2.13.0", case, case], "follows one case"),
                (["--bisect", "2.9.1..2.13.0", "--python", python, case], "takes no --python"),
                (["--threshold", "5", case], "--threshold needs two interpreters"),
                (["--json", case], "--json needs two interpreters"),
                (["--python", python, "--python", python, "--flops", case], "take one interpreter"),
                (["--python", python, "--python", python, "--variants", "eager,tuned", case], "in one variant")):
            with self.subTest(" ".join(arguments)):
                code, text = run("scripts/compare-python", *arguments)
                self.assertEqual(code, 2, text)
                self.assertIn(word, text)
                self.assertEqual(len(text.splitlines()), 1, text)


if __name__ == "__main__":
    unittest.main()

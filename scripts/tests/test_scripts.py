"""Wrong input to the scripts: one clear line, a non-zero exit, nothing lost."""
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent


def load(name):
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def run(*command, env=None):
    done = subprocess.run([str(c) for c in command], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, **(env or {})})
    return done.returncode, (done.stdout + done.stderr).strip()


class Setup(unittest.TestCase):
    def setUp(self):
        self.setup = load("setup")
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.setup.CACHE = self.folder / "cache"
        self.setup.STAMP = self.folder / "stamp.json"

    def stops(self, word, call, *arguments):
        with self.assertRaises(self.setup.Stop) as caught:
            call(*arguments)
        text = str(caught.exception)
        self.assertIn(word, text)
        self.assertNotIn("\n", text)

    def test_nothing_to_do_takes_no_time(self):
        code, text = run("scripts/setup", "--quiet")
        self.assertEqual((code, text), (0, ""))

    def test_unknown_argument(self):
        code, text = run("scripts/setup", "--cpuu")
        self.assertEqual(code, 1)
        self.assertIn("--cpuu", text)
        self.assertEqual(len(text.splitlines()), 1)

    def test_unsupported_platform(self):
        with mock.patch("platform.machine", return_value="riscv64"):
            self.stops("not supported", self.setup.platform_name)

    def test_no_compiler(self):
        with mock.patch("shutil.which", return_value=None):
            self.stops("c++", self.setup.need, "c++", "install one")

    def test_too_little_disk(self):
        self.stops("GB free", self.setup.check_disk, 10**9)

    def test_no_network(self):
        with mock.patch.object(self.setup, "run", side_effect=self.setup.Stop("exit 1")):
            self.stops("network", self.setup.wheel, "torch==2.13.0")
        self.assertEqual(list(self.setup.CACHE.iterdir()), [], "a failed download left something")

    def test_a_killed_build_is_not_taken_for_whole(self):
        def killed(work):
            (work / "half").write_text("")
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            self.setup.component("thing", ["1"], killed)
        # What SIGKILL leaves behind has another name than what is looked up.
        (self.setup.CACHE / "thing.partial-x").mkdir()
        built = self.setup.component("thing", ["1"], lambda work: (work / "whole").write_text(""))
        self.assertTrue((built / "whole").exists())
        again = self.setup.component("thing", ["1"], lambda work: self.fail("built twice"))
        self.assertEqual(built, again)

    def test_a_wrong_libtorch_of_ones_own(self):
        own = str(self.folder)
        self.stops("libtorch_cpu", self.setup.user_libtorch, own, "2.13.0")
        (self.folder / "lib").mkdir()
        (self.folder / "lib/libtorch_cpu.so").touch()
        (self.folder / "include/torch").mkdir(parents=True)
        (self.folder / "build-version").write_text("2.4.0+cu121\n")
        self.stops("2.4.0", self.setup.user_libtorch, own, "2.13.0")
        (self.folder / "build-version").write_text("2.13.0+cpu\n")
        self.assertEqual(self.setup.user_libtorch(own, "2.13.0"), self.folder.resolve())
        self.assertIsNone(self.setup.user_libtorch(None, "2.13.0"))

    def test_a_libtorch_of_ones_own_is_remembered(self):
        self.setup.STAMP.write_text('{"inputs": {"libtorch": "/opt/libtorch"}}')
        with mock.patch.dict(os.environ):
            os.environ.pop("LIBTORCH", None)
            self.assertEqual(self.setup.inputs(False)["libtorch"], "/opt/libtorch")
            os.environ["LIBTORCH"] = ""
            self.assertIsNone(self.setup.inputs(False)["libtorch"])

    def test_a_cargo_configuration_of_ones_own_is_kept(self):
        own = self.folder / "config.toml"
        own.write_text("[build]\njobs = 1\n")
        self.setup.CARGO_CONFIG = own
        self.stops("your own", self.setup.set_up, {"cuda": False})
        self.assertEqual(own.read_text(), "[build]\njobs = 1\n")


class Bench(unittest.TestCase):
    def test_unknown_option(self):
        code, text = run("scripts/bench", "--fast")
        self.assertEqual(code, 2)
        self.assertIn("--fast", text)

    def test_two_filters(self):
        code, text = run("scripts/bench", "a", "b")
        self.assertEqual(code, 2)
        self.assertIn("one filter", text)

    def test_a_filter_that_matches_nothing(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "torch", "--", "train-stepp")
        self.assertNotEqual(code, 0)
        self.assertIn("no case of the quick set matches 'train-stepp'", text)

    def test_an_unknown_set(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "mlx", "--", "copy",
                         env={"TRANSFORMER_BENCH_SET": "huge"})
        self.assertNotEqual(code, 0)
        self.assertIn("smoke, quick, full", text)

    def test_list_shows_ids(self):
        code, text = run("cargo", "bench", "--quiet", "--bench", "mlx", "--", "--list", "attention/.*/f32/")
        self.assertEqual(code, 0)
        self.assertIn("attention/mlx-cpu/f32/b16-h8-n111-d32: benchmark", text)
        self.assertNotIn("feed-forward", text)


class Reference(unittest.TestCase):
    def test_no_python_framework(self):
        code, text = run("scripts/reference", "--python", "/bin/false", "--rounds", "1",
                         "train-step/torch-cpu/f32/indicator-b1")
        self.assertEqual(code, 1)
        self.assertIn("needs torch or mlx", text)

    def test_a_wrong_id(self):
        code, text = run("scripts/reference", "train-step")
        self.assertEqual(code, 1)
        self.assertIn("workload/backend/precision/shape", text)


class Processes(unittest.TestCase):
    def test_an_executable_loads_one_framework(self):
        """Asked of the loader, for the executables that measure."""
        reference = load("reference")
        for name, executable in reference.executables().items():
            libraries = subprocess.run(["ldd", executable], text=True, capture_output=True).stdout
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


if __name__ == "__main__":
    unittest.main()

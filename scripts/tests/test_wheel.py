"""The wheel: built twice, and installed into environments with both frameworks, with one, and with wrong ones.

Torch and MLX come from set-up's cache, so that nothing is downloaded.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path

from support import ROOT, TORCH_PYTHON, needs_compile, run, temporary_folder, uses_all_cores, wheel

sys.path[:0] = [str(ROOT / "scripts" / name) for name in ("helpers", "setup.d", "wheel.d")]
import linux  # noqa: E402
import mlx  # noqa: E402
from crates import crate_folders  # noqa: E402
from pypi import wheel as cached_wheel  # noqa: E402
from shared import CACHE  # noqa: E402
from target import current_target  # noqa: E402

STEP = "^attention/(torch|mlx)-cpu/f32/"
# Runs a program of the wheel as the launcher does.
LAUNCH = "import os, sys, transformer_bench; os.execve(sys.argv[1], sys.argv[1:], transformer_bench.environment())"


def mount_namespace():
    """Returns a command that runs another one in a mount namespace of its own, or None if the system forbids it."""
    for command in (["unshare", "-m"], ["unshare", "-r", "-m"]):
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return None


def contents(folder):
    """Returns the size and the time of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in files}


class Environment:
    """A virtual environment with the wheel, torch and MLX.

    Python finds torch and MLX in their own folders, or in site-packages if `together` is true.
    """

    def __init__(self, folder, wheel, torch=TORCH_PYTHON, mlx=None, together=False):
        self.folder, self.home = folder / "an environment", folder / "home"
        self.home.mkdir(parents=True)
        self.variables = {}
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder], check=True)
        self.python = self.folder / "bin" / "python"
        wheels = [wheel, cached_wheel(linux.mlx.OPENBLAS)]
        subprocess.run([sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index",
                        *wheels], check=True)
        self.site = next((self.folder / "lib").glob("python*/site-packages"))
        self.package = self.site / "transformer_bench"
        for name, place in (("torch", torch), ("mlx", mlx)):
            if place and together:
                for path in place.resolve().glob(f"{name}*"):
                    (self.site / path.name).symlink_to(path)
            elif place:
                (self.site / f"{name}.pth").write_text(f"{place.resolve()}\n")

    def run(self, *command, prefix=(), cwd=None, requests=None, **variables):
        """Runs a command without the user's variables. Returns the exit code, the output and the errors."""
        done = subprocess.run([*prefix, *map(str, command)], cwd=cwd or self.home, text=True, capture_output=True, input=requests,
                              env={"HOME": str(self.home), "PATH": "/usr/bin:/bin", **self.variables, **variables})
        return done.returncode, done.stdout, done.stderr

    def command(self, *arguments, **options):
        return self.run(self.folder / "bin" / "transformer-bench", *arguments, **options)

    def program(self, name, *arguments, **options):
        return self.run(self.python, "-c", LAUNCH, self.package / "bin" / name, *arguments, **options)


@unittest.skipUnless(sys.platform == "linux" and sys.version_info >= (3, 10), "the wheel for Linux needs Python 3.10")
class Wheel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp(prefix="transformer-bench wheel-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.wheel = wheel()
        with zipfile.ZipFile(cls.wheel) as archive:
            cls.record = json.loads(archive.read("transformer_bench/installation.json"))
        target = current_target()
        cls.mlx = mlx.unpacked_wheel(target, mlx.version(crate_folders(target)["mlx-sys"]), None)

    def environment(self, **packages):
        return Environment(temporary_folder(self), self.wheel, **{"mlx": self.mlx, **packages})

    def assert_refused(self, done, *words):
        """Asserts that a command ended with one line that has all words."""
        code, _, error = done
        self.assertEqual(code, 2, error)
        self.assertEqual(len(error.strip().splitlines()), 1, error)
        for word in words:
            self.assertIn(word, error)

    def test_the_same_programs_give_the_same_bytes(self):
        code, text = run("scripts/wheel", "--target", "linux-" + os.uname().machine, "--out", self.folder / "second")
        self.assertEqual(code, 0, text)
        second = self.folder / "second" / self.wheel.name
        self.assertEqual(second.read_bytes(), self.wheel.read_bytes())
        self.assertLess(second.stat().st_size, 12e6)
        self.assertRegex(second.name, r"-py3-none-manylinux_2_\d+_")
        with zipfile.ZipFile(second) as archive:
            modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
            self.assertEqual(modes["transformer_bench/bin/torch"], 0o755)
            info = next(name for name in modes if name.endswith("/METADATA")).rsplit("/", 1)[0]
            libraries, metadata = (archive.read(f"{info}/{name}").decode() for name in ("licenses/LIBRARIES.txt", "METADATA"))
        self.assertEqual(modes["transformer_bench/installation.json"], 0o644)
        # mlx-c has its license in a folder of mlx-sys.
        for words in ("\ncriterion 0.", "Copyright (c) 2023 ml-explore"):
            self.assertIn(words, libraries)
        for line in ("License-File: LIBRARIES.txt", f"Requires-Dist: {self.record['requirements']['torch']}; extra == 'torch'"):
            self.assertIn(line, metadata.splitlines())

    def test_another_system_is_refused(self):
        for target in ("macos-arm64", "linux-aarch64", "linux-x86_64"):
            if target != f"linux-{os.uname().machine}":
                code, text = run("scripts/wheel", "--target", target, "--out", self.folder / "other")
                self.assertEqual((code, len(text.splitlines())), (2, 1), text)
        self.assertFalse((self.folder / "other").exists())

    @uses_all_cores
    def test_a_clean_machine_measures_and_writes_only_its_own_files(self):
        """The machine has neither a checkout nor cargo nor a cache. site-packages is read-only, and the current folder is a
        repository of the user."""
        namespace = mount_namespace()
        if namespace is None:
            self.skipTest("this system has no mount namespaces")
        place = temporary_folder(self)
        own = self.environment(torch=place / "torch", mlx=place / "mlx")
        repository = own.home / "project"
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-C", repository]
        subprocess.run(["git", "init", "--quiet", repository], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "first"], check=True)
        before = contents(own.home), contents(own.site)
        quote = lambda *words: " ".join(shlex.quote(str(word)) for word in words)
        lines = ["set -e", "mount --make-rprivate /"]
        for folder, link in ((TORCH_PYTHON.resolve(), place / "torch"), (self.mlx, place / "mlx")):
            link.mkdir()
            lines.append(quote("mount", "--bind", folder, link))
        for folder in (ROOT, Path.home() / ".cargo", Path.home() / ".rustup", CACHE):
            lines.append(quote("mount", "-t", "tmpfs", "none", folder) if folder.is_dir() else "")
        lines += [quote("mount", "--bind", own.site, own.site), quote("mount", "-o", "remount,ro,bind", own.site)]
        script = place / "clean.sh"
        script.write_text("\n".join([*lines, 'exec "$@"']) + "\n")
        prefix = [*namespace, "sh", script]

        code, text, error = own.command("bench", STEP, prefix=prefix, cwd=repository)
        self.assertEqual(code, 0, error)
        self.assertIn("attention/mlx-cpu/f32", text)
        self.assertIn("transformer-bench bench --quick", text)
        self.assertNotIn("./scripts/", text)
        code, text, error = own.command("baseline", "save", "first", "--send", prefix=prefix, cwd=repository)
        self.assertEqual(code, 0, error)
        self.assertIn("Nothing was sent", text)
        self.assertIn("### baseline.json", text)
        data = own.home / ".local/share/transformer-bench"
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"], text=True, capture_output=True).stdout
        machine = json.loads((data / "results/results.json").read_text())["machine"]
        self.assertEqual(machine["commit"], commit.strip())
        versions = dict(machine["versions"])
        self.assertIn("OpenBLAS", versions["MLX BLAS"])
        self.assertTrue(list(data.glob("baselines/*/first/baseline.json")))
        self.assertTrue((data / "results/issue.md").exists())
        after = contents(own.home), contents(own.site)
        self.assertEqual(before[1], after[1])
        strange = [path for path in after[0] if path not in before[0] and not path.startswith(str(data))]
        self.assertEqual(strange, [])
        self.assertIn(f"commit {commit.strip()}", own.command("--version")[1])

    @uses_all_cores
    def test_a_single_framework_is_enough(self):
        for name, other in (("torch", "mlx"), ("mlx", "torch")):
            own = self.environment(**{other: None})
            code, text, error = own.command("bench", f"^attention/{name}-cpu/f32/")
            self.assertEqual(code, 0, error)
            self.assertIn(f"attention/{name}-cpu/f32", text)
            self.assert_refused(own.command("bench", f"^attention/{other}-cpu/f32/"), "pip install", f"'{other}")

    def test_frameworks_that_do_not_fit_are_refused_with_the_right_command(self):
        own = self.environment(torch=None, mlx=None)
        self.assert_refused(own.command("bench", STEP), "neither torch nor mlx", "pip install 'torch==", "'mlx[cpu]==")
        (own.site / "torch/lib").mkdir(parents=True)
        (own.site / "torch/lib/libtorch_cpu.so").touch()
        self.assert_refused(own.command("bench", STEP), "PyTorch of an unknown version does not fit")
        (own.site / "torch-1.0.0.dist-info").mkdir()
        (own.site / "torch-1.0.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
        for command in (["bench", STEP], ["compare", "--backends", "torch-cpu", "mlx-cpu"], ["flamegraph", STEP]):
            self.assert_refused(own.command(*command), "PyTorch 1.0.0 does not fit",
                                f"pip install '{self.record['requirements']['torch']}'")
        code, text, _ = own.command("list", "quick", STEP)
        self.assertEqual(code, 0, "it needs no framework")

    def test_commands_that_need_a_checkout_say_so(self):
        own = self.environment()
        for command in (["compare", "main"], ["compare", "--torch", "2.11.0", "2.13.0"], ["bench", "--mlx", "0.32.4"],
                        ["publish"], ["calibrate"], ["compare", "--bisect", "2.11.0..2.13.0"]):
            self.assert_refused(own.command(*command), "checkout")
        for command in (["--help"], ["bench", "--help"], ["compare-python", "--help"]):
            code, text, _ = own.command(*command)
            self.assertEqual(code, 0, command)
            self.assertIn("transformer-bench", text)
            self.assertNotRegex(text, r"(?<!src/)\bscripts/[a-z]", command)

    @uses_all_cores
    def test_links_into_a_cache_work(self):
        """uv installs each file as a link into its cache if the user asks for it."""
        own = self.environment()
        store = own.folder / "store"
        shutil.move(own.package, store / "transformer_bench")
        for path in sorted((store / "transformer_bench").rglob("*")):
            link = own.package / path.relative_to(store / "transformer_bench")
            link.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                link.symlink_to(path)
        code, text, error = own.command("bench", STEP)
        self.assertEqual(code, 0, error)
        for name in ("torch", "mlx"):
            self.assertIn(f"attention/{name}-cpu/f32", text)

    def test_mlx_calls_openblas(self):
        own = self.environment(together=True)
        # Other programs of a comparison have their own libraries.
        code, text, error = own.run(own.python, "-c",
                                    "import transformer_bench as t; print(t.environment().get('LD_LIBRARY_PATH'))")
        self.assertEqual(text, "None\n", error)
        code, text, error = own.program("mlx", "--test", "^attention/mlx-cpu/f32/", LD_DEBUG="bindings")
        self.assertEqual(code, 0, text)
        for caller, library, symbol in (("libmlx.so", linux.BLAS, "cblas_sgemm"),
                                        (linux.BLAS, "libscipy_openblas.so", "scipy_cblas_sgemm")):
            self.assertRegex(error, rf"binding file \S*.*/{caller} \[0\] to .*/{library} \[0\]: normal symbol `{symbol}'")

    @needs_compile
    @uses_all_cores
    def test_the_interpreter_of_the_environment_compiles(self):
        own = self.environment()
        # Inductor splits its command line at spaces.
        cache = temporary_folder(self) / "cache"
        # A package of the forward pass is built in a third of the time of a training step.
        case = "forward/torch-cpu/f32-compile/indicator-tiny-b2"
        without = own.folder / "programs without a compiler"
        without.mkdir()
        for name in ("sh", "date", "git"):
            (without / name).symlink_to(shutil.which(name))
        own.variables = {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": ""}
        worker = ["torch", "--bench", "--worker"]
        code, text, error = own.program(*worker, requests=f"case {case}\n", PATH=str(without))
        self.assertIn("-compile needs a C++ compiler", text + error)
        self.assertFalse(cache.exists() and list(cache.rglob("*.so")))
        code, text, error = own.program(*worker, requests=f"case {case}\n")
        self.assertRegex(text, "^ready", error)
        self.assertEqual(len(list((cache / "transformer-bench").glob("compiled-*/*.so"))), 1)

    @needs_compile
    @uses_all_cores
    def test_the_python_counterparts_run(self):
        own = self.environment()
        case = "train-step/torch-cpu/f32/indicator-b1"
        code, text, error = own.command("compare-python", "--flops", case)
        self.assertEqual(code, 0, error)
        self.assertIn("+0.0", text)
        code, text, error = own.command("compare-python", "--rounds", "2", case)
        self.assertEqual(code, 0, error)
        self.assertRegex(text, r"eager .* × this suite")


if __name__ == "__main__":
    unittest.main()

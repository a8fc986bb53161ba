"""Set-up, with the platform pretended: what it downloads, writes and refuses."""
import importlib.machinery
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
import zipfile
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "setup.d")]
import configuration  # noqa: E402
import crates  # noqa: E402
import inductor  # noqa: E402
import macho  # noqa: E402
import mlx  # noqa: E402
import pypi  # noqa: E402
import shared  # noqa: E402
import target  # noqa: E402
import torch  # noqa: E402


def script(name):
    """A script as a module."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(ROOT / "scripts" / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


class SetupCase(unittest.TestCase):
    """A cache of its own, and answers of the system that are given."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        self.patch(mock.patch.object(shared, "CACHE", self.folder / "cache"))
        self.setup = script("setup")
        self.setup.STAMP = self.folder / "stamp.json"

    def patch(self, patcher):
        self.addCleanup(patcher.stop)
        return patcher.start()

    def pretend(self, system, machine, version="", arm64=""):
        """A platform, with what sw_vers and sysctl say there."""
        self.patch(mock.patch("platform.system", return_value=system))
        self.patch(mock.patch("platform.machine", return_value=machine))
        answers = {"sw_vers": version, "sysctl": arm64}
        real = subprocess.run

        def run(command, *arguments, **options):
            if command[0] in answers:
                return subprocess.CompletedProcess(command, 0, answers[command[0]] + "\n", "")
            return real(command, *arguments, **options)

        self.patch(mock.patch("subprocess.run", run))

    def stops(self, word, call, *arguments):
        with self.assertRaises(shared.Stop) as caught:
            call(*arguments)
        text = str(caught.exception)
        self.assertIn(word, text)
        self.assertNotIn("\n", text)


class Inductor(SetupCase):
    def test_a_python_that_torch_does_not_serve_leaves_the_recipe_out(self):
        self.patch(mock.patch.object(inductor, "SERVED", False))
        folder, reason = inductor.prepare(target.LINUX["x86_64"], "1.2", self.folder, True, None)
        self.assertIsNone(folder)
        self.assertIn("3.10 to 3.14", reason)
        text = configuration.text(target.LINUX["x86_64"], self.folder, self.folder, [], reason=reason)
        self.assertIn("TRANSFORMER_BENCH_NO_INDUCTOR", text)
        self.assertNotIn("TRANSFORMER_BENCH_PYTHON =", text)

    def test_a_failing_download_leaves_the_recipe_out(self):
        with mock.patch.object(inductor, "wheel", side_effect=shared.Stop("no network")):
            folder, reason = inductor.prepare(target.LINUX["x86_64"], "1.2", self.folder, True, None)
        self.assertEqual((folder, reason), (None, "no network"))
        self.assertEqual(list((self.folder / "cache").glob("torch-python*")), [])

    def test_a_libtorch_without_python(self):
        folder, reason = inductor.prepare(target.LINUX["x86_64"], "1.2", self.folder, False, None)
        self.assertIsNone(folder)
        self.assertIn("LIBTORCH", reason)

    @unittest.skipUnless(sys.platform == "linux", "ELF is Linux's")
    def test_stubs_stand_in_for_what_is_missing(self):
        lib, work = self.folder / "lib", self.folder / "work"
        lib.mkdir()
        work.mkdir()
        code = self.folder / "code.c"
        make = lambda name, text, *flags: (code.write_text(text), subprocess.run(
            ["cc", "-shared", "-fPIC", "-o", lib / name, code, f"-Wl,-soname,{name}", f"-L{lib}",
             "-Wl,-rpath,$ORIGIN", *flags], check=True))
        make("libtorch_cuda.so", "void absent(void) {}")
        make("libuser.so", "void absent(void); void call(void) { absent(); } int there(void) { return 7; }",
             "-ltorch_cuda")
        (lib / "libtorch_cuda.so").unlink()
        inductor.make_stubs(lib, work)
        self.assertEqual(list(work.iterdir()), [])
        ask = lambda what: subprocess.run(
            [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL('{lib}/libuser.so').{what}())"],
            capture_output=True, text=True)
        self.assertEqual(ask("there").stdout, "7\n")
        called = ask("call")
        self.assertNotEqual(called.returncode, 0)
        self.assertIn("absent is of CUDA's part", called.stderr)


class Platforms(SetupCase):
    def test_linux(self):
        for machine, triple in (("x86_64", "x86_64-unknown-linux-gnu"), ("aarch64", "aarch64-unknown-linux-gnu")):
            with self.subTest(machine):
                self.pretend("Linux", machine)
                row = target.target()
                self.assertEqual((row.triple, row.mlx, row.name("mlxc")), (triple, "mlx-cpu", "libmlxc.so"))
                self.assertIsNone(target.mlx_platform(row))
                self.assertNotIn("--platform", pypi.arguments("mlx-cpu==1", None, "x"))

    def test_macs(self):
        for version, tag in (("14.5", "macosx_14_0_arm64"), ("15.6", "macosx_15_0_arm64"), ("26.1", "macosx_15_0_arm64"),
                             ("26.2", "macosx_26_0_arm64"), ("27.0.1", "macosx_26_0_arm64")):
            with self.subTest(version):
                self.pretend("Darwin", "arm64", version)
                row = target.target()
                self.assertEqual((row.triple, row.mlx, row.name("mlxc")),
                                 ("aarch64-apple-darwin", "mlx-metal", "libmlxc.dylib"))
                self.assertEqual(target.mlx_platform(row), tag)
                # pip's own choice takes the wheel of 26.2 on 26.0 and 26.1.
                self.assertEqual(pypi.arguments(f"{row.mlx}==0.32.2", tag, "x"), [
                    "download", "--no-deps", "--only-binary=:all:", "--python-version", pypi.PYTHON,
                    "--implementation", "cp", "--platform", tag, "--dest", "x", "mlx-metal==0.32.2"])

    def test_a_mac_that_is_too_old(self):
        self.pretend("Darwin", "arm64", "13.7")
        self.stops("macOS 14 or newer", target.mlx_platform, target.target())

    def test_a_python_under_rosetta(self):
        self.pretend("Darwin", "x86_64", "15.6", arm64="1")
        self.stops("Rosetta", target.target)

    def test_no_such_platform(self):
        self.pretend("Darwin", "x86_64", "13.7", arm64="")
        self.stops("not supported", target.target)
        self.pretend("Linux", "riscv64")
        self.stops("not supported", target.target)

    def test_the_command_line_tools_are_asked_for_and_nothing_else(self):
        self.pretend("Darwin", "arm64", "15.6")
        asked = []

        def run(command, *arguments, **options):
            asked.append(command[0])
            return subprocess.CompletedProcess(command, 1 if command[0] == "c++" else 0, "", "")

        with mock.patch("subprocess.run", run), mock.patch("shutil.which", return_value="/somewhere"):
            self.stops("xcode-select --install", self.setup.check_tools, target.MAC)
        self.assertEqual(asked, ["c++"])


class Configuration(SetupCase):
    def text(self, row):
        return configuration.text(row, Path("/t"), Path("/m"), [Path("/t/lib"), Path("/m/mlx/lib")])

    def test_a_mac(self):
        self.assertEqual(self.text(target.MAC), configuration.MARK + """[env]
LIBTORCH = "/t"
MACOSX_DEPLOYMENT_TARGET = "14.0"

[target.aarch64-apple-darwin]
rustflags = ["-Clink-arg=-Wl,-rpath,/t/lib", "-Clink-arg=-Wl,-rpath,/m/mlx/lib"]

[target.aarch64-apple-darwin.mlx]
rustc-link-search = ["/m/mlx/lib"]
rustc-link-lib = ["mlxc", "mlx"]
rustc-env = { OUT_DIR = "/m" }
""")

    def test_linux(self):
        text = self.text(target.LINUX["x86_64"])
        self.assertIn("--disable-new-dtags", text)
        self.assertNotIn("MACOSX", text)

    def test_mlx_c_on_a_mac_is_compiled_and_linked_without_what_linux_needs(self):
        flags = " ".join(map(str, mlx.compile_flags(target.MAC, Path("/c"), Path("/m"), None)))
        self.assertNotIn("compat.hpp", flags)
        self.assertEqual(mlx.link_flags(target.MAC, "/m/lib"),
                         ["-dynamiclib", "-install_name", "@rpath/libmlxc.dylib", "-L/m/lib", "-lmlx", "-Wl,-rpath,@loader_path"])
        self.assertEqual(mlx.linux_only(target.MAC), [])

    def test_a_configuration_of_ones_own_is_kept(self):
        own = self.folder / "config.toml"
        own.write_text("[build]\njobs = 1\n")
        self.patch(mock.patch.object(configuration, "CARGO_CONFIG", own))
        self.stops("your own", self.setup.set_up, {"cuda": False})
        self.assertEqual(own.read_text(), "[build]\njobs = 1\n")


class Wheels(SetupCase):
    def metal_wheel(self):
        """A wheel laid out as mlx-metal's is."""
        path = self.folder / "mlx_metal-0.32.2-py3-none-macosx_15_0_arm64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("libmlx.dylib", "mlx.metallib", "libjaccl.dylib"):
                archive.writestr(f"mlx/lib/{name}", f"signed {name}")
            archive.writestr("mlx/include/mlx/mlx.h", "")
        return path

    def test_the_macs_wheel_stays_as_it_is(self):
        self.pretend("Darwin", "arm64", "15.6")
        path, asked = self.metal_wheel(), []

        def wheel(requirement, platform=None):
            asked.append((requirement, platform))
            return path

        with mock.patch.object(mlx, "wheel", wheel):
            folder = mlx.unpacked(target.MAC, "0.32.2", target.mlx_platform(target.MAC))
        self.assertEqual(asked, [("mlx-metal==0.32.2", "macosx_15_0_arm64")])
        # Metal's kernels are looked for beside libmlx.
        self.assertEqual(sorted(p.name for p in (folder / "mlx" / "lib").iterdir()),
                         ["libjaccl.dylib", "libmlx.dylib", "mlx.metallib"])
        self.assertEqual((folder / "mlx/lib/libmlx.dylib").read_text(), "signed libmlx.dylib")

    def test_the_mac_downloads_two_wheels_and_builds_no_bindgen(self):
        self.pretend("Darwin", "arm64", "26.2")
        mlx_sys = self.folder / "mlx-sys-0.7.0"
        (mlx_sys / "src/mlx-c/mlx/c").mkdir(parents=True)
        (mlx_sys / "src/mlx-c/mlx/c/array.cpp").touch()
        commands = []
        path = self.metal_wheel()

        def run(command, **options):
            commands.append([str(part) for part in command])
            return ""

        with mock.patch.object(mlx, "wheel", lambda requirement, platform=None: path), mock.patch.object(mlx, "run", run):
            folder = mlx.prepare(target.MAC, mlx_sys, "0.32.2", Path("/t"), None)
        self.assertEqual([c[0] for c in commands], ["c++", "c++"])
        self.assertIn("-dynamiclib", commands[1])
        self.assertEqual((folder / "bindings.rs").read_bytes(), mlx.BINDINGS.read_bytes())
        self.assertEqual((folder / "blas").read_text(), "Accelerate\n")

    def test_a_wheel_that_pypi_lacks(self):
        with mock.patch.object(pypi, "run", side_effect=shared.Stop("exit 1")):
            self.stops("network", pypi.wheel, "mlx-metal==0.32.2", "macosx_15_0_arm64")
        self.assertEqual(list(shared.CACHE.iterdir()), [], "a failed download left something")

    def test_a_damaged_download_is_named(self):
        bad = self.folder / "torch.whl"
        bad.write_text("half")
        self.stops("damaged", pypi.unpack, bad, self.folder)
        (self.folder / "cache").mkdir()
        with mock.patch.object(pypi, "component", return_value=self.folder / "cache"):
            self.stops("holds no wheel", pypi.wheel, "torch==1")

    def test_a_killed_build_is_not_taken_for_whole(self):
        def killed(work):
            (work / "half").write_text("")
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            shared.component("thing", ["1"], killed)
        # What SIGKILL leaves behind has another name than what is looked up.
        (shared.CACHE / "thing.partial-x").mkdir()
        built = shared.component("thing", ["1"], lambda work: (work / "whole").write_text(""))
        self.assertTrue((built / "whole").exists())
        again = shared.component("thing", ["1"], lambda work: self.fail("built twice"))
        self.assertEqual(built, again)


class CheckMac(SetupCase):
    def library(self, name, defined, undefined):
        """A Mach-O file that is a symbol table and nothing else."""
        strings, entries = b"\0", b""
        for kind, names in ((0x0F, defined), (0x01, undefined)):
            for symbol in names:
                entries += struct.pack("<IBBHQ", len(strings), kind, 0, 0, 0)
                strings += symbol.encode() + b"\0"
        head = struct.pack("<8I", macho.MAGIC, 0x0100000C, 0, 6, 1, 24, 0, 0)
        start = len(head) + 24
        table = struct.pack("<6I", macho.SYMTAB, 24, start, len(defined) + len(undefined), start + len(entries), len(strings))
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(head + table + entries + strings)
        return path

    def test_symbols_are_read(self):
        path = self.library("x.dylib", ["_mlx_a", "_b"], ["_mlx_c"])
        self.assertEqual(macho.symbols(path), ({"_mlx_a", "_b"}, {"_mlx_c"}))
        path.write_bytes(b"\x7fELF" + bytes(64))
        self.stops("no 64-bit Mach-O", macho.symbols, path)

    def test_a_symbol_that_a_wheel_lacks_is_named(self):
        check = script("check-mac")
        self.patch(mock.patch.object(check, "OUT", self.folder))
        for name in ("torch_cpu", "torch", "c10"):
            self.library(f"torch/lib/lib{name}.dylib", [f"__ZN2at{name}"], [])
        self.library("mlx/lib/libmlxc.dylib", ["_mlx_add"], [])
        self.library("wheel/mlx/lib/libmlx.dylib", ["__ZN3mlx4core3addE"], [])
        self.patch(mock.patch.object(mlx, "unpacked", lambda *_: self.folder / "wheel"))
        good = self.library("good", [], ["_mlx_add", "__ZN3mlx4core3addE", "__ZN2atc10", "_malloc"])
        check.look_for_symbols("1", {"good": good})
        for wanted in ("_mlx_gone", "__ZN3mlx4core4goneE", "__ZN2at4goneE", "__ZNK3c104goneE"):
            bad = self.library("bad", [], ["_mlx_add", wanted])
            self.stops(wanted, check.look_for_symbols, "1", {"bad": bad})
        none = self.library("none", [], ["_malloc"])
        self.stops("asks for nothing", check.look_for_symbols, "1", {"none": none})

    def test_without_the_standard_library_it_is_skipped_and_says_so(self):
        check = script("check-mac")
        empty = subprocess.CompletedProcess([], 0, str(self.folder), "")
        with mock.patch("subprocess.run", return_value=empty):
            self.assertIn("rustup target add aarch64-apple-darwin", check.missing_std())


class Bindings(SetupCase):
    def test_they_are_of_the_locked_mlx_sys(self):
        row = target.target()
        mlx_sys = crates.crate_folders(row)["mlx-sys"]
        mlx.check_bindings(mlx_sys, mlx.version(mlx_sys))

    def test_those_of_another_version_are_refused(self):
        row = target.target()
        mlx_sys = crates.crate_folders(row)["mlx-sys"]
        self.stops("scripts/setup --bindings", mlx.check_bindings, mlx_sys.with_name("mlx-sys-9.9.9"), "0.32.2")
        self.stops("scripts/setup --bindings", mlx.check_bindings, mlx_sys, "9.9.9")

    def test_they_hold_mlx_alone(self):
        """What another system lacks has no place in them."""
        text = mlx.BINDINGS.read_text()
        functions = [line.split("pub fn ")[1].split("(")[0] for line in text.splitlines() if "pub fn " in line]
        self.assertGreater(len(functions), 600)
        for name in functions:
            self.assertRegex(name, "^_?mlx_")
        for word in ("glibc", "GLIBC", "_IO_FILE", "darwin"):
            self.assertNotIn(word, text)


class Input(SetupCase):
    def test_nothing_to_do_takes_no_time(self):
        done = subprocess.run(["scripts/setup", "--quiet"], cwd=ROOT, text=True, capture_output=True)
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    def test_no_compiler(self):
        with mock.patch("shutil.which", return_value=None):
            self.stops("c++", shared.need, "c++", "install one")

    def test_too_little_disk(self):
        self.stops("GB free", shared.check_disk, 10**9)

    def test_the_cache_is_the_users(self):
        home = Path.home() / ".cache"
        for given, expected in (("", home), ("relative", home), ("/x", Path("/x"))):
            with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": given}):
                self.assertEqual(shared.cache_home(), expected)

    def test_a_wrong_libtorch_of_ones_own(self):
        own = str(self.folder)
        self.stops("libtorch_cpu", torch.of_the_user, own, "2.13.0")
        (self.folder / "lib").mkdir()
        (self.folder / "lib/libtorch_cpu.so").touch()
        (self.folder / "include/torch").mkdir(parents=True)
        (self.folder / "build-version").write_text("2.4.0+cu121\n")
        self.stops("2.4.0", torch.of_the_user, own, "2.13.0")
        (self.folder / "build-version").write_text("2.13.0+cpu\n")
        self.assertEqual(torch.of_the_user(own, "2.13.0"), self.folder.resolve())
        self.assertIsNone(torch.of_the_user(None, "2.13.0"))

    def test_a_libtorch_of_ones_own_is_remembered(self):
        self.setup.STAMP.write_text('{"inputs": {"libtorch": "/opt/libtorch"}, "paths": []}')
        with mock.patch.dict(os.environ):
            os.environ.pop("LIBTORCH", None)
            self.assertEqual(self.setup.inputs(False)["libtorch"], "/opt/libtorch")
            os.environ["LIBTORCH"] = ""
            self.assertIsNone(self.setup.inputs(False)["libtorch"])

    def test_a_damaged_stamp_counts_as_none(self):
        for stamp in ("", "{", "[]", "5", '{"inputs": 5}', '{"inputs": {}, "paths": 1}', '{"inputs": {"libtorch": 3}, "paths": [1]}'):
            self.setup.STAMP.write_text(stamp)
            with mock.patch.dict(os.environ):
                os.environ.pop("LIBTORCH", None)
                now = self.setup.inputs(False)
            self.assertIsNone(now["libtorch"], stamp)
            self.assertFalse(self.setup.ready(now), stamp)
        self.setup.STAMP.write_text(json.dumps({"inputs": now, "paths": ["/"], "config": 1}))
        self.assertFalse(self.setup.ready(now))


if __name__ == "__main__":
    unittest.main()

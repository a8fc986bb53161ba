"""Set-up on simulated platforms: its downloads, files and errors."""
import json
import os
import struct
import subprocess
import sys
import unittest
import zipfile
from pathlib import Path
from unittest import mock

from support import ROOT, TORCH_PYTHON, load, needs_compile, temporary_folder

sys.path.insert(0, str(ROOT / "scripts" / "setup.d"))
import configuration  # noqa: E402
import crates  # noqa: E402
import inductor  # noqa: E402
import macho  # noqa: E402
import mlx  # noqa: E402
import pypi  # noqa: E402
import shared  # noqa: E402
import target  # noqa: E402
import torch  # noqa: E402


class SetupCase(unittest.TestCase):
    """A test with its own cache, which can simulate another platform."""

    def setUp(self):
        self.folder = temporary_folder(self)
        self.patch(mock.patch.object(shared, "CACHE", self.folder / "cache"))
        self.setup = load("setup")
        self.setup.STAMP = self.folder / "stamp.json"

    def patch(self, patcher):
        self.addCleanup(patcher.stop)
        return patcher.start()

    def pretend(self, system, machine, version="", arm64=""):
        """Simulates a platform, with the output of sw_vers and sysctl."""
        self.patch(mock.patch("platform.system", return_value=system))
        self.patch(mock.patch("platform.machine", return_value=machine))
        answers = {"sw_vers": version, "sysctl": arm64}
        real = subprocess.run

        def run(command, *arguments, **options):
            if command[0] in answers:
                return subprocess.CompletedProcess(command, 0, answers[command[0]] + "\n", "")
            return real(command, *arguments, **options)

        self.patch(mock.patch("subprocess.run", run))

    def assert_error(self, word, call, *arguments):
        """Checks that a call raises SetupError with one line, which contains `word`."""
        with self.assertRaises(shared.SetupError) as caught:
            call(*arguments)
        text = str(caught.exception)
        self.assertIn(word, text)
        self.assertNotIn("\n", text)
        return caught.exception.exit_code


class Inductor(SetupCase):
    def test_an_unsupported_python_has_no_variant_compile(self):
        self.patch(mock.patch.object(inductor, "SUPPORTED", False))
        folder, reason = inductor.prepare(target.LINUX["x86_64"], "1.2", self.folder, True, None)
        self.assertIsNone(folder)
        self.assertIn("3.10 to 3.14", reason)
        text = configuration.text(target.LINUX["x86_64"], self.folder, self.folder, [], reason=reason)
        self.assertIn("TRANSFORMER_BENCH_NO_INDUCTOR", text)
        self.assertNotIn("TRANSFORMER_BENCH_PYTHON =", text)

    def test_without_the_download_there_is_no_variant_compile(self):
        self.patch(mock.patch.object(inductor, "SUPPORTED", True))
        with mock.patch.object(inductor, "wheel", side_effect=shared.SetupError("no network")):
            folder, reason = inductor.prepare(target.LINUX["x86_64"], "1.2", self.folder, True, None)
        self.assertEqual((folder, reason), (None, "no network"))
        self.assertEqual(list((self.folder / "cache").glob("torch-python*")), [])

    def test_a_libtorch_without_python_has_no_variant_compile(self):
        self.patch(mock.patch.object(inductor, "SUPPORTED", True))
        folder, reason = inductor.prepare(target.LINUX["x86_64"], "1.2", self.folder, False, None)
        self.assertIsNone(folder)
        self.assertIn("LIBTORCH", reason)

    def test_a_torch_that_cannot_compile_is_an_error(self):
        """Inductor imports these modules only while it compiles a step."""
        builder, extension = "torch/_inductor/cpp_builder.py", "torch/utils/cpp_extension.py"
        for name in ("torch/__init__.py", "torch/_inductor/__init__.py", "torch/utils/__init__.py", builder, extension):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        inductor.check_import(self.folder)
        for name in (builder, extension):
            (self.folder / name).write_text("import a_missing_module\n")
            self.assert_error("a_missing_module", inductor.check_import, self.folder)
            (self.folder / name).write_text("")

    @needs_compile
    def test_torch_compiles_without_other_packages(self):
        """Python 3.12 and newer have no setuptools of their own. -S hides the packages of this Python."""
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"{inductor.COMPILE_IMPORTS}; import setuptools; print(setuptools.__file__)"],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TORCH_PYTHON.resolve())})
        self.assertEqual(done.returncode, 0, done.stderr[-500:])
        self.assertTrue(done.stdout.startswith(str(TORCH_PYTHON.resolve())), done.stdout)

    @unittest.skipUnless(sys.platform == "linux", "only Linux has ELF files")
    def test_stubs_replace_missing_libraries(self):
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
        inductor.build_stubs(lib, work)
        self.assertEqual(list(work.iterdir()), [])
        call = lambda function: subprocess.run(
            [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL('{lib}/libuser.so').{function}())"],
            capture_output=True, text=True)
        self.assertEqual(call("there").stdout, "7\n")
        done = call("call")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("absent is part of CUDA", done.stderr)


class Platforms(SetupCase):
    def test_linux_needs_no_platform_tag(self):
        for machine, triple in (("x86_64", "x86_64-unknown-linux-gnu"), ("aarch64", "aarch64-unknown-linux-gnu")):
            with self.subTest(machine):
                self.pretend("Linux", machine)
                row = target.current_target()
                self.assertEqual((row.triple, row.mlx, row.file_name("mlxc")), (triple, "mlx-cpu", "libmlxc.so"))
                self.assertIsNone(target.mlx_platform(row))
                self.assertNotIn("--platform", pypi.download_arguments("mlx-cpu==1", None, "x"))

    def test_a_gpu_on_arm_gets_the_same_packages(self):
        """PyTorch's headers of CUDA graphs come from these packages."""
        self.pretend("Linux", "aarch64")
        row, commands = target.current_target(), []
        (self.folder / "torch").mkdir()
        with mock.patch.object(torch, "pip", lambda arguments, what: commands.append(arguments)), \
                mock.patch.object(torch, "component", lambda name, key, build: build(self.folder)):
            torch.cuda_packages(row, "2.13.0", "0.32.2")
        [arguments] = commands
        self.assertEqual(arguments[-3:], ["torch==2.13.0", "mlx-cuda-13==0.32.2", "nvidia-cuda-crt>=13,<14"])
        self.assertNotIn("--platform", arguments)
        self.assertIsNone(torch.cuda_headers(row, self.folder))

    def test_macs_get_the_wheel_for_their_system(self):
        for version, tag in (("14.5", "macosx_14_0_arm64"), ("15.6", "macosx_15_0_arm64"), ("26.1", "macosx_15_0_arm64"),
                             ("26.2", "macosx_26_0_arm64"), ("27.0.1", "macosx_26_0_arm64")):
            with self.subTest(version):
                self.pretend("Darwin", "arm64", version)
                row = target.current_target()
                self.assertEqual((row.triple, row.mlx, row.file_name("mlxc")),
                                 ("aarch64-apple-darwin", "mlx-metal", "libmlxc.dylib"))
                self.assertEqual(target.mlx_platform(row), tag)
                # pip itself chooses the wheel for 26.2 on 26.0 and 26.1.
                self.assertEqual(pypi.download_arguments(f"{row.mlx}==0.32.2", tag, "x"), [
                    "download", "--no-deps", "--only-binary=:all:", "--python-version", pypi.PYTHON,
                    "--implementation", "cp", "--platform", tag, "--dest", "x", "mlx-metal==0.32.2"])

    def test_an_old_mac_is_an_error(self):
        self.pretend("Darwin", "arm64", "13.7")
        self.assert_error("macOS 14 or newer", target.mlx_platform, target.current_target())

    def test_a_python_under_rosetta_is_an_error(self):
        self.pretend("Darwin", "x86_64", "15.6", arm64="1")
        self.assert_error("Rosetta", target.current_target)

    def test_other_platforms_are_an_error(self):
        self.pretend("Darwin", "x86_64", "13.7", arm64="")
        self.assert_error("not supported", target.current_target)
        self.pretend("Linux", "riscv64")
        self.assert_error("not supported", target.current_target)

    def test_missing_command_line_tools_are_the_only_error(self):
        self.pretend("Darwin", "arm64", "15.6")
        commands = []

        def run(command, *arguments, **options):
            commands.append(command[0])
            return subprocess.CompletedProcess(command, 1 if command[0] == "c++" else 0, "", "")

        with mock.patch("subprocess.run", run), mock.patch("shutil.which", return_value="/somewhere"):
            self.assert_error("xcode-select --install", self.setup.check_tools, target.MAC)
        self.assertEqual(commands, ["c++"])


class Configuration(SetupCase):
    def text(self, row, tag=None):
        return configuration.text(row, Path("/t"), Path("/m"), [Path("/t/lib"), Path("/m/mlx/lib")], mlx_wheel=tag)

    def test_the_configuration_of_a_mac(self):
        for tag, least in (("macosx_14_0_arm64", "14.0"), ("macosx_15_0_arm64", "15.0"), ("macosx_26_0_arm64", "26.2")):
            self.assertEqual(self.text(target.MAC, tag), configuration.MARK + f"""[env]
LIBTORCH = "/t"
MACOSX_DEPLOYMENT_TARGET = "{least}"
TRANSFORMER_BENCH_MLX_WHEEL = "{tag}"

[target.aarch64-apple-darwin]
rustflags = ["-Clink-arg=-Wl,-rpath,/t/lib", "-Clink-arg=-Wl,-rpath,/m/mlx/lib"]

[target.aarch64-apple-darwin.mlx]
rustc-link-search = ["/m/mlx/lib"]
rustc-link-lib = ["mlxc", "mlx"]
rustc-env = {{ OUT_DIR = "/m" }}
""")

    def test_the_configuration_of_linux(self):
        text = self.text(target.LINUX["x86_64"])
        self.assertIn("--disable-new-dtags", text)
        self.assertNotIn("MACOSX", text)

    def test_mlx_c_on_a_mac_has_no_flags_of_linux(self):
        flags = " ".join(map(str, mlx.compile_flags(target.MAC, Path("/c"), Path("/m"), None)))
        self.assertNotIn("compat.hpp", flags)
        self.assertEqual(mlx.link_flags(target.MAC, "/m/lib"),
                         ["-dynamiclib", "-install_name", "@rpath/libmlxc.dylib", "-L/m/lib", "-lmlx", "-Wl,-rpath,@loader_path"])
        self.assertEqual(mlx.linux_sources(target.MAC), [])

    def test_the_users_cargo_configuration_is_not_overwritten(self):
        own = self.folder / "config.toml"
        own.write_text("[build]\njobs = 1\n")
        self.patch(mock.patch.object(configuration, "CARGO_CONFIG", own))
        self.assert_error("your own", self.setup.set_up, {"cuda": False})
        self.assertEqual(own.read_text(), "[build]\njobs = 1\n")


class Wheels(SetupCase):
    def metal_wheel(self):
        """Writes a wheel with the files of mlx-metal."""
        path = self.folder / "mlx_metal-0.32.2-py3-none-macosx_15_0_arm64.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("libmlx.dylib", "mlx.metallib", "libjaccl.dylib"):
                archive.writestr(f"mlx/lib/{name}", f"signed {name}")
            archive.writestr("mlx/include/mlx/mlx.h", "")
        return path

    def test_the_wheel_of_a_mac_is_unpacked_unchanged(self):
        self.pretend("Darwin", "arm64", "15.6")
        path, requests = self.metal_wheel(), []

        def wheel(requirement, platform=None):
            requests.append((requirement, platform))
            return path

        with mock.patch.object(mlx, "wheel", wheel):
            folder = mlx.unpacked_wheel(target.MAC, "0.32.2", target.mlx_platform(target.MAC))
        self.assertEqual(requests, [("mlx-metal==0.32.2", "macosx_15_0_arm64")])
        # libmlx looks for Metal's kernels in its own folder.
        self.assertEqual(sorted(p.name for p in (folder / "mlx" / "lib").iterdir()),
                         ["libjaccl.dylib", "libmlx.dylib", "mlx.metallib"])
        self.assertEqual((folder / "mlx/lib/libmlx.dylib").read_text(), "signed libmlx.dylib")

    def test_a_mac_compiles_mlx_c_and_not_bindgen(self):
        self.pretend("Darwin", "arm64", "26.2")
        mlx_sys = self.folder / "mlx-sys-0.7.0"
        (mlx_sys / "src/mlx-c/mlx/c").mkdir(parents=True)
        (mlx_sys / "src/mlx-c/mlx/c/array.cpp").touch()
        (mlx_sys / "src/mlx-c/CMakeLists.txt").write_text("GIT_TAG v0.32.2)\n")
        commands, targets = [], set()
        path = self.metal_wheel()

        def run(command, env=None, **options):
            commands.append([str(part) for part in command])
            targets.add(env["MACOSX_DEPLOYMENT_TARGET"])
            return ""

        with mock.patch.object(mlx, "wheel", lambda requirement, platform=None: path), mock.patch.object(mlx, "run", run):
            folder = mlx.prepare(target.MAC, mlx_sys, "0.32.2", Path("/t"), None)
        self.assertEqual([c[0] for c in commands], ["c++", "c++"])
        self.assertIn("-dynamiclib", commands[1])
        self.assertEqual(targets, {"26.2"})
        self.assertEqual((folder / "bindings.rs").read_bytes(), mlx.BINDINGS.read_bytes())
        self.assertEqual((folder / "blas").read_text(), "Accelerate\n")

    def test_a_failed_download_leaves_no_files(self):
        with mock.patch.object(pypi, "run", side_effect=shared.SetupError("exit 1")):
            self.assert_error("network", pypi.wheel, "mlx-metal==0.32.2", "macosx_15_0_arm64")
        self.assertEqual(list(shared.CACHE.iterdir()), [], "a failed download left files")

    def test_a_damaged_download_is_an_error(self):
        bad = self.folder / "torch.whl"
        bad.write_text("half")
        self.assert_error("damaged", pypi.unpack, bad, self.folder)
        (self.folder / "cache").mkdir()
        with mock.patch.object(pypi, "component", return_value=self.folder / "cache"):
            self.assert_error("has no wheel", pypi.wheel, "torch==1")

    def test_a_killed_build_is_not_used(self):
        def killed(work):
            (work / "half").write_text("")
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            shared.component("thing", ["1"], killed)
        # A folder that SIGKILL has left has another name than the complete one.
        (shared.CACHE / "thing.partial-x").mkdir()
        built = shared.component("thing", ["1"], lambda work: (work / "whole").write_text(""))
        self.assertTrue((built / "whole").exists())
        again = shared.component("thing", ["1"], lambda work: self.fail("built twice"))
        self.assertEqual(built, again)


class CheckMac(SetupCase):
    def library(self, name, defined, undefined, version=0):
        """Writes a Mach-O file that only has a symbol table and a minimum system."""
        strings, entries = b"\0", b""
        for kind, names in ((0x0F, defined), (0x01, undefined)):
            for symbol in names:
                entries += struct.pack("<IBBHQ", len(strings), kind, 0, 0, 0)
                strings += symbol.encode() + b"\0"
        head = struct.pack("<8I", macho.MAGIC, 0x0100000C, 0, 6, 2, 48, 0, 0)
        head += struct.pack("<6I", macho.BUILD_VERSION, 24, 1, version, version, 0)
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
        self.assert_error("not a 64-bit Mach-O", macho.symbols, path)

    def test_a_wheel_that_is_not_as_assumed_is_an_error(self):
        check = load("check-mac")
        self.patch(mock.patch.object(check, "OUT", self.folder))
        self.patch(mock.patch.object(mlx, "unpacked_wheel", lambda row, version, tag: self.folder / tag))
        write = lambda tag, version: self.library(f"{tag}/mlx/lib/libmlx.dylib", [], [], version)
        for (major, minor), tag in target.MAC.wheels:
            write(tag, major << 16 | minor << 8)
        self.library("torch/lib/libtorch_cpu.dylib", list(check.TORCH_FACTS), [])
        check.check_wheel_facts("1")
        write("macosx_26_0_arm64", 26 << 16)
        self.assert_error("needs macOS 26.0", check.check_wheel_facts, "1")
        for text in check.TORCH_FACTS:
            self.library("torch/lib/libtorch_cpu.dylib", [other for other in check.TORCH_FACTS if other != text], [])
            self.assert_error(text, check.check_wheel_facts, "1")

    def test_a_symbol_that_a_wheel_lacks_is_an_error(self):
        check = load("check-mac")
        self.patch(mock.patch.object(check, "OUT", self.folder))
        for name in ("torch_cpu", "torch", "c10"):
            self.library(f"torch/lib/lib{name}.dylib", [f"__ZN2at{name}"], [])
        self.library("mlx/lib/libmlxc.dylib", ["_mlx_add"], [])
        self.library("wheel/mlx/lib/libmlx.dylib", ["__ZN3mlx4core3addE"], [])
        self.patch(mock.patch.object(mlx, "unpacked_wheel", lambda *_: self.folder / "wheel"))
        good = self.library("good", [], ["_mlx_add", "__ZN3mlx4core3addE", "__ZN2atc10", "_malloc"])
        check.check_symbols("1", {"good": good})
        for wanted in ("_mlx_gone", "__ZN3mlx4core4goneE", "__ZN2at4goneE", "__ZNK3c104goneE"):
            bad = self.library("bad", [], ["_mlx_add", wanted])
            self.assert_error(wanted, check.check_symbols, "1", {"bad": bad})
        none = self.library("none", [], ["_malloc"])
        self.assert_error("needs no symbol", check.check_symbols, "1", {"none": none})

    def test_a_mac_uses_its_own_sdk(self):
        environment = lambda: load("check-mac").environment(("cc", "c++"), "ar", "/torch", "/")
        self.pretend("Linux", "x86_64")
        self.assertEqual(environment()["SDKROOT"], "/")
        self.pretend("Darwin", "arm64")
        self.assertNotIn("SDKROOT", environment())

    def test_the_reason_is_printed_without_the_standard_library(self):
        check = load("check-mac")
        empty = subprocess.CompletedProcess([], 0, str(self.folder), "")
        with mock.patch("subprocess.run", return_value=empty):
            self.assertIn("rustup target add aarch64-apple-darwin", check.missing_standard_library())


class Bindings(SetupCase):
    def test_the_bindings_belong_to_the_locked_mlx_sys(self):
        row = target.current_target()
        mlx_sys = crates.crate_folders(row)["mlx-sys"]
        mlx.check_bindings(mlx_sys, mlx.version(mlx_sys))

    def test_bindings_of_another_version_are_refused(self):
        row = target.current_target()
        mlx_sys = crates.crate_folders(row)["mlx-sys"]
        self.assert_error("scripts/setup --bindings", mlx.check_bindings, mlx_sys.with_name("mlx-sys-9.9.9"), "0.32.2")
        self.assert_error("scripts/setup --bindings", mlx.check_bindings, mlx_sys, "9.9.9")

    def test_a_later_release_of_mlx_gets_translated_calls(self):
        for row in (target.LINUX["x86_64"], target.MAC):
            with mock.patch.object(mlx, "format_flags", return_value=[]):
                flags = [mlx.compile_flags(row, Path("/c"), Path("/m"), None, later) for later in (False, True)]
            self.assertEqual([mlx.LATER_RELEASES in each for each in flags], [False, True])
            self.assertTrue(mlx.LATER_RELEASES.exists())
        self.assertNotEqual(self.setup.inputs(True), self.setup.inputs(True, "0.32.3"))

    def test_the_bindings_only_have_names_of_mlx(self):
        """Names of one system would fail on another."""
        text = mlx.BINDINGS.read_text()
        functions = [line.split("pub fn ")[1].split("(")[0] for line in text.splitlines() if "pub fn " in line]
        self.assertGreater(len(functions), 600)
        for name in functions:
            self.assertRegex(name, "^_?mlx_")
        for word in ("glibc", "GLIBC", "_IO_FILE", "darwin"):
            self.assertNotIn(word, text)


class Input(SetupCase):
    def test_a_second_set_up_prints_nothing(self):
        for _ in range(2):
            done = subprocess.run(["scripts/setup", "--quiet"], cwd=ROOT, text=True, capture_output=True)
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))

    def test_a_missing_compiler_is_an_error(self):
        with mock.patch("shutil.which", return_value=None):
            self.assert_error("c++", shared.need, "c++", "install one")

    def test_a_full_disk_is_an_error(self):
        self.assert_error("GB free", shared.check_disk, 10**9)

    def test_the_cache_follows_the_xdg_variable(self):
        home = Path.home() / ".cache"
        for folder, expected in (("", home), ("relative", home), ("/x", Path("/x"))):
            with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
                self.assertEqual(shared.cache_home(), expected)

    def test_a_wrong_custom_libtorch_is_an_error(self):
        path = str(self.folder)
        self.assertEqual(self.assert_error("libtorch_cpu", torch.custom_libtorch, path, "2.13.0"), 2)
        (self.folder / "lib").mkdir()
        (self.folder / "lib/libtorch_cpu.so").touch()
        (self.folder / "include/torch").mkdir(parents=True)
        (self.folder / "build-version").write_text("2.4.0+cu121\n")
        self.assert_error("2.4.0", torch.custom_libtorch, path, "2.13.0")
        (self.folder / "build-version").write_text("2.13.0+cpu\n")
        self.assertEqual(torch.custom_libtorch(path, "2.13.0"), self.folder.resolve())
        self.assertIsNone(torch.custom_libtorch(None, "2.13.0"))

    def test_a_link_of_an_earlier_set_up_is_removed(self):
        self.patch(mock.patch.object(self.setup, "DEPS", self.folder / "deps"))
        self.setup.link("torch-python", self.folder)
        self.assertEqual((self.folder / "deps/torch-python").resolve(), self.folder.resolve())
        self.setup.link("torch-python", None)
        self.assertEqual(list((self.folder / "deps").iterdir()), [])

    def test_a_custom_libtorch_stays_in_use(self):
        self.setup.STAMP.write_text('{"inputs": {"libtorch": "/opt/libtorch"}, "paths": []}')
        with mock.patch.dict(os.environ):
            os.environ.pop("LIBTORCH", None)
            self.assertEqual(self.setup.inputs(False)["libtorch"], "/opt/libtorch")
            os.environ["LIBTORCH"] = ""
            self.assertIsNone(self.setup.inputs(False)["libtorch"])

    def test_an_update_of_macos_repeats_set_up(self):
        self.pretend("Darwin", "arm64", "26.1")
        before = self.setup.inputs(False)
        self.pretend("Darwin", "arm64", "26.2")
        self.assertEqual((before["mlx_wheel"], self.setup.inputs(False)["mlx_wheel"]), ("macosx_15_0_arm64", "macosx_26_0_arm64"))

    def test_a_damaged_record_of_set_up_is_ignored(self):
        for stamp in ("", "{", "[]", "5", '{"inputs": 5}', '{"inputs": {}, "paths": 1}', '{"inputs": {"libtorch": 3}, "paths": [1]}'):
            self.setup.STAMP.write_text(stamp)
            with mock.patch.dict(os.environ):
                os.environ.pop("LIBTORCH", None)
                current = self.setup.inputs(False)
            self.assertIsNone(current["libtorch"], stamp)
            self.assertFalse(self.setup.is_ready(current), stamp)
        self.setup.STAMP.write_text(json.dumps({"inputs": current, "paths": ["/"], "config": 1}))
        self.assertFalse(self.setup.is_ready(current))


if __name__ == "__main__":
    unittest.main()

"""MLX: PyPI's wheel, mlx-c compiled against it, and the Rust bindings.

They replace the build from source in mlx-sys, which needs Xcode, cmake and bindgen.
"""
import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
import sys

from libraries import needed, symbols
from pypi import unpack, wheel
from shared import NATIVE, InputError, SetupError, component, file_hash, run, say
from target import deployment_target, mlx_platform
from torch import version_in

OPENBLAS = "scipy-openblas32>=0.3.30,<0.4"
BINDGEN = "0.72.1"
LIBCLANG = "libclang>=18,<19"
BINDINGS = NATIVE / "bindings.rs"
LATER_RELEASES = NATIVE / "later_releases.hpp"


def version(mlx_sys):
    return version_in(mlx_sys / "src/mlx-c/CMakeLists.txt", r"GIT_TAG v([\d.]+)")


def format_flags(libtorch):
    """Returns compiler flags for std::format: none if the compiler has it, else fmt from libtorch's headers."""
    has_format = subprocess.run(
        ["c++", "-x", "c++", "-std=c++20", "-fsyntax-only", "-"],
        input="#include <format>\n", text=True, capture_output=True,
    ).returncode == 0
    if has_format:
        return []
    if (libtorch / "include/fmt/format.h").exists():
        return [f"-I{libtorch / 'include'}"]
    raise SetupError("this C++ compiler has no <format> and LIBTORCH has no fmt headers: install gcc 13 or newer")


def unpacked_wheel(target, version, tag):
    """Returns the folder of the unpacked wheel for the platform `tag`, or for pip's choice if it is None.

    Nothing is changed: libraries are signed, and libmlx looks for Metal's kernels in its own folder.
    """

    def build(work):
        path = wheel(f"{target.mlx}=={version}", tag)
        say("unpacking MLX")
        unpack(path, work)

    key = [version, target.triple] + ([tag] if tag else [])
    return component("mlx-wheel", key, build)


def bundled_blas(lib):
    """Returns the names of the BLAS and LAPACK that libmlx loads from its wheel."""
    return [name for name in needed(lib) if re.match(r"lib(blas|lapack)", name)]


def blas_calls(lib, bundled):
    """Returns the symbols that libmlx calls in its bundled BLAS and LAPACK, which are in the folder `bundled`."""
    offered = set().union(*(symbols(bundled / name, "--defined-only") for name in bundled_blas(lib)))
    return sorted(offered & symbols(lib, "--undefined-only"))


def missing_calls(calls, openblas):
    """Returns the symbols that PyPI's OpenBLAS, which prefixes its names, does not have."""
    defined = symbols(openblas, "--defined-only")
    return [name for name in calls if "scipy_" + name not in defined]


def jumps(calls):
    """Returns assembly code that forwards each symbol to PyPI's OpenBLAS, for the CPU of this machine."""
    arm = platform.machine() in ("aarch64", "arm64")
    code = [f".globl {c}\n.type {c},%function\n{c}: {'b' if arm else 'jmp'} scipy_{c}{'' if arm else '@PLT'}\n" for c in calls]
    return ".text\n" + "".join(code) + '.section .note.GNU-stack,"",%progbits\n'


def replace_blas(lib, bundled):
    """Replaces the reference BLAS and LAPACK that are bundled with MLX by OpenBLAS. Returns the name of the BLAS.

    PyPI's OpenBLAS prefixes its symbols. A library of jumps, which has the name of the bundled library, forwards
    each symbol that libmlx calls.
    """
    try:
        archive = wheel(OPENBLAS)
    except SetupError as reason:
        say(f"no OpenBLAS ({reason}); MLX uses its reference BLAS, which is many times slower")
        return "reference"
    unpack(archive, bundled)
    openblas = next((bundled / "scipy_openblas32" / "lib").glob("libscipy_openblas*.so"))
    openblas_library = bundled / openblas.name
    openblas.rename(openblas_library)
    replaced = bundled_blas(lib)
    calls = blas_calls(lib, bundled)
    missing = missing_calls(calls, openblas_library)
    if not calls or missing:
        say(f"this OpenBLAS lacks {', '.join(missing) or 'the symbols'}; MLX uses its reference BLAS")
        return "reference"
    source = bundled / "jumps.s"
    source.write_text(jumps(calls))
    for name in replaced:
        (bundled / name).rename(bundled / (name + ".reference"))
        run(["cc", "-shared", "-o", bundled / name, source, f"-Wl,-soname,{name}", f"-L{bundled}",
             f"-l:{openblas_library.name}", "-Wl,-rpath,$ORIGIN"])
    probe = (
        "import ctypes,sys;l=ctypes.CDLL(sys.argv[1]);n=256;A=(ctypes.c_float*(n*n))(*[1.0]*(n*n));"
        "C=(ctypes.c_float*(n*n))();f=ctypes.c_float(1);z=ctypes.c_float(0);"
        "l.cblas_sgemm(101,111,111,n,n,n,f,A,n,A,n,z,C,n);sys.exit(0 if all(c==n for c in C) else 1)"
    )
    product = next(name for name in replaced if "blas" in name)
    if subprocess.run([sys.executable, "-c", probe, bundled / product]).returncode:
        for name in replaced:
            (bundled / (name + ".reference")).replace(bundled / name)
        say("OpenBLAS computes a wrong matrix product on this CPU; MLX uses its reference BLAS")
        return "reference"
    return archive.name.split("-")[0] + " " + archive.name.split("-")[1]


def linux_sources(target):
    """Returns the files for functions that macOS has and Linux lacks."""
    return [NATIVE / "compat.hpp", NATIVE / "mach.c"] if target.linux else []


def compile_flags(target, source, mlx, libtorch, later=False):
    """Returns the compiler flags of a file of mlx-c. `later` is true for a release after the one that it is written for."""
    extra = ["-include", NATIVE / "compat.hpp", *format_flags(libtorch)] if target.linux else []
    if later:
        extra += ["-include", LATER_RELEASES]
    return ["-std=c++20", "-O2", "-fPIC", f"-I{source}", f"-I{mlx / 'include'}", *extra]


def link_flags(target, lib):
    """Returns the flags that link libmlxc with the libmlx in the same folder."""
    if target.linux:
        shared = ["-shared", f"-Wl,-soname,{target.file_name('mlxc')}", "-Wl,--allow-shlib-undefined"]
    else:
        shared = ["-dynamiclib", "-install_name", f"@rpath/{target.file_name('mlxc')}"]
    return [*shared, f"-L{lib}", "-lmlx", f"-Wl,-rpath,{target.origin}"]


def compile_mlx_c(target, mlx_sys, work, libtorch, compiler="c++", env=None, later=False):
    """Compiles libmlxc in the folder of libmlx, with additional environment variables."""
    source = mlx_sys / "src" / "mlx-c"
    mlx = work / "mlx"
    flags = compile_flags(target, source, mlx, libtorch, later)
    files = sorted((source / "mlx" / "c").glob("*.cpp"))
    objects = work / "objects"
    objects.mkdir()
    say(f"compiling mlx-c ({len(files)} files)")

    def compile_one(file):
        output = objects / (file.stem + ".o")
        run([compiler, *flags, "-c", file, "-o", output], env=env, what=f"compiling {file.name}")
        return output

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_one, files))
    for file in linux_sources(target):
        if file.suffix == ".c":
            compiled.append(objects / (file.stem + ".o"))
            run(["cc", "-O2", "-fPIC", "-c", file, "-o", compiled[-1]])
    run([compiler, "-o", mlx / "lib" / target.file_name("mlxc"), *compiled, *link_flags(target, mlx / "lib")],
        env=env, what="linking mlx-c")
    shutil.rmtree(objects)


def prepare(target, mlx_sys, release, libtorch, cuda):
    """Returns the folder with mlx/lib (libmlx, libmlxc), bindings.rs, and the name of the CPU's BLAS in `blas`.

    `cuda` is the folder of the CUDA packages, or None.
    """
    tag = mlx_platform(target)
    blas_key = [OPENBLAS] if target.linux else [tag, "deployment target"]
    key = [release, mlx_sys.name, target.triple, *blas_key, str(cuda) if cuda else "cpu", "mlx 2",
           [file_hash(path) for path in [*linux_sources(target), BINDINGS]]]
    later = release != version(mlx_sys)
    if later:
        key.append(file_hash(LATER_RELEASES))

    def build(work):
        if cuda:
            shutil.copytree(cuda / "mlx", work / "mlx", symlinks=True)
            for libs in cuda.glob("mlx_cuda*.libs"):
                shutil.copytree(libs, work / libs.name)
            if (cuda / "nvidia").is_dir():
                (work / "nvidia").symlink_to(cuda / "nvidia")
        else:
            shutil.copytree(unpacked_wheel(target, release, tag), work, dirs_exist_ok=True, symlinks=True)
        bundled = next(iter(work.glob("mlx_*.libs")), None)
        blas = replace_blas(work / "mlx" / "lib" / target.file_name("mlx"), bundled) if target.linux and bundled else "as bundled"
        (work / "blas").write_text(("Accelerate" if not target.linux else blas) + "\n")
        env = {"MACOSX_DEPLOYMENT_TARGET": deployment_target(target, tag)} if tag else None
        compile_mlx_c(target, mlx_sys, work, libtorch, env=env, later=later)
        shutil.copyfile(BINDINGS, work / "bindings.rs")

    return component("mlx", key, build)


def bindings_header(mlx_sys, version):
    return (f"// Bindings to mlx-c for {mlx_sys.name} (MLX {version}), the same on every platform.\n"
            "// Made by scripts/setup --bindings; edits are lost.\n")


def check_bindings(mlx_sys, version):
    """Raises SetupError if bindings.rs belongs to another version of mlx-sys."""
    if not BINDINGS.exists() or not BINDINGS.read_text().startswith(bindings_header(mlx_sys, version)):
        raise SetupError(f"{BINDINGS.name} does not belong to {mlx_sys.name}: "
                         "run 'scripts/setup --bindings', then scripts/setup again")


def generate_bindings(target, mlx_sys, version):
    """Generates bindings.rs for another version of mlx-sys. Building bindgen takes some minutes.

    The bindings only have names of mlx-c, so they are the same on every system.
    """
    if not target.linux:
        raise InputError("--bindings needs Linux: the bindings are the same on macOS")

    def build(work):
        say("building bindgen")
        run(["cargo", "install", "bindgen-cli", "--version", BINDGEN, "--locked", "--debug", "--root", work],
            what="building bindgen", env={"CARGO_TARGET_DIR": str(work / "target")})
        shutil.rmtree(work / "target")

    tool = component("bindgen", [BINDGEN, target.triple], build) / "bin" / "bindgen"
    clang = component("libclang", [LIBCLANG, target.triple], lambda work: unpack(wheel(LIBCLANG), work))
    source = mlx_sys / "src" / "mlx-c"
    say("generating the bindings")
    include = "".join(f'#include "mlx/c/{header.name}"\n' for header in sorted((source / "mlx" / "c").glob("*.h")))
    umbrella = BINDINGS.with_name("umbrella.h")
    umbrella.write_text(include)
    half = "#[repr(transparent)] #[derive(Debug, Default, Clone, Copy)] pub struct float16_t(pub u16);"
    try:
        text = run(
            [tool, umbrella, "--allowlist-item", "(_)?mlx_.*", "--blocklist-type", "_IO_.*|__off(64)?_t|FILE|float16_t|bfloat16_t",
             "--raw-line", half, "--raw-line", "pub type bfloat16_t = u16;",
             "--raw-line", "pub type FILE = ::std::os::raw::c_void;",
             "--", f"-I{source}", "-include", NATIVE / "compat.hpp",
             "-isystem", run(["gcc", "-print-file-name=include"]).strip()],
            env={"LIBCLANG_PATH": str(next(clang.glob("**/libclang.so*")).parent)},
            what="bindgen over mlx-c",
        )
    finally:
        umbrella.unlink()
    BINDINGS.write_text(bindings_header(mlx_sys, version) + text)

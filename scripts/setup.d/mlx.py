"""MLX: PyPI's wheel, mlx-c compiled against it, and the Rust bindings, in the place of what
mlx-sys's own build makes from source with Xcode, cmake and bindgen."""
import concurrent.futures
import os
import platform
import re
import shutil
import subprocess
import sys

from libraries import needed, symbols
from pypi import unpack, wheel
from shared import NATIVE, Stop, component, file_hash, run, say
from target import mlx_platform
from torch import version_in

OPENBLAS = "scipy-openblas32>=0.3.30,<0.4"
BINDGEN = "0.72.1"
LIBCLANG = "libclang>=18,<19"
BINDINGS = NATIVE / "bindings.rs"


def version(mlx_sys):
    return version_in(mlx_sys / "src/mlx-c/CMakeLists.txt", r"GIT_TAG v([\d.]+)")


def format_flags(libtorch):
    """Where std::format comes from: the compiler, or fmt out of libtorch's headers."""
    has_format = subprocess.run(
        ["c++", "-x", "c++", "-std=c++20", "-fsyntax-only", "-"],
        input="#include <format>\n", text=True, capture_output=True,
    ).returncode == 0
    if has_format:
        return []
    if (libtorch / "include/fmt/format.h").exists():
        return [f"-I{libtorch / 'include'}"]
    raise Stop("this C++ compiler has no <format> and LIBTORCH carries no fmt headers: install gcc 13 or newer")


def unpacked(row, version, chosen):
    """The wheel for the platform `chosen` (None: as pip chooses) as it is: signed libraries stay
    byte for byte, and Metal's kernels beside libmlx, where it looks for them."""

    def build(work):
        path = wheel(f"{row.mlx}=={version}", chosen)
        say("unpacking MLX")
        unpack(path, work)

    key = [version, row.triple] + ([chosen] if chosen else [])
    return component("mlx-wheel", key, build)


def put_blas(lib, bundled):
    """Puts OpenBLAS in the place of the reference BLAS and LAPACK that come with MLX.

    The PyPI build prefixes its symbols, so a library of jumps with the bundled
    files' names leads each symbol that libmlx calls to it. Returns what serves.
    """
    try:
        archive = wheel(OPENBLAS)
    except Stop as reason:
        say(f"no OpenBLAS ({reason}); MLX keeps its reference BLAS, which is many times slower")
        return "reference"
    unpack(archive, bundled)
    openblas = next((bundled / "scipy_openblas32" / "lib").glob("libscipy_openblas*.so"))
    target = bundled / openblas.name
    openblas.rename(target)
    has = symbols(target, "--defined-only")
    replaced = [name for name in needed(lib) if re.match(r"lib(blas|lapack)", name)]
    offered = set().union(*(symbols(bundled / name, "--defined-only") for name in replaced))
    calls = sorted(offered & symbols(lib, "--undefined-only"))
    missing = [name for name in calls if "scipy_" + name not in has]
    if not calls or missing:
        say(f"this OpenBLAS lacks {', '.join(missing) or 'the symbols'}; MLX keeps its reference BLAS")
        return "reference"
    jump = "b" if platform.machine() in ("aarch64", "arm64") else "jmp"
    suffix = "" if jump == "b" else "@PLT"
    source = bundled / "jumps.s"
    source.write_text(
        ".text\n"
        + "".join(f".globl {c}\n.type {c},%function\n{c}: {jump} scipy_{c}{suffix}\n" for c in calls)
        + '.section .note.GNU-stack,"",%progbits\n'
    )
    for name in replaced:
        kept = bundled / (name + ".reference")
        (bundled / name).rename(kept)
        run(["cc", "-shared", "-o", bundled / name, source, f"-Wl,-soname,{name}", f"-L{bundled}",
             f"-l:{target.name}", "-Wl,-rpath,$ORIGIN"])
    probe = (
        "import ctypes,sys;l=ctypes.CDLL(sys.argv[1]);n=256;A=(ctypes.c_float*(n*n))(*[1.0]*(n*n));"
        "C=(ctypes.c_float*(n*n))();f=ctypes.c_float(1);z=ctypes.c_float(0);"
        "l.cblas_sgemm(101,111,111,n,n,n,f,A,n,A,n,z,C,n);sys.exit(0 if all(c==n for c in C) else 1)"
    )
    product = next(name for name in replaced if "blas" in name)
    if subprocess.run([sys.executable, "-c", probe, bundled / product]).returncode:
        for name in replaced:
            (bundled / (name + ".reference")).replace(bundled / name)
        say("OpenBLAS fails a matrix product on this CPU; MLX keeps its reference BLAS")
        return "reference"
    return archive.name.split("-")[0] + " " + archive.name.split("-")[1]


def linux_only(row):
    """Files that only Linux needs compiled: what macOS's own library has."""
    return [NATIVE / "compat.hpp", NATIVE / "mach.c"] if row.linux else []


def compile_flags(row, source, mlx, libtorch):
    """How a file of mlx-c is compiled."""
    extra = ["-include", NATIVE / "compat.hpp", *format_flags(libtorch)] if row.linux else []
    return ["-std=c++20", "-O2", "-fPIC", f"-I{source}", f"-I{mlx / 'include'}", *extra]


def link_flags(row, lib):
    """How libmlxc is linked against the libmlx beside it."""
    if row.linux:
        own = ["-shared", f"-Wl,-soname,{row.name('mlxc')}", "-Wl,--allow-shlib-undefined"]
    else:
        own = ["-dynamiclib", "-install_name", f"@rpath/{row.name('mlxc')}"]
    return [*own, f"-L{lib}", "-lmlx", f"-Wl,-rpath,{row.origin}"]


def compile_mlx_c(row, mlx_sys, work, libtorch, compiler="c++"):
    """libmlxc beside libmlx."""
    source = mlx_sys / "src" / "mlx-c"
    mlx = work / "mlx"
    flags = compile_flags(row, source, mlx, libtorch)
    files = sorted((source / "mlx" / "c").glob("*.cpp"))
    objects = work / "objects"
    objects.mkdir()
    say(f"compiling mlx-c ({len(files)} files)")

    def compile_one(file):
        target = objects / (file.stem + ".o")
        run([compiler, *flags, "-c", file, "-o", target], what=f"compiling {file.name}")
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(compile_one, files))
    for file in linux_only(row):
        if file.suffix == ".c":
            done.append(objects / (file.stem + ".o"))
            run(["cc", "-O2", "-fPIC", "-c", file, "-o", done[-1]])
    run([compiler, "-o", mlx / "lib" / row.name("mlxc"), *done, *link_flags(row, mlx / "lib")], what="linking mlx-c")
    shutil.rmtree(objects)


def prepare(row, mlx_sys, version, libtorch, cuda):
    """The folder that holds mlx/lib (libmlx, libmlxc), bindings.rs, and in `blas` what
    multiplies matrices on the CPU."""
    blas_key = [OPENBLAS] if row.linux else [mlx_platform(row)]
    key = [version, mlx_sys.name, row.triple, *blas_key, str(cuda) if cuda else "cpu", "mlx 2",
           [file_hash(path) for path in [*linux_only(row), BINDINGS]]]

    def build(work):
        if cuda:
            shutil.copytree(cuda / "mlx", work / "mlx", symlinks=True)
            for libs in cuda.glob("mlx_cuda*.libs"):
                shutil.copytree(libs, work / libs.name)
            if (cuda / "nvidia").is_dir():
                (work / "nvidia").symlink_to(cuda / "nvidia")
        else:
            shutil.copytree(unpacked(row, version, mlx_platform(row)), work, dirs_exist_ok=True, symlinks=True)
        bundled = next(iter(work.glob("mlx_*.libs")), None)
        blas = put_blas(work / "mlx" / "lib" / row.name("mlx"), bundled) if row.linux and bundled else "as bundled"
        (work / "blas").write_text(("Accelerate" if not row.linux else blas) + "\n")
        compile_mlx_c(row, mlx_sys, work, libtorch)
        shutil.copyfile(BINDINGS, work / "bindings.rs")

    return component("mlx", key, build)


def bindings_head(mlx_sys, version):
    return (f"// Bindings to mlx-c for {mlx_sys.name} (MLX {version}), the same on every platform.\n"
            "// Made by scripts/setup --bindings; edits are lost.\n")


def check_bindings(mlx_sys, version):
    """Raises Stop where the kept bindings are of another mlx-sys."""
    if not BINDINGS.exists() or not BINDINGS.read_text().startswith(bindings_head(mlx_sys, version)):
        raise Stop(f"{BINDINGS.name} is not of {mlx_sys.name}: run 'scripts/setup --bindings', then scripts/setup again")


def make_bindings(row, mlx_sys, version):
    """Makes bindings.rs anew, after mlx-sys has moved. Needs Linux and, for bindgen, some
    minutes; limited to mlx-c's own names, it comes out the same for every system."""
    if not row.linux:
        raise Stop("--bindings needs Linux: what it makes serves macOS as it is")

    def build(work):
        say("building bindgen")
        run(["cargo", "install", "bindgen-cli", "--version", BINDGEN, "--locked", "--debug", "--root", work],
            what="building bindgen", env={"CARGO_TARGET_DIR": str(work / "target")})
        shutil.rmtree(work / "target")

    tool = component("bindgen", [BINDGEN, row.triple], build) / "bin" / "bindgen"
    clang = component("libclang", [LIBCLANG, row.triple], lambda work: unpack(wheel(LIBCLANG), work))
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
    BINDINGS.write_text(bindings_head(mlx_sys, version) + text)

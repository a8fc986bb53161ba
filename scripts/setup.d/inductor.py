"""The Python torch that compiles training steps (AOTInductor), from the wheel that set-up downloads.

On Linux, PyPI's wheel is a CUDA build. Without an NVIDIA GPU, set-up installs only its CPU part.
libtorch_python loads CUDA's libraries, so stub libraries replace them. They define the symbols, and abort the
process if one is called.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

from libraries import needed, symbols, undefined
from pypi import NEWEST, OLDEST, PYTHON, SUPPORTED, install, requirements, unpack, wheel
from shared import SetupError, component, run, say
from target import MAC_TORCH

# libtorch_python calls two functions of the CUDA part while it loads. One returns the place of a function
# pointer, the other constructs options for a default argument.
GET_GIL_CHECKER = "_ZN4c10d15get_gil_checkerEv"
NCCL_OPTIONS = "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb"

STUBS = """#include <stdio.h>
#include <stdlib.h>
// A class without bases, as the C++ ABI describes it.
extern char class_info[] __asm__("_ZTVN10__cxxabiv117__class_type_infoE");
static void missing(const char *name) {
  fprintf(stderr, "%s is part of CUDA, which is not installed\\n", name);
  abort();
}
static void nothing(void) {}
static void *checker;
static void *type[] = { class_info + 16, "N4c10d16ProcessGroupNCCL7OptionsE" };
static void *table[34] = { 0, type, NOTHINGS };
"""


def unsupported_python():
    """Returns the reason if there is no torch for this Python, or None."""
    versions = [".".join(map(str, version)) for version in (OLDEST, NEWEST, sys.version_info[:2])]
    return None if SUPPORTED else "torch.compile needs Python {} to {}, and scripts/setup ran in {}".format(*versions)


def stub_code(index, name):
    """Returns C code that defines one symbol."""
    if name.startswith("_ZT"):
        value = f' = {{ class_info + 16, "{name[4:]}" }}' if name.startswith("_ZTI") else ""
        return f'void *d{index}[64] __asm__("{name}"){value};\n'
    if name == GET_GIL_CHECKER:
        return f'void *f{index}(void) __asm__("{name}"); void *f{index}(void) {{ return &checker; }}\n'
    if name == NCCL_OPTIONS:
        return f'void f{index}(void **) __asm__("{name}"); void f{index}(void **self) {{ *self = table + 2; }}\n'
    return f'void f{index}(void) __asm__("{name}"); void f{index}(void) {{ missing("{name}"); }}\n'


def build_stubs(lib, work):
    """Builds stubs of the CUDA libraries that the libraries in `lib` need."""
    present = [path for path in lib.iterdir() if ".so" in path.name and path.is_file()]
    names = {path.name for path in present}
    defined = set().union(*(symbols(path, "--defined-only") for path in present))
    # A symbol with the version of a system library is found in that library.
    missing = {(name, version) for path in present for name, version in undefined(path)
               if name not in defined and not name.startswith(("Py", "_Py"))
               and (not version or version.startswith("lib"))}
    absent = {library for path in present for library in needed(path)} - names
    cuda = re.compile(r"lib(torch_cuda|torch_nvshmem|caffe2_nvrtc|cu|nccl|nv)")
    code = work / "stubs.c"
    for library in sorted(filter(cuda.match, absent)):
        own = sorted(name for name, version in missing
                     if version == library or not version and library == "libtorch_cuda.so")
        text = STUBS.replace("NOTHINGS", ", ".join(["nothing"] * 32))
        code.write_text(text + "".join(stub_code(index, name) for index, name in enumerate(own)))
        script = work / "version"
        script.write_text(f"{library} {{ *; }};\n")
        versioned = [f"-Wl,--version-script={script}"] if any(version == library for _, version in missing) else []
        run(["cc", "-shared", "-fPIC", "-w", "-o", lib / library, code, f"-Wl,-soname,{library}", *versioned, "-lstdc++"],
            what=f"building a stub of {library}")
    code.unlink(missing_ok=True)
    (work / "version").unlink(missing_ok=True)


def link_or_copy(source, destination):
    """Creates a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        destination.write_bytes(source.read_bytes())


def python_torch(target, version, libtorch):
    """Returns a folder for PYTHONPATH with torch and its dependencies. It shares the libraries of `libtorch`."""
    own = libtorch / "lib"
    left_out = re.compile(r"torch/(include|bin(?!/torch_shm_manager)|share|test)/|torch/lib/lib(torch_cuda|torch_nvshmem|caffe2_nvrtc)")

    def wanted(name):
        return not target.linux or not left_out.match(name) and not (own / Path(name).name).is_file()

    def build(work):
        path = wheel(f"torch=={version}", None if target.linux else MAC_TORCH)
        say(f"unpacking torch for Python {PYTHON}, which compiles training steps")
        unpack(path, work, wanted)
        if target.linux:
            for library in own.iterdir():
                if library.is_file():
                    link_or_copy(library, work / "torch" / "lib" / library.name)
            (work / "torch" / "include").symlink_to(libtorch / "include")
            if any("libtorch_cuda" in name for name in needed(work / "torch" / "lib" / "libtorch_python.so")):
                build_stubs(work / "torch" / "lib", work)
        # NVIDIA's packages and triton are only needed for a GPU. Inductor imports setuptools, which Python 3.12 and
        # newer do not bring along.
        install([r for r in requirements(path) if not re.match(r"(nvidia|cuda|triton)", r)], work)
        check_import(work)

    return component("torch-python", [version, target.triple, PYTHON, "2"], build)


# The modules that Inductor imports while it compiles a step. It imports these two only when it calls the compiler.
COMPILE_IMPORTS = "import torch._inductor, torch._inductor.cpp_builder, torch.utils.cpp_extension"


def check_import(folder):
    """Raises SetupError if Python can't import what Inductor needs from the torch in `folder`."""
    done = subprocess.run([sys.executable, "-c", COMPILE_IMPORTS], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder)})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise SetupError(f"Python can't import torch: {lines[-1] if lines else done.returncode}")


def prepare(target, version, libtorch, from_wheel, packages):
    """Returns (folder for PYTHONPATH, None), or (None, the reason why there is none).

    `packages` is the folder of the CUDA builds, if they are installed. `from_wheel` is true if set-up extracted
    `libtorch` from the CPU part of the wheel.
    """
    reason = unsupported_python()
    if reason is None:
        try:
            if packages:
                folder = packages
            elif from_wheel:
                folder = python_torch(target, version, libtorch)
            else:
                # A custom libtorch can be the one inside a Python package.
                folder = libtorch.parent
                if not (libtorch / "__init__.py").exists():
                    raise SetupError("your LIBTORCH is not part of a Python package of torch")
            if packages or not from_wheel:
                check_import(folder)
            return folder, None
        except SetupError as error:
            reason = str(error)
    return None, reason

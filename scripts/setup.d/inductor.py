"""The Python torch that compiles training steps (AOTInductor), out of the wheel that set-up has.

On x86-64 Linux without an NVIDIA GPU, PyPI's wheel is a CUDA build of which the CPU part alone is
kept. Python's part of it asks for CUDA's libraries when it is loaded: stubs stand in their place,
which hold the symbols and end the process where one is called.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

from libraries import needed, symbols, undefined
from pypi import NEWEST, OLDEST, PYTHON, SERVED, install, requirements, unpack, wheel
from shared import Stop, component, run, say
from target import MAC_TORCH

# Two functions of CUDA's part are called when Python's is loaded. The one returns where a checker is
# kept, the other makes options that stand as a default argument.
CHECKER = "_ZN4c10d15get_gil_checkerEv"
OPTIONS = "_ZN4c10d16ProcessGroupNCCL7OptionsC1Eb"

STUBS = """#include <stdio.h>
#include <stdlib.h>
// A class without bases, as the C++ ABI describes it.
extern char class_info[] __asm__("_ZTVN10__cxxabiv117__class_type_infoE");
static void missing(const char *name) {
  fprintf(stderr, "%s is of CUDA's part, which is not here\\n", name);
  abort();
}
static void nothing(void) {}
static void *checker;
static void *type[] = { class_info + 16, "N4c10d16ProcessGroupNCCL7OptionsE" };
static void *table[34] = { 0, type, NOTHINGS };
"""


def unfit():
    """Why this Python can't carry torch; None where it can."""
    versions = [".".join(map(str, version)) for version in (OLDEST, NEWEST, sys.version_info[:2])]
    return None if SERVED else "torch.compile needs Python {} to {}, and set-up ran in {}".format(*versions)


def stub(index, name):
    """C of one symbol."""
    if name.startswith("_ZT"):
        of = f' = {{ class_info + 16, "{name[4:]}" }}' if name.startswith("_ZTI") else ""
        return f'void *d{index}[64] __asm__("{name}"){of};\n'
    if name == CHECKER:
        return f'void *f{index}(void) __asm__("{name}"); void *f{index}(void) {{ return &checker; }}\n'
    if name == OPTIONS:
        return f'void f{index}(void **) __asm__("{name}"); void f{index}(void **self) {{ *self = table + 2; }}\n'
    return f'void f{index}(void) __asm__("{name}"); void f{index}(void) {{ missing("{name}"); }}\n'


def make_stubs(lib, work):
    """Makes the libraries that those in `lib` ask for and that are not there."""
    present = [path for path in lib.iterdir() if ".so" in path.name and path.is_file()]
    names = {path.name for path in present}
    defined = set().union(*(symbols(path, "--defined-only") for path in present))
    # What has the version of a system's library is found there.
    wanted = {(name, version) for path in present for name, version in undefined(path)
              if name not in defined and not name.startswith(("Py", "_Py"))
              and (not version or version.startswith("lib"))}
    asked = {library for path in present for library in needed(path)} - names
    cuda = re.compile(r"lib(torch_cuda|torch_nvshmem|caffe2_nvrtc|cu|nccl|nv)")
    code = work / "stubs.c"
    for library in sorted(filter(cuda.match, asked)):
        own = sorted(name for name, version in wanted
                     if version == library or not version and library == "libtorch_cuda.so")
        text = STUBS.replace("NOTHINGS", ", ".join(["nothing"] * 32))
        code.write_text(text + "".join(stub(index, name) for index, name in enumerate(own)))
        script = work / "version"
        script.write_text(f"{library} {{ *; }};\n")
        versioned = [f"-Wl,--version-script={script}"] if any(version == library for _, version in wanted) else []
        run(["cc", "-shared", "-fPIC", "-w", "-o", lib / library, code, f"-Wl,-soname,{library}", *versioned, "-lstdc++"],
            what=f"making a stub of {library}")
    code.unlink(missing_ok=True)
    (work / "version").unlink(missing_ok=True)


def beside(source, place):
    """The same file at a second place, by a hard link where the file system has them."""
    try:
        os.link(source, place)
    except OSError:
        place.write_bytes(source.read_bytes())


def whole(row, version, cut):
    """torch for Python, with what it imports: a folder for PYTHONPATH."""
    own = cut / "lib"
    left_out = re.compile(r"torch/(include|bin(?!/torch_shm_manager)|share|test)/|torch/lib/lib(torch_cuda|torch_nvshmem|caffe2_nvrtc)")

    def wanted(name):
        return not row.linux or not left_out.match(name) and not (own / Path(name).name).is_file()

    def build(work):
        path = wheel(f"torch=={version}", None if row.linux else MAC_TORCH)
        say(f"unpacking torch for Python {PYTHON}, which compiles training steps")
        unpack(path, work, wanted)
        if row.linux:
            for library in own.iterdir():
                if library.is_file():
                    beside(library, work / "torch" / "lib" / library.name)
            (work / "torch" / "include").symlink_to(cut / "include")
            if any("libtorch_cuda" in name for name in needed(work / "torch" / "lib" / "libtorch_python.so")):
                make_stubs(work / "torch" / "lib", work)
        # NVIDIA's packages and triton serve a GPU alone.
        install([r for r in requirements(path) if not re.match(r"(nvidia|cuda|triton|setuptools)", r)], work)
        check(work)

    return component("torch-python", [version, row.triple, PYTHON, "1"], build)


def check(folder):
    """Ends set-up's try where the torch in `folder` does not load."""
    done = subprocess.run([sys.executable, "-c", "import torch._inductor"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(folder)})
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Stop(f"torch does not load in Python: {lines[-1] if lines else done.returncode}")


def prepare(row, version, libtorch, cut, site):
    """(folder for PYTHONPATH, None), or (None, why there is none)."""
    reason = unfit()
    if reason is None:
        try:
            if site:
                folder = site
            elif cut:
                folder = whole(row, version, libtorch)
            else:
                # A libtorch of the user's own may be the one inside a Python package.
                folder = libtorch.parent
                if not (libtorch / "__init__.py").exists():
                    raise Stop("the libtorch of your own (LIBTORCH) is not inside a torch of Python")
            if site or not cut:
                check(folder)
            return folder, None
        except Stop as stop:
            reason = str(stop)
    return None, reason

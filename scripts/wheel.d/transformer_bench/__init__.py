"""Starts the programs of transformer-bench with the torch and the MLX of this environment."""
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

MAC = sys.platform == "darwin"
LIBRARY = "lib{}.dylib" if MAC else "lib{}.so"
# Not resolved: uv can install each file as a link into its cache, where there is neither torch nor MLX.
PROGRAM = Path(__file__).parent / "bin" / "transformer-bench"
# The packages whose libraries the programs load: the import name, a library, and the distributions that can have it.
PACKAGES = {
    "torch": ("torch_cpu", ["torch"]),
    "mlx": ("mlx", ["mlx-cpu", "mlx-cuda-13", "mlx-cuda-12", "mlx-metal", "mlx"]),
    "scipy_openblas32": ("scipy_openblas", ["scipy-openblas32"]),
}


def library_folder(package, library):
    """Returns the folder of a package's libraries, without importing the package, or None if it is missing."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place).absolute() / "lib"
        if (folder / LIBRARY.format(library)).exists():
            return folder
    return None


def distribution(names):
    """Returns the installed distribution of the first name that has one, or None."""
    for name in names:
        try:
            return importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def platform_tag(found):
    """Returns the platform tag of a distribution's wheel, such as macosx_14_0_arm64."""
    tags = [line for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")]
    return tags[0].rsplit("-", 1)[-1] if tags else ""


def is_found(folder):
    """Returns true if the programs find a package's libraries from their own folder.

    They do not if they are links out of site-packages, or if Python takes the package from another folder.
    """
    site = Path(os.path.realpath(PROGRAM)).parents[2]
    return os.path.realpath(folder) == os.path.realpath(site / folder.parent.name / folder.name)


def environment():
    """Returns the variables of the programs (src/installation.rs), and where the loader finds their libraries.

    The loader is only led if it must be, because a comparison also starts programs with other libraries.
    """
    variables = {"TRANSFORMER_BENCH_PYTHON": sys.executable}
    folders, found_by_programs = [], True
    for package, (library, names) in PACKAGES.items():
        folder = library_folder(package, library)
        found = distribution(names) if folder else None
        if folder:
            folders.append(str(folder))
            found_by_programs &= is_found(folder)
        if package in ("torch", "mlx"):
            version = "" if folder is None else found.version if found else "of an unknown version"
            variables[f"TRANSFORMER_BENCH_{package.upper()}_VERSION"] = version
        if package == "mlx" and MAC and found:
            variables["TRANSFORMER_BENCH_MLX_WHEEL"] = platform_tag(found)
    name = "DYLD_LIBRARY_PATH" if MAC else "LD_LIBRARY_PATH"
    earlier = os.environ.get(name)
    # The libraries of the environment also come before those of a folder that the user has named.
    if earlier or not found_by_programs:
        variables[name] = os.pathsep.join(folders + ([earlier] if earlier else []))
    return {**os.environ, **variables}


def main():
    os.execve(PROGRAM, [str(PROGRAM), *sys.argv[1:]], environment())

"""Programs and libraries of the wheel on macOS (Mach-O). This module runs on a Mac only."""
import shutil

import macho
from shared import run

SEARCH_PATHS = {
    "torch": ["@loader_path/../../torch/lib"],
    "mlx": ["@loader_path", "@loader_path/../../mlx/lib"],
    "libmlxc.dylib": ["@loader_path/../../mlx/lib"],
    "transformer-bench": [],
}


def stage(_target, _release, programs, mlx_folder, work):
    """Copies the programs and libraries into work/bin, without debug information. Returns that folder."""
    folder = work / "bin"
    folder.mkdir()
    for name, path in {**programs, "libmlxc.dylib": mlx_folder / "mlx" / "lib" / "libmlxc.dylib"}.items():
        shutil.copyfile(path, folder / name)
        (folder / name).chmod(0o755)
        run(["strip", "-S", folder / name])
        edits = [word for old in sorted(set(macho.search_paths(folder / name))) for word in ("-delete_rpath", old)]
        edits += [word for new in SEARCH_PATHS[name] for word in ("-add_rpath", new)]
        if edits:
            run(["install_name_tool", *edits, folder / name])
        # Every edit invalidates the signature that the linker wrote, and macOS ends programs without a valid one.
        run(["codesign", "--force", "--sign", "-", folder / name])
        run(["codesign", "--verify", "--strict", folder / name])
    return folder


def platform_tag(folder):
    """Returns the tag of the oldest macOS that all files of a folder run on."""
    major, minor = max(macho.minimum_system(path) for path in folder.iterdir())
    return f"macosx_{major}_{minor}_arm64"

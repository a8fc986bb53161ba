"""Downloads wheels from PyPI."""
import re
import sys
import zipfile

from shared import SetupError, component, run, say

# The Pythons that torch and MLX have wheels for.
OLDEST, NEWEST = (3, 10), (3, 14)
SUPPORTED = OLDEST <= sys.version_info[:2] <= NEWEST
# Another Python uses only the C++ part of a wheel, which is the same in all of them.
PYTHON = ".".join(map(str, sys.version_info[:2])) if SUPPORTED else "3.12"


def pip(arguments, what, show=True):
    """Runs pip. `what` describes the purpose in an error message."""
    try:
        run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], what=what, show=show)
    except SetupError:
        raise SetupError(
            f"{what} failed: check the network and pip's index (see the lines above), then run scripts/setup again"
        ) from None


def download_arguments(requirement, platform, destination):
    """Returns pip's arguments for downloading one wheel."""
    platform_option = ["--platform", platform] if platform else []
    return ["download", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON,
            "--implementation", "cp", *platform_option, "--dest", destination, requirement]


def wheel(requirement, platform=None):
    """Downloads one wheel into the cache and returns its path."""

    def fetch(work):
        say(f"downloading {requirement}" + (f" for {platform}" if platform else ""))
        pip(download_arguments(requirement, platform, work), f"downloading {requirement} from PyPI", show=sys.stderr.isatty())

    key = [requirement, PYTHON] + ([platform] if platform else [])
    folder = component("wheel-" + re.split(r"[=<>]", requirement)[0], key, fetch)
    path = next(folder.glob("*.whl"), None)
    if path is None:
        raise SetupError(f"{folder} has no wheel: remove it, then run scripts/setup again")
    return path


def unpack(wheel_path, into, wanted=lambda name: True):
    """Extracts the files of a wheel whose name `wanted` accepts."""
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            for name in archive.namelist():
                if wanted(name):
                    archive.extract(name, into)
    except zipfile.BadZipFile:
        raise SetupError(f"{wheel_path} is damaged: remove {wheel_path.parent}, then run scripts/setup again") from None


def requirements(wheel_path):
    """Returns the requirements of a wheel, without those of extras."""
    with zipfile.ZipFile(wheel_path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    everything = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [requirement for requirement in everything if "extra ==" not in requirement]


def install(packages, into):
    """Installs packages and their dependencies into a folder."""
    pip(["install", "--quiet", "--target", into, "--only-binary=:all:", *packages],
        f"installing {', '.join(re.split('[<>=;[ ]', name)[0] for name in packages)} from PyPI", show=sys.stderr.isatty())


def installed(requirement):
    """Returns the cached folder in which pip has installed a tool."""
    def build(work):
        say(f"installing {requirement}")
        install([requirement], work)

    return component("python-" + re.split(r"[=<>]", requirement)[0], [requirement, sys.version_info[:2]], build)

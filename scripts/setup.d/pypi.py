"""Wheels from PyPI."""
import re
import sys
import zipfile

from shared import Stop, component, run, say

# The Pythons that torch and MLX have wheels for.
OLDEST, NEWEST = (3, 10), (3, 14)
SERVED = OLDEST <= sys.version_info[:2] <= NEWEST
# Of another Python's wheel only the C++ part is used, which is the same in all.
PYTHON = ".".join(map(str, sys.version_info[:2])) if SERVED else "3.12"


def pip(arguments, what, show=True):
    try:
        run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], what=what, show=show)
    except Stop:
        raise Stop(
            f"{what} failed: check the network and pip's index (the lines above say which), then run scripts/setup again"
        ) from None


def arguments(requirement, platform, destination):
    """What pip is called with for one wheel."""
    chosen = ["--platform", platform] if platform else []
    return ["download", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON,
            "--implementation", "cp", *chosen, "--dest", destination, requirement]


def wheel(requirement, platform=None):
    """Downloads one wheel into the cache and returns its path."""

    def fetch(work):
        say(f"downloading {requirement}" + (f" for {platform}" if platform else ""))
        pip(arguments(requirement, platform, work), f"downloading {requirement} from PyPI", show=sys.stderr.isatty())

    key = [requirement, PYTHON] + ([platform] if platform else [])
    folder = component("wheel-" + re.split(r"[=<>]", requirement)[0], key, fetch)
    found = next(folder.glob("*.whl"), None)
    if found is None:
        raise Stop(f"{folder} holds no wheel: remove it, then run scripts/setup again")
    return found


def unpack(wheel_path, into, wanted=lambda name: True):
    try:
        with zipfile.ZipFile(wheel_path) as archive:
            for name in archive.namelist():
                if wanted(name):
                    archive.extract(name, into)
    except zipfile.BadZipFile:
        raise Stop(f"{wheel_path} is damaged: remove {wheel_path.parent}, then run scripts/setup again") from None


def requirements(wheel_path):
    """What a wheel asks for on this system, without its extras."""
    with zipfile.ZipFile(wheel_path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [requirement for requirement in asked if "extra ==" not in requirement]


def install(wanted, into):
    """Installs packages with what they ask for into a folder."""
    pip(["install", "--quiet", "--target", into, "--only-binary=:all:", *wanted],
        f"installing {', '.join(re.split('[<>=;[ ]', name)[0] for name in wanted)} from PyPI", show=sys.stderr.isatty())

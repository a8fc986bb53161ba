"""The cache, running commands, and errors of set-up."""
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
NATIVE = ROOT / "src" / "mlx" / "native"


class SetupError(Exception):
    """A condition that only the user can change. The text is one line that says how."""

    exit_code = 1


class InputError(SetupError):
    """A wrong argument or environment variable."""

    exit_code = 2


def cache_home():
    """Returns the user's cache folder. An empty or relative XDG_CACHE_HOME counts as unset, as in the
    XDG base directory specification."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"


CACHE = cache_home() / "transformer-bench"
START = time.monotonic()


def say(text):
    """Prints a line of progress."""
    print(f"setup [{time.monotonic() - START:5.0f} s] {text}", flush=True)


def run(command, env=None, cwd=None, what=None, show=False):
    """Runs a command and returns its output. Prints the output only if the command fails, or with `show`."""
    command = [str(part) for part in command]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=None if show else subprocess.PIPE,
        stderr=None if show else subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        if not show:
            sys.stderr.write("\n".join(done.stdout.splitlines()[-30:]) + "\n")
        raise SetupError(f"{what or shlex.join(command)} failed (exit {done.returncode}); see the lines above")
    return done.stdout or ""


def need(program, advice):
    path = shutil.which(program)
    if not path:
        raise SetupError(f"'{program}' is not installed: {advice}")
    return path


def check_disk(gigabytes):
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / 1e9
    if free < gigabytes:
        raise SetupError(
            f"{CACHE} has {free:.1f} GB free and set-up needs {gigabytes} GB: free some space, or set XDG_CACHE_HOME"
        )


def file_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def component(name, key, build):
    """Returns the cached folder of a component. Builds it if it is missing, completely or not at all.

    `key` identifies the version of the component. `build` writes it into the folder that it gets.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    final = CACHE / f"{name}-{digest}"
    if final.is_dir():
        return final
    CACHE.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=CACHE))
    try:
        build(work)
        work.chmod(0o755)
        try:
            work.rename(final)
        except OSError:
            # Another set-up finished the same component first.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def remove_stale_builds():
    """Removes what a killed set-up has left in the cache, once it is three hours old."""
    for folder in CACHE.glob("*.partial-*"):
        if time.time() - folder.stat().st_mtime > 3 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def write_atomic(path, text):
    """Writes a file so that readers see the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)

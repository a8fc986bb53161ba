"""What every part of set-up uses: the cache, commands, and the one line that ends it."""
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


class Stop(Exception):
    """A condition that only the user can change; its text is the one line shown."""


def cache_home():
    """The user's cache folder. The XDG base directory specification: an empty or relative
    XDG_CACHE_HOME counts as unset."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


CACHE = cache_home() / "transformer-bench"
started = time.monotonic()


def say(text):
    print(f"setup [{time.monotonic() - started:5.0f} s] {text}", flush=True)


def run(command, env=None, cwd=None, what=None, show=False):
    """Runs a command; its output is shown only when it fails, or with `show`."""
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
        raise Stop(f"{what or shlex.join(command)} failed (exit {done.returncode}); see the lines above")
    return done.stdout or ""


def need(program, advice):
    path = shutil.which(program)
    if not path:
        raise Stop(f"'{program}' is not installed: {advice}")
    return path


def check_disk(gigabytes):
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free / 1e9
    if free < gigabytes:
        raise Stop(
            f"{CACHE} has {free:.1f} GB free and set-up needs {gigabytes} GB: free some, or set XDG_CACHE_HOME"
        )


def file_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def component(name, key, build):
    """Returns the cached folder of a component, building it whole or not at all."""
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


def drop_old_remains():
    """What a killed set-up left behind is never taken for whole; it goes when it is old."""
    for left in CACHE.glob("*.partial-*"):
        if time.time() - left.stat().st_mtime > 3 * 3600:
            shutil.rmtree(left, ignore_errors=True)


def write_whole(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)

"""Comparisons of Python environments, and of releases in Python, by the rounds and the rule of scripts/compare.

Each environment is a folder with a program for each framework, which `transformer-bench compare` runs as a side.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import installation
import python_release
from timing import ComparisonError

ROOT = Path(__file__).resolve().parents[2]
COUNTERPARTS = ROOT / "scripts" / "python_counterparts"
PYTHON_RELEASE = ROOT / "scripts" / "setup.d" / "python_release.py"


# Options of scripts/compare that apply to environments: name, value and meaning.
OPTIONS = [("--threshold", "PERCENT", "the smallest change that must be found (default: 2)"),
           ("--minutes", "N", "stop a comparison after N minutes (default: 30)"),
           ("--threads", "one|all", "threads of the steps (default: one)")]
FLAGS = ["--strict", "--markdown", "--json"]


def program():
    """Returns the command line of the command `transformer-bench`, which cargo builds in a checkout."""
    if installation.INSTALLED:
        return [str(installation.PROGRAMS / "transformer-bench")]
    return ["cargo", "run", "--quiet", "--release", "--locked", "--bin", "transformer-bench", "--"]


def program_folder():
    """Returns the folder in which the command runs, or None for the user's."""
    return None if installation.INSTALLED else ROOT


def are_compared(arguments):
    """Returns true if several environments are compared with each other, not with the suite."""
    return len(arguments.pythons) > 1 or arguments.bisect is not None


def passed_on(arguments):
    """Returns the options of scripts/compare among the arguments."""
    value = lambda option: getattr(arguments, option.lstrip("-"))
    pairs = [f"{option}={value(option)}" for option, *_ in OPTIONS if value(option) is not None]
    return pairs + [flag for flag in FLAGS if value(flag)]


def argument_errors(arguments):
    """Yields the errors in the arguments of a comparison of environments."""
    if not are_compared(arguments):
        if passed_on(arguments):
            yield f"{passed_on(arguments)[0].split('=')[0]} needs two interpreters (--python A --python B) or --bisect"
        return
    if arguments.save or arguments.flops or arguments.parity:
        yield "--save, --flops and --parity take one interpreter"
    if arguments.bisect and arguments.pythons:
        yield "--bisect installs releases for the Python that runs this script: it takes no --python"
    if arguments.bisect and arguments.model:
        yield "--bisect installs only the framework: with --model, choose interpreters that have its library by --python"
    if arguments.variants and len(arguments.variants) > 1:
        yield "--variants: environments are compared in one variant"
    if not arguments.cases:
        yield "name the cases in which the environments are compared"
    elif len(arguments.cases) > 1 and (arguments.bisect or len(arguments.pythons) > 2):
        yield "a search for the first slower environment follows one case"


def version(python, framework):
    """Returns the version of a framework that an interpreter has."""
    code = f"import importlib.metadata as m; print(m.version({framework!r}))"
    done = subprocess.run([python, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise ComparisonError(f"'{python}' has no {framework}: install it there, or choose another interpreter")
    return done.stdout.strip()


def environments(arguments, frameworks):
    """Returns the name, the interpreter and the release to install, if there is one, of each environment."""
    if arguments.bisect:
        [framework] = frameworks
        releases = python_release.releases_between(framework, arguments.bisect)
        # The wheels are those for the Python that runs this script.
        return [(f"{python_release.NAMES[framework]} {release} (Python)", sys.executable, (framework, release))
                for release in releases]
    described = []
    for python in arguments.pythons:
        # The comparison runs in another folder. A link of an environment must stay one.
        python = os.path.abspath(shutil.which(python))
        versions = " and ".join(f"{python_release.NAMES[name]} {version(python, name)}" for name in frameworks)
        described.append((f"{versions} in {python}", python, None))
    return described


def write_program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_side(folder, name, python, scripts, steps, model=None, prepare=None):
    """Writes the folder of a side.

    `scripts` has the module of the counterpart by framework. `steps` has the description and the variant by framework
    and case. `prepare` is the framework and the release that must be installed first.
    """
    folder.mkdir()
    (folder / "name").write_text(name + "\n")
    environment = folder / "environment"
    environment.write_text("")
    quote = lambda *words: " ".join(shlex.quote(str(word)) for word in words)
    for framework, own in steps.items():
        file = folder / f"{framework}.json"
        file.write_text(json.dumps({"script": scripts[framework], "steps": own, "model": model}))
        write_program(folder / framework, "\n".join([
            "set -a", "PYTHONDONTWRITEBYTECODE=1", f". {quote(environment)}",
            f"exec {quote(python, COUNTERPARTS / 'side.py', file)}"]))
    if prepare:
        write_program(folder / "prepare", f"exec {quote(sys.executable, PYTHON_RELEASE, *prepare, environment)}")


def compare_command(sides, options):
    """Returns the arguments of transformer-bench that compare two sides, or search the first slower one of more."""
    names = [f"dir:{side}" for side in sides]
    chosen = names if len(names) == 2 else ["--bisect", ",".join(names)]
    return ["compare", *chosen, *options]


def compare_sides(environments, scripts, steps, model, options):
    """Compares environments, each a name, an interpreter and what must be prepared. Returns the exit code."""
    with tempfile.TemporaryDirectory(prefix="transformer-bench-sides-") as folder:
        sides = []
        for index, (name, python, prepare) in enumerate(environments):
            sides.append(Path(folder) / str(index))
            write_side(sides[-1], name, python, scripts, steps, model, prepare)
        process = subprocess.Popen([*program(), *compare_command(sides, options)], cwd=program_folder())
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The comparison received the signal too, and ends its processes.
                continue

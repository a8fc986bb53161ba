"""The C++ functions that Rust calls."""
import subprocess
import unittest

from support import ROOT, temporary_folder, uses_all_cores

CODE = """#include <cstdio>
#include <stdexcept>
#include "guarded.hpp"
int main() {
  auto show = [](int status) { std::printf("%d %s\\n", status, last_error.c_str()); };
  show(guarded([] {}));
  show(guarded([] { throw std::runtime_error("a reason"); }));
  show(guarded([] { throw 5; }));
}
"""


class Guarded(unittest.TestCase):
    @uses_all_cores
    def test_every_exception_becomes_an_error(self):
        """An exception of Objective-C is, like a number, not a std::exception. It must not end the process."""
        folder, torch = temporary_folder(self), (ROOT / ".deps" / "torch").resolve()
        (folder / "code.cpp").write_text(CODE)
        subprocess.run(["c++", "-std=c++20", "-w", "-I", ROOT / "src/torch/native", "-I", torch / "include", folder / "code.cpp",
                        "-o", folder / "code", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"],
                       check=True)
        done = subprocess.run([folder / "code"], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = done.stdout.splitlines()
        self.assertEqual([line.strip() for line in lines[:2]], ["0", "-1 a reason"])
        self.assertTrue(lines[2].startswith("-1 ") and "without a message" in lines[2], lines)


if __name__ == "__main__":
    unittest.main()

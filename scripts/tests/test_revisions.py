"""Comparisons of git revisions and of the working tree, which build their executables."""
import json
import os
import shutil
import subprocess
import unittest
from pathlib import Path

from support import PROGRAM, ROOT, CompareCase, uses_all_cores


class Revisions(CompareCase):
    @uses_all_cores
    def test_two_comparisons_of_the_working_tree_run_at_once(self):
        command = [PROGRAM, "compare", "worktree", "worktree", "^copy-peak/torch-cpu/f32/",
                   "--set", "smoke", "--minutes", "0.5", "--json"]
        both = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder)}) for _ in range(2)]
        for process in both:
            out, error = process.communicate(timeout=300)
            self.assertIn(process.returncode, (0, 3), error)
            self.assertNotEqual(json.loads(out)["cases"][0]["verdict"], "failed", out)
        self.assertEqual(list((self.folder / "compare").glob("worktree-*")), [])

    def commit(self, clone, change):
        """Commits a changed PyTorch step on top of HEAD in a clone. `change` converts its source."""
        if not clone.exists():
            subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(clone)], check=True)
        step = clone / "src" / "torch" / "step.rs"
        old = step.read_text()
        step.write_text(change(old))
        self.assertNotEqual(step.read_text(), old)
        subprocess.run(["git", "-C", str(clone), "-c", "user.name=t", "-c", "user.email=t@t",
                        "commit", "--quiet", "-am", "a change"], check=True)
        return clone

    def compare_revisions(self, clone, *arguments):
        """Compares in a clone. Checks that this leaves no files there and changes no build of this checkout."""
        def fingerprints():
            return sorted((p, p.stat().st_mtime_ns) for p in (ROOT / "target/release/.fingerprint").glob("transformer-bench*"))
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformer-bench" / "compare"
        before = fingerprints()
        done = subprocess.run([PROGRAM, "compare", *arguments], cwd=clone, text=True, capture_output=True,
                              env={**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder / "results")})
        self.assertEqual(before, fingerprints())
        self.assertEqual(list(cache.glob("tree-*")), [])
        for command, lines in ((["status", "--porcelain"], 0), (["worktree", "list"], 1)):
            output = subprocess.run(["git", "-C", str(clone), *command], capture_output=True, text=True, check=True).stdout
            self.assertEqual(output.count("\n"), lines, output)
        for revision in subprocess.run(["git", "-C", str(clone), "log", "-2", "--format=%H"],
                                       capture_output=True, text=True, check=True).stdout.split():
            for executables in cache.glob(f"{revision[:12]}-*"):
                shutil.rmtree(executables)
        return done.returncode, done.stdout, done.stderr

    @uses_all_cores
    def test_a_revision_that_does_not_build_is_an_error(self):
        clone = self.commit(self.folder / "broken", lambda _: "no Rust\n")
        code, out, error = self.compare_revisions(clone, "HEAD", self.side("head"))
        self.assertEqual(code, 2, out)
        self.assertIn("does not build", error)

    @uses_all_cores
    def test_a_slower_revision_is_reported(self):
        def slower(text):
            start = "fn step(&mut self) -> Result<()> {"
            return text.replace(start, start + " for i in 0..400_000u64 { std::hint::black_box(i); }")
        clone = self.commit(self.folder / "slower", slower)
        code, out, error = self.compare_revisions(clone, "HEAD~1", "HEAD", "^attention/torch-cpu/f32/",
                                          "--set", "smoke", "--json")
        self.assertEqual(code, 1, error)
        self.assertEqual({c["verdict"] for c in json.loads(out)["cases"]}, {"slower"}, out)


if __name__ == "__main__":
    unittest.main()

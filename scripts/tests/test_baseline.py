"""Saved baselines: damaged files, a killed run, and a comparison with the same code."""
import json
import os
import re
import subprocess
import time
import unittest

from support import PROGRAM, ROOT, build, executables, needs_quiet_machine, temporary_folder, uses_all_cores


class Baseline(unittest.TestCase):
    def setUp(self):
        build()
        self.folder = temporary_folder(self)
        (self.folder / "criterion-baselines").mkdir()
        self.env = {**os.environ, "TRANSFORMER_BENCH_RESULTS": str(self.folder / "results"),
                    "CRITERION_HOME": str(self.folder / "criterion")}

    def command(self, *arguments):
        done = subprocess.run([PROGRAM, *arguments], cwd=self.folder, env=self.env,
                              text=True, capture_output=True)
        return done.returncode, done.stdout, done.stderr

    def bench(self, framework, *arguments, **options):
        return subprocess.Popen([executables()[framework], "--bench", *arguments], cwd=self.folder, env={**self.env, **options},
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @needs_quiet_machine
    def test_a_new_baseline_is_not_slower_than_its_own_code(self):
        side = self.folder / "side"
        side.mkdir()
        for name, executable in executables().items():
            (side / name).symlink_to(executable)
        # Other programs can slow the machine down between the two runs. A fault of the suite shows in every attempt.
        for attempt in range(3):
            for framework in ("torch", "mlx"):
                self.assertEqual(self.bench(framework, "^(attention|feed-forward)/.*-cpu/f32/").wait(), 0)
            code, _, error = self.command("baseline", "save", "now", "--force")
            self.assertEqual(code, 0, error)
            # A checkout with changes is one of the differences that --allow-mismatch allows.
            code, out, error = self.command("compare", "baseline:now", f"dir:{side}", "--allow-mismatch", "--json")
            cases = json.loads(out)["cases"]
            self.assertEqual(len(cases), 4, error)
            slower = [case for case in cases if case["verdict"] == "slower"]
            self.assertEqual(code == 1, bool(slower), error)
            if not slower:
                return
        self.fail(f"slower than itself, three times: {slower}")

    @uses_all_cores
    def test_a_killed_run_is_only_saved_with_force(self):
        process = self.bench("torch", "^(attention|feed-forward|forward)(-grad)?/torch-cpu/f32/", TRANSFORMER_BENCH_SET="smoke")
        part = self.folder / "results/run/torch.json"
        while not part.exists() or len(json.loads(part.read_text())["cases"]) < 2:
            self.assertIsNone(process.poll(), "it ended before it was killed")
            time.sleep(0.05)
        process.kill()
        process.wait()
        code, _, error = self.command("baseline", "save", "cut")
        self.assertEqual(code, 2)
        self.assertIn("cut off", error)
        code, out, error = self.command("baseline", "save", "cut", "--force")
        self.assertEqual(code, 0, error)

    def test_damaged_baselines_are_reported_in_one_line(self):
        folder = self.folder / "project" / "criterion-baselines" / "m" / "bad"
        folder.mkdir(parents=True)
        for text, word in [("", "empty"), ("{", "damaged"), ("{}", "not a baseline"),
                           ('{"format": "transformer-bench baseline",\n"version": 99,\n"checksum": "0"}', "update"),
                           ('{"format": "transformer-bench baseline",\n"version": 1,\n"checksum": "0",\n"cases": []}', "changed after")]:
            (folder / "baseline.json").write_text(text)
            for command in (["baseline", "show", "bad"], ["baseline", "restore", "bad"], ["compare", "baseline:bad"]):
                done = subprocess.run([PROGRAM, *command], cwd=folder.parent.parent.parent, text=True, capture_output=True)
                self.assertEqual(done.returncode, 2, done.stdout)
                self.assertIn(word, done.stderr)
                self.assertEqual(len(done.stderr.strip().splitlines()), 1)


    def test_text_from_a_baseline_controls_neither_terminal_nor_page(self):
        """A pull request can contain any baseline: the checksum has no key."""
        project = self.folder / "project"
        folder = project / "criterion-baselines" / "m" / "hostile"
        folder.mkdir(parents=True)
        good = (ROOT / "criterion-baselines/amd-epyc-avx512-2-cores/quick/baseline.json").read_text()
        hostile = "\\u001b[31m\\u009b31m\\u202e\\n<script>alert(1)</script> [l](javascript:x) ![i](http://x) `c`"
        commit = json.loads(good)["machine"]["commit"]
        for place in ('"cpu": "AMD EPYC"', f'"commit": "{commit}"', '"2.13.0"'):
            self.assertIn(place, good)
            good = good.replace(place, f'{place[:-1]}{hostile}"', 1)
        head, body = good.split('"checksum"')[0], good.split("\n", 3)[3]
        checksum = 0xcbf29ce484222325
        for byte in body.encode():
            checksum = (checksum ^ byte) * 0x100000001b3 % 2**64
        (folder / "baseline.json").write_text(f'{head}"checksum": "{checksum:016x}",\n{body}')
        texts = []
        for command in (["baseline", "list"], ["baseline", "show", "hostile"], ["report", "m/hostile"]):
            done = subprocess.run([PROGRAM, *command], cwd=project, text=True, capture_output=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            texts.append(done.stdout + done.stderr)
        # scripts/publish writes into these pages.
        for name in ("README.md", "criterion-baselines/README.md", "src/compare/README.md"):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text((ROOT / name).read_text())
        done = subprocess.run([PROGRAM, "publish"], cwd=project, text=True, capture_output=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        pages, pictures = ([page.read_text() for page in project.rglob(f"*{suffix}")] for suffix in (".md", ".svg"))
        self.assertEqual((len(pages), len(pictures)), (4, 3))
        for text in texts + pages + pictures:
            self.assertNotRegex(text, "[\x1b\x9b\u202e]")
        for text in texts[2:] + pages + pictures:
            self.assertNotIn("<script>", text)
        for text in texts[2:] + pages:
            # Markdown does not apply to attributes of HTML.
            self.assertNotRegex(re.sub('alt="[^"]*"', "", text), r"(?<!\\)\[[li]\]\((javascript:x|http://x)\)")
        # A file of Python's results that is damaged is not left out.
        csv = folder.parent / "python.csv"
        for content in (b"", b"\xff\xfe", b"\0", b"a,b\n1,2\n"):
            csv.write_bytes(content)
            done = subprocess.run([PROGRAM, "publish"], cwd=project, text=True, capture_output=True)
            self.assertEqual(done.returncode, 2, content)
            self.assertIn("python.csv", done.stderr)
            self.assertEqual(len(done.stderr.splitlines()), 1)


if __name__ == "__main__":
    unittest.main()

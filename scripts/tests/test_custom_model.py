"""Benchmarks of a custom model, which a file describes."""
import json
import os
import shutil
import subprocess
import unittest

from support import PROGRAM, build, executables, run, temporary_folder, uses_all_cores


class CustomModel(unittest.TestCase):
    SMALL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 128}

    def setUp(self):
        build()
        self.folder = temporary_folder(self)

    def config(self, name="small", **change):
        path = self.folder / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**self.SMALL, **change}))
        return path

    @uses_all_cores
    def test_a_configuration_is_measured_saved_and_reported(self):
        results = {"TRANSFORMER_BENCH_RESULTS": str(self.folder / "results"), "CRITERION_HOME": str(self.folder / "criterion")}
        small = self.config(use_mup=True).parent
        code, text = run("scripts/bench", "--model", small, "--batch", "2", "--tokens", "64",
                         "^(train-step|attention-grad)/[^/]*-cpu/f32/", env=results)
        self.assertEqual(code, 0, text)
        self.assertIn("ignores the unknown field use_mup (true)", text)
        self.assertIn("small: 0.0 M parameters, measured as small-b2-t64, as requested", text)
        self.assertIn("Training speed, small-b2-t64", text)
        self.assertIn("tokens/s", text)
        results_json = json.loads((self.folder / "results" / "results.json").read_text())
        self.assertEqual(results_json["model"]["configuration"]["key-value-heads"], 2)
        measured = [case["id"] for case in results_json["cases"] if case["status"] == "measured"]
        self.assertEqual(sorted(measured), sorted(
            f"{workload}/{backend}/f32/small-b2-t64"
            for workload in ("train-step", "attention-grad") for backend in ("torch-cpu", "mlx-cpu")))
        # A baseline contains the configuration, and is only compared with the same one.
        (self.folder / "criterion-baselines").mkdir()
        for arguments, code, word in (
                (["baseline", "save", "own", "--force"], 0, "own"),
                (["compare", "baseline:own", "--allow-mismatch", "--minutes", "1"], 2,
                 "the baseline measured small: set TRANSFORMER_BENCH_MODEL=PATH TRANSFORMER_BENCH_BATCH=2")):
            done = subprocess.run([PROGRAM, *arguments], cwd=self.folder, env={**os.environ, **results}, text=True,
                                  capture_output=True)
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertIn(word, done.stdout + done.stderr)
        # The report only needs the results. Another configuration with this name is refused.
        code, text = run("scripts/report", env=results)
        self.assertEqual(code, 0, text)
        self.assertIn("# transformer-bench: small", text)
        other = self.config(rope_theta=500.0)
        code, text = run("scripts/report", env={**results, "TRANSFORMER_BENCH_MODEL": str(other)})
        self.assertEqual(code, 2, text)
        self.assertIn("two configurations have the name 'small'", text)

    @uses_all_cores
    def test_every_script_uses_the_custom_model(self):
        env = {"TRANSFORMER_BENCH_MODEL": str(self.config()), "TRANSFORMER_BENCH_BATCH": "3",
               "TRANSFORMER_BENCH_RESULTS": str(self.folder / "results")}
        code, text = run("scripts/list", "full", "train-step/torch-cpu/f32/", env=env)
        self.assertEqual(code, 0, text)
        self.assertIn("train-step/torch-cpu/f32/small-b3-t128", text)
        self.assertNotIn("indicator", text)
        code, text = run("scripts/compare", "worktree", "worktree", "^attention/torch-cpu/f32/", "--minutes", "0.3", env=env)
        self.assertIn(code, (0, 3), text)
        self.assertIn("attention/torch-cpu/f32/small-b1-t128", text)

    def test_a_wrong_model_is_reported_in_one_line(self):
        broken = self.folder / "broken.json"
        broken.write_text("{")
        for path, more, word in (
                (self.config("scaled", rope_scaling={"rope_type": "ntk", "factor": 4.0}), {}, "rope_scaling"),
                (self.config("experts", num_local_experts=8), {}, "num_local_experts"),
                (self.config("odd", num_attention_heads=5), {}, "do not divide"),
                (self.config("huge", hidden_size=16384, num_hidden_layers=400, intermediate_size=65536), {}, "GB"),
                (self.config(), {"TRANSFORMER_BENCH_TOKENS": "129"}, "at most 128"),
                (self.config(), {"TRANSFORMER_BENCH_BATCH": "0"}, "TRANSFORMER_BENCH_BATCH=0"),
                (broken, {}, "is not JSON"),
                (self.folder / "none", {}, "could not be read"),
                ("", {"TRANSFORMER_BENCH_TOKENS": "8"}, "need TRANSFORMER_BENCH_MODEL")):
            code, text = run(PROGRAM, "list", "quick",
                             env={"TRANSFORMER_BENCH_MODEL": str(path), **more})
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)
            self.assertEqual(len(text.splitlines()), 1, text)
        small = str(self.config().parent)
        for arguments, word in ((["--model"], "a value is required"), (["--model", "/no/such"], "no such file"),
                                (["--batch", "4"], "--batch, --tokens, --accumulate, --lora and --optimizer need --model"),
                                (["--accumulate", "4"], "--batch, --tokens, --accumulate, --lora and --optimizer need --model"),
                                (["--model", small, "--batch", "6", "--accumulate", "4"], "does not divide the batch of 6"),
                                (["--lora", "16"], "--lora and --optimizer need --model"),
                                (["--model", small, "--lora", "16:kv"], "use a rank from 1 to 65536"),
                                (["--optimizer", "muon"], "--lora and --optimizer need --model"),
                                (["--model", small, "--optimizer", "sgd"], "adamw, muon"),
                                (["--model", small, "--lora", "4", "--optimizer", "muon"], "adapters (--lora) are trained"),
                                (["--model", small, "--batch", "0"], "--batch"),
                                (["--model", small, "--tokens", "5000000"], "from 1 to 4194304"),
                                (["--model", small, "--tokens", "70000"], "takes at most 128")):
            code, text = run("scripts/bench", *arguments)
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)


    def test_paths_and_variables_need_not_be_text(self):
        folder = os.fsencode(self.config().parent) + b"-\xff"
        shutil.copytree(self.config().parent, os.fsdecode(folder))
        for path, code, word in ((folder, 0, "small"), (folder + b"/none", 2, "could not be read")):
            done = subprocess.run([PROGRAM, "list", "quick"], capture_output=True, text=True,
                                  env={**os.environb, b"TRANSFORMER_BENCH_MODEL": path})
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertIn(word, done.stdout + done.stderr)
        model = {b"TRANSFORMER_BENCH_MODEL": os.fsencode(self.config())}
        for variable, code in ((b"FOO", 0), (b"TRANSFORMER_BENCH_BATCH", 2)):
            done = subprocess.run([PROGRAM, "list", "quick"], capture_output=True, text=True,
                                  env={**os.environb, **model, variable: b"\xff"})
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertEqual("is not UTF-8" in done.stderr, code == 2, done.stderr)

    @uses_all_cores
    def test_executables_refuse_what_is_not_text(self):
        for framework, executable in executables().items():
            for arguments, variables, word in (([b"--bench", b"\xff"], {}, "the argument"),
                                               ([b"--bench"], {b"TRANSFORMER_BENCH_SET": b"\xff"}, "TRANSFORMER_BENCH_SET"),
                                               ([b"--bench"], {b"TRANSFORMER_BENCH_MALLOC": b"\xff"}, "_MALLOC")):
                done = subprocess.run([os.fsencode(executable), *arguments], capture_output=True, text=True,
                                      env={**os.environb, **variables})
                self.assertEqual(done.returncode, 2, (framework, done.stderr))
                self.assertRegex(done.stderr, rf"^error: .*{word}.* is not UTF-8\n$")

    def test_only_regular_files_are_read(self):
        pipe = self.folder / "pipe.json"
        os.mkfifo(pipe)
        huge = self.folder / "huge.json"
        with open(huge, "wb") as file:
            file.truncate(1 << 30)
        for path, word in ((pipe, "not a regular file"), ("/dev/zero", "not a regular file"), (huge, "over 16 MiB")):
            done = subprocess.run([PROGRAM, "list"], capture_output=True, text=True, timeout=10,
                                  env={**os.environ, "TRANSFORMER_BENCH_MODEL": str(path)})
            self.assertEqual(done.returncode, 2)
            self.assertIn(word, done.stderr)
            self.assertEqual(len(done.stderr.splitlines()), 1)


if __name__ == "__main__":
    unittest.main()

"""Searches for the largest training step that fits into memory."""
import json
import unittest

from support import PROGRAM, build, executables, fake_worker, run, temporary_folder, uses_all_cores


class Fit(unittest.TestCase):
    MODEL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
             "num_key_value_heads": 2, "num_hidden_layers": 6, "vocab_size": 4096, "max_position_embeddings": 512}

    def setUp(self):
        build()
        self.folder = temporary_folder(self)
        self.model = self.folder / "small" / "config.json"
        self.model.parent.mkdir()
        self.model.write_text(json.dumps(self.MODEL))

    def fit(self, *arguments):
        return run(PROGRAM, "fit", *arguments, env={"TRANSFORMER_BENCH_RESULTS": str(self.folder / "results")})

    def fake(self, script):
        """Searches with a worker that reports times, and answers `memory` with a GB."""
        fake_worker(self.folder / "sides" / "torch", "train-step/torch-cpu/f32/small-b1-t256",
                    'if word == "memory": print("- 1000000000", flush=True); continue\n'
                    '    if word == "case": size = line.split("-b")[-1]; batch, tokens = map(int, size.strip().split("-t"))\n'
                    f'    {script}\n'
                    '    if word == "case": print("ready 1000000", flush=True); continue')
        return self.fit("--executables", self.folder / "sides", "--model", self.model, "--tokens", "256", "--json")

    def test_a_killed_process_is_a_result(self):
        code, text = self.fake('if word == "case" and batch * tokens > 1600: os.kill(os.getpid(), 9)')
        self.assertEqual(code, 0, text)
        first = json.loads(text[text.index("{"):text.rindex("}") + 1])["methods"][0]
        self.assertEqual((first["batch"]["largest"], first["batch"]["limited_by"]), (6, "memory"))
        self.assertEqual((first["tokens"]["largest"], first["tokens"]["limited_by"]), (512, "size"))
        for point in first["batch"]["points"]:
            self.assertEqual(point["fits"], point["size"] <= 6, point)

    def test_an_error_that_is_not_about_memory_ends_the_search(self):
        code, text = self.fake('if word == "case" and batch > 3: print("failed: a wrong dimension", flush=True); continue')
        self.assertEqual(code, 2, text)
        self.assertIn("train-step/torch-cpu/f32/small-b6-t256: a wrong dimension", text)

    def test_wrong_options_are_one_line(self):
        for arguments, words in (([], "needs --model PATH"), (["--model", self.model, "--tokens", "4096"], "at most 512")):
            code, text = self.fit(*arguments)
            self.assertEqual((code, len(text.splitlines())), (2, 1), text)
            self.assertIn(words, text)

    @uses_all_cores
    def test_variants_with_less_memory_fit_larger_batches(self):
        found = executables()
        sides = self.folder / "built"
        sides.mkdir()
        for framework, path in found.items():
            (sides / framework).symlink_to(path)
        code, text = self.fit("--executables", sides, "--model", self.model, "--tokens", "512", "--memory", "0.5", "--json")
        self.assertEqual(code, 0, text)
        methods = {(m["backend"], m["method"]): m for m in json.loads(text[text.index("{"):text.rindex("}") + 1])["methods"]}
        for backend in ("torch-cpu", "mlx-cpu"):
            plain = methods[backend, "f32"]
            self.assertEqual(plain["batch"]["limited_by"], "memory", text)
            for point in plain["batch"]["points"]:
                if point["fits"]:
                    self.assertLess(point["process_peak_bytes"], 1_000_000_000)
            less = methods[backend, "f32-checkpoint"]
            self.assertGreater(less["batch"]["largest"], plain["batch"]["largest"], text)
            self.assertGreaterEqual(less["tokens"]["largest"], plain["tokens"]["largest"], text)


if __name__ == "__main__":
    unittest.main()

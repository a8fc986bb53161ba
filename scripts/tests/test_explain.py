"""`transformer-bench explain` and `first-step` on a small model."""
import json
import unittest

from support import PROGRAM, build, executables, needs_compile, needs_quiet_machine, run, temporary_folder, uses_all_cores

BACKENDS = ("torch-cpu", "mlx-cpu")
CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
          "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64}
STEPS = [f"train-step/{backend}/f32/small-b2-t64" for backend in BACKENDS]


class Explain(unittest.TestCase):
    def setUp(self):
        build()
        self.folder = temporary_folder(self)
        (self.folder / "small").mkdir()
        (self.folder / "small" / "config.json").write_text(json.dumps(CONFIG))
        self.env = {"TRANSFORMER_BENCH_RESULTS": str(self.folder / "results")}
        (self.folder / "results").mkdir()

    def measure(self, command, *arguments, env=None):
        """Runs a command on the small model. Returns its exit code and all that it printed."""
        side = self.folder / "side"
        side.mkdir(exist_ok=True)
        for framework, path in executables().items():
            (side / framework).unlink(missing_ok=True)
            (side / framework).symlink_to(path)
        return run(PROGRAM, command, *arguments, "--model", self.folder / "small", "--batch", "2", "--tokens", "64",
                   "--executables", side, env={**self.env, **(env or {})})

    @needs_quiet_machine
    def test_the_sentence_names_a_planted_slow_operation(self):
        # About 20 ms each: longer than any operation of this model. The step has two calls of it.
        rounds = 5_000_000
        planted = f"mlx-cpu/activation/backward={rounds};{STEPS[1]}={2 * rounds}"
        code, text = self.measure("explain", *BACKENDS, env={"TRANSFORMER_BENCH_EXTRA_WORK": planted})
        self.assertEqual(code, 0, text)
        self.assertRegex(text, r"MLX \(CPU\) takes \S+ m?s longer a step than PyTorch CPU\. "
                               r"It loses \S+ m?s in SiLU and its gradient\.")
        # The saved result has the same numbers.
        [saved] = json.loads((self.folder / "results" / "operations.json").read_text())
        self.assertEqual(saved["ids"], STEPS)
        operations = saved["operations"]
        names = {operation["operation"] for operation in operations}
        self.assertLessEqual({"q", "k-v", "attention-scores", "softmax", "rotary-keys", "norm", "gate-product", "loss",
                              "embedding", "output-head", "optimizer"}, names)
        self.assertTrue(all(time > 0 for operation in operations for time in operation["ns"]), operations)
        slow = next(o for o in operations if (o["operation"], o["pass"]) == ("activation", "backward"))
        self.assertEqual(slow["count"], 2)
        lost = slow["count"] * (slow["ns"][1] - slow["ns"][0])
        longer = saved["step_ns"][1] - saved["step_ns"][0]
        self.assertTrue(0.6 < lost / longer < 1.5, (lost, longer))
        # The printed sums are those of the operations.
        for side in (0, 1):
            total = sum(o["count"] * o["ns"][side] for o in operations)
            share = 100 * total / saved["step_ns"][side]
            self.assertIn(f"{share:.1f} %", text)

    @uses_all_cores
    def test_a_start_leaves_the_users_caches_alone(self):
        cache = self.folder / "cache"
        code, text = self.measure("first-step", "/mlx-cpu/f32-tuned/", "--json", env={"XDG_CACHE_HOME": str(cache)})
        self.assertEqual(code, 0, text)
        # The progress follows on standard error.
        [steps], _ = json.JSONDecoder().raw_decode(text[text.index("[\n"):])
        self.assertEqual(steps["ids"], [STEPS[1], STEPS[1].replace("f32", "f32-tuned")])
        for starts in (steps["cold"], steps["warm"]):
            for start in starts:
                self.assertTrue(all(start[part] > 0 for part in ("loaded_ns", "first_ns", "second_ns")), steps)
        # The kernels of the tuned step are compiled once.
        self.assertGreater(steps["cold"][1]["loaded_ns"], 2 * steps["warm"][1]["loaded_ns"])
        self.assertFalse(cache.exists() and any(cache.rglob("compiled-*")))

    @needs_compile
    @uses_all_cores
    def test_torch_compile_in_python_has_a_row_of_its_own(self):
        # One layer, because its step is compiled three times.
        (self.folder / "small" / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 1}))
        code, text = self.measure("first-step", "/torch-cpu/f32-compile/", "--json")
        self.assertEqual(code, 0, text)
        [suite, python], _ = json.JSONDecoder().raw_decode(text[text.index("[\n"):])
        self.assertEqual(suite["ids"], python["ids"])
        self.assertEqual([suite["python"], python["python"]], [False, True])
        # The suite makes a package before the first step. torch.compile compiles in the first step.
        self.assertGreater(suite["cold"][1]["made_ns"], 1e9)
        self.assertEqual(python["cold"][1]["made_ns"], 0)
        self.assertGreater(python["cold"][1]["first_ns"], 5 * python["cold"][0]["first_ns"])
        self.assertLess(python["warm"][1]["first_ns"], python["cold"][1]["first_ns"])

    def test_steps_without_separate_parts_are_refused(self):
        for command, arguments, word in [
                ("explain", ["--method", "f32-tuned"], "cannot be timed alone"),
                ("explain", ["--method", "amp"], "use mixed"),
                ("explain", ["torch-cpu"], "2 values required"),
                ("explain", ["torch-cpu", "tpu"], "unknown backend"),
                ("first-step", ["["], "not a regular expression")]:
            code, text = run(PROGRAM, command, *arguments, env={**self.env, "TRANSFORMER_BENCH_CHECK_ARGUMENTS": "1"})
            self.assertEqual(code, 2, text)
            self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()

"""Steps that TorchInductor compiles when they are first used."""
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from support import ROOT, TORCH_PYTHON, executables, load, needs_compile, uses_all_cores


class Inductor(unittest.TestCase):
    @needs_compile
    def test_a_failed_compilation_is_reported_and_leaves_no_files(self):
        executable = executables()["torch"]
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [executable, "--bench", "--test", "train-step/torch-cpu/f32(-compile)?/indicator-tiny-b2$"],
                capture_output=True, text=True, env={
                    # Python does not start.
                    **os.environ, "PYTHONHOME": "/no/such/folder", "XDG_CACHE_HOME": folder,
                    "TRANSFORMER_BENCH_RESULTS": f"{folder}/results", "TRANSFORMER_BENCH_SET": "smoke"})
            self.assertEqual(done.returncode, 1, done.stderr)
            [line] = [line for line in done.stderr.splitlines() if "compilation failed" in line and "[" not in line]
            self.assertIn("f32-compile", line)
            self.assertIn("Inductor", line)
            self.assertIn("torch: 1 passed, 1 failed", done.stdout)
            self.assertEqual(list((Path(folder) / "transformer-bench").glob("*")), [])

    @needs_compile
    @uses_all_cores
    def test_the_network_of_every_choice_can_be_traced(self):
        """Tracing takes seconds. Compiling the traced graph takes a minute and only tests Inductor."""
        common = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
                  "vocab_size": 96, "max_position_embeddings": 32}
        models = [{"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6,
                   "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False, **common},
                  {"model_type": "bert", "layer_norm_eps": 1e-12, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
                   "attention_probs_dropout_prob": 0.1, "type_vocab_size": 2, **common}]
        script, executable = load("compare-python"), executables()["torch"]
        code = ("import json, sys; import network, package; case = json.loads(sys.argv[1]); "
                "names = [name for name, _ in network.build(case, True).named_parameters()]; "
                "graph, (_, _, parameters) = package.trace(case, names); "
                "[[_, *gradients]] = [node.args[0] for node in graph.graph.nodes if node.op == 'output']; "
                "layouts = [[t.stride() for t in ts] for ts in (parameters, [g.meta['val'] for g in gradients])]; "
                "print(len(graph.graph.nodes), len(gradients), layouts[0] == layouts[1])")
        for model in models:
            name = model["model_type"]
            with self.subTest(name), tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}.json"
                path.write_text(json.dumps(model))
                variables = {"TRANSFORMER_BENCH_MODEL": str(path), "TRANSFORMER_BENCH_BATCH": "2", "TRANSFORMER_BENCH_TOKENS": "32"}
                with mock.patch.dict(os.environ, variables):
                    [description] = script.query_worker(
                        executable, f"describe forward-backward/torch-cpu/mixed-compile/{name}-b2-t32")
                folders = [ROOT / "src" / "torch" / "inductor", TORCH_PYTHON]
                done = subprocess.run([sys.executable, "-c", code, description], capture_output=True, text=True, env={
                    **os.environ, "PYTHONPATH": ":".join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"})
                self.assertEqual(done.returncode, 0, done.stderr[-500:])
                nodes, gradients, same_layout = done.stdout.split()
                self.assertGreater(int(nodes), 100)
                self.assertGreater(int(gradients), 10)
                self.assertEqual(same_layout, "True", "the fused optimizer needs the layout of the parameters")


if __name__ == "__main__":
    unittest.main()

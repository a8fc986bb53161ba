"""Models of six families, and one with adapters, have the results of `transformers` and PEFT.

The test runs if TRANSFORMERS_PYTHON names an interpreter with `torch`, `transformers` and `peft`, and is skipped otherwise.
"""
import json
import os
import unittest

import miniature
from support import executables, run, temporary_folder, uses_all_cores

PYTHON = os.environ.get("TRANSFORMERS_PYTHON")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
         "num_hidden_layers": 6, "vocab_size": 512, "max_position_embeddings": 4096}
FAMILIES = {
    "llama": {**SIZES, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                        "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}},
    "gemma3_text": {**SIZES, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512, "rope_theta": 1e6,
                    "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "gpt_neox": {**SIZES, "num_key_value_heads": None, "rotary_pct": 0.25, "use_parallel_residual": True},
    "olmo2": {**SIZES, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    "phi3": {**SIZES, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 1024,
             "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                              "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]}},
    "roberta": {**SIZES, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
}


class Families(unittest.TestCase):
    @uses_all_cores
    @unittest.skipUnless(PYTHON, "TRANSFORMERS_PYTHON is not set")
    def test_the_results_are_those_of_transformers(self):
        folder = temporary_folder(self)
        for framework, executable in executables().items():
            (folder / framework).symlink_to(executable)
        for family, fields in FAMILIES.items():
            path = folder / family / "config.json"
            path.parent.mkdir()
            path.write_text(json.dumps(miniature.miniature({"model_type": family, **fields})))
            for adapters in ([], ["--lora", "4"], ["--lora", "4:qv"]) if family == "llama" else ([],):
                with self.subTest(family, adapters=adapters):
                    code, text = run("scripts/compare-python", "--executables", folder, "--parity", "--model", path, "--tokens",
                                     "16", "--batch", "2", "--python", PYTHON, *adapters)
                    self.assertEqual(code, 0, text)
                    self.assertIn("tensors compared with transformers", text)


if __name__ == "__main__":
    unittest.main()

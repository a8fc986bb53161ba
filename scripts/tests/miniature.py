#!/usr/bin/env python3
"""Writes a miniature of a config.json: the same options at three layers and small sizes.

usage: scripts/tests/miniature.py CONFIG FOLDER

scripts/compare-python --parity --model FOLDER --tokens 16 --batch 2 then compares it with transformers within seconds.
Layers have both kinds of attention if the model has them, and windows are shorter than 16 tokens.
"""
import json
import sys
from pathlib import Path

LAYERS, WIDTH, HEADS, HEAD_WIDTH, VOCABULARY = 3, 64, 4, 16, 80
SIZES = {
    LAYERS: ("num_hidden_layers", "n_layer", "n_layers"),
    WIDTH: ("hidden_size", "n_embd", "dim", "word_embed_proj_dim"),
    HEADS: ("num_attention_heads", "n_head", "n_heads"),
    HEAD_WIDTH: ("head_dim",),
    96: ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"),
    VOCABULARY: ("vocab_size",),
    5: ("sliding_window",),
}
# Ids of tokens that a small vocabulary lacks, and storage that the step does not have.
DROPPED = ("bos_token_id", "eos_token_id", "quantization", "quantization_config", "auto_map")
FIRST_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "no_rope_layers": [1, 0, 1]}


def rotating_pairs(fields):
    share = fields.get("partial_rotary_factor", fields.get("rotary_pct", 1))
    return int(HEAD_WIDTH * share) // 2


def shortened(value, pairs):
    """Returns a scaling object with as many factors as there are pairs."""
    if isinstance(value, dict):
        return {name: shortened(part, pairs) for name, part in value.items()}
    if isinstance(value, list):
        return [value[i * len(value) // pairs] for i in range(pairs)]
    return value


def miniature(fields):
    """Returns the fields of the miniature."""
    small = {name: value for name, value in fields.items() if name not in DROPPED}
    # Its default is outside the vocabulary in some families.
    small["pad_token_id"] = 1
    for size, names in SIZES.items():
        small.update({name: size for name in names if small.get(name) is not None})
    shared = small.get("num_key_value_heads")
    if shared is not None:
        whole = shared == fields.get("num_attention_heads")
        small["num_key_value_heads"] = HEADS if whole else min(shared, 2)
    for name in ("rope_scaling", "rope_parameters"):
        if small.get(name):
            small[name] = shortened(small[name], rotating_pairs(small))
    for name, value in FIRST_LAYERS.items():
        if small.get(name):
            small[name] = value if len(set(small[name])) > 1 else small[name][:LAYERS]
    if "text_config" in small:
        small["text_config"] = miniature(small["text_config"])
    return small


def main(config, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = json.loads(Path(config).read_text())
    (folder / "config.json").write_text(json.dumps(miniature(fields), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Hugging Face's names for the suite's parameters, by `model_type`.

An entry is a name, or `Rows(name, index)` for rows of a stacked parameter. L is the number of a layer.
"""
from typing import NamedTuple


class Rows(NamedTuple):
    """Rows of a parameter that several of the suite's parameters share."""

    name: str
    index: int = 0
    # The number of rows that no parameter of the suite has, at the beginning.
    first: int = 0
    # True if the rows of each head of the parts are together: q, k, v of the first head, then of the second.
    by_head: bool = False


def modules(names, kinds=("weight", "bias")):
    """Returns the entries of modules that have a weight and a bias."""
    return {f"{name}.{kind}": f"{hf_name}.{kind}" for name, hf_name in names.items() for kind in kinds}


def stacked(parts, hf_name, **options):
    """Returns the entries of modules that are stacked in another one."""
    return {f"{name}.{kind}": Rows(f"{hf_name}.{kind}", index, **options)
            for kind in ("weight", "bias") for index, name in enumerate(parts)}


QKV = [f"blocks.L.attention.{part}" for part in "qkv"]
GATE_UP = ["blocks.L.feed-forward.gate", "blocks.L.feed-forward.up"]

LLAMA = {
    "token": "model.embed_tokens.weight",
    **modules({
        "norm": "model.norm",
        "output": "lm_head",
        **{f"blocks.L.attention.{part}": f"model.layers.L.self_attn.{part}_proj" for part in "qkvo"},
        **{f"blocks.L.attention.{part}-norm": f"model.layers.L.self_attn.{part}_norm" for part in "qk"},
        "blocks.L.norm1": "model.layers.L.input_layernorm",
        "blocks.L.norm2": "model.layers.L.post_attention_layernorm",
        **{f"blocks.L.feed-forward.{part}": f"model.layers.L.mlp.{part}_proj" for part in ("gate", "up", "down")},
    }),
}
OUTPUT_NORMS = {
    **LLAMA,
    **modules({"blocks.L.norm1": "model.layers.L.post_attention_layernorm",
               "blocks.L.norm2": "model.layers.L.post_feedforward_layernorm"}),
}
SANDWICH_NORMS = {
    **LLAMA,
    **modules({"blocks.L.output-norm1": "model.layers.L.post_attention_layernorm",
               "blocks.L.norm2": "model.layers.L.pre_feedforward_layernorm",
               "blocks.L.output-norm2": "model.layers.L.post_feedforward_layernorm"}),
}
PHI3 = {**LLAMA, **stacked(QKV, "model.layers.L.self_attn.qkv_proj"), **stacked(GATE_UP, "model.layers.L.mlp.gate_up_proj")}
PHI = {
    **LLAMA,
    **modules({"norm": "model.final_layernorm", "blocks.L.attention.o": "model.layers.L.self_attn.dense",
               "blocks.L.feed-forward.up": "model.layers.L.mlp.fc1", "blocks.L.feed-forward.down": "model.layers.L.mlp.fc2"}),
}
STARCODER2 = {
    **LLAMA,
    **modules({"blocks.L.feed-forward.up": "model.layers.L.mlp.c_fc",
               "blocks.L.feed-forward.down": "model.layers.L.mlp.c_proj"}),
}
NANOCHAT = {
    **LLAMA,
    **modules({"blocks.L.feed-forward.up": "model.layers.L.mlp.fc1", "blocks.L.feed-forward.down": "model.layers.L.mlp.fc2"}),
}
GPT_NEOX = {
    "token": "gpt_neox.embed_in.weight",
    **modules({
        "norm": "gpt_neox.final_layer_norm",
        "output": "lm_head",
        "blocks.L.norm1": "gpt_neox.layers.L.input_layernorm",
        "blocks.L.norm2": "gpt_neox.layers.L.post_attention_layernorm",
        "blocks.L.attention.o": "gpt_neox.layers.L.attention.dense",
        "blocks.L.feed-forward.up": "gpt_neox.layers.L.mlp.dense_h_to_4h",
        "blocks.L.feed-forward.down": "gpt_neox.layers.L.mlp.dense_4h_to_h",
    }),
    **stacked(QKV, "gpt_neox.layers.L.attention.query_key_value", by_head=True),
}
OPT = {
    "token": "model.decoder.embed_tokens.weight",
    "position": Rows("model.decoder.embed_positions.weight", first=2),
    **modules({
        "norm": "model.decoder.final_layer_norm",
        "output": "lm_head",
        **{f"blocks.L.attention.{part}": f"model.decoder.layers.L.self_attn.{part}_proj" for part in "qkv"},
        "blocks.L.attention.o": "model.decoder.layers.L.self_attn.out_proj",
        "blocks.L.norm1": "model.decoder.layers.L.self_attn_layer_norm",
        "blocks.L.norm2": "model.decoder.layers.L.final_layer_norm",
        "blocks.L.feed-forward.up": "model.decoder.layers.L.fc1",
        "blocks.L.feed-forward.down": "model.decoder.layers.L.fc2",
    }),
}
GPT2 = {
    "token": "transformer.wte.weight",
    "position": Rows("transformer.wpe.weight"),
    "output.weight": "lm_head.weight",
    **modules({
        "norm": "transformer.ln_f",
        "blocks.L.norm1": "transformer.h.L.ln_1",
        "blocks.L.norm2": "transformer.h.L.ln_2",
        "blocks.L.attention.o": "transformer.h.L.attn.c_proj",
        "blocks.L.feed-forward.up": "transformer.h.L.mlp.c_fc",
        "blocks.L.feed-forward.down": "transformer.h.L.mlp.c_proj",
    }),
    **stacked(QKV, "transformer.h.L.attn.c_attn"),
}


def bert(prefix, first, head):
    """Returns the entries of BERT or RoBERTa. `head` has the modules of the output head."""
    return {
        "token": f"{prefix}.embeddings.word_embeddings.weight",
        "type": Rows(f"{prefix}.embeddings.token_type_embeddings.weight"),
        "position": Rows(f"{prefix}.embeddings.position_embeddings.weight", first=first),
        **head,
        **modules({
            "embedding-norm": f"{prefix}.embeddings.LayerNorm",
            **{f"blocks.L.attention.{part}": f"{prefix}.encoder.layer.L.attention.self.{name}"
               for part, name in (("q", "query"), ("k", "key"), ("v", "value"))},
            "blocks.L.attention.o": f"{prefix}.encoder.layer.L.attention.output.dense",
            "blocks.L.norm1": f"{prefix}.encoder.layer.L.attention.output.LayerNorm",
            "blocks.L.feed-forward.up": f"{prefix}.encoder.layer.L.intermediate.dense",
            "blocks.L.feed-forward.down": f"{prefix}.encoder.layer.L.output.dense",
            "blocks.L.norm2": f"{prefix}.encoder.layer.L.output.LayerNorm",
        }),
    }


BERT = bert("bert", 0, {
    "output.bias": "cls.predictions.bias",
    **modules({"output.dense": "cls.predictions.transform.dense", "output.norm": "cls.predictions.transform.LayerNorm"}),
})
# The positions begin after that of the padding token, 1.
ROBERTA = bert("roberta", 2, {
    "output.bias": "lm_head.bias",
    **modules({"output.dense": "lm_head.dense", "output.norm": "lm_head.layer_norm"}),
})
DISTILBERT = {
    "token": "distilbert.embeddings.word_embeddings.weight",
    "position": Rows("distilbert.embeddings.position_embeddings.weight"),
    "output.bias": "vocab_projector.bias",
    **modules({
        "output.dense": "vocab_transform",
        "output.norm": "vocab_layer_norm",
        "embedding-norm": "distilbert.embeddings.LayerNorm",
        **{f"blocks.L.attention.{part}": f"distilbert.transformer.layer.L.attention.{part}_lin" for part in "qkv"},
        "blocks.L.attention.o": "distilbert.transformer.layer.L.attention.out_lin",
        "blocks.L.norm1": "distilbert.transformer.layer.L.sa_layer_norm",
        "blocks.L.feed-forward.up": "distilbert.transformer.layer.L.ffn.lin1",
        "blocks.L.feed-forward.down": "distilbert.transformer.layer.L.ffn.lin2",
        "blocks.L.norm2": "distilbert.transformer.layer.L.output_layer_norm",
    }),
}

FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "granite", "olmo", "smollm3",
                     "ernie4_5", "stablelm"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), SANDWICH_NORMS),
    **dict.fromkeys(("olmo2", "olmo3"), OUTPUT_NORMS),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), GPT2),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), ROBERTA),
    "bert": BERT, "distilbert": DISTILBERT, "gpt_neox": GPT_NEOX, "nanochat": NANOCHAT, "opt": OPT, "phi": PHI,
    "phi3": PHI3, "starcoder2": STARCODER2,
}

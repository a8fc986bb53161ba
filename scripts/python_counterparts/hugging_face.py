"""Hugging Face's names for the suite's parameters, and comparisons of tensors between the two."""
import json
import re
import sys
from pathlib import Path

import numpy as np

# From the suite's name to Hugging Face's name, or that name and the index of a part in a stacked parameter.
# L is the number of a layer.
LLAMA = {
    "token": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    **{f"blocks.L.attention.{part}.{kind}": f"model.layers.L.self_attn.{part}_proj.{kind}"
       for part in "qkvo" for kind in ("weight", "bias")},
    **{f"blocks.L.attention.{part}-norm.weight": f"model.layers.L.self_attn.{part}_norm.weight" for part in "qk"},
    "blocks.L.norm1.weight": "model.layers.L.input_layernorm.weight",
    "blocks.L.norm2.weight": "model.layers.L.post_attention_layernorm.weight",
    **{f"blocks.L.feed-forward.{part}.{kind}": f"model.layers.L.mlp.{part}_proj.{kind}"
       for part in ("gate", "up", "down") for kind in ("weight", "bias")},
}
GPT2 = {
    "token": "transformer.wte.weight",
    "position": "transformer.wpe.weight",
    "output.weight": "lm_head.weight",
    **{f"{name}.{kind}": f"transformer.{hf_name}.{kind}"
       for kind in ("weight", "bias")
       for name, hf_name in (("norm", "ln_f"), ("blocks.L.norm1", "h.L.ln_1"), ("blocks.L.norm2", "h.L.ln_2"),
                            ("blocks.L.attention.o", "h.L.attn.c_proj"), ("blocks.L.feed-forward.up", "h.L.mlp.c_fc"),
                            ("blocks.L.feed-forward.down", "h.L.mlp.c_proj"))},
    **{f"blocks.L.attention.{part}.{kind}": (f"transformer.h.L.attn.c_attn.{kind}", index)
       for kind in ("weight", "bias") for index, part in enumerate("qkv")},
}
BERT = {
    "token": "bert.embeddings.word_embeddings.weight",
    "type": ("bert.embeddings.token_type_embeddings.weight", 0),
    "position": "bert.embeddings.position_embeddings.weight",
    "output.bias": "cls.predictions.bias",
    **{f"{name}.{kind}": f"{hf_name}.{kind}"
       for kind in ("weight", "bias")
       for name, hf_name in (
           ("embedding-norm", "bert.embeddings.LayerNorm"),
           *((f"blocks.L.attention.{part}", f"bert.encoder.layer.L.attention.self.{name}")
             for part, name in (("q", "query"), ("k", "key"), ("v", "value"))),
           ("blocks.L.attention.o", "bert.encoder.layer.L.attention.output.dense"),
           ("blocks.L.norm1", "bert.encoder.layer.L.attention.output.LayerNorm"),
           ("blocks.L.feed-forward.up", "bert.encoder.layer.L.intermediate.dense"),
           ("blocks.L.feed-forward.down", "bert.encoder.layer.L.output.dense"),
           ("blocks.L.norm2", "bert.encoder.layer.L.output.LayerNorm"),
           ("output.dense", "cls.predictions.transform.dense"),
           ("output.norm", "cls.predictions.transform.LayerNorm"))},
}
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "bert": BERT}


def run(compare_outputs, time_steps):
    """Runs the function that the command line selects: --parity CONFIG FILE..., or DESCRIPTION VARIANT CONFIG."""
    if sys.argv[1] == "--parity":
        compare_outputs(sys.argv[2], sys.argv[3:])
        return
    case = json.loads(sys.argv[1])
    if case["workload"] != "train-step" or case["precision"] not in ("f32", "bf16"):
        sys.exit(f"no Python counterpart of {case['workload']} in {case['precision']}")
    time_steps(case, *sys.argv[2:])


def hf_name(family, name):
    """Returns Hugging Face's name of a parameter, and its index in a stacked parameter or None."""
    layer = re.search(r"blocks\.(\d+)\.", name)
    entry = FAMILIES[family].get(re.sub(r"blocks\.\d+\.", "blocks.L.", name))
    if entry is None:
        sys.exit(f"{family} has no parameter {name}")
    stacked_name, index = (entry, None) if isinstance(entry, str) else entry
    return (stacked_name.replace(".L.", f".{layer[1]}.") if layer else stacked_name), index


def stack(family, parameters):
    """Converts the suite's parameters to Hugging Face's: a dict of arrays, weights [out, in]."""
    parts = {}
    for name, data in parameters.items():
        stacked_name, index = hf_name(family, name)
        parts.setdefault(stacked_name, {})[index] = data
    stacked = {}
    for name, by_index in parts.items():
        if None in by_index:
            stacked[name] = by_index[None]
        elif "token_type" in name:
            stacked[name] = by_index[0][None]
        else:
            stacked[name] = np.concatenate([by_index[index] for index in sorted(by_index)])
    return stacked


def unstack(array, index, dims):
    """Returns the part of a stacked array that is one of the suite's parameters, of shape `dims`."""
    if index is None:
        return array
    # A row of a table, or stacked rows.
    return array[index] if array.ndim > len(dims) else array[index * dims[0]:(index + 1) * dims[0]]


def read_config(path):
    """Returns the JSON of a config.json. `path` is the file or its folder."""
    path = Path(path)
    return json.loads((path / "config.json" if path.is_dir() else path).read_text())


def read_outputs(files):
    """Reads what a worker wrote on the request `outputs`: a dict from names to arrays."""
    tensors = {}
    for file in files:
        with open(file, "rb") as opened:
            index = json.loads(opened.readline())
            data = np.frombuffer(opened.read(), "<f4")
        start = 0
        for name, dims in index:
            size = int(np.prod(dims))
            tensors[name] = data[start:start + size].reshape(dims)
            start += size
    return tensors


def of_kind(tensors, kind):
    return {name.removeprefix(kind + "/"): data for name, data in tensors.items() if name.startswith(kind + "/")}


def report(family, suite, loss, logits, gradients):
    """Prints a line of JSON for each tensor: its name, and the norm of the difference over Hugging Face's norm."""
    suite_gradients = of_kind(suite, "grad")
    rows = {"loss": (suite["loss"], np.asarray([loss]))}
    if logits is not None:
        rows["logits"] = (suite["logits"], logits)
    for name, gradient in suite_gradients.items():
        stacked_name, index = hf_name(family, name)
        if stacked_name not in gradients:
            sys.exit(f"no gradient of {stacked_name}")
        rows[name] = (gradient, unstack(np.asarray(gradients[stacked_name]), index, gradient.shape))
    # A gradient that vanishes by symmetry (the bias of keys) is measured by the largest gradient.
    largest = max(float(np.linalg.norm(gradient)) for gradient in suite_gradients.values())
    for name, (actual, expected) in rows.items():
        if actual.shape != expected.shape and actual.size != expected.size:
            sys.exit(f"{name} has shape {actual.shape} in the suite and {expected.shape} in the library")
        actual, expected = actual.astype(np.float64).ravel(), np.asarray(expected, np.float64).ravel()
        size = np.linalg.norm(expected)
        error = np.linalg.norm(actual - expected) / (size if size > 1e-6 * largest else largest)
        print(json.dumps({"tensor": name, "error": float(error)}))

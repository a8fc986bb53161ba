"""Hugging Face's names for the suite's parameters, and the exchange of tensors with it."""
import json
import re
import sys

import numpy as np

# Ours, with L for a layer's number: theirs, and which of how many stacked parts.
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
    **{f"{ours}.{kind}": f"transformer.{theirs}.{kind}"
       for kind in ("weight", "bias")
       for ours, theirs in (("norm", "ln_f"), ("blocks.L.norm1", "h.L.ln_1"), ("blocks.L.norm2", "h.L.ln_2"),
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
    **{f"{ours}.{kind}": f"{theirs}.{kind}"
       for kind in ("weight", "bias")
       for ours, theirs in (
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


def run(parity, main):
    """What the command line asks of a twin: --parity CONFIG OUTPUTS..., or DESCRIPTION VARIANT CONFIG."""
    if sys.argv[1] == "--parity":
        parity(sys.argv[2], sys.argv[3:])
    else:
        main(json.loads(sys.argv[1]), *sys.argv[2:])


def theirs(family, name):
    """Their name of a parameter of ours, and its place among stacked ones (None where it is alone)."""
    layer = re.search(r"blocks\.(\d+)\.", name)
    found = FAMILIES[family].get(re.sub(r"blocks\.\d+\.", "blocks.L.", name))
    if found is None:
        sys.exit(f"{family} has no parameter {name}")
    found, place = (found, None) if isinstance(found, str) else found
    return (found.replace(".L.", f".{layer[1]}.") if layer else found), place


def stacked(family, parameters):
    """Their parameters from ours: a dict of arrays, weights [out, in]."""
    parts = {}
    for name, data in parameters.items():
        their_name, place = theirs(family, name)
        parts.setdefault(their_name, {})[place] = data
    joined = {}
    for name, of in parts.items():
        if None in of:
            joined[name] = of[None]
        elif "token_type" in name:
            joined[name] = of[0][None]
        else:
            joined[name] = np.concatenate([of[place] for place in sorted(of)])
    return joined


def part(array, place, dims):
    """Our part of one of their arrays."""
    if place is None:
        return array
    # A row of a table, or rows that are stacked.
    return array[place] if array.ndim > len(dims) else array[place * dims[0]:(place + 1) * dims[0]]


def configuration(path):
    """The JSON of a config.json, or of the folder that holds it."""
    from pathlib import Path

    path = Path(path)
    return json.loads((path / "config.json" if path.is_dir() else path).read_text())


def read(file):
    """What `outputs` of a worker wrote: a dict of names and arrays."""
    with open(file, "rb") as opened:
        index = json.loads(opened.readline())
        data = np.frombuffer(opened.read(), "<f4")
    found, at = {}, 0
    for name, dims in index:
        size = int(np.prod(dims))
        found[name] = data[at:at + size].reshape(dims)
        at += size
    return found


def of_kind(found, kind):
    return {name.removeprefix(kind + "/"): data for name, data in found.items() if name.startswith(kind + "/")}


def report(family, ours, loss, logits, gradients):
    """Prints a line for each tensor: its name, and the norm of the difference over theirs."""
    grads = of_kind(ours, "grad")
    rows = {"loss": (ours["loss"], np.asarray([loss]))}
    if logits is not None:
        rows["logits"] = (ours["logits"], logits)
    for name, own in grads.items():
        their_name, place = theirs(family, name)
        if their_name not in gradients:
            sys.exit(f"no gradient of {their_name}")
        rows[name] = (own, part(np.asarray(gradients[their_name]), place, own.shape))
    # What vanishes by symmetry (a bias of keys) is held against the largest gradient.
    largest = max(float(np.linalg.norm(own)) for own in grads.values())
    for name, (own, their) in rows.items():
        if own.shape != their.shape and own.size != their.size:
            sys.exit(f"{name} is {own.shape} here and {their.shape} there")
        own, their = own.astype(np.float64).ravel(), np.asarray(their, np.float64).ravel()
        size = np.linalg.norm(their)
        error = np.linalg.norm(own - their) / (size if size > 1e-6 * largest else largest)
        print(json.dumps({"tensor": name, "error": float(error)}))

"""A model of mlx-lm. Usage:

mlx_lm_twin.py --parity CONFIG OUTPUTS...   compares loss, logits and gradients with what a
                                            worker of ours wrote
mlx_lm_twin.py DESCRIPTION VARIANT CONFIG  times its training step

Variants: eager, compile (mx.compile over the whole step).
"""
import os
import re
import sys

os.environ["MLX_ENABLE_TF32"] = "0"

from functools import partial
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

import hugging_face
from protocol import serve


def build(path, tokens):
    fields = hugging_face.configuration(path)
    family = fields["model_type"]
    try:
        # mlx-lm keeps mistral among its llamas.
        module = import_module(f"mlx_lm.models.{'llama' if family == 'mistral' else family}")
    except ModuleNotFoundError:
        sys.exit(f"mlx-lm has no {family}")
    if family == "gpt2":
        fields = {"n_ctx": tokens, "layer_norm_epsilon": 1e-5, **fields, "n_positions": tokens}
    defaults = {"rope_theta": 10000.0, "max_position_embeddings": tokens,
                "num_key_value_heads": fields.get("num_attention_heads")}
    return family, module.Model(module.ModelArgs.from_dict({**defaults, **fields}))


def loss_of(net, tokens, following):
    logits = net(tokens)
    return nn.losses.cross_entropy(logits.astype(mx.float32), following, reduction="mean")


def parity(path, files):
    mx.set_default_device(mx.cpu)
    ours = {name: data for file in files for name, data in hugging_face.read(file).items()}
    tokens, following = (mx.array(ours[f"input/{name}"].astype("int32")) for name in ("tokens", "next"))
    family, net = build(path, tokens.shape[1])
    own = lambda name: re.sub("^transformer", "model", name)
    stacked = hugging_face.stacked(family, hugging_face.of_kind(ours, "parameter"))
    given = {own(name): mx.array(data.copy()) for name, data in stacked.items()}
    known = dict(tree_flatten(net.parameters()))
    given = {name: data for name, data in given.items() if name in known}
    net.update(tree_unflatten(list(given.items())))
    logits = net(tokens)
    loss, gradients = nn.value_and_grad(net, lambda net: loss_of(net, tokens, following))(net)
    mx.eval(logits, loss, gradients)
    gradients = {name: np.array(g) for name, g in tree_flatten(gradients)}
    theirs = {name: gradients[own(name)] for name in stacked if own(name) in gradients}
    hugging_face.report(family, ours, loss.item(), np.array(logits), theirs)


def main(case, variant, path):
    precision, batch, tokens = case["compute"], case["batch"], case["model"]["tokens"]
    mx.set_default_device(mx.cpu if case["device"] == "cpu" else mx.gpu)
    _, net = build(path, tokens)
    net.set_dtype({"bf16": mx.bfloat16}.get(precision, mx.float32))
    net.train()
    vocabulary = hugging_face.configuration(path)["vocab_size"]
    data = [mx.random.randint(0, vocabulary, (batch, tokens)) for _ in range(2)]
    optimizer = optimizers.AdamW(2e-4, weight_decay=1e-5, bias_correction=True)
    state = [net.state, optimizer.state, mx.random.state]
    of = nn.value_and_grad(net, lambda net: loss_of(net, *data))

    def train():
        loss, gradients = of(net)
        optimizer.update(net, gradients)
        return loss

    if variant == "compile":
        train = partial(mx.compile, inputs=state, outputs=state)(train)

    def step():
        mx.eval(train(), state)

    serve(step)


if __name__ == "__main__":
    hugging_face.run(parity, main)

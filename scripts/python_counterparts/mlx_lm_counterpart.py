"""The Python counterpart of a custom model with mlx-lm.

mlx_lm_counterpart.py --parity CONFIG DESCRIPTION FILE...  compares loss, logits and gradients with FILE..., which
                                                           the suite's worker wrote
mlx_lm_counterpart.py DESCRIPTION VARIANT CONFIG  times the training step

Variants: eager, compile (mx.compile over the whole step). Adapters are mlx-lm's LoRALinear.
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
from mlx_counterpart import versions  # noqa: F401 (side.py asks for it)


def build(path, tokens):
    fields = hugging_face.read_config(path)
    family = fields["model_type"]
    try:
        # mlx-lm implements mistral in its llama module.
        module = import_module(f"mlx_lm.models.{'llama' if family == 'mistral' else family}")
    except ModuleNotFoundError:
        sys.exit(f"mlx-lm has no model type {family}")
    if family == "gpt2":
        fields = {"n_ctx": tokens, "layer_norm_epsilon": 1e-5, **fields, "n_positions": tokens}
    defaults = {"rope_theta": 10000.0, "max_position_embeddings": tokens,
                "num_key_value_heads": fields.get("num_attention_heads")}
    return family, module.Model(module.ModelArgs.from_dict({**defaults, **fields}))


def add_adapters(family, net, lora):
    """Freezes a network, and gives the linear layers of its blocks adapters."""
    from mlx_lm.tuner.lora import LoRALinear

    net.freeze()
    modules = dict(net.named_modules())
    adapted = hugging_face.adapted_modules(family, lora, modules)
    scale = lora["alpha"] / lora["rank"]
    net.update_modules(tree_unflatten([(name, LoRALinear.from_base(modules[name], r=lora["rank"], scale=scale))
                                       for name in adapted]))


def adapters_in_suite_layout(parameters):
    """Yields the adapters among named parameters, or gradients, as the suite has them: A [rank, in], B [out, rank]."""
    for name, data in parameters.items():
        if name.endswith((".lora_a", ".lora_b")):
            yield f"{name[:-7]}.lora-{name[-1]}", data.T


def loss_of(net, tokens, following):
    logits = net(tokens)
    return nn.losses.cross_entropy(logits.astype(mx.float32), following, reduction="mean")


def compare_outputs(path, model, files):
    mx.set_default_device(mx.cpu)
    suite = hugging_face.read_outputs(files)
    tokens, following = (mx.array(suite[f"input/{name}"].astype("int32")) for name in ("tokens", "next"))
    family, net = build(path, tokens.shape[1])
    mlx_lm_name = lambda name: re.sub("^transformer", "model", name)
    heads = hugging_face.head_count(hugging_face.read_config(path))
    stacked = hugging_face.stack(family, hugging_face.of_kind(suite, "parameter"), heads)
    known = dict(tree_flatten(net.parameters()))
    parameters = [(mlx_lm_name(name), mx.array(data.copy())) for name, data in stacked.items()]
    net.update(tree_unflatten([(name, data) for name, data in parameters if name in known]))
    if model.get("lora"):
        add_adapters(family, net, model["lora"])
        net.update(tree_unflatten([(name.replace(".lora-", ".lora_"), mx.array(data.T.copy()))
                                   for name, data in stacked.items() if hugging_face.is_adapter(name)]))
    logits = net(tokens)
    loss, gradients = nn.value_and_grad(net, lambda net: loss_of(net, tokens, following))(net)
    mx.eval(logits, loss, gradients)
    gradients = {name: np.array(g) for name, g in tree_flatten(gradients)}
    gradients.update(list(adapters_in_suite_layout(gradients)))
    by_hf_name = {name: gradients[mlx_lm_name(name)] for name in stacked if mlx_lm_name(name) in gradients}
    hugging_face.report(family, suite, loss.item(), np.array(logits), by_hf_name, heads)


def build_step(case, variant, path):
    """Returns the function that runs a training step."""
    hugging_face.check_workload(case)
    batch, tokens = case["batch"], case["model"]["tokens"]
    mx.set_default_device(mx.cpu if case["device"] == "cpu" else mx.gpu)
    family, net = build(path, tokens)
    net.set_dtype(mx.bfloat16 if case["precision"] == "bf16" else mx.float32)
    if case["model"].get("lora"):
        add_adapters(family, net, case["model"]["lora"])
    net.train()
    vocabulary = hugging_face.read_config(path)["vocab_size"]
    data = [mx.random.randint(0, vocabulary, (batch, tokens)) for _ in range(2)]
    optimizer = optimizers.AdamW(2e-4, weight_decay=1e-5, bias_correction=True)
    state = [net.state, optimizer.state, mx.random.state]
    loss_and_gradients = nn.value_and_grad(net, lambda net: loss_of(net, *data))

    def train():
        loss, gradients = loss_and_gradients(net)
        optimizer.update(net, gradients)
        return loss

    if variant == "compile":
        train = partial(mx.compile, inputs=state, outputs=state)(train)

    def step():
        mx.eval(train(), state)

    return step


if __name__ == "__main__":
    hugging_face.run(compare_outputs, build_step)

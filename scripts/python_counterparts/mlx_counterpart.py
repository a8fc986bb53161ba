"""The suite's steps in Python MLX. Usage: mlx_counterpart.py DESCRIPTION VARIANT

DESCRIPTION is the answer of the suite's worker to `describe ID`, for the models indicator and gpt2. Variants:
eager (as in a tutorial), compile (mx.compile over the whole step, with fused attention if its weights need no
dropout).
"""
import json
import os
import sys

os.environ["MLX_ENABLE_TF32"] = "0"

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from protocol import serve


class Attention(nn.Module):
    def __init__(self, s, fused, causal):
        super().__init__()
        d = s["width"]
        self.fused, self.causal, self.heads, self.p = fused, causal, s["heads"], s["dropout"]
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.drop = nn.Dropout(self.p)

    def __call__(self, x):
        b, n, d = x.shape
        split = lambda y: y.reshape(b, n, self.heads, -1).transpose(0, 2, 1, 3)
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        scale = (d // self.heads) ** -0.5
        if self.fused and (self.p == 0 or not self.training):
            mask = "causal" if self.causal else None
            heads = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        else:
            scores = (q * scale) @ k.transpose(0, 1, 3, 2)
            if self.causal:
                scores = scores + nn.MultiHeadAttention.create_additive_causal_mask(n, x.dtype)
            heads = self.drop(mx.softmax(scores, axis=-1, precise=True)) @ v
        return self.o(heads.transpose(0, 2, 1, 3).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, s, fused, pre_norm):
        super().__init__()
        d = s["width"]
        self.pre_norm = pre_norm
        self.attention = Attention(s, fused, pre_norm)
        self.up, self.down = nn.Linear(d, s["ffn-width"]), nn.Linear(s["ffn-width"], d)
        self.gelu = nn.gelu_approx if pre_norm else nn.gelu
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.drop = nn.Dropout(s["dropout"])

    def feed_forward(self, x):
        return self.down(self.drop(self.gelu(self.up(x))))

    def __call__(self, x):
        if self.pre_norm:
            x = x + self.attention(self.norm1(x))
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.drop(self.attention(x)))
        return self.norm2(x + self.drop(self.feed_forward(x)))


class Indicator(nn.Module):
    def __init__(self, s, fused):
        super().__init__()
        d = s["width"]
        self.value, self.market = nn.Linear(1, d), nn.Linear(10, d)
        self.position = mx.random.uniform(-0.5, 0.5, (s["tokens"], d))
        self.blocks = [Block(s, fused, False) for _ in range(s["layers"])]
        self.norm = nn.LayerNorm(d)
        head = lambda: nn.Sequential(nn.Linear(d, d // 2), nn.ReLU(), nn.Dropout(s["dropout"]), nn.Linear(d // 2, 1))
        self.selection, self.allocation = head(), head()

    def __call__(self, values, market):
        x = self.value(values[..., None]) + self.market(market)[:, None] + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.selection(x)[..., 0], mx.softmax(self.allocation(x)[..., 0], axis=-1, precise=True)

    def loss(self, values, market, useful):
        selection, weights = (y.astype(mx.float32) for y in self(values, market))
        probability = mx.sigmoid(selection)
        raw = useful * probability
        target = raw / (raw.sum(-1, keepdims=True) + 1e-8)
        bce = nn.losses.binary_cross_entropy(selection, useful, with_logits=True)
        return bce + 0.5 * nn.losses.mse_loss(weights, target) + 0.1 * probability.mean()


class Gpt2(nn.Module):
    def __init__(self, s, fused):
        super().__init__()
        self.token = nn.Embedding(s["vocabulary"], s["width"])
        self.position = mx.random.uniform(0, 0.02, (s["tokens"], s["width"]))
        self.blocks = [Block(s, fused, True) for _ in range(s["layers"])]
        self.norm = nn.LayerNorm(s["width"])

    def __call__(self, tokens, following):
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.token.as_linear(self.norm(x))

    def loss(self, tokens, following):
        logits = self(tokens, following)
        return nn.losses.cross_entropy(logits.astype(mx.float32), following, reduction="mean")


class Muon(optimizers.Muon):
    """MLX's Muon with decoupled weight decay. MLX adds the decay to the gradient, and orthogonalizes the sum.

    The iterations run in the type of the computation, as in the suite. In bf16, MLX's norm adds the squares up in bf16 on
    a CPU, where the sum stops growing. The suite's norm is in f32, so the results differ there, but not the work.
    """

    def __init__(self, learning_rate, decay, dtype):
        super().__init__(learning_rate, weight_decay=0)
        self.decay, self.dtype = learning_rate * decay, dtype

    def _zeropower_via_newtonschulz5(self, X, steps):
        return super()._zeropower_via_newtonschulz5(X.astype(self.dtype), steps).astype(X.dtype)

    def apply_single(self, gradient, parameter, state):
        return super().apply_single(gradient, parameter * (1 - self.decay), state)


def is_block_matrix(name, parameter):
    """Returns whether Muon updates a parameter, as `ParameterSpec::is_block_matrix` in src/model/parameters.rs."""
    return name.startswith("blocks.") and parameter.ndim == 2


def build_optimizer(case):
    """Returns the optimizer, with the hyperparameters of `TRAINING` in src/fixture/hyperparameters.rs."""
    adamw = optimizers.AdamW(2e-4, weight_decay=1e-5, bias_correction=True)
    if case.get("optimizer") != "muon":
        return adamw
    dtype = mx.float32 if case["precision"] == "f32" else mx.bfloat16
    return optimizers.MultiOptimizer([Muon(0.02, 0.1, dtype), adamw], [is_block_matrix])


def build_step(case, variant):
    """Returns the function that runs a step."""
    workload, precision, batch = case["workload"], case["precision"], case["batch"]
    compiled, s = variant == "compile", {**case["model"], "dropout": case["model"]["dropout"]["residual"]}
    model = s["name"]
    if workload not in ("forward", "forward-backward", "optimizer-step", "train-step") or precision not in ("f32", "bf16", "f16", "mixed"):
        sys.exit(f"no Python counterpart of {workload} in {precision}")
    if s.get("lora"):
        sys.exit("no Python counterpart of adapters in MLX")
    if model not in ("indicator", "gpt2"):
        sys.exit(f"no Python counterpart of the model {model}: try --model, which uses mlx-lm")
    mx.set_default_device(mx.cpu if case["device"] == "cpu" else mx.gpu)
    net = (Indicator if model == "indicator" else Gpt2)(s, compiled)
    dtype = {"bf16": mx.bfloat16, "f16": mx.float16}.get(precision, mx.float32)
    net.set_dtype(dtype)
    if model == "indicator":
        useful = (mx.random.uniform(shape=(batch, s["tokens"])) < 0.3).astype(mx.float32)
        data = (mx.random.normal((batch, s["tokens"])).astype(dtype), mx.random.normal((batch, 10)).astype(dtype), useful)
    else:
        data = tuple(mx.random.randint(0, s["vocabulary"], (batch, s["tokens"])) for _ in range(2))
    optimizer = build_optimizer(case)
    mx.eval(net.parameters(), data)
    state = [net.state, optimizer.state, mx.random.state]
    if workload == "optimizer-step":
        fixed = tree_map(lambda p: (mx.random.normal(p.shape) / 100).astype(p.dtype), net.trainable_parameters())

    def loss(parameters, *data):
        if precision == "mixed":
            half = lambda a: a.astype(mx.bfloat16) if a.dtype == mx.float32 else a
            # The third input of the indicator model is the target, which stays f32.
            data = [half(a) for a in data[:2]] + list(data[2:])
            parameters = tree_map(half, parameters)
        net.update(parameters)
        return net.loss(*data)

    def train():
        if workload == "optimizer-step":
            optimizer.update(net, fixed)
            return ()
        masters = net.trainable_parameters()
        value, gradients = mx.value_and_grad(loss)(masters, *data)
        net.update(masters)
        if workload == "train-step":
            optimizer.update(net, gradients)
        return value, gradients

    if compiled and workload != "forward":
        train = partial(mx.compile, inputs=state, outputs=state)(train)

    def step():
        if workload == "forward":
            mx.eval(net(*data[:2]))
        else:
            mx.eval(train(), state)

    if workload == "forward":
        net.eval()
    return step


def versions():
    """Returns the names and versions that the process reports."""
    return {"MLX": mx.__version__}


if __name__ == "__main__":
    serve(build_step(json.loads(sys.argv[1]), *sys.argv[2:]))

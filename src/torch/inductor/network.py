"""A model in PyTorch, built from the JSON that describes a case (`Case::description` in src/suite/case.rs).

Its parameters have the suite's names, which `attribute_name` converts. Shapes: B batch, N (T) tokens, D width,
H heads, d head width, V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch import nn


def attribute_name(name):
    """Converts the suite's name of a parameter to a module's. `type` is a method of modules."""
    return "type_" if name == "type" else name.replace("-", "_")


class Dropout:
    """PyTorch's dropout, with the model's probability at each site."""

    def __init__(self, probabilities):
        self.probabilities = probabilities

    def __call__(self, x, site, training):
        p = self.probabilities[site]
        return F.dropout(x, p, training) if p else x

    def attention_probability(self, training):
        """Returns the `dropout_p` of scaled_dot_product_attention, or None if its dropout needs a separate call."""
        return self.probabilities["weights"] if training else 0.0


def norm(kind, width):
    [(name, choices)] = kind.items()
    if name == "layer":
        return nn.LayerNorm(width, choices["eps"])
    return nn.RMSNorm(width, choices["eps"], elementwise_affine=choices["weight"])


class RopeCache(nn.Module):
    """The cosines and sines [N, d/2] of a rotary position, or None for another position."""

    def __init__(self, m):
        super().__init__()
        self.rotary = "rotary" in m["position"]
        if self.rotary:
            power = torch.arange(0, m["head-width"], 2) / m["head-width"]
            angle = torch.arange(m["tokens"]).unsqueeze(1) / m["position"]["rotary"]["theta"] ** power
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())

    def forward(self):
        return (self.cos, self.sin) if self.rotary else None


class Attention(nn.Module):
    """[B, N, D] → [B, N, D]"""

    def __init__(self, m, fused, dropout):
        super().__init__()
        self.heads, self.key_value_heads, self.head_width = m["heads"], m["key-value-heads"], m["head-width"]
        self.fused, self.causal, self.dropout = fused, m["causal"], dropout
        inner, key_value = self.heads * self.head_width, self.key_value_heads * self.head_width
        self.qkv_widths = [inner, key_value, key_value]
        bias = m["bias"]["qkv"]
        if fused:
            self.qkv = nn.Linear(m["width"], sum(self.qkv_widths), bias)
        else:
            self.q, self.k, self.v = (nn.Linear(m["width"], width, bias) for width in self.qkv_widths)
        self.o = nn.Linear(inner, m["width"], m["bias"]["out"])
        kind = m.get("qk-norm")
        self.q_norm, self.k_norm = (norm(kind, self.head_width) if kind else None for _ in range(2))

    def norm_and_rope(self, x, qk_norm, rope):
        """Applies the model's norm and rotary position, if it has them, to queries or keys [B, H, N, d]."""
        x = qk_norm(x) if qk_norm else x
        if rope is None:
            return x
        (cos, sin), (left, right) = rope, x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def forward(self, x, rope=None):
        b, n, _ = x.shape
        parts = self.qkv(x).split(self.qkv_widths, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(b, n, -1, self.head_width).transpose(1, 2) for part in parts)
        q, k = self.norm_and_rope(q, self.q_norm, rope), self.norm_and_rope(k, self.k_norm, rope)
        p, grouped = self.dropout.attention_probability(self.training), self.key_value_heads < self.heads
        if self.fused and p is not None:
            heads = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal, enable_gqa=grouped)
        else:
            if grouped:
                k, v = (each.repeat_interleave(self.heads // self.key_value_heads, 1) for each in (k, v))
            scores = q @ k.transpose(-2, -1) / self.head_width ** 0.5
            if self.causal:
                future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            heads = self.dropout(scores.softmax(-1), "weights", self.training) @ v
        return self.o(heads.transpose(1, 2).reshape(b, n, -1))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu-squared": lambda x: F.relu(x).square(),
}


class FeedForward(nn.Module):
    """[.., D] → [.., D]"""

    def __init__(self, m, dropout):
        super().__init__()
        bias = m["bias"]["feed-forward"]
        up = lambda: nn.Linear(m["width"], m["ffn-width"], bias)
        self.gate = up() if m["glu"] else None
        self.up, self.down = up(), nn.Linear(m["ffn-width"], m["width"], bias)
        self.activation, self.dropout = ACTIVATIONS[m["activation"]], dropout

    def forward(self, x):
        hidden = self.activation(self.gate(x)) * self.up(x) if self.gate else self.activation(self.up(x))
        return self.down(self.dropout(hidden, "hidden", self.training))


class Block(nn.Module):
    def __init__(self, m, fused, dropout):
        super().__init__()
        self.pre_norm, self.dropout = m["norm-order"] == "pre-norm", dropout
        self.attention, self.feed_forward = Attention(m, fused, dropout), FeedForward(m, dropout)
        self.norm1, self.norm2 = norm(m["norm"], m["width"]), norm(m["norm"], m["width"])

    def residual(self, x, norm, part):
        if self.pre_norm:
            return x + self.dropout(part(norm(x)), "residual", self.training)
        return norm(x + self.dropout(part(x), "residual", self.training))

    def forward(self, x, rope):
        x = self.residual(x, self.norm1, lambda x: self.attention(x, rope))
        return self.residual(x, self.norm2, self.feed_forward)


class Head(nn.Module):
    """[B, N, D] → [B, N]"""

    def __init__(self, width, dropout):
        super().__init__()
        self.hidden, self.out, self.dropout = nn.Linear(width, width // 2), nn.Linear(width // 2, 1), dropout

    def forward(self, x):
        return self.out(self.dropout(F.relu(self.hidden(x)), "heads", self.training)).squeeze(-1)


class MlmHead(nn.Module):
    """BERT's head for masked tokens, with tied embeddings: [B, T, D], [V, D] → [B, T, V]"""

    def __init__(self, m):
        super().__init__()
        self.dense, self.norm = nn.Linear(m["width"], m["width"]), norm(m["norm"], m["width"])
        self.activation, self.bias = ACTIVATIONS[m["activation"]], nn.Parameter(torch.zeros(m["vocabulary"]))

    def forward(self, x, table):
        return F.linear(self.norm(self.activation(self.dense(x))), table, self.bias)


class Model(nn.Module):
    """The whole model, and its loss in f32."""

    def __init__(self, m, fused, dropout):
        super().__init__()
        width, small = m["width"], lambda *dims: nn.Parameter((torch.rand(dims) - 0.5) / 10)
        self.dropout, self.head = dropout, m["output"]
        if m["input"] == "tokens":
            self.token = small(m["vocabulary"], width)
            self.type_ = small(width) if m["token-type"] else None
        else:
            self.value, self.market = nn.Linear(1, width), nn.Linear(m["input"]["indicator"]["market"], width)
        self.position = small(m["tokens"], width) if m["position"] == "learned" else None
        self.rope = RopeCache(m)
        self.embedding_norm = norm(m["norm"], width) if m["embedding-norm"] else None
        self.blocks = nn.ModuleList(Block(m, fused, dropout) for _ in range(m["layers"]))
        self.norm = norm(m["norm"], width) if m["final-norm"] else None
        if self.head == "indicator-heads":
            self.selection, self.allocation = Head(width, dropout), Head(width, dropout)
        elif self.head != "tied":
            self.output = MlmHead(m) if self.head == "mlm-head" else nn.Linear(width, m["vocabulary"], bias=False)

    def forward(self, *data):
        if hasattr(self, "token"):
            x = F.embedding(data[0], self.token)
            x = x if self.type_ is None else x + self.type_
        else:
            x = self.value(data[0].unsqueeze(-1)) + self.market(data[1]).unsqueeze(1)
        x = x if self.position is None else x + self.position
        x = self.embedding_norm(x) if self.embedding_norm else x
        x = self.dropout(x, "embedding", self.training)
        for block in self.blocks:
            x = block(x, self.rope())
        x = self.norm(x) if self.norm else x
        if self.head == "indicator-heads":
            return self.selection(x), self.allocation(x).softmax(-1)
        if self.head == "tied":
            return (F.linear(x, self.token),)
        return (self.output(x, self.token) if self.head == "mlm-head" else self.output(x),)

    def loss(self, *data):
        out = self(*data)
        if self.head != "indicator-heads":
            return F.cross_entropy(out[0].flatten(0, 1).float(), data[1].flatten())
        selection, weights, useful = out[0].float(), out[1].float(), data[2]
        probability = selection.sigmoid()
        raw = useful * probability
        target = raw / (raw.sum(-1, keepdim=True) + 1e-8)
        bce = F.binary_cross_entropy_with_logits(selection, useful)
        return bce + 0.5 * F.mse_loss(weights, target) + 0.1 * probability.mean()


class BlockPart(nn.Module):
    """The attention or the feed-forward part of a block."""

    def __init__(self, workload, m, fused, dropout):
        super().__init__()
        if workload.startswith("attention"):
            self.attention, self.rope = Attention(m, fused, dropout), RopeCache(m)
        else:
            self.feed_forward = FeedForward(m, dropout)

    def forward(self, x):
        return (self.attention(x, self.rope()) if hasattr(self, "attention") else self.feed_forward(x),)


class Loss(nn.Module):
    """A model whose forward method returns the loss, for functional_call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *data):
        return self.net.loss(*data)


# The type of the parameters, if it is not f32.
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def build(case, fused, dropout=None):
    """Builds the network of a case, with `fused` attention and a fused q-k-v projection or without.

    It is in training mode if the case trains. Its parameters have the type of the case's precision, its buffers
    the type of the computation.
    """
    m, precision = case["model"], case["precision"]
    dropout = dropout or Dropout(case["dropout"])
    is_part = case["workload"].startswith(("attention", "feed-forward"))
    net = BlockPart(case["workload"], m, fused, dropout) if is_part else Model(m, fused, dropout)
    net = net.to(case["device"], DTYPES.get(precision, torch.float32))
    if precision == "mixed":
        if hasattr(net, "rope"):
            net.rope.bfloat16()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return net.train(case["trains"])


def data(case):
    """Returns random inputs of a case, in the order of the fixture."""
    m, batch, device = case["model"], case["batch"], case["device"]
    dtype = DTYPES.get(case["precision"], torch.float32)
    if case["workload"].startswith(("attention", "feed-forward")):
        rows = (batch, m["tokens"], m["width"])
        return [torch.randn(rows, device=device, dtype=dtype) for _ in range(2 if case["trains"] else 1)]
    shape = (batch, m["tokens"])
    if m["input"] == "tokens":
        return [torch.randint(m["vocabulary"], shape, device=device) for _ in range(2)]
    market = torch.randn(batch, m["input"]["indicator"]["market"], device=device, dtype=dtype)
    useful = (torch.rand(shape, device=device) < 0.3).float()
    return [torch.randn(shape, device=device, dtype=dtype), market, useful]


def to_bf16(tensors):
    """Copies the f32 tensors of a dict or a list to bf16. Precision `mixed` does this in every step."""
    half = lambda t: t.bfloat16() if t.dtype == torch.float32 else t
    return {name: half(t) for name, t in tensors.items()} if isinstance(tensors, dict) else [half(t) for t in tensors]


def compute_inputs(inputs, precision):
    """Returns the inputs in the type of the computation. The third input is the loss's and stays in f32."""
    return to_bf16(inputs[:2]) + list(inputs[2:]) if precision == "mixed" else list(inputs)

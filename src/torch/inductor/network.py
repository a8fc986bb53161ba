"""A model in PyTorch, built from the description of a case (`Case::description` as JSON).

The names of its parameters are the suite's, as `attribute` spells them. B batch, N (T) tokens, D width, H heads,
F hidden, V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch import nn


def attribute(name):
    """The suite's name of a parameter as a module has it, which keeps `type` for itself."""
    return "type_" if name == "type" else name.replace("-", "_")


class Drops:
    """Dropout as PyTorch has it, by the model's probability at each site."""

    def __init__(self, probabilities):
        self.probabilities = probabilities

    def __call__(self, x, site, training):
        p = self.probabilities[site]
        return F.dropout(x, p, training) if p else x

    def in_attention(self, training):
        """What scaled_dot_product_attention is told; None where the weights are dropped by a call."""
        return self.probabilities["weights"] if training else 0.0


def norm(kind, width):
    [(name, told)] = kind.items()
    if name == "layer":
        return nn.LayerNorm(width, told["eps"])
    return nn.RMSNorm(width, told["eps"], elementwise_affine=told["weight"])


class Attention(nn.Module):
    """[B, N, D] → [B, N, D]"""

    def __init__(self, m, good, drops):
        super().__init__()
        self.heads, self.shared, self.each = m["heads"], m["key-value-heads"], m["head-width"]
        self.good, self.causal, self.drops = good, m["causal"], drops
        inner, shared = self.heads * self.each, self.shared * self.each
        self.rows = [inner, shared, shared]
        bias = m["bias"]["qkv"]
        if good:
            self.qkv = nn.Linear(m["width"], sum(self.rows), bias)
        else:
            self.q, self.k, self.v = (nn.Linear(m["width"], rows, bias) for rows in self.rows)
        self.o = nn.Linear(inner, m["width"], m["bias"]["out"])
        kind = m.get("qk-norm")
        self.q_norm, self.k_norm = (norm(kind, self.each) if kind else None for _ in range(2))

    def placed(self, x, own_norm, turns):
        """Queries or keys [B, H, N, d], normalised and turned where the model has that."""
        x = own_norm(x) if own_norm else x
        if turns is None:
            return x
        (cos, sin), (left, right) = turns, x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def forward(self, x, turns=None):
        b, n, _ = x.shape
        parts = self.qkv(x).split(self.rows, -1) if self.good else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.view(b, n, -1, self.each).transpose(1, 2) for part in parts)
        q, k = self.placed(q, self.q_norm, turns), self.placed(k, self.k_norm, turns)
        p, grouped = self.drops.in_attention(self.training), self.shared < self.heads
        if self.good and p is not None:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal, enable_gqa=grouped)
        else:
            if grouped:
                k, v = (each.repeat_interleave(self.heads // self.shared, 1) for each in (k, v))
            scores = q @ k.transpose(-2, -1) / self.each ** 0.5
            if self.causal:
                future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            mixed = self.drops(scores.softmax(-1), "weights", self.training) @ v
        return self.o(mixed.transpose(1, 2).reshape(b, n, -1))


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu-squared": lambda x: F.relu(x).square(),
}


class FeedForward(nn.Module):
    """[.., D] → [.., D]"""

    def __init__(self, m, drops):
        super().__init__()
        bias = m["bias"]["feed-forward"]
        up = lambda: nn.Linear(m["width"], m["ffn-width"], bias)
        self.gate = up() if m["glu"] else None
        self.up, self.down = up(), nn.Linear(m["ffn-width"], m["width"], bias)
        self.activation, self.drops = ACTIVATIONS[m["activation"]], drops

    def forward(self, x):
        hidden = self.activation(self.gate(x)) * self.up(x) if self.gate else self.activation(self.up(x))
        return self.down(self.drops(hidden, "hidden", self.training))


class Block(nn.Module):
    def __init__(self, m, good, drops):
        super().__init__()
        self.before, self.drops = m["norm-order"] == "pre-norm", drops
        self.attention, self.feed_forward = Attention(m, good, drops), FeedForward(m, drops)
        self.norm1, self.norm2 = norm(m["norm"], m["width"]), norm(m["norm"], m["width"])

    def around(self, x, own_norm, part):
        if self.before:
            return x + self.drops(part(own_norm(x)), "residual", self.training)
        return own_norm(x + self.drops(part(x), "residual", self.training))

    def forward(self, x, turns):
        x = self.around(x, self.norm1, lambda x: self.attention(x, turns))
        return self.around(x, self.norm2, self.feed_forward)


class Head(nn.Module):
    """[B, N, D] → [B, N]"""

    def __init__(self, width, drops):
        super().__init__()
        self.hidden, self.out, self.drops = nn.Linear(width, width // 2), nn.Linear(width // 2, 1), drops

    def forward(self, x):
        return self.out(self.drops(F.relu(self.hidden(x)), "heads", self.training)).squeeze(-1)


class Masked(nn.Module):
    """BERT's head: [B, T, D] → logits, by the table of tokens."""

    def __init__(self, m):
        super().__init__()
        self.dense, self.norm = nn.Linear(m["width"], m["width"]), norm(m["norm"], m["width"])
        self.activation, self.bias = ACTIVATIONS[m["activation"]], nn.Parameter(torch.zeros(m["vocabulary"]))

    def forward(self, x, table):
        return F.linear(self.norm(self.activation(self.dense(x))), table, self.bias)


class Model(nn.Module):
    """What the model reads → what it puts out, and its loss in f32."""

    def __init__(self, m, good, drops):
        super().__init__()
        width, small = m["width"], lambda *dims: nn.Parameter((torch.rand(dims) - 0.5) / 10)
        self.drops, self.end = drops, m["output"]
        if m["input"] == "tokens":
            self.token = small(m["vocabulary"], width)
            self.type_ = small(width) if m["token-type"] else None
        else:
            self.value, self.market = nn.Linear(1, width), nn.Linear(m["input"]["indicator"]["market"], width)
        self.position = small(m["tokens"], width) if m["position"] == "learned" else None
        self.turns = None
        if "rotary" in m["position"]:
            power = torch.arange(0, m["head-width"], 2) / m["head-width"]
            angle = torch.arange(m["tokens"]).unsqueeze(1) / m["position"]["rotary"]["theta"] ** power
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())
            self.turns = True
        self.embedding_norm = norm(m["norm"], width) if m["embedding-norm"] else None
        self.blocks = nn.ModuleList(Block(m, good, drops) for _ in range(m["layers"]))
        self.norm = norm(m["norm"], width) if m["final-norm"] else None
        if self.end == "indicator-heads":
            self.selection, self.allocation = Head(width, drops), Head(width, drops)
        elif self.end != "tied":
            self.output = Masked(m) if self.end == "mlm-head" else nn.Linear(width, m["vocabulary"], bias=False)

    def forward(self, *data):
        if hasattr(self, "token"):
            x = F.embedding(data[0], self.token)
            x = x if self.type_ is None else x + self.type_
        else:
            x = self.value(data[0].unsqueeze(-1)) + self.market(data[1]).unsqueeze(1)
        x = x if self.position is None else x + self.position
        x = self.embedding_norm(x) if self.embedding_norm else x
        x = self.drops(x, "embedding", self.training)
        for block in self.blocks:
            x = block(x, (self.cos, self.sin) if self.turns else None)
        x = self.norm(x) if self.norm else x
        if self.end == "indicator-heads":
            return self.selection(x), self.allocation(x).softmax(-1)
        if self.end == "tied":
            return (F.linear(x, self.token),)
        return (self.output(x, self.token) if self.end == "mlm-head" else self.output(x),)

    def loss(self, *data):
        out = self(*data)
        if self.end != "indicator-heads":
            return F.cross_entropy(out[0].flatten(0, 1).float(), data[1].flatten())
        selection, weights, useful = out[0].float(), out[1].float(), data[2]
        probability = selection.sigmoid()
        raw = useful * probability
        target = raw / (raw.sum(-1, keepdim=True) + 1e-8)
        bce = F.binary_cross_entropy_with_logits(selection, useful)
        return bce + 0.5 * F.mse_loss(weights, target) + 0.1 * probability.mean()


class Part(nn.Module):
    """A block's attention or feed-forward part alone."""

    def __init__(self, workload, m, good, drops):
        super().__init__()
        if workload.startswith("attention"):
            self.attention = Attention(m, good, drops)
        else:
            self.feed_forward = FeedForward(m, drops)

    def forward(self, x):
        return (self.attention(x) if hasattr(self, "attention") else self.feed_forward(x),)


class Loss(nn.Module):
    """A model's loss as a module's forward, which is what functional_call runs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *data):
        return self.net.loss(*data)


KINDS = {"bf16": torch.bfloat16, "f16": torch.float16}


def build(case, good, drops=None):
    """The network of a case, in training mode where the case trains, in the type that its parameters
    have; what is computed with beside them has the type that computes."""
    m, compute = case["model"], case["compute"]
    drops = drops or Drops(case["dropout"])
    is_part = case["workload"].startswith(("attention", "feed-forward"))
    net = Part(case["workload"], m, good, drops) if is_part else Model(m, good, drops)
    net = net.to(case["device"], KINDS.get(compute, torch.float32))
    if compute == "amp":
        for name, buffer in net.named_buffers():
            setattr(net, name, buffer.bfloat16())
    torch.set_float32_matmul_precision("high" if compute == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = compute == "tf32"
    return net.train(case["trains"])


def data(case):
    """Random tensors of what the case reads, in the fixture's order."""
    m, batch, device = case["model"], case["batch"], case["device"]
    kind = KINDS.get(case["compute"], torch.float32)
    if case["workload"].startswith(("attention", "feed-forward")):
        rows = (batch, m["tokens"], m["width"])
        return [torch.randn(rows, device=device, dtype=kind) for _ in range(2 if case["trains"] else 1)]
    shape = (batch, m["tokens"])
    if m["input"] == "tokens":
        return [torch.randint(m["vocabulary"], shape, device=device) for _ in range(2)]
    market = torch.randn(batch, m["input"]["indicator"]["market"], device=device, dtype=kind)
    useful = (torch.rand(shape, device=device) < 0.3).float()
    return [torch.randn(shape, device=device, dtype=kind), market, useful]


def narrow(tensors):
    """Copies in bf16 of what is in f32: amp's parameters and inputs, anew in every step."""
    half = lambda t: t.bfloat16() if t.dtype == torch.float32 else t
    return {name: half(t) for name, t in tensors.items()} if isinstance(tensors, dict) else [half(t) for t in tensors]


def narrowed(inputs, compute):
    """The inputs in the type that the network computes in; what the loss alone reads stays."""
    return narrow(inputs[:2]) + list(inputs[2:]) if compute == "amp" else list(inputs)

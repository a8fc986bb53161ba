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

    def probability(self, site):
        """Returns the probability of a site. That of attention's output is that of the residual unless it is set."""
        return self.probabilities.get(site, self.probabilities.get("residual"))

    def __call__(self, x, site, training):
        p = self.probability(site)
        return F.dropout(x, p, training) if p else x

    def attention_probability(self, training):
        """Returns the `dropout_p` of scaled_dot_product_attention, or None if its dropout needs a separate call."""
        return self.probabilities["weights"] if training else 0.0


class OffsetRMSNorm(nn.Module):
    """An RMS norm whose parameter is the weight minus 1 (Gemma)."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight + 1, self.eps)


def is_trained(m, name):
    """Returns whether a parameter is trained. With adapters, only they are."""
    return not m.get("lora") or name.endswith(("lora_a", "lora_b"))


def add_adapter(y, low_rank, b, lora):
    """Adds the result of an adapter to `y` [.., out], given the result of its matrix A [.., rank]."""
    return y + F.linear(low_rank, b) * (lora["alpha"] / lora["rank"])


class Linear(nn.Linear):
    """A linear layer of a block, with an adapter if the model has one for it. `part` is its name in the block."""

    def __init__(self, m, part, inputs, outputs, bias):
        super().__init__(inputs, outputs, bias)
        self.lora = m.get("lora")
        self.has_adapter = bool(self.lora) and (self.lora["layers"] == "all" or part in ("q", "v"))
        if self.has_adapter:
            self.lora_a = nn.Parameter(torch.randn(self.lora["rank"], inputs) / inputs ** 0.5)
            self.lora_b = nn.Parameter(torch.randn(outputs, self.lora["rank"]) / self.lora["rank"] ** 0.5)

    def forward(self, x):
        y = super().forward(x)
        return add_adapter(y, F.linear(x, self.lora_a), self.lora_b, self.lora) if self.has_adapter else y


class AdapterOutput(nn.Module):
    """The matrix B of an adapter whose matrix A is packed with those of other layers."""

    def __init__(self, outputs, lora):
        super().__init__()
        self.lora, self.lora_b = lora, nn.Parameter(torch.randn(outputs, lora["rank"]) / lora["rank"] ** 0.5)

    def forward(self, y, low_rank):
        return add_adapter(y, low_rank, self.lora_b, self.lora)


class PackedLinear(nn.Linear):
    """Queries, keys and values as one product, and the matrices A of `count` adapters as another one."""

    def __init__(self, inputs, widths, bias, count, lora):
        super().__init__(inputs, sum(widths), bias)
        self.widths, self.count = widths, count
        if count:
            self.lora_a = nn.Parameter(torch.randn(count * lora["rank"], inputs) / inputs ** 0.5)

    def forward(self, x):
        """Returns q, k and v, and the results of the matrices A."""
        low_rank = F.linear(x, self.lora_a).chunk(self.count, -1) if self.count else ()
        return list(super().forward(x).split(self.widths, -1)), low_rank


def norm(kind, width):
    [(name, choices)] = kind.items()
    if name == "layer":
        return nn.LayerNorm(width, choices["eps"], elementwise_affine=choices["weight"], bias=choices["bias"])
    if choices["weight"] and choices["offset"]:
        return OffsetRMSNorm(width, choices["eps"])
    return nn.RMSNorm(width, choices["eps"], elementwise_affine=choices["weight"])


class Scale:
    """Multiplies by a constant, which it first rounds to the type of the operand."""

    def __init__(self, factor):
        types = torch.float64, torch.float32, torch.bfloat16, torch.float16
        self.changes = factor != 1
        self.factors = {kind: torch.tensor(factor, dtype=kind).item() for kind in types} if self.changes else {}

    def __call__(self, x):
        return x * self.factors[x.dtype] if self.changes else x


def soft_cap(x, cap):
    return x if cap is None else (x / cap).tanh() * cap


def frequencies(rotary, head_width):
    """Returns the frequencies of the pairs that rotate, as `Rotary::frequencies` in src/model/position.rs."""
    width = 2 * max(int(head_width * rotary["share"] / 2), 1)
    listed, pairs = rotary.get("frequencies"), width // 2
    if listed:
        return torch.tensor([listed[i * len(listed) // pairs] for i in range(pairs)], dtype=torch.float64)
    return rotary["theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


class AttentionCache(nn.Module):
    """The cosines and sines [N, pairs] of a rotary position, and the mask [N, N] of a window, if there are any."""

    def __init__(self, m, position, window):
        super().__init__()
        rotary = position.get("rotary") if isinstance(position, dict) else None
        self.has_rotary, self.pairs = rotary is not None, bool(rotary and rotary["pairs"])
        token = torch.arange(m["tokens"])
        if rotary:
            angle = token.unsqueeze(1) * frequencies(rotary, m["head-width"]).to(torch.get_default_dtype())
            self.register_buffer("cos", angle.cos() * rotary["factor"])
            self.register_buffer("sin", angle.sin() * rotary["factor"])
        self.has_window = window is not None and window < m["tokens"]
        if self.has_window:
            distance = token.unsqueeze(1) - token
            self.register_buffer("visible", (distance.abs() < window) & ((distance >= 0) | (not m["causal"])))

    def rotate(self, x):
        """Applies the rotary position to queries or keys [B, H, N, d]."""
        if not self.has_rotary:
            return x
        cos, sin, width = self.cos, self.sin, 2 * self.cos.shape[1]
        turning, rest = x[..., :width], x[..., width:]
        left, right = (turning[..., ::2], turning[..., 1::2]) if self.pairs else turning.chunk(2, -1)
        turned = left * cos - right * sin, right * cos + left * sin
        turned = torch.stack(turned, -1).flatten(-2) if self.pairs else torch.cat(turned, -1)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def attention_caches(m):
    """Returns a cache for each of the model's kinds of attention."""
    second = m.get("second-attention")
    kinds = [m] + ([second] if second else [])
    return nn.ModuleList(AttentionCache(m, kind["position"], kind.get("window")) for kind in kinds)


def attention_index(m, layer):
    second = m.get("second-attention")
    return int(second["layers"][layer % len(second["layers"])]) if second else 0


class Attention(nn.Module):
    """[B, N, D] → [B, N, D]"""

    def __init__(self, m, fused, dropout):
        super().__init__()
        self.heads, self.key_value_heads, self.head_width = m["heads"], m["key-value-heads"], m["head-width"]
        self.fused, self.causal, self.dropout = fused, m["causal"], dropout
        self.score_scale, self.score_cap = m["scale"].get("scores"), m["cap"].get("scores")
        inner, key_value = self.heads * self.head_width, self.key_value_heads * self.head_width
        self.qkv_widths = [inner, key_value, key_value]
        bias = m["bias"]["qkv"]
        if fused:
            lora = m.get("lora")
            self.adapted = [] if not lora else ["q", "k", "v"] if lora["layers"] == "all" else ["q", "v"]
            self.qkv = PackedLinear(m["width"], self.qkv_widths, bias, len(self.adapted), lora)
            for part in self.adapted:
                setattr(self, part, AdapterOutput(self.qkv_widths["qkv".index(part)], lora))
        else:
            self.q, self.k, self.v = (
                Linear(m, part, m["width"], width, bias) for part, width in zip("qkv", self.qkv_widths))
        self.o = Linear(m, "o", inner, m["width"], m["bias"]["out"])
        kind, self.across_heads = m.get("qk-norm"), m["qk-norm-across-heads"]
        widths = self.qkv_widths[:2] if self.across_heads else [self.head_width] * 2
        self.q_norm, self.k_norm = (norm(kind, width) if kind else None for width in widths)

    def project(self, x):
        """Returns queries, keys and values [B, N, H·d]."""
        if not self.fused:
            return self.q(x), self.k(x), self.v(x)
        qkv, low_rank = self.qkv(x)
        for part, result in zip(self.adapted, low_rank):
            index = "qkv".index(part)
            qkv[index] = getattr(self, part)(qkv[index], result)
        return qkv

    def split_heads(self, x, qk_norm=None):
        """[B, N, H·d] → [B, H, N, d], with the norm of queries or keys."""
        if qk_norm and self.across_heads:
            x = qk_norm(x)
        x = x.view(*x.shape[:2], -1, self.head_width).transpose(1, 2)
        return qk_norm(x) if qk_norm and not self.across_heads else x

    def forward(self, x, cache):
        b, n, _ = x.shape
        q, k, v = self.project(x)
        q, k, v = self.split_heads(q, self.q_norm), self.split_heads(k, self.k_norm), self.split_heads(v)
        q, k = cache.rotate(q), cache.rotate(k)
        p, grouped = self.dropout.attention_probability(self.training), self.key_value_heads < self.heads
        visible = cache.visible if cache.has_window else None
        # The fused function has no soft cap of the scores.
        if self.fused and p is not None and self.score_cap is None:
            heads = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, dropout_p=p, is_causal=self.causal and visible is None,
                scale=self.score_scale, enable_gqa=grouped)
        else:
            if grouped:
                k, v = (each.repeat_interleave(self.heads // self.key_value_heads, 1) for each in (k, v))
            scores = q @ k.transpose(-2, -1)
            scores = scores * self.score_scale if self.score_scale else scores / self.head_width ** 0.5
            scores = soft_cap(scores, self.score_cap)
            if visible is None and self.causal:
                visible = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            if visible is not None:
                scores = scores.masked_fill(~visible, float("-inf"))
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
        up = lambda part: Linear(m, part, m["width"], m["ffn-width"], bias)
        self.gate = up("gate") if m["glu"] else None
        self.up, self.down = up("up"), Linear(m, "down", m["ffn-width"], m["width"], bias)
        self.activation, self.dropout = ACTIVATIONS[m["activation"]], dropout

    def forward(self, x):
        hidden = self.activation(self.gate(x)) * self.up(x) if self.gate else self.activation(self.up(x))
        return self.down(self.dropout(hidden, "hidden", self.training))


class Block(nn.Module):
    def __init__(self, m, fused, dropout):
        super().__init__()
        self.order, self.dropout, self.scale = m["norm-order"], dropout, Scale(m["scale"]["residual"])
        self.attention, self.feed_forward = Attention(m, fused, dropout), FeedForward(m, dropout)
        self.norm1 = norm(m["norm"], m["width"])
        self.norm2 = norm(m["norm"], m["width"]) if self.order != "parallel-shared-norm" else None
        if self.order == "sandwich-norm":
            self.output_norm1, self.output_norm2 = norm(m["norm"], m["width"]), norm(m["norm"], m["width"])
        elif self.order == "output-norm":
            self.output_norm1, self.output_norm2 = self.norm1, self.norm2

    def branch(self, y, site, output_norm=None):
        """Completes the result of a part for the residual addition."""
        y = output_norm(y) if output_norm else y
        return self.scale(self.dropout(y, site, self.training))

    def residual(self, x, number, site, part):
        norm, output_norm = getattr(self, f"norm{number}"), getattr(self, f"output_norm{number}", None)
        y = part(norm(x)) if self.order in ("pre-norm", "sandwich-norm") else part(x)
        y = x + self.branch(y, site, output_norm)
        return norm(y) if self.order == "post-norm" else y

    def forward(self, x, cache):
        if self.order.startswith("parallel"):
            first = self.norm1(x)
            attention = self.branch(self.attention(first, cache), "attention")
            second = self.norm2(x) if self.norm2 else first
            return attention + self.branch(self.feed_forward(second), "residual") + x
        x = self.residual(x, 1, "attention", lambda x: self.attention(x, cache))
        return self.residual(x, 2, "residual", self.feed_forward)


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
        self.caches, self.indices = attention_caches(m), [attention_index(m, i) for i in range(m["layers"])]
        self.embedding_scale, self.hidden_scale, self.logit_scale = (
            Scale(m["scale"][name]) for name in ("embedding", "hidden", "logits"))
        self.logit_cap = m["cap"].get("logits")
        self.embedding_norm = norm(m["norm"], width) if m["embedding-norm"] else None
        self.blocks = nn.ModuleList(Block(m, fused, dropout) for _ in range(m["layers"]))
        self.norm = norm(m["norm"], width) if m["final-norm"] else None
        if self.head == "indicator-heads":
            self.selection, self.allocation = Head(width, dropout), Head(width, dropout)
        elif self.head != "tied":
            self.output = MlmHead(m) if self.head == "mlm-head" else nn.Linear(width, m["vocabulary"], m["bias"]["output"])

    def forward(self, *data):
        if hasattr(self, "token"):
            x = F.embedding(data[0], self.token)
            x = x if self.type_ is None else x + self.type_
        else:
            x = self.value(data[0].unsqueeze(-1)) + self.market(data[1]).unsqueeze(1)
        x = self.embedding_scale(x)
        x = x if self.position is None else x + self.position
        x = self.embedding_norm(x) if self.embedding_norm else x
        x = self.dropout(x, "embedding", self.training)
        for block, index in zip(self.blocks, self.indices):
            x = block(x, self.caches[index])
        x = self.norm(x) if self.norm else x
        x = self.hidden_scale(x)
        if self.head == "indicator-heads":
            return self.selection(x), self.allocation(x).softmax(-1)
        if self.head == "tied":
            x = F.linear(x, self.token)
        else:
            x = self.output(x, self.token) if self.head == "mlm-head" else self.output(x)
        return (soft_cap(self.logit_scale(x), self.logit_cap),)

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
            self.attention = Attention(m, fused, dropout)
            self.caches, self.index = attention_caches(m), attention_index(m, 0)
        else:
            self.feed_forward = FeedForward(m, dropout)

    def forward(self, x):
        return (self.attention(x, self.caches[self.index]) if hasattr(self, "attention") else self.feed_forward(x),)


class Loss(nn.Module):
    """A model whose forward method returns the loss, for functional_call."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *data):
        return self.net.loss(*data)


# The type of the parameters, if it is not f32.
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


# The type of the computation, if parameters can have another one.
COMPUTE_DTYPES = {"mixed": torch.bfloat16, **DTYPES}


def build(case, fused, dropout=None):
    """Builds the network of a case, with `fused` attention and a fused q-k-v projection or without.

    It is in training mode if the case trains. Its parameters have the type of the case's precision, adapters are in f32,
    and its buffers have the type of the computation. Frozen parameters need no gradient.
    """
    m, precision = case["model"], case["precision"]
    dropout = dropout or Dropout(case["dropout"])
    is_part = case["workload"].startswith(("attention", "feed-forward"))
    net = BlockPart(case["workload"], m, fused, dropout) if is_part else Model(m, fused, dropout)
    net = net.to(case["device"], DTYPES.get(precision, torch.float32))
    for name, parameter in net.named_parameters():
        if not is_trained(m, name):
            parameter.requires_grad_(False)
        elif m.get("lora"):
            parameter.data = parameter.data.float()
    if precision == "mixed":
        if hasattr(net, "caches"):
            net.caches.bfloat16()
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


def compute_parameters(parameters, precision):
    """Returns a dict of parameters in the type of the computation. Every step casts those that are stored in f32."""
    dtype = COMPUTE_DTYPES.get(precision, torch.float32)
    return {name: p.to(dtype) if p.dtype == torch.float32 else p for name, p in parameters.items()}


def compute_inputs(inputs, precision):
    """Returns the inputs in the type of the computation. The third input is the loss's and stays in f32."""
    cast = lambda t: t.bfloat16() if precision == "mixed" and t.dtype == torch.float32 else t
    return [cast(t) for t in inputs[:2]] + list(inputs[2:])

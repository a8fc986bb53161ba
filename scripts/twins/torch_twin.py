"""The suite's training step in Python PyTorch. Usage: torch_twin.py CASE VARIANT

Variants: eager (as a newcomer writes it), good (fused attention, one q-k-v projection,
fused AdamW), compile (good under torch.compile), graphs (mode="reduce-overhead").
Under amp the model runs on bf16 copies of its f32 parameters; autocast is torch.autocast.
`--flops CASE` prints what torch's own counter counts instead.
"""
import sys

import torch
import torch.nn.functional as F
from torch import nn

from protocol import SIZES, parse, serve


class Attention(nn.Module):
    def __init__(self, s, good, causal):
        super().__init__()
        d = s["width"]
        self.good, self.causal, self.heads, self.p = good, causal, s["heads"], s["dropout"]
        if good:
            self.qkv = nn.Linear(d, 3 * d)
        else:
            self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.o = nn.Linear(d, d)
        self.drop = nn.Dropout(self.p)

    def forward(self, x):
        b, n, d = x.shape
        split = lambda y: y.view(b, n, self.heads, d // self.heads).transpose(1, 2)
        if self.good:
            q, k, v = map(split, self.qkv(x).split(d, -1))
            p = self.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        else:
            q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
            scores = q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5
            if self.causal:
                future = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            mixed = self.drop(scores.softmax(-1)) @ v
        return self.o(mixed.transpose(1, 2).reshape(b, n, d))


class FeedForward(nn.Module):
    def __init__(self, s, tanh):
        super().__init__()
        self.up, self.down = nn.Linear(s["width"], s["hidden"]), nn.Linear(s["hidden"], s["width"])
        self.gelu, self.drop = nn.GELU("tanh" if tanh else "none"), nn.Dropout(s["dropout"])

    def forward(self, x):
        return self.down(self.drop(self.gelu(self.up(x))))


class Loss(nn.Module):
    """A model's loss as a module's forward, which is what functional_call runs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *data):
        return self.net.loss(*data)


class Block(nn.Module):
    def __init__(self, s, good, pre_norm):
        super().__init__()
        self.pre_norm = pre_norm
        self.attention, self.feed_forward = Attention(s, good, pre_norm), FeedForward(s, pre_norm)
        self.norm1, self.norm2 = nn.LayerNorm(s["width"]), nn.LayerNorm(s["width"])
        self.drop = nn.Dropout(s["dropout"])

    def forward(self, x):
        if self.pre_norm:
            x = x + self.attention(self.norm1(x))
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(x + self.drop(self.attention(x)))
        return self.norm2(x + self.drop(self.feed_forward(x)))


class Indicator(nn.Module):
    def __init__(self, s, good):
        super().__init__()
        d = s["width"]
        self.value, self.market = nn.Linear(1, d), nn.Linear(10, d)
        self.position = nn.Parameter(torch.rand(s["tokens"], d) - 0.5)
        self.blocks = nn.Sequential(*(Block(s, good, False) for _ in range(s["layers"])))
        self.norm = nn.LayerNorm(d)
        head = lambda: nn.Sequential(
            nn.Linear(d, d // 2), nn.ReLU(), nn.Dropout(s["dropout"]), nn.Linear(d // 2, 1))
        self.selection, self.allocation = head(), head()

    def forward(self, values, market):
        x = self.value(values.unsqueeze(-1)) + self.market(market).unsqueeze(1) + self.position
        x = self.norm(self.blocks(x))
        return self.selection(x).squeeze(-1), self.allocation(x).squeeze(-1).softmax(-1)

    def loss(self, values, market, useful):
        selection, weights = self(values, market)
        selection, weights = selection.float(), weights.float()
        probability = selection.sigmoid()
        raw = useful * probability
        target = raw / (raw.sum(-1, keepdim=True) + 1e-8)
        bce = F.binary_cross_entropy_with_logits(selection, useful)
        return bce + 0.5 * F.mse_loss(weights, target) + 0.1 * probability.mean()


class Gpt2(nn.Module):
    def __init__(self, s, good):
        super().__init__()
        d = s["width"]
        self.token, self.position = nn.Embedding(s["vocabulary"], d), nn.Parameter(torch.rand(s["tokens"], d) / 50)
        self.blocks = nn.Sequential(*(Block(s, good, True) for _ in range(s["layers"])))
        self.norm = nn.LayerNorm(d)

    def loss(self, tokens, following):
        x = self.norm(self.blocks(self.token(tokens) + self.position))
        logits = F.linear(x, self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


def build(case, good):
    workload, precision, model, batch = parse(case)
    name = case.split("/")[1].removeprefix("torch-")
    device = torch.device(name)
    s = SIZES[model]
    tf32 = precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}.get(precision, torch.float32)
    net = (Indicator if model == "indicator" else Gpt2)(s, good).to(device, kind)
    shape = (batch, s["tokens"])
    if model == "indicator":
        useful = (torch.rand(shape, device=device) < 0.3).float()
        data = (torch.randn(shape, device=device, dtype=kind), torch.randn(batch, 10, device=device, dtype=kind), useful)
    else:
        data = tuple(torch.randint(s["vocabulary"], shape, device=device) for _ in range(2))
    return workload, precision, device, net, data


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def main(case, variant):
    good = variant != "eager"
    workload, precision, device, net, data = build(case, good)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, weight_decay=1e-5, fused=True if good else None)

    half = lambda t: t.bfloat16() if t.is_floating_point() else t
    # The last input of the indicator model is the target, which stays f32.
    narrow = lambda: [half(t) for t in data[:2]] + list(data[2:])
    copies = lambda module: {name: half(p) for name, p in module.named_parameters()}
    whole = Loss(net)

    def loss():
        if precision == "amp":
            return torch.func.functional_call(whole, copies(whole), tuple(narrow()))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            return net.loss(*data)

    def forward():
        if precision == "amp":
            return torch.func.functional_call(net, copies(net), tuple(narrow()[:2]))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            return net(*data[:2])

    if variant in ("compile", "graphs"):
        loss = torch.compile(loss, mode="reduce-overhead" if variant == "graphs" else None)

    def step():
        if workload == "forward":
            with torch.no_grad():
                forward()
        else:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            if workload == "train-step":
                optimizer.step()
        synchronize(device)

    if workload == "forward":
        net.eval()
    if variant in ("compile", "graphs"):
        for _ in range(4):
            step()
    serve(step)


def flops(case):
    from torch.utils.flop_counter import FlopCounterMode

    workload, _, _, net, data = build(case, False)
    with FlopCounterMode(display=False) as counter:
        if workload == "forward":
            net(*data[:2])
        else:
            net.loss(*data).backward()
    print(counter.get_total_flops())


if __name__ == "__main__":
    if sys.argv[1] == "--flops":
        flops(sys.argv[2])
    else:
        main(*sys.argv[1:])

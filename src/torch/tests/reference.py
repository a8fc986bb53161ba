"""Recomputes the results of the f64 reference with PyTorch, and compares them.

The argument is a folder that `reference.rs` wrote: `cases.json` describes cases and their tensors, and `values`
has the numbers of the tensors in this order.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import network

# The largest difference of a tensor over its norm. Sums of at most a few thousand products, in another order, differ
# by about 1e-14 of their size. The layers amplify that up to a hundredfold.
TOLERANCE = 1e-11
# Some gradients are zero, such as that of a key's bias without a rotary position. Their difference is compared with
# this part of the norm of all results of the case.
SMALLEST_PART = 1e-4


class MaskedDropout(network.Dropout):
    """Multiplies by the recorded masks instead of drawing."""

    def __init__(self, masks):
        super().__init__({})
        self.masks = iter(masks) if masks else None

    def __call__(self, x, site, training):
        if self.masks is None:
            return x
        name, mask = next(self.masks)
        assert name == site, (name, site)
        return x * mask

    def attention_probability(self, training):
        return None


def loss_terms(m, outputs, data):
    """Returns the terms that add up to the loss, one per token. `network.Model.loss` computes it in f32."""
    if m["output"] != "indicator-heads":
        terms = F.cross_entropy(outputs[0].flatten(0, 1), data[1].flatten(), reduction="none")
    else:
        (selection, weights), useful = outputs, data[2]
        probability = selection.sigmoid()
        product = useful * probability
        target = product / (product.sum(-1, keepdim=True) + 1e-8)
        bce = F.binary_cross_entropy_with_logits(selection, useful, reduction="none")
        terms = bce + 0.5 * (weights - target) ** 2 + 0.1 * probability
    return terms.flatten() / terms.numel()


def step(case, parameters, inputs, masks):
    """Returns the results of a model or a block by name."""
    m, workload = case["case"]["model"], case["workload"]
    dropout = MaskedDropout(masks)
    is_part = workload.startswith(("attention", "feed-forward"))
    net = network.BlockPart(workload, m, False, dropout) if is_part else network.Model(m, False, dropout)
    own = {name: p for name, p in net.named_parameters()}
    names = {name: network.attribute_name(name) for name, _ in parameters}
    assert sorted(own) == sorted(names.values()), set(own) ^ set(names.values())
    with torch.no_grad():
        for name, values in parameters:
            own[names[name]].copy_(values)
    data = [t.long() if name in ("tokens", "next") else t for name, t in inputs]
    outputs = net(data[0].requires_grad_()) if is_part else net(*data)
    if not case["case"]["trains"]:
        names = ["out"] if is_part else ["selection", "weights"] if m["output"] == "indicator-heads" else ["logits"]
        return dict(zip(names, outputs))
    trained = [name for name, _ in parameters if network.is_trained(m, names[name])]
    leaves = [own[names[name]] for name in trained]
    if is_part:
        leaves.insert(0, data[0])
        results, gradients = {}, torch.autograd.grad(outputs[0], leaves, data[1])
    else:
        terms = loss_terms(m, outputs, data)
        results, gradients = {"loss": terms.sum(), "loss/terms": terms}, torch.autograd.grad(terms.sum(), leaves)
    grad_names = (["grad/x"] if is_part else []) + [f"grad/{name}" for name in trained]
    return {**results, **dict(zip(grad_names, gradients))}


def optimize(case, parameters, gradients):
    """Returns the parameters after two steps of torch.optim.AdamW, or of torch.optim.Muon for the case's matrices."""
    # torch.optim.Muon casts to bf16. Its iterations then stay in f64.
    torch.Tensor.bfloat16 = torch.Tensor.clone
    results = {}
    for index, (name, values) in enumerate(parameters):
        parameter = torch.nn.Parameter(values.clone())
        if name in case["matrices"]:
            optimizer = torch.optim.Muon([parameter], **case["muon"])
        else:
            optimizer = torch.optim.AdamW([parameter], **case["options"])
        for _, gradient in gradients[2 * index:2 * index + 2]:
            parameter.grad = gradient.clone()
            optimizer.step()
        results[name] = parameter
    return results


def compute(case, parameters, inputs, masks):
    """Returns the results of a case by name."""
    if case["workload"] == "optimizer-step":
        return optimize(case, parameters, inputs)
    if case["workload"] == "matmul-peak":
        (_, a), (_, out) = inputs
        for _ in range(case["chain"]):
            out = a @ out
        return {"out": out}
    if case["workload"] == "copy-peak":
        return {"out": -inputs[0][1]}
    return step(case, parameters, inputs, masks)


def differences(case, read):
    """Yields the name of each result and its relative difference."""
    parameters, inputs, masks, expected = (
        [(name, read(dims)) for name, dims in case[part]] for part in ("parameters", "inputs", "masks", "results"))
    found = compute(case, parameters, inputs, masks)
    assert sorted(found) == sorted(name for name, _ in expected), (sorted(found), [name for name, _ in expected])
    smallest = SMALLEST_PART * torch.cat([values.detach().flatten() for values in found.values()]).norm()
    for name, values in expected:
        wanted = found[name].detach().flatten()
        yield name, ((values.flatten() - wanted).norm() / torch.maximum(wanted.norm(), smallest)).item()


def main(folder):
    torch.set_default_dtype(torch.float64)
    values = torch.frombuffer(bytearray((folder / "values").read_bytes()), dtype=torch.float64)
    at, worst, wrong = 0, 0.0, 0

    def read(dims):
        nonlocal at
        count = torch.Size(dims).numel()
        at += count
        return values[at - count:at].view(dims).clone()

    cases = json.loads((folder / "cases.json").read_text())
    for case in cases:
        for name, difference in differences(case, read):
            worst = max(worst, difference)
            if not difference <= TOLERANCE:
                wrong += 1
                print(f"{case['id']}{' with dropout' if case['masks'] else ''}: {name} differs by {difference:.1e}")
    assert at == len(values), "tensors are left"
    print(f"{len(cases)} cases, largest difference {worst:.1e}")
    return 1 if wrong or not cases else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

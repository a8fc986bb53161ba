"""The suite's steps in Python PyTorch. Usage: torch_counterpart.py DESCRIPTION VARIANT

DESCRIPTION is the answer of the suite's worker to `describe ID`. The network is the one that the suite's
variant -compile compiles. Variants: eager (as in a tutorial), tuned (scaled_dot_product_attention, one q-k-v
projection, fused AdamW), compile (tuned under torch.compile, with the step of torch.optim.Muon if the case has it),
reduce-overhead (torch.compile with that mode).
Precision `mixed` runs on bf16 copies of f32 parameters, `amp` is torch.autocast. `--flops DESCRIPTION` prints
the FLOPs that torch's own counter finds.
"""
import copy
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src" / "torch" / "inductor"))
import network
from protocol import serve
from torch_optimizers import Optimizers, is_block_matrix


# Largest error of a gradient as a share of its norm. Rounding causes 1e-6 in f32. In bf16 it causes up to 20 % in the
# gradients of layer norms (src/torch/lib.rs), and another function differs by more than its norm.
TOLERANCES = {"f32": 1e-3, "tf32": 2e-2}
HALF_TOLERANCE = 0.5
# Share of the largest norm below which a gradient is measured by the largest one, because it may vanish by symmetry.
SMALL = 1e-3


def is_compiled(variant):
    return variant in ("compile", "reduce-overhead")


def functions(case, variant, net, data):
    """Returns the functions that compute the loss and the outputs of a network."""
    precision, device = case["precision"], torch.device(case["device"])
    net_and_loss = network.Loss(net)
    # Adapters are in f32, also in a bf16 model.
    casts = precision == "mixed" or (case["model"].get("lora") and precision == "bf16")

    def run(module, data):
        if casts:
            copies = network.compute_parameters(dict(module.named_parameters()), precision)
            return torch.func.functional_call(module, copies, tuple(network.compute_inputs(data, precision)))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "amp"):
            return module(*data)

    loss = lambda: run(net_and_loss, data)
    forward = lambda: run(net, data[:2])
    if is_compiled(variant):
        mode = "reduce-overhead" if variant == "reduce-overhead" else None
        return torch.compile(loss, mode=mode), torch.compile(forward, mode=mode)
    return loss, forward


def check_workload(case):
    if case["workload"] not in ("forward", "forward-backward", "optimizer-step", "train-step"):
        sys.exit(f"no Python counterpart of {case['workload']}")


def build_step(case, variant, warm_up=True):
    """Returns the function that runs a step. With `warm_up`, a compiled step has already run."""
    check_workload(case)
    tuned, device = variant != "eager", torch.device(case["device"])
    net, data = network.build(case, tuned), network.data(case)
    optimizer = Optimizers(case, net, tuned, is_compiled(variant))
    loss, forward = functions(case, variant, net, data)
    if case["workload"] == "optimizer-step":
        for p in net.parameters():
            p.grad = torch.randn_like(p) / 100

    def step():
        if case["workload"] == "forward":
            with torch.no_grad():
                forward()
        elif case["workload"] == "optimizer-step":
            optimizer.step()
        else:
            net.zero_grad(set_to_none=True)
            loss().backward()
            if case["optimizes"]:
                optimizer.step()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    if warm_up and is_compiled(variant):
        for _ in range(4):
            step()
    return step


def muon_updates(case, net, wide_net, fused):
    """Returns the change of each matrix by a step of Muon, and that in f64 for the same gradients."""
    named, wide = (dict(module.named_parameters()) for module in (net, wide_net))
    before = {name: p.detach().clone() for name, p in named.items()}
    for name, p in named.items():
        wide[name].grad = p.grad.to("cpu", torch.float64)
    Optimizers(case, net, fused).step()
    Optimizers({**case, "precision": "f64"}, wide_net, False).step()
    change = lambda p, name: p.detach().double().cpu() - before[name].double().cpu()
    return {f"update of {name}": (change(p, name), change(wide[name], name)) for name, p in named.items()
            if is_block_matrix(name, p)}


def check(case, variant):
    """Compares the results of a step without dropout with the same network in f64 on the CPU.

    So are the updates of the matrices by Muon, if the case has it and iterates in f32.
    Returns the largest error as a share of its tolerance, and the name of that tensor.
    """
    check_workload(case)
    torch.manual_seed(0)
    no_dropout = network.Dropout({site: 0.0 for site in case["dropout"]})
    net, data = network.build(case, variant != "eager", no_dropout), network.data(case)
    wide_net = copy.deepcopy(net).to("cpu", torch.float64)
    # The third input belongs to the loss, which is computed in f32.
    wide = [t.to("cpu", torch.float64 if t.is_floating_point() and i < 2 else t.dtype) for i, t in enumerate(data)]
    loss, forward = functions(case, variant, net, data)
    if case["workload"] == "forward":
        with torch.no_grad():
            pairs = {f"output {i}": pair for i, pair in enumerate(zip(forward(), wide_net(*wide[:2])))}
    else:
        value, expected = loss(), wide_net.loss(*wide)
        value.backward()
        expected.backward()
        wide_parameters = dict(wide_net.named_parameters())
        pairs = {name: (p.grad, wide_parameters[name].grad) for name, p in net.named_parameters() if p.grad is not None}
        pairs["loss"] = value.detach(), expected.detach()
        # In bf16, Muon raises rounding errors of a gradient of low rank to the size of its update.
        if case["optimizes"] and case.get("optimizer") == "muon" and case["precision"] in TOLERANCES:
            pairs.update(muon_updates(case, net, wide_net, variant != "eager"))
    norms = {name: expected.double().norm().item() for name, (_, expected) in pairs.items()}
    least = SMALL * max(norms.values())
    errors = {name: (actual.double().cpu() - expected.double()).norm().item() / max(norms[name], least)
              for name, (actual, expected) in pairs.items()}
    # A comparison with NaN is false, so NaN would never be the largest.
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return errors[worst] / TOLERANCES.get(case["precision"], HALF_TOLERANCE), worst


def versions():
    """Returns names and versions of PyTorch and its libraries, as the suite's own executable reports them."""
    text = torch.__config__.show()
    found = {"PyTorch": torch.__version__, "PyTorch threads": str(torch.get_num_threads())}
    for name, pattern in (("compiler", r"- ((?:GCC|clang|Clang|Apple LLVM)[^\n]*)"), ("BLAS", r"BLAS_INFO=(\w+)"),
                          ("oneDNN", r"MKL-DNN v([\d.]+)"), ("OpenMP", r"- OpenMP (\d+)")):
        if match := re.search(pattern, text):
            found[f"PyTorch {name}"] = match[1]
    if torch.cuda.is_available():
        found["PyTorch CUDA"] = torch.version.cuda
        found["PyTorch cuDNN"] = str(torch.backends.cudnn.version())
    return found


def flops(case):
    from torch.utils.flop_counter import FlopCounterMode

    net, data = network.build(case, False), network.data(case)
    with FlopCounterMode(display=False) as counter:
        if case["workload"] == "forward":
            net(*data[:2])
        else:
            net.loss(*data).backward()
    print(counter.get_total_flops())


if __name__ == "__main__":
    if sys.argv[1] == "--flops":
        flops(json.loads(sys.argv[2]))
    else:
        serve(build_step(json.loads(sys.argv[1]), sys.argv[2]))

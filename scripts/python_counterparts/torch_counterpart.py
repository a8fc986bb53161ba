"""The suite's steps in Python PyTorch. Usage: torch_counterpart.py DESCRIPTION VARIANT

DESCRIPTION is the answer of the suite's worker to `describe ID`. The network is the one that the suite's
variant -compile compiles. Variants: eager (as in a tutorial), tuned (scaled_dot_product_attention, one q-k-v
projection, fused AdamW), compile (tuned under torch.compile), reduce-overhead (torch.compile with that mode).
Precision `mixed` runs on bf16 copies of f32 parameters, `amp` is torch.autocast. `--flops DESCRIPTION` prints
the FLOPs that torch's own counter finds.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src" / "torch" / "inductor"))
import network
from protocol import serve


def main(case, variant):
    tuned, precision, device = variant != "eager", case["precision"], torch.device(case["device"])
    net, data = network.build(case, tuned), network.data(case)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=1e-5, fused=True if tuned else None)
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
    compiled = variant in ("compile", "reduce-overhead")
    if compiled:
        mode = "reduce-overhead" if variant == "reduce-overhead" else None
        loss, forward = torch.compile(loss, mode=mode), torch.compile(forward, mode=mode)

    def step():
        if case["workload"] == "forward":
            with torch.no_grad():
                forward()
        else:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            if case["optimizes"]:
                optimizer.step()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    if compiled:
        for _ in range(4):
            step()
    serve(step)


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
        case = json.loads(sys.argv[1])
        if case["workload"] not in ("forward", "forward-backward", "train-step"):
            sys.exit(f"no Python counterpart of {case['workload']}")
        main(case, sys.argv[2])

"""The suite's steps in Python PyTorch. Usage: torch_twin.py DESCRIPTION VARIANT

DESCRIPTION is what a worker answers to `describe ID`; the network is the one that the recipe -compile
compiles. Variants: eager (as a newcomer writes it), good (fused attention, one q-k-v projection, fused
AdamW), compile (good under torch.compile), graphs (mode="reduce-overhead"). Under amp the model runs on
bf16 copies of its f32 parameters; autocast is torch.autocast. `--flops DESCRIPTION` prints what torch's
own counter counts instead.
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src" / "torch" / "inductor"))
import network
from protocol import serve


def main(case, variant):
    good, compute, device = variant != "eager", case["compute"], torch.device(case["device"])
    net, data = network.build(case, good), network.data(case)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4, weight_decay=1e-5, fused=True if good else None)
    whole = network.Loss(net)

    def run(module, data):
        if compute == "amp":
            copies = network.narrow(dict(module.named_parameters()))
            return torch.func.functional_call(module, copies, tuple(network.narrowed(data, compute)))
        with torch.autocast(device.type, torch.bfloat16, enabled=compute == "autocast"):
            return module(*data)

    loss = lambda: run(whole, data)
    forward = lambda: run(net, data[:2])
    if variant in ("compile", "graphs"):
        mode = "reduce-overhead" if variant == "graphs" else None
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

    if variant in ("compile", "graphs"):
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
        described = json.loads(sys.argv[1])
        if described["workload"] not in ("forward", "forward-backward", "train-step"):
            sys.exit(f"no twin of {described['workload']}")
        main(described, sys.argv[2])

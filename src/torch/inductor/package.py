"""Makes a package: a step as TorchInductor compiles it, which C++ loads and runs without Python.

Reads JSON: {"case": its description, "leaves": the parameters in their order, "folder": where the
package goes}. A package takes, in this order, the case's inputs, `chances` where the
case draws, `adamw` where it optimizes, then parameters and both moments, which it changes in place. It
gives the loss or what the network puts out, then the gradients.

torch.compile's own way ends in Python code that calls kernels; AOTInductor is the same compiler with
C++ in that place (https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html).
"""
import json
import sys
import zipfile
from pathlib import Path

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import network

SITES = ["embedding", "weights", "residual", "hidden", "heads"]


class Chances(network.Drops):
    """Dropout as PyTorch decomposes it for Inductor, with the probability read from a tensor: so what is
    timed is what was proven without dropout."""

    def __init__(self, case):
        super().__init__(case["dropout"])
        # Fused kernels take a number: CUDA has them with dropout.
        self.fused = case["device"] == "cuda"
        self.rows = None

    def __call__(self, x, site, training):
        if not training or not self.probabilities[site]:
            return x
        chance, scale = self.rows[SITES.index(site)]
        return x * (torch.rand(x.shape, device=x.device) > chance) * scale.to(x.dtype)

    def in_attention(self, training):
        p = super().in_attention(training)
        return p if p == 0 or self.fused else None


def adamw_(numbers, parameters, gradients, first, second):
    """One step of torch.optim.AdamW in place; `numbers` are what the caller knows before it: decay, 1 − β1,
    β2, 1 − β2, ε, lr over the first bias correction, the root of the second."""
    decay, own1, keep2, own2, eps, rate, root = numbers
    for p, g, m, v in zip(parameters, gradients, first, second):
        p.mul_(decay)
        m.lerp_(g, own1)
        v.mul_(keep2).add_(own2 * g * g)
        p.sub_(rate * m / (v.sqrt() / root + eps))


class Step(torch.nn.Module):
    """One iteration of a case as a function of tensors."""

    def __init__(self, case, leaves):
        super().__init__()
        self.case, self.drops = case, Chances(case)
        net = network.build(case, good=True, drops=self.drops)
        # Outside nn.Module's registry: parameters are inputs, not constants.
        self.__dict__["net"] = net
        self.__dict__["loss"] = network.Loss(net)
        self.names = [network.attribute(name) for name in leaves]
        known = dict(net.named_parameters())
        assert sorted(known) == sorted(self.names), set(known) ^ set(self.names)

    def arguments(self):
        """Tensors of the right shapes."""
        case, device = self.case, self.case["device"]
        own = [p.detach().clone() for p in (dict(self.net.named_parameters())[name] for name in self.names)]
        zeros = lambda: [torch.zeros_like(p) for p in own]
        draws = [torch.full((len(SITES), 2), 0.5, device=device)] if self.draws() else []
        numbers = [torch.full((7,), 0.5, device=device)] if case["optimizes"] else []
        moments = [zeros(), zeros()] if case["optimizes"] else []
        return network.data(case), draws, numbers, own, *moments

    def draws(self):
        return self.case["trains"] and any(self.case["dropout"].values())

    def forward(self, data, draws, numbers, parameters, *moments):
        case, amp = self.case, self.case["compute"] == "amp"
        if draws:
            self.drops.rows = [row.unbind() for row in draws[0].unbind()]
        whole = case["workload"] in ("forward-backward", "train-step")
        module, prefix = (self.loss, "net.") if whole else (self.net, "")
        inputs = network.narrowed(data, case["compute"])

        def run(parameters, inputs):
            given = {prefix + name: p for name, p in zip(self.names, parameters)}
            return functional_call(module, network.narrow(given) if amp else given, tuple(inputs))

        if not case["trains"]:
            return tuple(run(parameters, inputs[:2]))
        leaves = [p.detach().requires_grad_() for p in parameters]
        with torch.enable_grad():
            if whole:
                loss = run(leaves, inputs)
                gradients = torch.autograd.grad(loss, leaves)
            else:
                x = data[0].detach().requires_grad_()
                [out] = run(leaves, network.narrowed([x], case["compute"]))
                return torch.autograd.grad(out, [x, *leaves], data[1].to(out.dtype))
        if case["optimizes"]:
            adamw_(numbers[0].unbind(), parameters, gradients, *moments)
        return loss.detach(), *gradients


def trace(case, leaves):
    """The step as a graph of operators, and arguments of its shapes."""
    step = Step(case, leaves)
    arguments = step.arguments()
    with enable_python_dispatcher():
        # What is no input, the turns of a rotary position, is a constant of the package.
        made = make_fx(step, tracing_mode="fake", decomposition_table=select_decomp_table(),
                       _allow_non_fake_inputs=True)
        return made(*arguments), arguments


def make(case, leaves, folder):
    graph, arguments = trace(case, leaves)
    program = torch.export.export(graph, arguments, strict=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "step.pt2"))
    # What C++ loads, and what that looks for beside itself; the sources are Inductor's.
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "/aotinductor/" in name and not name.endswith((".cpp", "/")):
                (folder / Path(name).name).write_bytes(archive.read(name))
    Path(path).unlink()


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    make(asked["case"], asked["leaves"], Path(asked["folder"]))

"""Compiles a step with TorchInductor into a package, which C++ loads and runs without Python.

Reads JSON from standard input: {"case": its description, "leaves": the parameters in order, "folder": the
folder of the package}. A package takes the case's inputs, then `probabilities` if the case has dropout, then the
parameters. It returns the loss or the outputs of the network, then the gradients of the trained parameters. The
optimizer is not in it.

torch.compile generates Python code that calls kernels. AOTInductor is the same compiler, but generates C++
(https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html).
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

SITES = ["embedding", "weights", "attention", "residual", "hidden", "heads"]


class TensorDropout(network.Dropout):
    """Dropout as PyTorch decomposes it for Inductor, but with probabilities from a tensor.

    The package that is timed is therefore the one that was checked with all probabilities 0.
    """

    def __init__(self, case):
        super().__init__(case["dropout"])
        # CUDA has fused attention with dropout. Its probability is a number.
        self.fused_attention = case["device"] == "cuda"
        # Of each site: the probability, and 1 / (1 - probability).
        self.rows = None

    def __call__(self, x, site, training):
        if not training or not self.probability(site):
            return x
        probability, scale = self.rows[SITES.index(site)]
        return x * (torch.rand(x.shape, device=x.device) > probability) * scale.to(x.dtype)

    def attention_probability(self, training):
        p = super().attention_probability(training)
        return p if p == 0 or self.fused_attention else None


class Step(torch.nn.Module):
    """One iteration of a case as a function of tensors."""

    def __init__(self, case, leaves):
        super().__init__()
        self.case, self.dropout = case, TensorDropout(case)
        net = network.build(case, fused=True, dropout=self.dropout)
        # Outside nn.Module's registry: parameters are inputs, not constants.
        self.__dict__["net"] = net
        self.__dict__["loss"] = network.Loss(net)
        self.names = [network.attribute_name(name) for name in leaves]
        self.trained = [network.is_trained(case["model"], name) for name in self.names]
        known = dict(net.named_parameters())
        assert sorted(known) == sorted(self.names), set(known) ^ set(self.names)

    def arguments(self):
        """Returns tensors of the shapes that `forward` takes."""
        case, device = self.case, self.case["device"]
        parameters = [p.detach().clone() for p in (dict(self.net.named_parameters())[name] for name in self.names)]
        random = case["trains"] and any(case["dropout"].values())
        probabilities = [torch.full((len(SITES), 2), 0.5, device=device)] if random else []
        return network.data(case), probabilities, parameters

    def forward(self, data, probabilities, parameters):
        case, precision = self.case, self.case["precision"]
        if probabilities:
            self.dropout.rows = [row.unbind() for row in probabilities[0].unbind()]
        has_loss = case["workload"] == "forward-backward"
        module, prefix = (self.loss, "net.") if has_loss else (self.net, "")
        inputs = network.compute_inputs(data, precision)

        def run(parameters, inputs):
            named = {prefix + name: p for name, p in zip(self.names, parameters)}
            return functional_call(module, network.compute_parameters(named, precision), tuple(inputs))

        if not case["trains"]:
            return tuple(run(parameters, inputs[:2]))
        leaves = [p.detach().requires_grad_(is_trained) for p, is_trained in zip(parameters, self.trained)]
        trained = [leaf for leaf, is_trained in zip(leaves, self.trained) if is_trained]
        with torch.enable_grad():
            if has_loss:
                loss = run(leaves, inputs)
                gradients = torch.autograd.grad(loss, trained)
            else:
                x = data[0].detach().requires_grad_()
                [out] = run(leaves, network.compute_inputs([x], precision))
                return torch.autograd.grad(out, [x, *trained], data[1].to(out.dtype))
        # A fused optimizer needs the layout of the parameters. A contiguous gradient is returned as it is.
        return loss.detach(), *(gradient.contiguous() for gradient in gradients)


def trace(case, leaves):
    """Returns the step as a graph of operators, and example arguments."""
    step = Step(case, leaves)
    arguments = step.arguments()
    with enable_python_dispatcher():
        # The tables of a rotary position are constants of the package, not inputs.
        tracer = make_fx(step, tracing_mode="fake", decomposition_table=select_decomp_table(),
                         _allow_non_fake_inputs=True)
        return tracer(*arguments), arguments


def write_package(case, leaves, folder):
    graph, arguments = trace(case, leaves)
    program = torch.export.export(graph, arguments, strict=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "step.pt2"))
    # The library, and the files that it loads from its folder. The C++ sources are not needed.
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "/aotinductor/" in name and not name.endswith((".cpp", "/")):
                (folder / Path(name).name).write_bytes(archive.read(name))
    Path(path).unlink()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    write_package(request["case"], request["leaves"], Path(request["folder"]))

"""Generates the code of compiled steps for MPS on any machine, and prints facts about each as a line of JSON.

Usage: lower.py HOOKS FOLDER < DESCRIPTIONS, with the folder of `package.py` and torch in PYTHONPATH. HOOKS is the library of
`hooks.cpp`. FOLDER receives the C++ sources, which contain Metal's. Tensors are fake: they have shapes and no data.
"""
import ctypes
import json
import re
import sys
import zipfile
from pathlib import Path

import torch
import torch._inductor.config
from torch._subclasses.fake_tensor import FakeTensorMode

import network
import package


def convert(net, device, dtype):
    """Replaces the parameters and buffers of a network by copies of another type."""
    for module in net.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(device, dtype))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device, dtype)
    return net


def attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """Returns the attention that PyTorch computes on MPS if gradients are needed."""
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def pretend_mps(hooks):
    """Makes this PyTorch report a device of MPS."""
    ctypes.CDLL(hooks)
    torch._C._has_mps = True
    torch._C._mps_is_available = lambda: True
    torch._C._mps_is_on_macos_or_newer = lambda *version: True
    torch._C._mps_get_core_count = lambda: 10
    torch._C._mps_get_name = lambda: "Apple M3"
    torch.backends.mps.is_available = torch.mps.is_available = lambda: True
    torch.mps.device_count = lambda: 1
    # It would compute with the constants.
    torch._inductor.config.joint_graph_constant_folding = False
    # A fake parameter cannot change its data in place.
    torch.nn.Module.to = convert
    network.F.scaled_dot_product_attention = attention


def lower(case, folder):
    """Returns the traced graph and the C++ source of a case."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("mps"):
        leaves = [name for name, _ in network.build(case, True).named_parameters()]
        graph, arguments = package.trace(case, leaves)
        program = torch.export.export(graph, arguments, strict=False)
    # The fake tensors of the exported program belong to another mode.
    flat, structure = torch.utils._pytree.tree_flatten(arguments)
    fakes = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    program._example_inputs = torch.utils._pytree.tree_unflatten(fakes[-len(flat):], structure), {}
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "step.pt2"), inductor_configs={"aot_inductor.package_cpp_only": True})
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".cpp")]
        return graph, archive.read(name).decode()


def wide_nodes(graph):
    """Returns the nodes of a graph whose tensors MPS does not support: f64 and complex numbers of f64."""
    wide = (torch.float64, torch.complex128)
    return [str(node) for node in graph.graph.nodes if getattr(node.meta.get("val"), "dtype", None) in wide]


def facts(graph, source):
    kernels = re.findall(r"kernel void \w+\((.*?)\) \{", source, re.DOTALL)
    # Every argument is a buffer, except the positions of the thread.
    buffers = [len(re.findall(r"^\s*(?:device|constant) ", kernel, re.MULTILINE)) for kernel in kernels]
    return {"wide": wide_nodes(graph), "kernels": len(kernels),
            "buffers": max(buffers, default=0), "products": len(re.findall(r"aoti_torch_mps_\w*mm_out\(", source)),
            # Calls of the CPU's operators, or of operators that the generated code has no function for.
            "fallbacks": sorted(set(re.findall(r"aoti_torch_(?:cpu_\w+|proxy_executor\w+|call_dispatcher)", source)))}


if __name__ == "__main__":
    pretend_mps(sys.argv[1])
    for number, line in enumerate(sys.stdin):
        graph, source = lower(json.loads(line), Path(sys.argv[2]))
        (Path(sys.argv[2]) / f"step{number}.cpp").write_text(source)
        print(json.dumps(facts(graph, source)), flush=True)

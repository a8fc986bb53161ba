"""The optimizers of the suite's steps in Python PyTorch: torch.optim.AdamW and torch.optim.Muon.

Hyperparameters are those of `TRAINING` in src/fixture/hyperparameters.rs.
"""
import torch

ADAMW = {"lr": 2e-4, "weight_decay": 1e-5}
MUON = {"lr": 0.02, "weight_decay": 0.1}


def is_block_matrix(name, parameter):
    """Returns whether Muon updates a parameter, as `ParameterSpec::is_block_matrix` in src/model/parameters.rs."""
    return name.startswith("blocks.") and parameter.ndim == 2


def matrix_rows(m, name, parameter):
    """Returns the rows of each matrix in a parameter. One of queries, keys and values has three."""
    if ".qkv." not in name:
        return [parameter.shape[0]]
    keys = m["key-value-heads"] * m["head-width"]
    return [m["heads"] * m["head-width"], keys, keys]


class Optimizers:
    """The optimizers of a network. Muon updates views of the matrices, whose memory they share."""

    def __init__(self, case, net, fused, is_compiled=False):
        named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        has_muon = case.get("optimizer") == "muon"
        self.matrices = []
        for name, p in named:
            if has_muon and is_block_matrix(name, p):
                rows = matrix_rows(case["model"], name, p)
                views = [torch.nn.Parameter(view) for view in p.detach().split(rows)]
                self.matrices.append((p, rows, views))
        others = [p for name, p in named if not (has_muon and is_block_matrix(name, p))]
        self.adamw = torch.optim.AdamW(others, **ADAMW, fused=True if fused else None)
        views = [view for _, _, own in self.matrices for view in own]
        self.muon = torch.optim.Muon(views, **MUON) if has_muon else None
        # torch.optim.Muon iterates in bf16. The suite iterates in the type of the computation, and so does this step.
        self.is_wide = has_muon and case["precision"] in ("f32", "tf32", "f64")
        self.step_muon = torch.compile(self.muon.step) if has_muon and is_compiled else self.muon and self.muon.step

    def step(self):
        """Updates all parameters with their gradients."""
        for p, rows, views in self.matrices:
            for view, gradient in zip(views, p.grad.split(rows)):
                view.grad = gradient
        if self.muon:
            cast = torch.Tensor.bfloat16
            torch.Tensor.bfloat16 = torch.Tensor.clone if self.is_wide else cast
            try:
                self.step_muon()
            finally:
                torch.Tensor.bfloat16 = cast
        self.adamw.step()

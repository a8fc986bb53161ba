"""Conversion of the suite's parameters to Hugging Face's, and comparisons of tensors between the two."""
import json
import re
import sys
from pathlib import Path

import numpy as np

from families import FAMILIES, Rows
from protocol import serve

# The linear layers of a block that have an adapter.
QUERIES_VALUES = ("attention.q", "attention.v")
ALL_LINEAR = (*(f"attention.{part}" for part in "qkvo"), *(f"feed-forward.{part}" for part in ("gate", "up", "down")))


def run(compare_outputs, build_step):
    """Runs the function that the command line selects: --parity CONFIG DESCRIPTION FILE..., or DESCRIPTION VARIANT CONFIG."""
    if sys.argv[1] == "--parity":
        compare_outputs(sys.argv[2], json.loads(sys.argv[3])["model"], sys.argv[4:])
        return
    serve(build_step(json.loads(sys.argv[1]), *sys.argv[2:]))


def check_workload(case):
    if case["workload"] != "train-step" or case["precision"] not in ("f32", "bf16"):
        sys.exit(f"no Python counterpart of {case['workload']} in {case['precision']}")
    if case.get("optimizer", "adamw") != "adamw":
        sys.exit(f"no counterpart in a library with the optimizer {case['optimizer']}")


def adapted_modules(family, lora, names):
    """Yields those of Hugging Face's `names` of modules that have an adapter."""
    parts = QUERIES_VALUES if lora["layers"] == "queries-values" else ALL_LINEAR
    wanted = set()
    for part in parts:
        entry = FAMILIES.get(family, {}).get(f"blocks.L.{part}.weight")
        if isinstance(entry, Rows):
            sys.exit(f"{family} has one layer for several projections, so its adapters are not those of the suite")
        wanted.add(str(entry).removesuffix(".weight"))
    yield from (name for name in names if re.sub(r"\.\d+\.", ".L.", name, count=1) in wanted)


def is_adapter(name):
    return name.endswith((".lora-a", ".lora-b"))


def entry(family, name):
    """Returns Hugging Face's name of a parameter, and its rows there."""
    if family not in FAMILIES:
        sys.exit(f"the names of the parameters of {family} are unknown (scripts/python_counterparts/families.py)")
    if is_adapter(name):
        module, part = name.rsplit(".", 1)
        return Rows(f"{entry(family, module + '.weight').name.removesuffix('.weight')}.{part}")
    layer = re.search(r"blocks\.(\d+)\.", name)
    found = FAMILIES[family].get(re.sub(r"blocks\.\d+\.", "blocks.L.", name))
    if found is None:
        sys.exit(f"{family} has no parameter {name}")
    rows = found if isinstance(found, Rows) else Rows(found)
    return rows._replace(name=rows.name.replace(".L.", f".{layer[1]}.") if layer else rows.name)


def stack(family, parameters, heads):
    """Converts the suite's parameters to Hugging Face's: a dict of arrays, weights [out, in]."""
    parts = {}
    for name, data in parameters.items():
        rows = entry(family, name)
        parts.setdefault(rows.name, []).append((rows, data[None] if name == "type" else data))
    stacked = {}
    for name, all_rows in parts.items():
        all_rows.sort(key=lambda part: part[0].index)
        rows, arrays = all_rows[0][0], [data for _, data in all_rows]
        if rows.by_head:
            by_head = [data.reshape(heads, -1, *data.shape[1:]) for data in arrays]
            stacked[name] = np.concatenate(by_head, 1).reshape(-1, *arrays[0].shape[1:])
        else:
            unused = np.zeros((rows.first, *arrays[0].shape[1:]), arrays[0].dtype)
            stacked[name] = np.concatenate([unused, *arrays])
    return stacked


def unstack(family, parameters, gradients, heads):
    """Returns the gradients of the suite's parameters, from those of Hugging Face's. Yields names and arrays."""
    sizes = {}
    for name, data in parameters.items():
        rows = entry(family, name)
        sizes.setdefault(rows.name, {})[rows.index] = 1 if name == "type" else len(data)
    for name, data in parameters.items():
        rows = entry(family, name)
        if rows.name not in gradients:
            sys.exit(f"no gradient of {rows.name}")
        gradient, of_part = np.asarray(gradients[rows.name]), sizes[rows.name]
        if rows.by_head:
            by_head = gradient.reshape(heads, len(of_part), -1, *gradient.shape[1:])
            yield name, by_head[:, rows.index].reshape(data.shape)
        else:
            start = rows.first + sum(size for index, size in of_part.items() if index < rows.index)
            yield name, gradient[start:start + of_part[rows.index]]


def read_config(path):
    """Returns the JSON of a config.json, or of the text model inside. `path` is the file or its folder."""
    path = Path(path)
    fields = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    if "text_config" not in fields:
        return fields
    shared = {"model_type": fields.get("model_type"), "tie_word_embeddings": fields.get("tie_word_embeddings")}
    return {**{name: value for name, value in shared.items() if value is not None}, **fields["text_config"]}


def head_count(fields):
    return next(fields[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in fields)


def read_outputs(files):
    """Reads what a worker wrote on the request `outputs`: a dict from names to arrays."""
    tensors = {}
    for file in files:
        with open(file, "rb") as opened:
            index = json.loads(opened.readline())
            data = np.frombuffer(opened.read(), "<f4")
        start = 0
        for name, dims in index:
            size = int(np.prod(dims))
            tensors[name] = data[start:start + size].reshape(dims)
            start += size
    return tensors


def of_kind(tensors, kind):
    return {name.removeprefix(kind + "/"): data for name, data in tensors.items() if name.startswith(kind + "/")}


def report(family, suite, loss, logits, gradients, heads):
    """Prints a line of JSON for each tensor: its name, and the norm of the difference over Hugging Face's norm."""
    suite_gradients = of_kind(suite, "grad")
    rows = {"loss": (suite["loss"], np.asarray([loss]))}
    if logits is not None:
        rows["logits"] = (suite["logits"], logits)
    for name, gradient in unstack(family, suite_gradients, gradients, heads):
        rows[name] = (suite_gradients[name], gradient)
    # A gradient that vanishes by symmetry (the bias of keys) is measured by the largest gradient.
    largest = max(float(np.linalg.norm(gradient)) for gradient in suite_gradients.values())
    for name, (actual, expected) in rows.items():
        if actual.shape != expected.shape and actual.size != expected.size:
            sys.exit(f"{name} has shape {actual.shape} in the suite and {expected.shape} in the library")
        actual, expected = actual.astype(np.float64).ravel(), np.asarray(expected, np.float64).ravel()
        size = np.linalg.norm(expected)
        error = np.linalg.norm(actual - expected) / (size if size > 1e-6 * largest else largest)
        print(json.dumps({"tensor": name, "error": float(error)}))

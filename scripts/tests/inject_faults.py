#!/usr/bin/env python3
"""Injects faults into the networks, one after the other, and checks that `cargo bench` refuses to time them.

Usage: scripts/tests/inject_faults.py [torch | mlx]

A fault is a changed line of src/torch/network.rs or src/mlx/network.rs, which is built and then restored. Each
takes about half a minute. These files must have no uncommitted changes.
"""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TRAIN = "train-step/{}/f32/indicator-b16"
FFN = "feed-forward-grad/{}/f32/b16-t111-d256-f1024"
ATTENTION = "attention-grad/{}/f32/b16-h8-t111-d32"

# Name, the id of a case that must be refused, a part of the source, and its replacement.
TORCH_DROP = "x.dropout(p, true)"
TORCH_LAST = "self.linear(&dropout(hidden, self.dropout.hidden), &f.down)"
FAULTS = {
    "torch": [
        ("dropout 0.2 for 0.1", TRAIN, TORCH_DROP, "x.dropout(2.0 * p, true)"),
        ("dropout 0.01 for 0.1", FFN, TORCH_DROP, "x.dropout(0.1 * p, true)"),
        ("dropout without 1/(1 - p)", TRAIN, TORCH_DROP, "x.dropout(p, true) * (1.0 - p)"),
        ("dropout that drops nothing", ATTENTION, TORCH_DROP, "x"),
        ("no dropout in fused attention", "train-step/{}/f32-tuned/indicator-b16",
         "(self.dropout.weights, cache.visible", "(0.0, cache.visible"),
        ("keys past the hundredth ignored", "forward/{}/f32/indicator-b16",
         "            let scores = q.matmul(",
         "            let (k, v) = (k.narrow(2, 0, n.min(100)), v.narrow(2, 0, n.min(100)));\n            let scores = q.matmul("),
        ("feed-forward 5 % too large in bf16", "train-step/{}/mixed/indicator-b16", TORCH_LAST,
         f"{{ let y = {TORCH_LAST}; if y.kind() == Kind::BFloat16 {{ y * 1.05 }} else {{ y }} }}"),
        ("feed-forward 5 % too large in the tuned variant", "train-step/{}/mixed-tuned/indicator-b16", TORCH_LAST,
         f"{{ let y = {TORCH_LAST}; if y.kind() == Kind::BFloat16 {{ y * 1.05 }} else {{ y }} }}"),
        ("attention scale 10 % off in bf16", "train-step/{}/mixed/indicator-b16", "/ (m.head_width as f64).sqrt(),",
         "/ (m.head_width as f64).sqrt() * if x.kind() == Kind::BFloat16 { 1.1 } else { 1.0 },"),
        ("the tanh approximation of GELU", FFN, 'x.gelu("none")', 'x.gelu("tanh")'),
    ],
    "mlx": [
        ("dropout 0.2 for 0.1", TRAIN, "let keep = 1.0 - p;", "let keep = 1.0 - 2.0 * p;"),
        ("dropout without 1/(1 - p)", FFN, "scale(&x.multiply(mask)?, 1.0 / keep)", "x.multiply(mask)"),
        ("dropout that drops nothing", ATTENTION, "if p == 0.0 {", "if p < 2.0 {"),
        ("the same random key at every site", "train-step/{}/f32-tuned/indicator-b16", "self.random.next_key()?",
         "mlx_rs::random::key(7)?"),
        ("keys past the hundredth ignored", "forward/{}/f32/indicator-b16", "let weights = softmax(&scores)?;",
         "let past = ops::arange::<f32, f32>(None, n as f32, None)?.ge(Array::from_f32(100.0))?;\n"
         "            let weights = softmax(&scores.add(past.as_dtype(x.dtype())?.multiply(scalar(-3e4, x.dtype()))?)?)?;"),
        ("attention scale 10 % off", ATTENTION, "scale(&q, m.score_scale())", "scale(&q, 1.1 * m.score_scale())"),
    ],
}


def source(framework):
    return ROOT / "src" / framework / "network.rs"


def run(*words):
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main():
    frameworks = sys.argv[1:] or list(FAULTS)
    unknown = set(frameworks) - set(FAULTS)
    if unknown:
        sys.exit(f"inject_faults: unknown framework '{unknown.pop()}': {' or '.join(FAULTS)}")
    missed = 0
    for framework in frameworks:
        path = source(framework)
        if run("git", "diff", "--quiet", "--", path).returncode:
            sys.exit(f"inject_faults: {path} has changes: commit them first")
        original = path.read_text()
        try:
            for name, case, old, new in FAULTS[framework]:
                path.write_text(original.replace(old, new))
                case = case.format(f"{framework}-cpu")
                done = run("cargo", "bench", "--quiet", "--bench", framework, "--", f"^{case}$")
                failures = [line for line in done.stdout.splitlines() if "parity" in line and " failed: " in line]
                found = done.returncode != 0 and failures
                missed += not found
                print(f"{'found ' if found else 'MISSED'}  {framework}: {name}\n        "
                      f"{failures[-1] if failures else done.stdout[-300:]}", flush=True)
        finally:
            path.write_text(original)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

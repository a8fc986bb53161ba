#!/usr/bin/env python3
"""Injects faults into the sources, and checks that `cargo bench` refuses to time them.

Usage: scripts/tests/inject_faults.py [torch | mlx] [--only TEXT]

faults_torch.py and faults_mlx.py list the faults. All faults of a framework are in one executable, and the variable
INJECTED_FAULT selects one of them. The changed sources are then restored. They must have no uncommitted changes.
Each run takes 5 to 20 seconds, or minutes for a fault in a compiled step. With --only, the faults run whose name
or case contains TEXT.
"""
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.dont_write_bytecode = True
import faults_mlx  # noqa: E402
import faults_torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {"torch": faults_torch.FAULTS, "mlx": faults_mlx.FAULTS}
HELPERS = {"torch": faults_torch.HELPERS, "mlx": faults_mlx.HELPERS}
VARIABLE = "INJECTED_FAULT"

# Functions for the injected code: the selected fault, and named counters.
RUST = f"""
pub fn injected(name: &str) -> bool {{
    std::env::var("{VARIABLE}").is_ok_and(|selected| selected == name)
}}

static COUNTS: std::sync::Mutex<std::collections::BTreeMap<&str, u64>> =
    std::sync::Mutex::new(std::collections::BTreeMap::new());

/// Returns how often it was called with this name before.
pub fn count(name: &'static str) -> u64 {{
    let mut all = COUNTS.lock().unwrap();
    let count = all.entry(name).or_insert(0);
    *count += 1;
    *count - 1
}}

/// Returns a count, and sets it to 0.
pub fn take_count(name: &str) -> u64 {{
    COUNTS.lock().unwrap().remove(name).unwrap_or(0)
}}
"""


def folder(framework):
    return ROOT / "src" / framework


def parse(anchor):
    """Splits an anchor into its text, and the range of the marked part."""
    before, rest = anchor.split("«")
    old, after = rest.split("»")
    return before + old + after, len(before), len(before) + len(old)


def regions(framework):
    """Returns the changes of each file: {file: {(start, end): [(fault, new)]}}. Each anchor must occur once."""
    files = {}
    for name, _, edits in FAULTS[framework]:
        for file, anchor, new in edits:
            source = (folder(framework) / file).read_text()
            text, start, end = parse(anchor)
            assert source.count(text) == 1, f"{framework}: {name}: {file} has {source.count(text)} of: {text}"
            at = source.index(text)
            files.setdefault(file, {}).setdefault((at + start, at + end), []).append((name, new))
    for file, changes in files.items():
        ranges = sorted(changes)
        for (start, end), (next_start, _) in zip(ranges, ranges[1:]):
            assert end <= next_start, f"{file}: the faults {changes[start, end][0][0]} and others overlap"
    return files


def injected(file, old, changes):
    """Returns the code that replaces `old`. Without `old`, the new code is inserted, with FAULT for its condition."""
    python = file.endswith(".py")
    if python:
        condition = lambda name: f'__import__("os").environ.get("{VARIABLE}") == "{name}"'
    else:
        condition = lambda name: f'crate::injected("{name}")'
    if not old:
        return "".join(new.replace("FAULT", condition(name)) for name, new in changes)
    if python:
        return "(" + "".join(f"({new}) if {condition(name)} else " for name, new in changes) + f"({old}))"
    return "(" + "".join(f"if {condition(name)} {{ {new} }} else " for name, new in changes) + f"{{ {old} }})"


def inject(framework):
    """Writes all faults of a framework into its sources. Returns the original sources."""
    originals = {}
    for file, changes in regions(framework).items():
        path = folder(framework) / file
        source = originals[path] = path.read_text()
        for (start, end), faults in sorted(changes.items(), reverse=True):
            source = source[:start] + injected(file, source[start:end], faults) + source[end:]
        path.write_text(source)
    library = folder(framework) / "lib.rs"
    originals.setdefault(library, library.read_text())
    library.write_text(library.read_text() + RUST + HELPERS[framework])
    return originals


def build(framework):
    """Builds the executable with all faults, and returns its path."""
    changed = subprocess.run(["git", "diff", "--quiet", "--", folder(framework)], cwd=ROOT)
    if changed.returncode:
        sys.exit(f"inject_faults: {folder(framework)} has changes: commit them first")
    originals = inject(framework)
    try:
        done = subprocess.run(["cargo", "bench", "--locked", "--no-run", "--bench", framework], cwd=ROOT, text=True,
                              capture_output=True)
    finally:
        for path, source in originals.items():
            path.write_text(source)
    if done.returncode:
        sys.exit(f"inject_faults: the faults do not compile\n{done.stderr}")
    path = next(line for line in done.stderr.splitlines() if "Executable" in line).split("(")[-1].rstrip(")")
    # A later build must not replace it.
    copy = ROOT / "target" / f"injected-faults-{framework}"
    copy.unlink(missing_ok=True)
    copy.hardlink_to(ROOT / path)
    return copy


def run(executable, name, case):
    """Runs a case with a fault. Returns the reason for which it was refused, or None if it was timed."""
    with tempfile.TemporaryDirectory(prefix="transformer-bench-fault-") as scratch:
        env = {**os.environ, VARIABLE: name, "TRANSFORMER_BENCH_RESULTS": f"{scratch}/results",
               "CRITERION_HOME": f"{scratch}/criterion",
               "TRANSFORMER_BENCH_SET": "smoke" if "-tiny" in case else "full"}
        if "-compile" in case and "torch" in case:
            # Packages of faults are not cached.
            env["XDG_CACHE_HOME"] = scratch
        done = subprocess.run([executable, "--bench", "--warm-up-time=0.1", "--measurement-time=1", f"^{case}$"],
                              cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    reasons = [line for line in done.stdout.splitlines() if " failed" in line and case in line]
    if done.returncode == 0:
        return None
    return reasons[-1] if reasons else f"exit code {done.returncode}: {done.stdout[-400:]}"


def main():
    parser = argparse.ArgumentParser(usage=__doc__.split("Usage: ")[1].splitlines()[0])
    parser.add_argument("framework", nargs="?", choices=FAULTS)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    missed = 0
    for framework in [options.framework] if options.framework else FAULTS:
        executable = build(framework)
        for name, cases, _ in FAULTS[framework]:
            for case in cases:
                if options.only not in f"{name} {case}":
                    continue
                reason = run(executable, name, case)
                missed += reason is None
                print(f"{'found ' if reason else 'MISSED'}  {name}: {case}\n        {reason or ''}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

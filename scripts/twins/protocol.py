"""What both twins share: the case's sizes, and the worker protocol of the harness."""
import re
import sys
import time


def parse(case):
    """(workload, precision, model, batch) of an id such as
    train-step/torch-cpu/f32/indicator-b16."""
    workload, _, precision, shape = case.split("/")
    match = re.fullmatch(r"(indicator|gpt2)(?:-tiny)?-b(\d+)(?:-t\d+)?", shape)
    if not match or "tiny" in shape:
        sys.exit(f"{case}: the twins know indicator-bN and gpt2-bN-t1024")
    return workload, precision.removesuffix("-opt"), match[1], int(match[2])


SIZES = {
    "indicator": dict(tokens=111, width=256, heads=8, layers=6, hidden=1024, vocabulary=0, dropout=0.1),
    "gpt2": dict(tokens=1024, width=768, heads=12, layers=12, hidden=3072, vocabulary=50304, dropout=0.0),
}


def serve(step):
    """Runs `step` once, then as often as each line of the input says; answers in ns."""
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter_ns()
        for _ in range(count):
            step()
        print(time.perf_counter_ns() - start, flush=True)

"""The worker protocol of the harness."""
import sys
import time


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

"""The worker protocol of benches/harness/worker.rs, as far as the Python counterparts need it."""
import sys
import time


def serve(step):
    """Runs `step` once, then as many times as each line of the input says. Prints each time in ns."""
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter_ns()
        for _ in range(count):
            step()
        print(time.perf_counter_ns() - start, flush=True)

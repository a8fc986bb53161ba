"""The worker protocol of benches/harness/worker.rs, as far as the Python counterparts need it."""
import sys
import time

# As in src/process.rs: the period in seconds, the share of a core, and the longest wait.
IDLE_PERIOD, IDLE_SHARE, IDLE_TIMEOUT = 0.005, 0.2, 0.5


def wait_until_idle():
    """Waits until the threads of this process sleep, so that they take no core from the next timed process."""
    start = time.perf_counter()
    while time.perf_counter() - start < IDLE_TIMEOUT:
        begin, before = time.perf_counter(), time.process_time()
        time.sleep(IDLE_PERIOD)
        if time.process_time() - before < IDLE_SHARE * (time.perf_counter() - begin):
            return


def serve(step):
    """Runs `step` once, then as many times as each line of the input says. Prints each time in ns."""
    step()
    wait_until_idle()
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        start = time.perf_counter_ns()
        for _ in range(count):
            step()
        elapsed = time.perf_counter_ns() - start
        wait_until_idle()
        print(elapsed, flush=True)

"""A side of scripts/compare whose steps run in Python. Usage: side.py FILE

FILE is JSON: the module of the counterpart (`script`), its `steps` by the ids of their cases, and the path of a
custom `model` or null. A step has the `description` of its case and a `variant`. The requests are those of
benches/harness/worker.rs, as far as Python can answer them.
"""
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protocol import wait_until_idle  # noqa: E402

# As in benches/harness/worker.rs: the seconds from which the threads of this process are waited for.
LONG_STEPS = 0.01
# The request for a check, which keeps its name for older executables.
CHECK = "prove"
# The version of the protocol, as in src/results/upgrade.rs.
VERSION = 4


class Refused(Exception):
    """A request that cannot be answered. The text is one line."""


def scheduler_delay_ns():
    """Returns the nanoseconds for which threads of this process waited for a core, or 0 if the system counts none."""
    delay = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            delay += int(path.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            # The thread has ended, or the kernel does not count.
            pass
    return delay


class Side:
    def __init__(self, description):
        self.script, self.steps, self.model = (description[name] for name in ("script", "steps", "model"))
        self.step = None

    def counterpart(self):
        return importlib.import_module(self.script)

    def arguments(self, case):
        """Returns the arguments of the counterpart's functions."""
        if case not in self.steps:
            raise Refused(f"{case} is not a case of this side")
        step = self.steps[case]
        return [step["description"], step["variant"], *([self.model] if self.model else [])]

    def load(self, case):
        """Builds a step and runs it once."""
        self.step = None
        step = self.counterpart().build_step(*self.arguments(case))
        start = time.perf_counter_ns()
        step()
        elapsed = time.perf_counter_ns() - start
        wait_until_idle()
        self.step = step
        return f"ready {elapsed}"

    def start(self, case):
        """Imports the framework, builds a step and runs it twice. Returns the nanoseconds of each part.

        A compiled step is made by its first call, so the first part is 0.
        """
        self.step = None
        times = [time.perf_counter_ns()]
        step = self.counterpart().build_step(*self.arguments(case), warm_up=False)
        times.append(time.perf_counter_ns())
        for _ in range(2):
            step()
            times.append(time.perf_counter_ns())
        wait_until_idle()
        self.step = step
        return " ".join(str(part) for part in [0, *(end - begin for begin, end in zip(times, times[1:]))])

    def check(self, case):
        """Compares the results of a step with the same network in f64, if the counterpart can."""
        counterpart = self.counterpart()
        if not hasattr(counterpart, "check"):
            raise Refused(f"'{CHECK}' is not a request")
        share, tensor = counterpart.check(*self.arguments(case))
        return f"now {share}" if share <= 1 else f"wrong {tensor}: {share:.2g} times its tolerance"

    def machine(self):
        """Returns the machine as far as two sides of it can differ, in the format of src/results/machine.rs."""
        versions = {"Python": platform.python_version(), **self.counterpart().versions()}
        same = {"cpu": "", "cores": os.cpu_count(), "memory_bytes": 0, "os": "", "arch": "", "gpus": [], "driver": "",
                "commit": "", "dirty": False}
        return json.dumps({**same, "versions": list(versions.items())})

    def time(self, steps):
        if self.step is None:
            raise Refused("no case is loaded: send 'case ID' first")
        delay, cpu, start = scheduler_delay_ns(), time.process_time_ns(), time.perf_counter_ns()
        for _ in range(steps):
            self.step()
        wall, cpu = time.perf_counter_ns() - start, time.process_time_ns() - cpu
        delay = scheduler_delay_ns() - delay
        if wall > 1e9 * LONG_STEPS:
            wait_until_idle()
        return f"{wall} {cpu} {max(delay, 0)}"

    def answer(self, line):
        word, _, rest = line.partition(" ")
        if word.isdigit():
            return self.time(int(word))
        if word == "work":
            start = time.perf_counter_ns()
            for _ in range(int(rest)):
                pass
            return time.perf_counter_ns() - start
        requests = {"cases": lambda: " ".join(self.steps), "case": lambda: self.load(rest), CHECK: lambda: self.check(rest),
                    "start": lambda: self.start(rest), "machine": self.machine, "version": lambda: VERSION}
        if word not in requests:
            raise Refused(f"'{word}' is not a request")
        return requests[word]()


def one_line(error):
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def main():
    side = Side(json.loads(Path(sys.argv[1]).read_text()))
    # Libraries may print, which must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            text = side.answer(line.strip())
        except (Exception, SystemExit) as error:
            text = f"failed: {one_line(error)}"
        print(text, file=answers, flush=True)


if __name__ == "__main__":
    main()

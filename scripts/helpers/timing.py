"""Processes that time steps on request, and their interleaved timings."""
import itertools
import math
import os
import random
import re
import statistics
import subprocess

# Duration of a timing in seconds, if a step is not longer.
TIMING = 0.3
# Confidence level of the intervals.
CONFIDENCE = 0.95


class ComparisonError(Exception):
    """A comparison that could not run, or failed. The text is one line."""

    exit_code = 1


def last_line(text, fallback):
    lines = text.strip().splitlines()
    return lines[-1] if lines else fallback


class Worker:
    """A process that times steps on request."""

    def __init__(self, command, env=None):
        try:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        except OSError as error:
            raise ComparisonError(f"{command[0]} does not start: {error.strerror}") from None
        if self.read_answer() != "ready":
            raise ComparisonError(last_line(self.process.stderr.read(), f"exit {self.process.wait()}"))

    def read_answer(self):
        """Returns the first word of the next answer: a time in ns, or `ready`. Skips what libraries print."""
        for line in self.process.stdout:
            if re.fullmatch(r"\d+( \d+)*|ready( \d+)?", line.strip()):
                return line.split()[0]
        return None

    def seconds_per_step(self, steps):
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
            answer = self.read_answer()
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise ComparisonError(last_line(self.process.stderr.read(), "the process ended early"))
        return int(answer) * 1e-9 / steps

    def close(self):
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()


def time_interleaved(workers, rounds):
    """Times all workers in each round, in random order. Returns the seconds per step of each worker by round."""
    steps = [max(1, round(TIMING / max(worker.seconds_per_step(1), 1e-6))) for worker in workers]
    times = [[] for _ in workers]
    order, dice = list(range(len(workers))), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for index in order:
            times[index].append(workers[index].seconds_per_step(steps[index]))
    return times


def median_with_interval(values):
    """Returns the median, and the order statistics that contain the true median with 95 % confidence.

    Fewer than six values have no such interval, so their range is returned.
    """
    ordered, count = sorted(values), len(values)
    # The number of values below the true median is binomial.
    tails = itertools.accumulate(math.comb(count, below) / 2 ** count for below in range(count))
    cut = max(0, sum(tail <= (1 - CONFIDENCE) / 2 for tail in tails) - 1)
    return statistics.median(ordered), ordered[cut], ordered[-1 - cut]

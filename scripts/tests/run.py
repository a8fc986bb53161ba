#!/usr/bin/env python3
"""Runs the script tests side by side, and prints how long each of them took.

Most tests wait for processes and time-outs, so several run at once. Of the tests marked `uses_all_cores`, one
runs at a time. Those marked `needs_quiet_machine` run alone, after all others. `python3 -m unittest discover -s
scripts/tests` runs the same tests one after the other.
"""
import argparse
import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.dont_write_bytecode = True
import support  # noqa: E402

# The number of waiting tests that run at once, next to one that computes.
WAITING = 3
# Modules whose tests need no program of the suite.
WITHOUT_PROGRAMS = ("test_setup.", "test_style.", "test_inject_faults.", "test_native.", "test_portability.")


def collect(suite):
    """Yields the single tests of a suite."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from collect(test)
        else:
            yield test


def has_mark(test, mark):
    return getattr(test, mark, False) or getattr(getattr(test, test._testMethodName, None), mark, False)


def run_test(name):
    """Runs one test. Returns (outcome, seconds, messages)."""
    output = io.StringIO()
    start = time.monotonic()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        result = unittest.TextTestRunner(output).run(unittest.defaultTestLoader.loadTestsFromName(name))
    seconds = time.monotonic() - start
    if not result.wasSuccessful():
        return "failed", seconds, output.getvalue()
    if result.skipped:
        return "skipped", seconds, "; ".join(sorted({reason for _, reason in result.skipped}))
    return "passed", seconds, ""


class Report:
    """Prints each test when it ends, and the summary."""

    def __init__(self):
        self.results = []

    def add(self, name, outcome, seconds, messages):
        self.results.append((name, outcome, seconds, messages))
        reason = f" ({messages})" if outcome == "skipped" else ""
        print(f"{seconds:7.1f} s  {outcome:7}  {name}{reason}", flush=True)

    def finish(self, seconds):
        """Prints failures, the longest tests and the counts. Returns the exit code."""
        for name, outcome, _, messages in self.results:
            if outcome == "failed":
                print(f"\n{'=' * 70}\n{name}\n{messages}")
        longest = sorted(self.results, key=lambda result: -result[2])[:10]
        print(f"\nAll tests took {seconds:.0f} s. The longest:")
        for name, _, seconds, _ in longest:
            print(f"{seconds:7.1f} s  {name}")
        counts = {outcome: sum(result[1] == outcome for result in self.results) for outcome in ("passed", "failed", "skipped")}
        print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
        return 1 if counts["failed"] or not counts["passed"] else 0


def run_all(report, computing, waiting):
    """Runs one computing test and several waiting tests at a time, each in a process of its pool."""
    # A new interpreter per process: forked copies of a process with threads can hang.
    context = multiprocessing.get_context("spawn")
    pools = [concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) for workers in (1, WAITING)]
    futures = {pool.submit(run_test, name): name for pool, names in zip(pools, (computing, waiting)) for name in names}
    try:
        for future in concurrent.futures.as_completed(futures):
            try:
                report.add(futures[future], *future.result())
            except concurrent.futures.BrokenExecutor as error:
                report.add(futures[future], "failed", 0.0, f"the process of the test ended: {error}")
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def main():
    parser = argparse.ArgumentParser(prog="scripts/tests/run.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="run only tests whose name contains a PATTERN")
    parser.add_argument("--list", action="store_true", help="print the names of the tests and how they run")
    arguments = parser.parse_args()
    tests = list(collect(unittest.defaultTestLoader.discover(str(HERE))))
    broken = [test for test in tests if isinstance(test, unittest.loader._FailedTest)]
    if broken:
        return unittest.TextTestRunner().run(unittest.TestSuite(broken)) and 1
    groups = {"waiting": [], "computing": [], "quiet": []}
    for test in tests:
        if not arguments.patterns or any(pattern in test.id() for pattern in arguments.patterns):
            quiet, computing = has_mark(test, "needs_quiet_machine"), has_mark(test, "uses_all_cores")
            groups["quiet" if quiet else "computing" if computing else "waiting"].append(test.id())
    if not any(groups.values()):
        parser.error("no test matches")
    if arguments.list:
        for group, names in groups.items():
            print("\n".join(f"{group:9}  {name}" for name in names))
        return 0
    report, start = Report(), time.monotonic()
    if not all(name.startswith(WITHOUT_PROGRAMS) for names in groups.values() for name in names):
        try:
            support.build()
            support.executables()
        except Exception as error:
            print(f"run.py: the suite does not build: {error}", file=sys.stderr)
            return 1
        print(f"{time.monotonic() - start:7.1f} s  the build", flush=True)
    with tempfile.TemporaryDirectory(prefix="transformer-bench tests-") as folder:
        os.environ[support.SHARED_FOLDER] = folder
        run_all(report, groups["computing"], groups["waiting"])
        for name in groups["quiet"]:
            report.add(name, *run_test(name))
    return report.finish(time.monotonic() - start)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

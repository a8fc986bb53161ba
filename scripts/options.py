"""Refuses an option that a script does not have, and names the nearest that it has.

Run as `python3 options.py SCRIPT OPTION KNOWN...` by scripts that are not in Python."""
import difflib
import sys


def refusal(script, option, known):
    """The one line that is shown."""
    near = difflib.get_close_matches(option, known, n=1)
    meant = f", did you mean {near[0]}?" if near else ""
    return f"unknown option '{option}'{meant} (see scripts/{script} --help)"


if __name__ == "__main__":
    script, option, *known = sys.argv[1:]
    print(f"{script}: {refusal(script, option, known)}", file=sys.stderr)
    sys.exit(2)

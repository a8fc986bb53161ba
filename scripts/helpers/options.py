"""Command-line options of the scripts. A wrong option is reported in one line, with exit code 2.

Shell scripts run `python3 options.py SCRIPT OPTION KNOWN...` to report the unknown OPTION.
"""
import argparse
import difflib
import os
import sys

import installation


def unknown_option(script, option, known):
    """Returns the error message, which suggests the most similar option of `known`."""
    similar = difflib.get_close_matches(option, known, n=1)
    suggestion = f", did you mean {similar[0]}?" if similar else ""
    return f"unknown option '{option}'{suggestion} (see {installation.command(script)} --help)"


class Parser(argparse.ArgumentParser):
    """A parser for a script. Options and positional arguments may come in any order."""

    def __init__(self, script, description, epilog=None):
        super().__init__(prog=installation.command(script), description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.script = script

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_intermixed_args(args, namespace)
        for argument in unknown:
            if argument.startswith("-"):
                known = [option for option in self._option_string_actions if option.startswith("--")]
                self.exit(2, f"{self.script}: {unknown_option(self.script, argument, known)}\n")
            self.error(f"unexpected argument '{argument}'")
        return values

    def print_help(self, file=None):
        """Prints the help. argparse would ignore a full disk."""
        print(installation.words(self.format_help()), end="", file=file)

    def error(self, message):
        self.exit(2, f"{self.script}: {message} (see {installation.command(self.script)} --help)\n")


def printable(text):
    """Returns the text without control characters, which a path or a file could contain."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def run(script, main, known_error):
    """Runs `main`, and reports an expected error in one line.

    A `known_error` has its exit code in `exit_code`. A closed pipe is not an error: its reader has seen enough.
    """
    for stream in (sys.stdout, sys.stderr):
        # A path that is not UTF-8 can be printed.
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
        return
    except known_error as reason:
        message, code = reason, reason.exit_code
    except BrokenPipeError:
        message, code = None, 0
    except OSError as reason:
        message, code = reason, 1
    except KeyboardInterrupt:
        message, code = None, 130
    if message is not None:
        print(f"{script}: {printable(message)}", file=sys.stderr)
    # Python would flush the output again at its end, and print a traceback if that fails.
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    script, option, *known = sys.argv[1:]
    print(f"{script}: {unknown_option(script, option, known)}", file=sys.stderr)
    sys.exit(2)

"""Reads ELF libraries (Linux)."""
import re

from shared import run


def needed(library):
    """The libraries that an ELF file asks the loader for."""
    text = run(["readelf", "-d", library])
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


def symbols(library, which):
    text = run(["nm", "-D", which, library])
    return {line.split()[-1].split("@")[0] for line in text.splitlines() if line.strip()}


def undefined(library):
    """What an ELF file expects of others: (symbol, the version asked for or "")."""
    found = set()
    for line in run(["nm", "-D", "--undefined-only", library]).splitlines():
        kind, _, symbol = line.strip().partition(" ")
        if kind == "U":
            name, _, version = symbol.partition("@")
            found.add((name, version.lstrip("@")))
    return found

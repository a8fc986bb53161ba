"""Reads ELF libraries (Linux)."""
import re

from shared import run


def needed(library):
    """Returns the names of the libraries that an ELF file loads (DT_NEEDED)."""
    text = run(["readelf", "-d", library])
    return re.findall(r"\(NEEDED\).*\[(.+)\]", text)


def symbols(library, which):
    """Returns the dynamic symbols of a library. `which` is an option of nm."""
    text = run(["nm", "-D", which, library])
    return {line.split()[-1].split("@")[0] for line in text.splitlines() if line.strip()}


def undefined(library):
    """Returns the undefined symbols of an ELF file as pairs (symbol, version or "")."""
    found = set()
    for line in run(["nm", "-D", "--undefined-only", library]).splitlines():
        kind, _, symbol = line.strip().partition(" ")
        if kind == "U":
            name, _, version = symbol.partition("@")
            found.add((name, version.lstrip("@")))
    return found

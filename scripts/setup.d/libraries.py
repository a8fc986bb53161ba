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

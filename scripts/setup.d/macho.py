"""Reads the symbols and the minimum system of an arm64 Mach-O file (Apple's <mach-o/loader.h>, <mach-o/nlist.h>).

PyPI's lief 0.17 crashes on libtorch_cpu, which has 323 MB.
"""
import mmap
import struct

from shared import SetupError

MAGIC = 0xFEEDFACF
SYMTAB = 0x2
BUILD_VERSION = 0x32
SEARCH_PATH = 0x8000001C
EXTERNAL, TYPE, STAB = 0x01, 0x0E, 0xE0


def load_commands(data, path):
    """Yields (kind, offset) of each load command."""
    magic, _, _, _, commands = struct.unpack_from("<5I", data, 0)
    if magic != MAGIC:
        raise SetupError(f"{path} is not a 64-bit Mach-O file")
    place = 32
    for _ in range(commands):
        kind, size = struct.unpack_from("<2I", data, place)
        yield kind, place
        place += size


def mapped(path):
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def symbols(path):
    """Returns the names of the external symbols as two sets: (defined, undefined)."""
    found = (set(), set())
    with mapped(path) as data:
        for command, place in load_commands(data, path):
            if command == SYMTAB:
                start, count, strings, length = struct.unpack_from("<4I", data, place + 8)
                table = data[strings:strings + length]
                for name, kind, _, _, _ in struct.iter_unpack("<IBBHQ", data[start:start + 16 * count]):
                    if kind & EXTERNAL and not kind & STAB:
                        found[not kind & TYPE].add(table[name:table.index(b"\0", name)].decode())
    return found


def minimum_system(path):
    """Returns (major, minor) of the oldest macOS that a file runs on."""
    with mapped(path) as data:
        for command, place in load_commands(data, path):
            if command == BUILD_VERSION:
                [version] = struct.unpack_from("<I", data, place + 12)
                return version >> 16, version >> 8 & 0xFF
    raise SetupError(f"{path} names no minimum system")


def search_paths(path):
    """Returns the folders in which a file looks for its libraries (LC_RPATH)."""
    found = []
    with mapped(path) as data:
        for command, place in load_commands(data, path):
            if command == SEARCH_PATH:
                size, offset = struct.unpack_from("<2I", data, place + 4)
                found.append(data[place + offset:place + size].split(b"\0")[0].decode())
    return found


def contains(path, text):
    """Returns true if a file contains an ASCII text."""
    with mapped(path) as data:
        return data.find(text.encode()) >= 0

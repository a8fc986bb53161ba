"""Writes wheels (https://packaging.python.org/en/latest/specifications/binary-distribution-format/).

The same files give the same bytes: names are sorted, and every entry has the date that ZIP begins with.
"""
import base64
import hashlib
import zipfile

NAME = "transformer_bench"
FIRST_DATE = (1980, 1, 1, 0, 0, 0)
# A regular file, with and without the right to run it.
PLAIN, PROGRAM = 0o100644, 0o100755


def digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def metadata(version, licenses, dependencies, extras):
    """Returns the text of METADATA. `licenses` are names of files.

    `dependencies` and the values of `extras` are lists of requirements.
    """
    lines = [
        "Metadata-Version: 2.4",
        "Name: transformer-bench",
        f"Version: {version}",
        "Summary: Measures how fast PyTorch and Apple MLX train a transformer on this machine",
        "License-Expression: MIT OR Apache-2.0",
        *(f"License-File: {name}" for name in sorted(licenses)),
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in dependencies),
    ]
    for extra, requirements in extras.items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f"Requires-Dist: {requirement}; extra == '{extra}'" for requirement in requirements]
    return "\n".join(lines) + "\n"


def write(folder, version, tag, files, requirements, licenses, compression=zipfile.ZIP_DEFLATED):
    """Writes a wheel into a folder and returns its path.

    `files` has the content and the mode of each file by its name below the package. `requirements` are the last
    arguments of `metadata`. `licenses` has the content of each license by its name.
    """
    info = f"{NAME}-{version}.dist-info"
    entries = {f"{NAME}/{name}": entry for name, entry in files.items()}
    texts = {
        "METADATA": metadata(version, licenses, *requirements),
        # The libraries of torch are in platlib, which some systems keep apart from purelib.
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {NAME} {version}\nRoot-Is-Purelib: false\nTag: {tag}\n",
        "entry_points.txt": f"[console_scripts]\ntransformer-bench = {NAME}:main\n",
    }
    entries.update({f"{info}/{name}": (text.encode(), PLAIN) for name, text in texts.items()})
    entries.update({f"{info}/licenses/{name}": (data, PLAIN) for name, data in licenses.items()})
    entries = dict(sorted(entries.items()))
    record = [f"{name},sha256={digest(data)},{len(data)}\n" for name, (data, _) in entries.items()]
    entries[f"{info}/RECORD"] = ("".join(record) + f"{info}/RECORD,,\n").encode(), PLAIN
    path = folder / f"{NAME}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        # RECORD is the last entry, as the specification recommends.
        for name, (data, mode) in entries.items():
            entry = zipfile.ZipInfo(name, FIRST_DATE)
            # The attributes are those of Unix, also if another system packs the same files.
            entry.create_system, entry.external_attr = 3, mode << 16
            archive.writestr(entry, data, compression, 9)
    return path

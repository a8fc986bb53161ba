"""The license files that a wheel contains: those of the suite, and those of the libraries that it was built with."""
import json
import re
from pathlib import Path

from shared import ROOT, run

LICENSE = re.compile(r"(LICEN[CS]E|COPYING|COPYRIGHT|NOTICE|UNLICENSE)", re.IGNORECASE)


def crates(triple):
    """Returns the locked crates of other projects, as cargo describes them."""
    text = run(["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", triple], cwd=ROOT,
               what="cargo metadata")
    data = json.loads(text[text.index('{"packages"'):text.rindex("}") + 1])
    used = {node["id"] for node in data["resolve"]["nodes"]}
    return [package for package in data["packages"] if package["source"] and package["id"] in used]


def files(folder):
    """Returns the texts of the license files in a folder."""
    paths = [path for path in sorted(folder.iterdir()) if LICENSE.match(path.name) and path.is_file()]
    return [path.read_text(errors="replace").strip() for path in paths]


def notices(triple):
    """Returns the licenses of all crates. Crates with the same text share it."""
    owners, lines = {}, []
    for package in sorted(crates(triple), key=lambda package: (package["name"], package["version"])):
        name, folder = f"{package['name']} {package['version']}", Path(package["manifest_path"]).parent
        lines.append(f"{name}: {package['license'] or package['license_file']}")
        # mlx-c, which the wheel contains too, is a folder of mlx-sys.
        texts = files(folder) + (files(folder / "src" / "mlx-c") if package["name"] == "mlx-sys" else [])
        for text in texts:
            owners.setdefault(text, []).append(name)
    parts = [f"{', '.join(dict.fromkeys(names))}\n\n{text}" for text, names in owners.items()]
    return f"\n\n{'=' * 80}\n".join(["The programs were built with these libraries:\n\n" + "\n".join(lines), *parts]) + "\n"


def contents(triple):
    """Returns the content of each license file of a wheel by its name."""
    own = {path.name: path.read_bytes() for path in ROOT.glob("LICENSE-*")}
    return {**own, "LIBRARIES.txt": notices(triple).encode()}

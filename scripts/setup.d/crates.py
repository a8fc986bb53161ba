"""The crates in Cargo.lock that need a framework."""
import json
from pathlib import Path

from shared import ROOT, SetupError, run


def crate_folders(target):
    """Returns the source folders of the locked torch-sys and mlx-sys."""
    if not (ROOT / "Cargo.lock").exists():
        raise SetupError("Cargo.lock is missing: restore it with 'git checkout Cargo.lock'")
    text = run(
        ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target.triple],
        what="cargo metadata (fetching the crates)",
        cwd=ROOT,
    )
    start = text.index('{"packages"')
    packages = json.loads(text[start:text.rindex("}") + 1])["packages"]
    return {p["name"]: Path(p["manifest_path"]).parent for p in packages if p["name"] in ("torch-sys", "mlx-sys")}

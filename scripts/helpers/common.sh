# What the scripts share. Sourced from the project's root.

# Stops with one line where a tool is missing.
need() {
  command -v "$1" >/dev/null || {
    echo "$(basename "$0"): '$1' is not installed: $2" >&2
    exit 1
  }
}

need_tools() {
  need python3 "install Python 3.9 or newer"
  need cargo "install Rust from https://rustup.rs"
}

# Where cargo builds: the environment and every configuration file have a say.
target_folder() {
  cargo metadata --no-deps --format-version 1 |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
}

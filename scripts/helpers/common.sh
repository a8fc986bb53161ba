# shellcheck shell=bash
# Functions of the shell scripts, which source this file in the project's root.

# Exits with one line if a tool is missing.
need() {
  command -v "$1" >/dev/null || {
    echo "${0##*/}: '$1' is not installed: $2" >&2
    exit 1
  }
}

need_tools() {
  need python3 "install Python 3.9 or newer"
  need cargo "install Rust from https://rustup.rs"
}

# Returns true if the command is newer than its sources, which do not include the frameworks' packages.
is_current() {
  [ -x "$1" ] && [ -z "$(find src build.rs Cargo.toml Cargo.lock \( -path src/torch -o -path src/mlx \) -prune -o \
    -type f ! -name '*.md' -newer "$1" -print | head -n 1)" ]
}

# Prints cargo's target folder, which the environment and configuration files can change.
target_folder() {
  cargo metadata --no-deps --format-version 1 |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
}

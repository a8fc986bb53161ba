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

# Returns true if a program is newer than all sources.
is_current() {
  [ -x "$1" ] && [ -z "$(find src build.rs Cargo.toml Cargo.lock -newer "$1" | head -n 1)" ]
}

# Prints cargo's target folder, which the environment and configuration files can change.
target_folder() {
  cargo metadata --no-deps --format-version 1 |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
}

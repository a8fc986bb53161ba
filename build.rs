//! Says what to do where the frameworks were never set up, before their own build
//! scripts fail at length.

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    if std::env::var_os("LIBTORCH").is_none() {
        println!("cargo::error=the frameworks are not set up: run ./scripts/setup once, then this again");
    }
}

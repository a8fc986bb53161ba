//! Passes set-up's choice of MLX's wheel for macOS to the code.

fn main() {
    const NAME: &str = "TRANSFORMER_BENCH_MLX_WHEEL";
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={NAME}");
    println!("cargo::rustc-env={NAME}={}", std::env::var(NAME).unwrap_or_default());
}

//! Benchmarks of all MLX cases.

mod harness;

fn main() -> std::process::ExitCode {
    harness::main(transformer_bench::suite::Framework::Mlx, transformer_bench_mlx::find)
}

//! Benchmarks of all PyTorch cases.

mod harness;

fn main() -> std::process::ExitCode {
    harness::main(transformer_bench::suite::Framework::Torch, transformer_bench_torch::find)
}

//! Runs the conformance suite on every MLX backend of this machine, one after the
//! other: timings must not share the cores with other tests.

use transformer_bench::parity::conformance;
use transformer_bench::suite::BackendId;

#[test]
fn mlx_conforms() {
    let found = transformer_bench_mlx::find();
    assert!(found.get(BackendId::MlxCpu).is_some(), "mlx-cpu must run everywhere");
    conformance::assert_all(&found);
}

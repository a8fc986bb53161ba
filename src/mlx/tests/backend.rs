//! Runs the conformance suite on every MLX backend of this machine, one after the
//! other: timings must not share the cores with other tests.

use transformer_bench::parity::conformance;
use transformer_bench::parity::operations::operations_are_checked;
use transformer_bench::suite::BackendId;

#[test]
fn mlx_conforms() {
    let found = transformer_bench_mlx::find();
    assert!(found.get(BackendId::MlxCpu).is_some(), "mlx-cpu must run everywhere");
    conformance::assert_all(&found);
}

#[test]
fn every_operation_agrees_with_the_reference() {
    for backend in transformer_bench_mlx::find().available {
        operations_are_checked(backend.as_ref()).unwrap();
    }
}

//! Runs the conformance suite on every PyTorch backend of this machine, one after the
//! other: timings must not share the cores with other tests.

use transformer_bench::parity::conformance;
use transformer_bench::parity::operations::operations_are_checked;
use transformer_bench::suite::BackendId;

#[test]
fn torch_conforms() {
    let found = transformer_bench_torch::find();
    assert!(found.get(BackendId::TorchCpu).is_some(), "torch-cpu must run everywhere");
    conformance::assert_all(&found);
}

#[test]
fn every_operation_agrees_with_the_reference() {
    for backend in transformer_bench_torch::find().available {
        operations_are_checked(backend.as_ref()).unwrap();
    }
}

//! The f64 reference: the same functions as the backends compute, with their gradients, in f64.
//!
//! It is written in matrix products, so that it runs at the sizes that are timed. It also computes as a precision
//! does and rounds every result. The error of that run is the basis of the tolerance of a backend.
//!
//! | file | content |
//! | --- | --- |
//! | `batch.rs` | the results of a case, from those of its samples |
//! | `network.rs`, `loss.rs` | the layers and the loss of one sample |
//! | `operation.rs` | a single operation of a step |
//! | `autograd.rs` | operations on matrices and their gradients |
//! | `attention.rs`, `activation.rs` | larger operations of the graph, and functions of single numbers |
//! | `adamw.rs`, `muon.rs` | the optimizers |
//! | `matmul.rs` | matrices and their products |
//! | `rounding.rs` | number formats of the precisions |
//! | `test_data.rs` | cases and dropout masks for the tests |
//!
//! Two tests check the gradients. `gradient_tests.rs` compares them with central differences, and
//! `src/torch/tests/reference.rs` compares all results with PyTorch's in f64.

mod activation;
mod adamw;
mod attention;
mod autograd;
mod batch;
#[cfg(test)]
mod gradient_tests;
mod loss;
mod matmul;
pub mod muon;
mod network;
mod operation;
mod rounding;
pub mod test_data;

pub use adamw::adamw;
pub use batch::{LOSS_TERMS, NamedValues, compute};
pub use matmul::{Matrix, Real};
pub use network::{DropoutMasks, Site};
pub use operation::operation;
pub use rounding::{Accumulation, Format, Rounding};

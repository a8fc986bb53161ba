//! The cases of the suite. README.md describes their ids, the sets and the files.

mod adapter_cost;
mod case;
pub mod cost;
pub mod custom_model;
mod dimensions;
pub mod operations;
#[cfg(test)]
mod operations_tests;
mod shape;
mod table;

pub use crate::model::Block;
pub use case::{Case, parse_filter};
pub use custom_model::CustomModel;
pub use dimensions::{BackendId, Device, Framework, Method, Optimizer, Precision, Set, Variant, Workload};
pub use shape::{MAX_BATCH, Shape};
pub use table::{HEADLINE_BATCH, HEADLINE_SHAPE, cases, cases_for};

//! What can be measured.
//!
//! | file | what |
//! | --- | --- |
//! | `axes.rs` | workloads, frameworks, backends, number formats, recipes |
//! | `shape.rs` | the sizes that a case runs at |
//! | `case.rs` | a case and its id |
//! | `table.rs` | the table of cases |
//! | `given.rs` | the user's own model in the place of the suite's |
//! | `cost.rs` | FLOPs, bytes and memory of a case |

mod case;
pub mod cost;
pub mod custom_model;
mod dimensions;
mod shape;
mod table;

pub use case::{Case, parse_filter};
pub use custom_model::CustomModel;
pub use dimensions::{BackendId, Device, Framework, Method, Precision, Set, Variant, Workload};
pub use shape::{Block, Shape};
pub use table::{HEADLINE_BATCH, HEADLINE_SHAPE, cases, cases_for};

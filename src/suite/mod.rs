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

mod axes;
mod case;
pub mod cost;
pub mod given;
mod shape;
mod table;

pub use axes::{BackendId, Compute, Device, Framework, Precision, Recipe, Set, Workload};
pub use case::{Case, pattern};
pub use given::Given;
pub use shape::{Block, Shape};
pub use table::{HEADLINE_BATCH, HEADLINE_SHAPE, cases, cases_of};

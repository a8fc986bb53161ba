//! Comparisons of two sides, base and head. A side is a set of executables; nothing here depends on a framework.
//! `README.md` in this folder describes the method.
//!
//! | file | content |
//! | --- | --- |
//! | `decision.rs` | the decision rule: from rounds to a verdict, without a clock |
//! | `rounds.rs` | interleaved rounds of base and head |
//! | `cores.rs` | pinning to cores |
//! | `worker.rs` | a side, and the client of its worker processes |
//! | `revisions.rs` | what a user may compare |
//! | `builds.rs` | builds of the sides |
//! | `releases.rs` | releases of the frameworks, and the crates that fit |
//! | `release_builds.rs` | builds with a release |
//! | `bisection.rs` | the search for the first slower side |
//! | `fit.rs` | the search for the largest step that fits into memory |
//! | `baseline_level.rs` | comparisons with a saved baseline |
//! | `explain.rs` | the operations of a training step on two backends |
//! | `first_step.rs` | times until the first step, with empty and filled caches |
//! | `python_side.rs` | a side whose steps are written in Python |
//! | `pair.rs` | two processes whose samples alternate |
//! | `signals.rs` | interrupts |

pub mod baseline_level;
pub mod bisection;
pub mod builds;
pub mod cores;
pub mod decision;
pub mod explain;
pub mod first_step;
pub mod fit;
pub mod pair;
mod python_side;
mod release_builds;
pub mod releases;
pub mod revisions;
pub mod rounds;
pub mod signals;
pub mod worker;

//! Measures how fast PyTorch and MLX train the same transformer.
//!
//! Data flows one way, and imports point the same way:
//!
//! ```text
//! model ─► suite ─► fixture ─► backend loads and steps ─► harness times ─► results ─► report
//!             │        │        (src/torch, src/mlx)       (benches)         │
//!             │        └─► reference ─► parity: checks each case first       ├─► baseline
//!             └─► cost                                                       └─► compare, profile
//! ```
//!
//! | module | content |
//! | --- | --- |
//! | [`model`] | a model as plain data: built-in models, files, parameters |
//! | [`suite`] | the cases: workloads, precisions, variants, shapes, ids, sets, FLOPs |
//! | [`fixture`] | seeded inputs, targets and parameters of a case |
//! | [`mod@reference`] | the same functions in f64 |
//! | [`backend`], [`rendezvous`] | the traits that a framework implements, and how launched ranks find each other |
//! | [`parity`] | checks against the reference, fault injection, conformance tests |
//! | [`results`] | the record of a run, the machine, baselines |
//! | [`compare`] | interleaved comparisons of revisions and their decision rule, operations, first steps |
//! | [`profile`] | flamegraphs of CPU stacks and GPU kernels |
//! | [`energy`] | counters of energy |
//! | [`report`] | tables, pictures and text from results |
//! | [`installation`] | the layout of an installed wheel, and the commands that messages name |
//! | [`text`] | cleaning of text that is read, and escaping for each target |
//! | [`files`], [`process`], [`memory`], [`interference`], [`statistics`] | tools for all modules |
//!
//! Nothing here imports Criterion or a framework, or reads arguments. Each framework is a package of its own, and each
//! bench target links one of them, so a process never has both.
//!
//! `src/GLOSSARY.md` defines the terms.

pub mod backend;
pub mod compare;
pub mod energy;
pub mod files;
pub mod fixture;
pub mod installation;
pub mod interference;
pub mod memory;
pub mod model;
pub mod parity;
pub mod process;
pub mod profile;
#[cfg(test)]
mod reader_tests;
pub mod reference;
pub mod rendezvous;
pub mod report;
pub mod results;
pub mod statistics;
pub mod suite;
pub mod text;

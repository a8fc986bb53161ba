//! Measured training speed of PyTorch and MLX on the same transformer.
//!
//! Data flows one way:
//!
//! ```text
//! model ──► suite (case, cost) ──► fixture ──► backend prepares ──► harness times ──► results ──► report
//!   │                                           (src/torch,          (benches/)        │  │
//!   └─► oracle ──► parity: every backend         src/mlx)              │               │  └─► baseline
//!                  against it                                          │               │
//!                                                                      ├─► compare: base and head
//!                                                                      └─► profile ──► flamegraph
//! ```
//!
//! Nothing in this library imports Criterion or a framework, reads arguments or prints. Each
//! framework is a package of its own, and each bench target links one of them: a process
//! never holds both.
//!
//! Words, as used throughout:
//!
//! - *framework*: PyTorch or MLX; *backend*: a framework on a device
//! - *workload*: what one iteration does; *model*: sizes and choices; *shape*: a model with
//!   its batch, or a block's own sizes
//! - *precision*: number formats; *recipe*: how the step is written, eager or optimised
//! - *case*: workload × backend × precision × shape, and its id
//! - *fixture*: the seeded inputs and parameters of a case, the same for every backend
//! - *rank*: one of several processes, a device each, that share a case
//! - *oracle*: the same mathematics in f64; *parity*: the proof that a backend computes it
//! - *baseline*: a run with its samples and machine, kept
//! - *base*, *head*: the two sides of a comparison; *round*: a fresh process of each

pub mod backend;
pub mod compare;
pub mod interference;
pub mod memory;
pub mod model;
pub mod parity;
pub mod profile;
pub mod report;
pub mod results;
pub mod statistics;
pub mod suite;

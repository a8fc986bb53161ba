//! Measured training speed of PyTorch and MLX on the same transformer.
//!
//! Data flows one way:
//!
//! ```text
//! case ──► cost, fixture ──► backend prepares ──► harness times ──► results ──► report
//!  │                          (src/torch,          (benches/)         │        (src/report)
//!  └─► parity: every backend   src/mlx)               │               └─► baseline
//!      against the reference                          ├─► interleave ──► compare
//!                                                     └─► profile, gpu ──► flamegraph
//! ```
//!
//! Nothing in this library imports Criterion or a framework. Each framework is a package
//! of its own, and each bench target links one of them: a process never holds both.
//!
//! Words, as used throughout:
//!
//! - *framework*: PyTorch or MLX; *backend*: a framework on a device
//! - *workload*: what one iteration does; *shape*: the sizes it runs at
//! - *precision*: number formats, and the plain or the `-opt` recipe
//! - *case*: workload × backend × precision × shape
//! - *fixture*: the seeded inputs and parameters of a case, the same for every backend
//! - *baseline*: a run with its samples and machine, kept; *side*: one half of a comparison
//! - *parity*: the proof that a backend computes what the f64 reference does

pub mod backend;
pub mod compare;
pub mod memory;
pub mod model;
pub mod parity;
pub mod profile;
pub mod report;
pub mod results;
pub mod statistics;
pub mod suite;

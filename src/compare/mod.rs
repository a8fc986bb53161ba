//! Is one side slower than the other? Base and head are executables, cases are ids: nothing here
//! knows a framework. `README.md` beside this file is the method.
//!
//! | file | what |
//! | --- | --- |
//! | `rule.rs` | rounds in, verdict out: without a clock |
//! | `rounds.rs` | interleaves base and head, round by round |
//! | `cores.rs` | the cores that they are pinned to |
//! | `worker.rs` | a side, and the protocol with its processes |
//! | `sides.rs` | what a user may compare, and how it comes to have executables |
//! | `past.rs` | a baseline's part |
//! | `stop.rs` | Ctrl-C |

pub mod baseline_level;
pub mod cores;
pub mod decision;
pub mod revisions;
pub mod rounds;
pub mod signals;
pub mod worker;

//! The interface through which the measuring process controls the ranks of a case.

use std::time::Duration;

use anyhow::Result;
use transformer_bench::backend::COLLECTIVE_TIMEOUT;

/// Expected time to load one rank of a case. MLX may build kernels for minutes.
pub const LOAD_TIME: Duration = Duration::from_secs(90);

/// Sends every request to all ranks.
pub trait Controller {
    /// Returns the answer of rank 0 after all ranks have answered. `expected` is the time that the work should take.
    ///
    /// # Errors
    /// Returns an error that names the rank if one fails, ends or does not answer. All ranks are stopped then.
    fn ask(&mut self, request: &str, expected: Duration) -> Result<String>;
}

/// Returns the time limit of work that should take `expected`. It exceeds the timeout of the communication backend,
/// whose error says more.
pub fn request_timeout(expected: Duration) -> Duration {
    3 * expected + COLLECTIVE_TIMEOUT + Duration::from_secs(5)
}

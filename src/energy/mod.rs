//! Counters of energy, and what they count.
//!
//! | file | counter | counts |
//! | --- | --- | --- |
//! | `nvml.rs` | NVIDIA's management library | the board of a GPU |
//! | `rapl.rs` | Linux's power capping framework | all packages of the CPU |
//! | `io_report.rs` | macOS's reports of the power manager | the CPU or the GPU in the package |

#[cfg(any(target_os = "macos", test))]
mod io_report;
mod nvml;
mod rapl;

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::suite::Device;

/// The hardware whose energy a counter counts. Energies of different hardware are never compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// The whole board of a GPU, with its memory and voltage regulators.
    Board,
    /// The CPU packages, without memory modules.
    Package,
    /// The cores of the CPU or of the GPU in a package.
    Cores,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Board => "board",
            Self::Package => "CPU packages",
            Self::Cores => "cores in the package",
        })
    }
}

/// A counter of energy.
pub struct Counter {
    pub scope: Scope,
    /// The largest power in watts that the hardware allows, if it reports one.
    pub limit_watts: Option<f64>,
    read: Box<dyn FnMut() -> Result<f64>>,
}

/// Share by which a mean power may exceed the limit: the counter of a GPU is updated every 20 to 100 ms, which is 2 % of
/// five seconds.
const LIMIT_MARGIN: f64 = 0.02;

impl Counter {
    /// Finds the counter of a device.
    ///
    /// # Errors
    /// Returns the reason if there is none, or if this user may not read it.
    pub fn open(device: Device) -> Result<Self> {
        match device {
            Device::NvidiaGpu => nvml::open(),
            Device::Cpu | Device::AppleGpu if cfg!(target_os = "macos") => open_io_report(device),
            Device::Cpu => rapl::open(std::path::Path::new("/sys/class/powercap")),
            Device::AppleGpu => bail!("this system has no GPU of Apple"),
        }
    }

    /// Returns the energy in joules since some moment in the past.
    ///
    /// # Errors
    /// Returns an error if the counter cannot be read.
    pub fn joules(&mut self) -> Result<f64> {
        (self.read)().context("the energy counter could not be read")
    }

    /// Checks that a mean power is possible.
    ///
    /// # Errors
    /// Returns an error if it is not positive or exceeds the limit of the hardware.
    pub fn check(&self, watts: f64) -> Result<()> {
        ensure!(watts.is_finite() && watts > 0.0, "the energy counter did not advance: {watts} W");
        if let Some(limit) = self.limit_watts {
            ensure!(
                watts <= (1.0 + LIMIT_MARGIN) * limit,
                "{watts:.0} W exceed the limit of {limit:.0} W of the {}: the counter is wrong",
                self.scope
            );
        }
        Ok(())
    }
}

#[cfg(target_os = "macos")]
fn open_io_report(device: Device) -> Result<Counter> {
    io_report::open(device)
}

#[cfg(not(target_os = "macos"))]
fn open_io_report(_: Device) -> Result<Counter> {
    bail!("only macOS has IOReport")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_above_the_limit_is_an_error() {
        let counter = Counter { scope: Scope::Board, limit_watts: Some(700.0), read: Box::new(|| Ok(0.0)) };
        counter.check(713.0).unwrap();
        assert!(counter.check(715.0).unwrap_err().to_string().contains("limit of 700 W of the board"));
        assert!(counter.check(0.0).is_err() && counter.check(f64::NAN).is_err());
        let unlimited = Counter { limit_watts: None, ..counter };
        unlimited.check(1e4).unwrap();
    }
}

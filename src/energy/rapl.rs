//! The energy counters of CPU packages, from Linux's power capping framework (Documentation/power/powercap).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::{Counter, Scope};

/// A package's counter, which starts again at 0 above `range`.
struct Package {
    folder: PathBuf,
    range: u64,
    last: u64,
    /// Microjoules since the counter was opened.
    total: u64,
}

fn read_number(path: &Path) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.trim().parse().with_context(|| format!("{} is not a number", path.display()))
}

impl Package {
    fn open(folder: PathBuf) -> Result<Self> {
        let last = read_number(&folder.join("energy_uj"))?;
        let range = read_number(&folder.join("max_energy_range_uj"))?;
        Ok(Self { folder, range, last, total: 0 })
    }

    /// Returns the microjoules since the counter was opened. It must be read more often than the counter overflows, which
    /// takes a minute at full power.
    fn microjoules(&mut self) -> Result<u64> {
        let now = read_number(&self.folder.join("energy_uj"))?;
        self.total += if now >= self.last { now - self.last } else { self.range - self.last + now };
        self.last = now;
        Ok(self.total)
    }

    /// Returns the largest power limit in watts, if the package has one.
    fn limit(&self) -> Option<f64> {
        let limits = (0..3)
            .filter_map(|i| read_number(&self.folder.join(format!("constraint_{i}_power_limit_uw"))).ok());
        limits.max().filter(|limit| *limit > 0).map(|limit| limit as f64 * 1e-6)
    }
}

/// Opens the counters of all CPU packages.
///
/// # Errors
/// Returns the reason if there are none, or if this user may not read them.
pub fn open(root: &Path) -> Result<Counter> {
    let entries = fs::read_dir(root).with_context(|| format!("this system has no {}", root.display()))?;
    let is_package = |folder: &PathBuf| {
        fs::read_to_string(folder.join("name")).is_ok_and(|name| name.trim().starts_with("package"))
    };
    let folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_package).collect();
    if folders.is_empty() {
        bail!("{} has no CPU package: a virtual machine seldom has one", root.display());
    }
    let packages: Result<Vec<Package>> = folders.into_iter().map(Package::open).collect();
    let mut packages = packages.context("since Linux 5.10, only root may read the counters of a CPU")?;
    let limits: Option<Vec<f64>> = packages.iter().map(Package::limit).collect();
    ensure!(!packages.is_empty(), "no package");
    let read = move || -> Result<f64> {
        let all: Result<Vec<u64>> = packages.iter_mut().map(Package::microjoules).collect();
        Ok(all?.iter().sum::<u64>() as f64 * 1e-6)
    };
    Ok(Counter {
        scope: Scope::Package,
        limit_watts: limits.map(|all| all.iter().sum()),
        read: Box::new(read),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::scratch;

    #[test]
    fn packages_are_added_and_overflows_are_counted() {
        let root = scratch("rapl");
        let write = |package: usize, file: &str, text: &str| {
            let folder = root.join(format!("intel-rapl:{package}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(file), text).unwrap();
        };
        assert!(open(&root).is_err());
        for package in 0..2 {
            write(package, "name", &format!("package-{package}\n"));
            write(package, "energy_uj", "9000000\n");
            write(package, "max_energy_range_uj", "10000000\n");
            write(package, "constraint_0_power_limit_uw", "65000000\n");
            write(package, "constraint_1_power_limit_uw", "90000000\n");
        }
        // A part of a package is not added again.
        write(2, "name", "core");
        let mut counter = open(&root).unwrap();
        assert_eq!((counter.scope, counter.limit_watts), (Scope::Package, Some(180.0)));
        assert_eq!(counter.joules().unwrap(), 0.0);
        write(0, "energy_uj", "9500000");
        write(1, "energy_uj", "1000000");
        assert_eq!(counter.joules().unwrap(), 0.5 + 2.0);
        fs::remove_file(root.join("intel-rapl:0/energy_uj")).unwrap();
        assert!(counter.joules().is_err());
        assert!(format!("{:#}", open(&root).err().unwrap()).contains("only root"));
        fs::remove_dir_all(root).unwrap();
    }
}

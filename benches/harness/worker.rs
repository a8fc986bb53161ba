//! `--worker ID`: steps of one case on request, so that another program can interleave
//! them with its own. Reads a number of steps a line, answers with nanoseconds.

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use transformer_bench::backend::Found;
use transformer_bench::case::Case;
use transformer_bench::fixture::Fixture;

use super::timing;

/// The case that `--worker` names, if it is there.
pub fn requested(mut arguments: impl Iterator<Item = String>) -> Option<String> {
    arguments.find(|a| a == "--worker").and_then(|_| arguments.next())
}

pub fn serve(found: &Found, id: &str) -> Result<()> {
    let case: Case = id.parse().map_err(anyhow::Error::msg)?;
    let Some(backend) = found.backend(case.backend) else {
        let reason = found.absent.iter().find(|a| a.id == case.backend).map(|a| a.reason.as_str());
        bail!("{}: {}", case.backend, reason.unwrap_or("not a backend of this executable"));
    };
    if let Err(reason) = backend.supports(&case) {
        bail!("{case}: {reason}");
    }
    let mut prepared = backend.prepare(&Fixture::new(case))?;
    prepared.step()?;
    let mut output = std::io::stdout().lock();
    writeln!(output, "ready")?;
    output.flush()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let steps = line.trim().parse().with_context(|| format!("'{line}' is no number of steps"))?;
        writeln!(output, "{}", timing::time(prepared.as_mut(), steps)?.as_nanos())?;
        output.flush()?;
    }
    Ok(())
}

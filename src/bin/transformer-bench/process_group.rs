//! A process group that ends with this process.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use transformer_bench::compare::signals::check_interrupted;

/// A group for child processes. It receives SIGTERM when it is dropped, and when this process ends for any reason.
pub struct ProcessGroup {
    /// A shell that terminates its own group once its input ends. The input ends with this process.
    leader: Child,
}

impl ProcessGroup {
    /// Starts an empty group.
    ///
    /// # Errors
    /// Returns an error if no shell can be started.
    pub fn start() -> Result<Self> {
        let leader = Command::new("sh")
            .args(["-c", "read -r _; kill -TERM 0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("sh did not start")?;
        Ok(Self { leader })
    }

    /// Starts a command in the group.
    ///
    /// # Errors
    /// Returns an error if the command does not start.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let name = command.get_program().to_string_lossy().into_owned();
        let group = i32::try_from(self.leader.id())?;
        let child = command.stdin(Stdio::null()).process_group(group).spawn();
        child.with_context(|| format!("{name} did not start"))
    }

    /// Runs a command in the group and waits for its end.
    ///
    /// # Errors
    /// Returns an error if the command does not start or the user interrupts.
    pub fn run(&self, command: &mut Command) -> Result<ExitStatus> {
        let mut child = self.spawn(command)?;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            check_interrupted()?;
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        drop(self.leader.stdin.take());
        let _ = self.leader.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn children_end_with_their_group() {
        let group = ProcessGroup::start().unwrap();
        assert!(group.run(&mut Command::new("true")).unwrap().success());
        let mut child = group.spawn(Command::new("sleep").arg("1000")).unwrap();
        drop(group);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    }
}

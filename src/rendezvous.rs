//! The variables with which launched ranks find each other, checked before a framework waits for the others.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::files;
use crate::suite::Framework;
use crate::text::variable;

/// Time between attempts to connect.
const RETRY: Duration = Duration::from_millis(100);

/// Variable with the file that connects PyTorch's ranks of one machine, instead of `MASTER_ADDR` and `MASTER_PORT`.
pub const FILE_VARIABLE: &str = "TRANSFORMER_BENCH_RENDEZVOUS_FILE";

/// Returns the number of ranks in a hosts file of MLX: a list with the addresses of each rank.
///
/// # Errors
/// Returns an error with an example if the file cannot be read or has another form.
pub fn count_hosts(path: &Path) -> Result<usize> {
    let hosts: Option<Vec<Vec<String>>> = serde_json::from_str(&files::read_text(path)?).ok();
    let has_port = |address: &String| {
        address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    let hosts = hosts.filter(|hosts| hosts.iter().all(|host| !host.is_empty() && host.iter().all(has_port)));
    let example = r#"[["127.0.0.1:5000"], ["127.0.0.1:5001"]]"#;
    Ok(hosts.with_context(|| format!("{} is not a list of hosts such as {example}", path.display()))?.len())
}

/// Checks the variables with which a launched rank connects to the others.
///
/// # Errors
/// Returns an error that names the missing or wrong variable and the launcher that sets it.
pub fn check_environment(framework: Framework) -> Result<()> {
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    match framework {
        Framework::Torch if is_set(FILE_VARIABLE) => Ok(()),
        Framework::Torch => master().map(drop),
        Framework::Mlx => {
            let variables = ["MLX_HOSTFILE", "NCCL_HOST_IP", "MLX_IBV_DEVICES"];
            let known = variables.into_iter().any(is_set);
            ensure!(known, "{} are not set: start the ranks with mlx.launch", variables.join(", "));
            Ok(())
        }
    }
}

/// Returns the address and port of PyTorch's first rank.
///
/// # Errors
/// Returns an error if `MASTER_ADDR` or `MASTER_PORT` is missing or invalid.
pub fn master() -> Result<(String, u16)> {
    let required = |name: &str| -> Result<String> {
        variable(name)?.with_context(|| format!("{name} is not set: start the ranks with torchrun"))
    };
    let (host, port) = (required("MASTER_ADDR")?, required("MASTER_PORT")?);
    match port.parse() {
        Ok(number) if number > 0 => Ok((host, number)),
        _ => bail!("MASTER_PORT={port}: use a port from 1 to 65535"),
    }
}

/// Waits until PyTorch's first rank accepts connections. libtorch waits up to three times its time limit.
///
/// # Errors
/// Returns an error after `limit`.
pub fn wait_for_master(host: &str, port: u16, limit: Duration) -> Result<()> {
    let start = Instant::now();
    let connect = || -> std::io::Result<()> {
        let address = (host, port).to_socket_addrs()?.next();
        let address = address.ok_or(std::io::ErrorKind::NotFound)?;
        TcpStream::connect_timeout(&address, limit.saturating_sub(start.elapsed()).max(RETRY)).map(drop)
    };
    while let Err(error) = connect() {
        let seconds = limit.as_secs();
        ensure!(
            start.elapsed() < limit,
            "rank 0 did not answer at {host}:{port} within {seconds} s: {error}"
        );
        std::thread::sleep(RETRY);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::tests::scratch;

    #[test]
    fn a_first_rank_that_does_not_listen_is_an_error_in_time() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        wait_for_master("127.0.0.1", port, Duration::from_secs(5)).unwrap();
        drop(listener);
        let start = Instant::now();
        let error = wait_for_master("127.0.0.1", port, Duration::from_millis(300)).unwrap_err().to_string();
        assert!(error.contains("did not answer") && start.elapsed() < Duration::from_secs(3), "{error}");
    }

    #[test]
    fn a_hosts_file_lists_addresses_with_ports() {
        let folder = scratch("hosts");
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("hosts.json");
        let count = |text: &str| {
            std::fs::write(&path, text).unwrap();
            count_hosts(&path)
        };
        assert_eq!(count(r#"[["10.0.0.1:1", "10.0.0.2:1"], ["host:65535"]]"#).unwrap(), 2);
        for text in ["[1,2]", r#"["a:1"]"#, r#"[["a"]]"#, r#"[["a:99999"]]"#, "[[]]", "{", r#"[[":1"]]"#] {
            let error = count(text).unwrap_err().to_string();
            assert!(
                error.contains("not a list of hosts") && error.contains("127.0.0.1:5000"),
                "{text}: {error}"
            );
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}

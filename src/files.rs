//! Files that several processes share: guarded reads, atomic writes, locks, scratch folders and checksums.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::installation;

/// A folder or file that is removed on drop.
#[derive(Debug)]
pub struct Scratch(pub PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0).or_else(|_| fs::remove_file(&self.0));
    }
}

/// FNV-1a, 64 bits, <https://www.rfc-editor.org/rfc/rfc9923>.
pub fn checksum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Largest file in bytes that [`read_text`] reads: over 60 times the largest baseline of this project. Parsed JSON takes
/// up to 16 times as much memory.
const MAX_TEXT: u64 = 16 << 20;

/// Reads a text file. A pipe or device could block or never end, and a huge file would fill the memory.
///
/// # Errors
/// Returns an error that begins with the path if the file cannot be read, is not a regular file, is larger than 16 MiB,
/// or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let place = path.display();
    let unreadable = || format!("{place} could not be read");
    let found = fs::metadata(path).with_context(unreadable)?;
    ensure!(!found.is_dir(), "{place} could not be read: it is a folder");
    ensure!(found.is_file(), "{place} could not be read: it is not a regular file");
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_TEXT + 1).read_to_end(&mut bytes))
        .with_context(unreadable)?;
    ensure!(bytes.len() as u64 <= MAX_TEXT, "{place} could not be read: it has over {} MiB", MAX_TEXT >> 20);
    String::from_utf8(bytes).ok().with_context(|| format!("{place} could not be read: it is not UTF-8"))
}

/// Returns a checksum of the running program.
///
/// # Errors
/// Returns an error if its file cannot be read.
pub fn executable_checksum() -> Result<String> {
    let exe = std::env::current_exe()?;
    let bytes = fs::read(&exe).with_context(|| format!("{} could not be read", exe.display()))?;
    Ok(format!("{:016x}", checksum(&bytes)))
}

/// Writes a file atomically, through a temporary file and a rename.
///
/// # Errors
/// Returns an error if the file cannot be written. An older file is then unchanged.
pub fn write_atomic(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().context("a file has a folder")?;
    let partial = path.with_extension("partial");
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut file = fs::File::create(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&partial);
        anyhow::anyhow!("{} could not be written: {error}; an older file there is unchanged", path.display())
    })
}

/// Takes an exclusive lock for reading, changing and writing `path`. Dropping the result releases it.
///
/// # Errors
/// Returns an error if the lock file cannot be created.
pub fn lock_file(path: &Path) -> Result<fs::File> {
    lock_with(path, fs::File::lock)
}

/// Takes a lock for reading `path`, which others may hold too. It waits while [`lock_file`] holds the lock.
///
/// # Errors
/// Returns an error if the lock file cannot be created.
pub fn lock_file_shared(path: &Path) -> Result<fs::File> {
    lock_with(path, fs::File::lock_shared)
}

fn lock_with(path: &Path, lock_as: impl Fn(&fs::File) -> std::io::Result<()>) -> Result<fs::File> {
    let lock = path.with_extension("lock");
    let take = || -> std::io::Result<fs::File> {
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        let file = fs::File::create(&lock)?;
        lock_as(&file)?;
        Ok(file)
    };
    take().with_context(|| format!("{} could not be locked", lock.display()))
}

/// Returns the cache folder that all clones and installations share. On a Mac, set-up uses `~/.cache` too, and an
/// installation the platform's folder.
///
/// # Errors
/// Returns an error if the user has no home folder.
pub fn cache_folder() -> Result<PathBuf> {
    let home = std::env::home_dir().context("neither XDG_CACHE_HOME nor HOME is set")?;
    let mac = cfg!(target_os = "macos") && installation::find().is_some();
    let platform = if mac { "Library/Caches" } else { ".cache" };
    Ok(installation::user_folder(std::env::var_os("XDG_CACHE_HOME"), &home, platform))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a path private to this process that does not exist yet.
    pub fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("transformer-bench-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        folder
    }

    #[test]
    fn only_regular_files_of_moderate_size_are_read() {
        let folder = scratch("read");
        fs::create_dir_all(&folder).unwrap();
        let pipe = folder.join("pipe");
        let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let huge = folder.join("huge");
        fs::File::create(&huge).unwrap().set_len(1 << 30).unwrap();
        let binary = folder.join("binary");
        fs::write(&binary, [0xff]).unwrap();
        for (path, word) in [
            (pipe.as_path(), "not a regular file"),
            (Path::new("/dev/zero"), "not a regular file"),
            (&folder, "a folder"),
            (&huge, "over 16 MiB"),
            (&binary, "not UTF-8"),
            (&folder.join("none"), "No such file"),
        ] {
            let error = format!("{:#}", read_text(path).unwrap_err());
            assert!(error.starts_with(path.to_str().unwrap()) && error.contains(word), "{error}");
        }
        fs::write(&binary, "µ").unwrap();
        assert_eq!(read_text(&binary).unwrap(), "µ");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = scratch("write");
        let path = folder.join("a.json");
        write_atomic(&path, "old").unwrap();
        fs::create_dir(path.with_extension("partial")).unwrap();
        assert!(write_atomic(&path, "new").unwrap_err().to_string().contains("unchanged"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        fs::remove_dir_all(folder).unwrap();
    }
}

//! From an address in this process to the names of the functions there.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol};
use transformer_bench::profile::{readable, unresolved};

/// What lies in no library: kernels that were written at run time.
const GENERATED: &str = "generated code";

/// Makes oneDNN list the kernels that it generates. Before the framework's first step.
pub fn ask_for_generated() {
    // Bit 2 of `enum dnnl_jit_profile`, oneDNN's developer guide, "Profiling": perf's map.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("ONEDNN_JIT_PROFILE", "2") };
}

fn map_of_generated() -> PathBuf {
    PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()))
}

/// Removes what [`ask_for_generated`] asked for. At the process's end: the list grows as
/// kernels are generated.
pub fn drop_generated() {
    let _ = std::fs::remove_file(map_of_generated());
}

/// Names by the addresses where they begin, with their sizes.
#[derive(Debug, Default, PartialEq)]
pub struct Ranges(BTreeMap<usize, (usize, String)>);

impl Ranges {
    pub fn at(&self, address: usize) -> Option<&str> {
        let (start, (size, name)) = self.0.range(..=address).next_back()?;
        (address - start < *size).then_some(name)
    }

    /// perf's map of generated code: a line each of start and size in hexadecimal, and name.
    pub fn of_perf_map(text: &str) -> Self {
        let hex = |text: &str| usize::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let line = |line: &str| {
            let mut parts = line.splitn(3, ' ');
            Some((hex(parts.next()?)?, (hex(parts.next()?)?, parts.next()?.trim().to_owned())))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Functions that a library lists, also in `.gnu_debugdata`, which distributions leave in
    /// place of a full table: an ELF file under xz. Addresses count from the first segment.
    fn of_library(path: &Path) -> Option<Self> {
        let whole = std::fs::read(path).ok()?;
        let library = object::File::parse(&*whole).ok()?;
        let first = library.segments().map(|s| s.address()).min()?;
        // Mach-O's symbols have no sizes: each ends where the next begins.
        let sized = library.format() != object::BinaryFormat::MachO;
        let range = |s: object::Symbol| {
            let name = s.name().ok().filter(|_| s.is_definition() && (!sized || s.size() > 0))?.to_owned();
            Some((s.address().checked_sub(first)? as usize, (s.size() as usize, name)))
        };
        let mut found: BTreeMap<_, _> =
            library.symbols().chain(library.dynamic_symbols()).filter_map(range).collect();
        if !sized {
            let starts: Vec<usize> = found.keys().copied().skip(1).chain([usize::MAX]).collect();
            for ((start, (size, _)), next) in found.iter_mut().zip(starts) {
                *size = next - start;
            }
        }
        if let Some(packed) = library.section_by_name(".gnu_debugdata").and_then(|s| s.data().ok()) {
            let mut inner = Vec::new();
            lzma_rust2::XzReader::new(packed, false).read_to_end(&mut inner).ok()?;
            found.extend(object::File::parse(&*inner).ok()?.symbols().filter_map(range));
        }
        Some(Self(found))
    }
}

/// Looks names up, and remembers them.
pub struct Symbols {
    known: HashMap<usize, Vec<String>>,
    generated: Ranges,
    libraries: HashMap<PathBuf, Ranges>,
}

impl Symbols {
    /// With what [`ask_for_generated`] asked for.
    pub fn read() -> Self {
        let text = std::fs::read_to_string(map_of_generated()).unwrap_or_default();
        Self { known: HashMap::new(), generated: Ranges::of_perf_map(&text), libraries: HashMap::new() }
    }

    /// The functions at an address, the outermost of inlined ones first; its library in
    /// brackets where none has a name.
    pub fn at(&mut self, address: usize) -> &[String] {
        if !self.known.contains_key(&address) {
            let names = self.look_up(address);
            self.known.insert(address, names);
        }
        &self.known[&address]
    }

    fn look_up(&mut self, address: usize) -> Vec<String> {
        let mut names = Vec::new();
        // It takes what it is given for the place behind a call, and looks one byte before.
        backtrace::resolve((address + 1) as *mut libc::c_void, |found| {
            if let Some(name) = found.name() {
                names.push(readable(&String::from_utf8_lossy(name.as_bytes())));
            }
        });
        if !names.is_empty() {
            names.reverse();
            return names;
        }
        // Libraries that were loaded since the first look are not known there: MLX compiles
        // and loads kernels as it goes. Nor are those that macOS keeps in no file.
        let Some((path, base, name)) = library_of(address) else {
            let name = self.generated.at(address);
            return vec![name.map_or_else(|| unresolved(GENERATED), str::to_owned)];
        };
        let listed = self
            .libraries
            .entry(path.clone())
            .or_insert_with(|| Ranges::of_library(&path).unwrap_or_default());
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = listed.at(address - base).map(str::to_owned).or(name);
        vec![name.map_or_else(|| unresolved(&file), |name| readable(&name))]
    }
}

/// Whether a frame is code that was generated and that nobody named.
pub fn is_generated(frame: &str) -> bool {
    frame == unresolved(GENERATED)
}

/// The library at an address, where it was loaded, and on macOS the symbol before the
/// address; elsewhere only an exported one would be told, however far away.
fn library_of(address: usize) -> Option<(PathBuf, usize, Option<String>)> {
    // SAFETY: dladdr fills plain data, and reads nothing behind the address.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(address as *const libc::c_void, &raw mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        let text = |text| std::ffi::CStr::from_ptr(text).to_string_lossy().into_owned();
        let name = cfg!(target_os = "macos") && !info.dli_sname.is_null();
        Some((
            PathBuf::from(text(info.dli_fname)),
            info.dli_fbase as usize,
            name.then(|| text(info.dli_sname)),
        ))
    }
}

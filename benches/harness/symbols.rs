//! Resolves addresses in this process to the names of functions.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol};
use transformer_bench::profile::{readable_name, unresolved_frame};

/// Code outside of all libraries, such as kernels that were generated at run time.
const JIT_CODE: &str = "generated code";

/// Makes oneDNN write a map of the kernels that it generates. Must run before the framework's first step.
pub fn enable_jit_map() {
    // Bit 2 of `enum dnnl_jit_profile` is perf's map: oneDNN's developer guide, "Profiling".
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("ONEDNN_JIT_PROFILE", "2") };
}

fn jit_map_path() -> PathBuf {
    PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()))
}

/// Removes the map of [`enable_jit_map`] at the end of the process.
pub fn remove_jit_map() {
    let _ = std::fs::remove_file(jit_map_path());
}

/// Sizes and names of functions, by their start address.
#[derive(Debug, Default, PartialEq)]
pub struct Ranges(BTreeMap<usize, (usize, String)>);

impl Ranges {
    pub fn at(&self, address: usize) -> Option<&str> {
        let (start, (size, name)) = self.0.range(..=address).next_back()?;
        (address - start < *size).then_some(name)
    }

    /// Parses perf's map of generated code. Each line has a start, a size (both hexadecimal) and a name.
    pub fn from_perf_map(text: &str) -> Self {
        let hex = |text: &str| usize::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let line = |line: &str| {
            let mut parts = line.splitn(3, ' ');
            Some((hex(parts.next()?)?, (hex(parts.next()?)?, parts.next()?.trim().to_owned())))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// Reads the symbols of a library, with addresses relative to its first segment. Distributions replace the full
    /// table by `.gnu_debugdata`, an ELF file compressed with xz.
    fn from_library(path: &Path) -> Option<Self> {
        let whole = std::fs::read(path).ok()?;
        let library = object::File::parse(&*whole).ok()?;
        let first = library.segments().map(|s| s.address()).min()?;
        // Symbols of Mach-O have no sizes: each ends at the start of the next.
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

/// Resolves addresses and caches the names.
pub struct Symbols {
    cache: HashMap<usize, Vec<String>>,
    jit: Ranges,
    libraries: HashMap<PathBuf, Ranges>,
}

impl Symbols {
    /// Reads the map of [`enable_jit_map`], if there is one.
    pub fn read() -> Self {
        let text = std::fs::read_to_string(jit_map_path()).unwrap_or_default();
        Self { cache: HashMap::new(), jit: Ranges::from_perf_map(&text), libraries: HashMap::new() }
    }

    /// Returns the functions at an address, the outermost of inlined functions first. Without a name, it is the
    /// library in brackets.
    pub fn at(&mut self, address: usize) -> &[String] {
        if !self.cache.contains_key(&address) {
            let names = self.resolve(address);
            self.cache.insert(address, names);
        }
        &self.cache[&address]
    }

    fn resolve(&mut self, address: usize) -> Vec<String> {
        let mut names = Vec::new();
        // The function expects a return address and looks one byte before it.
        backtrace::resolve((address + 1) as *mut libc::c_void, |found| {
            if let Some(name) = found.name() {
                names.push(readable_name(&String::from_utf8_lossy(name.as_bytes())));
            }
        });
        if !names.is_empty() {
            names.reverse();
            return names;
        }
        // `backtrace` misses libraries that were loaded after its first call, as MLX does with compiled kernels, and
        // the libraries that macOS stores in no file.
        let Some((path, base, name)) = find_library(address) else {
            let name = self.jit.at(address);
            return vec![name.map_or_else(|| unresolved_frame(JIT_CODE), str::to_owned)];
        };
        let ranges = self
            .libraries
            .entry(path.clone())
            .or_insert_with(|| Ranges::from_library(&path).unwrap_or_default());
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        let name = ranges.at(address - base).map(str::to_owned).or(name);
        vec![name.map_or_else(|| unresolved_frame(&file), |name| readable_name(&name))]
    }
}

/// Returns true for a frame in generated code without a name.
pub fn is_unnamed_jit_code(frame: &str) -> bool {
    frame == unresolved_frame(JIT_CODE)
}

/// Returns the library at an address and its base address. On macOS, it also returns the symbol before the address.
/// On other systems, `dladdr` knows only exported symbols, which may be far away.
fn find_library(address: usize) -> Option<(PathBuf, usize, Option<String>)> {
    // SAFETY: dladdr fills plain data and does not read from the address.
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

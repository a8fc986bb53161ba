//! Profiles as folded stacks: written, read, drawn, and laid side by side.

pub mod gpu;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use inferno::{differential, flamegraph};

use crate::results::write_atomic;

/// What a stack's weight counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Times that a stack was seen running on a CPU.
    Samples,
    /// Nanoseconds on a GPU.
    Nanoseconds,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Samples => "samples",
            Self::Nanoseconds => "ns",
        }
    }
}

/// Stacks, outermost frame first, with their weight.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    stacks: BTreeMap<String, u64>,
}

/// How a frame without a symbol is named: in brackets, as its library.
pub fn unresolved(library: &str) -> String {
    format!("[{library}]")
}

impl Profile {
    /// # Panics
    /// On a stack without frames.
    pub fn add(&mut self, frames: &[String], weight: u64) {
        assert!(!frames.is_empty(), "a stack has frames");
        // What separates frames and ends stacks can't be part of a name.
        let clean: Vec<String> = frames.iter().map(|f| f.replace([';', '\n'], ":")).collect();
        *self.stacks.entry(clean.join(";")).or_default() += weight;
    }

    pub fn is_empty(&self) -> bool {
        self.stacks.is_empty()
    }

    pub fn total(&self) -> u64 {
        self.stacks.values().sum()
    }

    /// A line a stack: frames joined by `;`, a space, the weight.
    pub fn folded(&self) -> String {
        self.stacks.iter().fold(String::new(), |mut text, (stack, weight)| {
            let _ = writeln!(text, "{stack} {weight}");
            text
        })
    }

    /// Reads what [`Self::folded`] writes.
    pub fn parse(text: &str) -> Result<Self> {
        let mut profile = Self::default();
        for line in text.lines() {
            let (stack, weight) =
                line.rsplit_once(' ').with_context(|| format!("'{line}' is no folded stack"))?;
            let weight = weight.parse().with_context(|| format!("'{line}' has no weight"))?;
            profile.add(&stack.split(';').map(str::to_owned).collect::<Vec<_>>(), weight);
        }
        ensure!(!profile.is_empty(), "the profile is empty");
        Ok(profile)
    }

    /// The frames that were innermost most often: name, share of the total in 0..1.
    pub fn heaviest(&self, count: usize) -> Vec<(String, f64)> {
        let mut own: BTreeMap<&str, u64> = BTreeMap::new();
        for (stack, weight) in &self.stacks {
            *own.entry(stack.rsplit(';').next().unwrap_or(stack)).or_default() += weight;
        }
        let total = self.total().max(1) as f64;
        let mut all: Vec<(String, f64)> =
            own.into_iter().map(|(n, w)| (n.to_owned(), w as f64 / total)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(count);
        all
    }

    /// The share of the weight whose innermost frame has a name, in 0..1.
    pub fn resolved(&self) -> f64 {
        let named = |stack: &&String| !stack.rsplit(';').next().is_some_and(|leaf| leaf.starts_with('['));
        let weight: u64 = self.stacks.iter().filter(|(stack, _)| named(stack)).map(|(_, w)| w).sum();
        weight as f64 / self.total().max(1) as f64
    }

    /// A flamegraph as SVG.
    pub fn svg(&self, title: &str, unit: Unit) -> Result<String> {
        draw(self.folded().lines(), title, unit, None)
    }

    /// A flamegraph of this profile, coloured by what grew (red) and shrank (blue) since
    /// `base`, whose total is scaled to this one's.
    pub fn svg_since(&self, base: &Profile, title: &str, unit: Unit) -> Result<String> {
        let mut lines = Vec::new();
        let options = differential::Options { normalize: true, ..Default::default() };
        differential::from_readers(options, base.folded().as_bytes(), self.folded().as_bytes(), &mut lines)?;
        let text = String::from_utf8(lines)?;
        draw(text.lines(), title, unit, Some("red: more than before, blue: less"))
    }

    /// Writes `NAME.folded` and `NAME.svg` into a folder.
    pub fn write(&self, folder: &Path, name: &str, title: &str, unit: Unit) -> Result<()> {
        write_atomic(&folder.join(format!("{name}.folded")), &self.folded())?;
        write_atomic(&folder.join(format!("{name}.svg")), &self.svg(title, unit)?)
    }
}

fn draw<'a>(
    lines: impl Iterator<Item = &'a str>,
    title: &str,
    unit: Unit,
    subtitle: Option<&str>,
) -> Result<String> {
    let mut options = flamegraph::Options::default();
    options.title = title.to_owned();
    options.subtitle = subtitle.map(str::to_owned);
    options.count_name = unit.name().to_owned();
    options.min_width = 0.05;
    // The same name has the same colour in every picture.
    options.hash = subtitle.is_none();
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, lines, &mut svg).map_err(|e| anyhow!("no flamegraph: {e}"))?;
    Ok(String::from_utf8(svg)?)
}

/// What a reader wants of a mangled C++ or Rust name: [`short`] of what it stands for.
pub fn readable(mangled: &str) -> String {
    short(&symbolic_demangle::demangle(mangled))
}

/// A C++ or Rust function's name without its parameters, and without template arguments
/// that fill a line.
pub fn short(name: &str) -> String {
    const LONG: usize = 40;
    let mut out = String::new();
    let mut depth = 0usize;
    let mut inner = String::new();
    let mut rest = name.strip_prefix("void ").unwrap_or(name).chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            // `operator<`, `operator()` and `<T as Trait>` at the start are names.
            '<' if depth > 0 || !(out.is_empty() || out.ends_with("operator")) => {
                depth += 1;
                inner.push(c);
            }
            '>' if depth > 0 && !inner.ends_with('-') => {
                depth -= 1;
                inner.push(c);
                if depth == 0 {
                    if inner.chars().count() > LONG {
                        out.push_str("<…>")
                    } else {
                        out.push_str(&inner)
                    }
                    inner.clear();
                }
            }
            _ if depth > 0 => inner.push(c),
            '(' if rest.clone().collect::<String>().starts_with("anonymous namespace)") => {
                out.push_str("(anonymous namespace)");
                rest.nth("anonymous namespace)".len() - 1);
            }
            '(' if out.ends_with("operator") => {
                out.push_str("()");
                rest.next();
            }
            '(' if !out.is_empty() => break,
            _ => out.push(c),
        }
    }
    out.push_str(&inner);
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(stack: &str) -> Vec<String> {
        stack.split(';').map(str::to_owned).collect()
    }

    fn profile() -> Profile {
        let mut profile = Profile::default();
        profile.add(&frames("step;matmul;sgemm"), 60);
        profile.add(&frames("step;gelu"), 25);
        profile.add(&frames("step;matmul;sgemm"), 10);
        profile.add(&frames("step;[libx.so]"), 5);
        profile
    }

    #[test]
    fn folded_stacks_come_back() {
        assert_eq!(Profile::parse(&profile().folded()).unwrap(), profile());
        assert!(Profile::parse("").unwrap_err().to_string().contains("empty"));
        assert!(Profile::parse("step;x").is_err());
        assert!(Profile::parse("step;x many").unwrap_err().to_string().contains("weight"));
    }

    #[test]
    fn the_heaviest_frames_are_those_that_ran_themselves() {
        let heaviest = profile().heaviest(2);
        assert_eq!(heaviest, [("sgemm".to_owned(), 0.7), ("gelu".to_owned(), 0.25)]);
        assert!((profile().resolved() - 0.95).abs() < 1e-12);
    }

    #[test]
    fn pictures_name_their_frames() {
        let svg = profile().svg("a <title>", Unit::Samples).unwrap();
        assert!(svg.contains("</svg>") && svg.contains("sgemm (70 samples, 70.00%)"), "{svg}");
        assert!(svg.contains("a &lt;title&gt;"));
        let mut slower = profile();
        slower.add(&frames("step;gelu"), 50);
        let diff = slower.svg_since(&profile(), "diff", Unit::Samples).unwrap();
        assert!(diff.contains("gelu") && diff.contains("red: more"), "{diff}");
    }

    #[test]
    fn names_lose_what_fills_a_line() {
        for (long, expected) in [
            ("at::native::add(at::Tensor const&, long)", "at::native::add"),
            (
                "void at::native::(anonymous namespace)::softmax<float>(int)",
                "at::native::(anonymous namespace)::softmax<float>",
            ),
            ("<a::Step as b::Prepared>::step", "<a::Step as b::Prepared>::step"),
            (
                "std::function<void (int, int)>::operator()(int, int) const",
                "std::function<void (int, int)>::operator()",
            ),
            ("f<aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa>::g(int)", "f<…>::g"),
            ("mkl_blas_sgemm", "mkl_blas_sgemm"),
        ] {
            assert_eq!(short(long), expected);
        }
    }
}

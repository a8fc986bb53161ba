//! Profiles as folded stacks, flamegraphs of them, and differences between two of them.

pub mod gpu;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use inferno::{differential, flamegraph};

use crate::files::write_atomic;

/// The unit of a stack's weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Number of samples in which a CPU ran the stack.
    Samples,
    /// Nanoseconds of GPU time.
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

/// Stacks, outermost frame first, and the weight of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    stacks: BTreeMap<String, u64>,
}

/// Returns the name of a frame without a symbol: its library in brackets.
pub fn unresolved_frame(library: &str) -> String {
    format!("[{library}]")
}

impl Profile {
    /// Adds `weight` to the stack of `frames`, outermost first.
    ///
    /// # Panics
    /// Panics if `frames` is empty.
    pub fn add(&mut self, frames: &[String], weight: u64) {
        assert!(!frames.is_empty(), "a stack needs at least one frame");
        // `;` separates frames and a line break ends a stack.
        let clean: Vec<String> = frames.iter().map(|f| f.replace([';', '\n'], ":")).collect();
        *self.stacks.entry(clean.join(";")).or_default() += weight;
    }

    pub fn is_empty(&self) -> bool {
        self.stacks.is_empty()
    }

    /// Returns the sum of all weights.
    pub fn total(&self) -> u64 {
        self.stacks.values().sum()
    }

    /// Formats one line per stack: the frames joined by `;`, a space and the weight.
    pub fn folded(&self) -> String {
        self.stacks.iter().fold(String::new(), |mut text, (stack, weight)| {
            let _ = writeln!(text, "{stack} {weight}");
            text
        })
    }

    /// Parses the format of [`Self::folded`].
    ///
    /// # Errors
    /// Returns an error if a line is not a folded stack, or if there is none.
    pub fn parse(text: &str) -> Result<Self> {
        let mut profile = Self::default();
        for line in text.lines() {
            let (stack, weight) =
                line.rsplit_once(' ').with_context(|| format!("'{line}' is not a folded stack"))?;
            let weight = weight.parse().with_context(|| format!("'{line}' has no weight"))?;
            profile.add(&stack.split(';').map(str::to_owned).collect::<Vec<_>>(), weight);
        }
        ensure!(!profile.is_empty(), "the profile is empty");
        Ok(profile)
    }

    /// Returns the `count` innermost frames with the most weight: name and share of the total, from 0 to 1.
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

    /// Returns the share of the weight whose innermost frame has a name, from 0 to 1.
    pub fn named_share(&self) -> f64 {
        let named = |stack: &&String| !stack.rsplit(';').next().is_some_and(|leaf| leaf.starts_with('['));
        let weight: u64 = self.stacks.iter().filter(|(stack, _)| named(stack)).map(|(_, w)| w).sum();
        weight as f64 / self.total().max(1) as f64
    }

    /// Draws a flamegraph as SVG.
    pub fn svg(&self, title: &str, unit: Unit) -> Result<String> {
        draw(self.folded().lines(), title, unit, None)
    }

    /// Draws a flamegraph of this profile whose colors show growth (red) and reduction (blue) since `base`.
    /// The total of `base` is scaled to the total of this profile.
    pub fn diff_svg(&self, base: &Profile, title: &str, unit: Unit) -> Result<String> {
        let mut lines = Vec::new();
        let options = differential::Options { normalize: true, ..Default::default() };
        differential::from_readers(options, base.folded().as_bytes(), self.folded().as_bytes(), &mut lines)?;
        let text = String::from_utf8(lines)?;
        draw(text.lines(), title, unit, Some("red: more than before, blue: less than before"))
    }

    /// Writes `NAME.folded` and `NAME.svg` into `folder`.
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
    // A name gets the same color in every flamegraph.
    options.hash = subtitle.is_none();
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, lines, &mut svg)
        .map_err(|e| anyhow!("the flamegraph could not be drawn: {e}"))?;
    Ok(String::from_utf8(svg)?)
}

/// Demangles a C++ or Rust name and shortens it with [`shorten`].
pub fn readable_name(mangled: &str) -> String {
    shorten(&symbolic_demangle::demangle(mangled))
}

/// Removes the parameters and long template arguments from the name of a C++ or Rust function.
pub fn shorten(name: &str) -> String {
    const LONG: usize = 40;
    let mut out = String::new();
    let mut depth = 0usize;
    let mut inner = String::new();
    let mut rest = name.strip_prefix("void ").unwrap_or(name).chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            // `operator<`, `operator()` and a leading `<T as Trait>` are part of the name.
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
    fn folded_stacks_round_trip() {
        assert_eq!(Profile::parse(&profile().folded()).unwrap(), profile());
        assert!(Profile::parse("").unwrap_err().to_string().contains("empty"));
        assert!(Profile::parse("step;x").is_err());
        assert!(Profile::parse("step;x many").unwrap_err().to_string().contains("weight"));
    }

    #[test]
    fn the_heaviest_frames_are_innermost_frames() {
        let heaviest = profile().heaviest(2);
        assert_eq!(heaviest, [("sgemm".to_owned(), 0.7), ("gelu".to_owned(), 0.25)]);
        assert!((profile().named_share() - 0.95).abs() < 1e-12);
    }

    #[test]
    fn flamegraphs_show_the_names_of_frames() {
        let svg = profile().svg("a <title>", Unit::Samples).unwrap();
        assert!(svg.contains("</svg>") && svg.contains("sgemm (70 samples, 70.00%)"), "{svg}");
        assert!(svg.contains("a &lt;title&gt;"));
        let mut slower = profile();
        slower.add(&frames("step;gelu"), 50);
        let diff = slower.diff_svg(&profile(), "diff", Unit::Samples).unwrap();
        assert!(diff.contains("gelu") && diff.contains("red: more"), "{diff}");
    }

    #[test]
    fn long_names_are_shortened() {
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
            assert_eq!(shorten(long), expected);
        }
    }
}

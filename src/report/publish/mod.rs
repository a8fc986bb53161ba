//! The generated parts of the project's documents, computed from the baselines in criterion-baselines/.

mod blocks;
mod pictures;
pub(crate) mod python;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::headline::best_pairs;
use super::markdown;
use super::summary::Comparison;
use crate::files;
use crate::results::Results;
use crate::results::baseline;
use crate::suite::{BackendId, Case};
use blocks::Answer;

/// A baseline that is part of the project.
pub struct PublishedBaseline {
    /// `h100-80gb-hbm3/training`
    pub name: String,
    pub results: Results,
    /// The command that repeats the run.
    command: String,
}

impl PublishedBaseline {
    /// Names the hardware: `AMD EPYC, 2 cores, AVX512`, `2 × NVIDIA H100 80GB HBM3`.
    pub fn hardware(&self) -> String {
        match &self.results.machine.gpus[..] {
            [] => self.cpu(),
            [gpu] => gpu.clone(),
            [gpu, ..] => format!("{} × {gpu}", self.results.machine.gpus.len()),
        }
    }

    fn cpu(&self) -> String {
        let m = &self.results.machine;
        let simd = if m.simd.is_empty() { String::new() } else { format!(", {}", m.simd) };
        format!("{}, {} cores{simd}", m.cpu, m.cores)
    }

    /// Names the device of a case without ranks: `NVIDIA H100 80GB HBM3 (1 GPU)`.
    pub fn device(&self, backend: BackendId) -> String {
        match &self.results.machine.gpus[..] {
            [gpu, others @ ..] if !backend.is_cpu() => {
                format!("{gpu}{}", if others.is_empty() { "" } else { " (1 GPU)" })
            }
            _ => self.cpu(),
        }
    }

    /// Returns the fastest steps of both frameworks, for each device with both. A run of a custom model has none.
    pub fn pairs(&self) -> Vec<[Case; 2]> {
        if self.results.model.is_some() { Vec::new() } else { best_pairs(&self.results) }
    }
}

/// Returns the baselines that git tracks, or `None` outside of a repository.
fn tracked(root: &Path) -> Option<Vec<PathBuf>> {
    let listed =
        Command::new("git").arg("-C").arg(root).args(["ls-files", "--", "*/baseline.json"]).output().ok()?;
    let text = String::from_utf8(listed.stdout).ok().filter(|_| listed.status.success())?;
    Some(text.lines().map(|line| root.join(line)).collect())
}

/// Reads the baselines of the project under `root`, those of GPUs first. A user's own baselines are left out.
///
/// # Errors
/// Returns an error if a baseline is damaged.
pub fn published_baselines(root: &Path) -> Result<Vec<PublishedBaseline>> {
    let mut all = Vec::new();
    let tracked = tracked(root);
    for (machine, name, file) in baseline::list(root) {
        if tracked.as_ref().is_none_or(|tracked| tracked.contains(&file)) {
            // The names become links.
            baseline::check_name(&machine).and_then(|()| baseline::check_name(&name))?;
            let baseline = baseline::load(&file)?;
            let name = format!("{machine}/{name}");
            all.push(PublishedBaseline { name, results: baseline.results(), command: baseline.command });
        }
    }
    all.sort_by_key(|baseline| (baseline.results.machine.gpus.is_empty(), baseline.name.clone()));
    Ok(all)
}

/// Replaces the text between `<!-- NAME: note -->` and `<!-- end of NAME -->`.
///
/// # Errors
/// Returns an error if the page lacks one of the marks.
pub fn replace_block(page: &str, name: &str, text: &str) -> Result<String> {
    let (start, end) = (format!("<!-- {name}: "), format!("<!-- end of {name} -->"));
    let missing = |mark: &str| format!("the page lacks the mark {mark}");
    let (before, rest) = page.split_once(&start).with_context(|| missing(&start))?;
    let (note, rest) = rest.split_once("-->").with_context(|| missing("-->"))?;
    let (_, after) = rest.split_once(&end).with_context(|| missing(&end))?;
    Ok(format!("{before}{start}{note}-->\n{}\n{end}{after}", text.trim_end()))
}

/// Returns every generated file of the project at `root` with its expected text.
///
/// # Errors
/// Returns an error if a baseline is damaged, or if a page lacks the marks of a block.
pub fn files(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let folder = root.join("criterion-baselines");
    let all = published_baselines(&folder)?;
    let answers: Vec<Answer<'_>> = all
        .iter()
        .flat_map(|baseline| {
            let comparisons = baseline.pairs().into_iter();
            let comparisons = comparisons.filter_map(|pair| Comparison::new(&baseline.results, pair));
            comparisons.map(move |comparison| Answer { baseline, comparison })
        })
        .collect();
    let page = |path: &Path, blocks: &[(&str, String)]| -> Result<(PathBuf, String)> {
        let page = files::read_text(path)?;
        let replaced = blocks.iter().try_fold(page, |page, (name, text)| replace_block(&page, name, text));
        Ok((path.to_owned(), replaced.with_context(|| path.display().to_string())?))
    };
    let front = [("answer", blocks::answer(&answers)?), ("scaling", blocks::scaling(&all))];
    let data = [
        ("baselines", blocks::baselines(&all)),
        ("printed", blocks::training_speeds(&all)?),
        ("python", blocks::python_results(&folder)?),
    ];
    let (_, comparisons) = page(&root.join("src/compare/README.md"), &[])?;
    let mut files = vec![
        page(&root.join("README.md"), &front)?,
        page(&folder.join("README.md"), &data)?,
        (folder.join("answer-light.svg"), pictures::answer(&answers, &pictures::LIGHT)?),
        (folder.join("answer-dark.svg"), pictures::answer(&answers, &pictures::DARK)?),
        (root.join("src/compare/power.svg"), pictures::power(&pictures::trials(&comparisons)?)?),
    ];
    for baseline in &all {
        let report = markdown::render(&baseline.results, &baseline.command);
        files.push((folder.join(&baseline.name).join("report.md"), report));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::files::tests::scratch;

    #[test]
    fn every_generated_file_agrees_with_the_baselines() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for (path, text) in files(root).unwrap() {
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{} differs from the baselines: run ./scripts/publish", path.display());
        }
    }

    #[test]
    fn a_users_own_baselines_are_not_published() {
        let root = scratch("publish");
        let folder = root.join("m/own");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("baseline.json"), "damaged").unwrap();
        // Without git all of them count, and a damaged one is an error.
        assert!(published_baselines(&root).is_err());
        let git = |arguments: &[&str]| {
            let done = Command::new("git").arg("-C").arg(&root).args(arguments).output().unwrap();
            assert!(done.status.success(), "{arguments:?}");
        };
        git(&["init", "-q"]);
        assert!(published_baselines(&root).unwrap().is_empty());
        git(&["add", "m"]);
        assert!(published_baselines(&root).is_err());
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn only_the_text_between_the_marks_is_replaced() {
        let page = "a\n<!-- x: by hand -->\nold\n<!-- end of x -->\nb";
        let replaced = replace_block(page, "x", "new\n").unwrap();
        assert_eq!(replaced, "a\n<!-- x: by hand -->\nnew\n<!-- end of x -->\nb");
        assert!(replace_block(page, "y", "").unwrap_err().to_string().contains("<!-- y: "));
    }
}

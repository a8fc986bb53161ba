//! What README.md and criterion-baselines/README.md show of the baselines: made here, and nowhere by hand.

mod pictures;

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{all_measured, best_pairs, find, markdown, measured, rate, scaling, summary, tables};
use crate::results::Results;
use crate::results::baseline;
use crate::suite::{Case, Workload};

/// A step beside the same step written in Python, interleaved: a line of `<machine>/python.csv`, which
/// `scripts/compare-python --save` writes.
#[derive(Clone, Debug, Deserialize)]
pub struct PythonResult {
    pub date: String,
    pub case: String,
    /// How Python writes it: `eager`, `torch.compile, reduce-overhead` …
    pub python: String,
    pub ours_ms: f64,
    pub python_ms: f64,
    /// The median of the rounds' ratios of our time to Python's.
    pub ratio: f64,
}

/// A machine's folder in criterion-baselines/.
pub struct PublishedBaseline {
    /// `h100-80gb-hbm3/training`.
    pub name: String,
    pub results: Results,
    /// What measures it again.
    command: String,
    /// Of this kind of machine.
    pub twins: Vec<PythonResult>,
}

impl PublishedBaseline {
    /// `AMD EPYC, 2 cores, AVX512`, or the GPUs.
    fn title(&self) -> String {
        let m = &self.results.machine;
        match &m.gpus[..] {
            [] if m.simd.is_empty() => format!("{}, {} cores", m.cpu, m.cores),
            [] => format!("{}, {} cores, {}", m.cpu, m.cores, m.simd),
            [gpu] => gpu.clone(),
            [gpu, ..] => format!("{gpu}, one of {}", m.gpus.len()),
        }
    }

    /// Python's figures of a case; of the first way in which Python writes it.
    pub fn python_result(&self, case: &Case) -> Option<&PythonResult> {
        let id = case.to_string();
        self.twins.iter().find(|twin| twin.case == id)
    }
}

/// The rows of a machine's python.csv; none where it has no such file.
fn twins(folder: &Path) -> Result<Vec<PythonResult>> {
    let path = folder.join("python.csv");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut reader =
        csv::Reader::from_path(&path).with_context(|| format!("{} could not be read", path.display()))?;
    let rows: Vec<PythonResult> = reader
        .deserialize()
        .collect::<Result<_, _>>()
        .with_context(|| format!("{} is damaged", path.display()))?;
    for row in &rows {
        let positive = [row.ours_ms, row.python_ms, row.ratio].iter().all(|v| v.is_finite() && *v > 0.0);
        ensure!(
            positive && row.case.parse::<Case>().is_ok(),
            "{}: {} has no figures",
            path.display(),
            row.case
        );
    }
    Ok(rows)
}

/// The baselines that are part of the project, not a user's own beside them; None where git does not tell.
fn tracked(root: &Path) -> Option<Vec<PathBuf>> {
    let listed =
        Command::new("git").arg("-C").arg(root).args(["ls-files", "--", "*/baseline.json"]).output().ok()?;
    let text = String::from_utf8(listed.stdout).ok().filter(|_| listed.status.success())?;
    Some(text.lines().map(|line| root.join(line)).collect())
}

/// Every baseline of the project under `root`, GPUs first, with the Python figures of its kind of machine.
///
/// # Errors
/// Where a file is damaged.
pub fn published_baselines(root: &Path) -> Result<Vec<PublishedBaseline>> {
    let mut all = Vec::new();
    let tracked = tracked(root);
    for (machine, name, file) in baseline::list(root) {
        if tracked.as_ref().is_some_and(|tracked| !tracked.contains(&file)) {
            continue;
        }
        let baseline = baseline::load(&file)?;
        let mut of_kind = twins(&root.join(&machine))?;
        // One GPU and two of its kind pay the same for Python.
        if let Some((one, count)) = machine.rsplit_once("-x")
            && count.parse::<usize>().is_ok()
        {
            of_kind.extend(twins(&root.join(one))?);
        }
        all.push(PublishedBaseline {
            name: format!("{machine}/{name}"),
            results: baseline.results(),
            command: baseline.command,
            twins: of_kind,
        });
    }
    all.sort_by_key(|kept| (kept.results.machine.gpus.is_empty(), kept.name.clone()));
    Ok(all)
}

/// The baselines that answer the question: both frameworks on one device.
fn answering(all: &[PublishedBaseline]) -> impl Iterator<Item = &PublishedBaseline> {
    all.iter().filter(|kept| kept.results.model.is_none() && !best_pairs(&kept.results).is_empty())
}

/// The baselines that tell what further GPUs bring, and what they say: of each machine the last, and of one day
/// that of several devices alone.
fn sharing(all: &[PublishedBaseline]) -> Vec<(&PublishedBaseline, Vec<String>)> {
    let mut chosen: Vec<(&PublishedBaseline, Vec<String>)> = Vec::new();
    let age =
        |kept: &PublishedBaseline| (kept.results.machine.date.clone(), best_pairs(&kept.results).is_empty());
    for kept in all {
        let said = scaling::speedup_summary(&all_measured(&kept.results));
        if said.is_empty() {
            continue;
        }
        match chosen.iter_mut().find(|(other, _)| other.title() == kept.title()) {
            Some(other) if age(other.0) < age(kept) => *other = (kept, said),
            Some(_) => {}
            None => chosen.push((kept, said)),
        }
    }
    chosen
}

/// README.md's first screen.
fn answer(all: &[PublishedBaseline]) -> String {
    let mut out = String::new();
    for kept in answering(all) {
        for sentence in summary::answer(&kept.results) {
            let _ = writeln!(out, "- **{}** ({}): {sentence}", kept.title(), kept.results.machine.date);
        }
        for pair in best_pairs(&kept.results) {
            let _ = write!(out, "{}", in_python(kept, pair).unwrap_or_default());
        }
    }
    for (kept, said) in sharing(all) {
        let (m, name) = (&kept.results.machine, &kept.name);
        for sentence in said {
            let gpus = format!("{} × {}", m.gpus.len(), m.gpus.first().map_or("", String::as_str));
            let link = format!("criterion-baselines/{name}/report.md#several-devices");
            let _ = writeln!(out, "- **{gpus}** ({}): {sentence}. [What is lost]({link}).", m.date);
        }
    }
    out.push_str(
        "- **Mac**: nobody has sent figures yet. `./scripts/bench && ./scripts/baseline save first-mac` makes them; \
         [how to send them](.github/CONTRIBUTING.md#your-machines-figures).\n\n",
    );
    out.push_str("![Training steps of both frameworks](criterion-baselines/answer.svg)\n\n");
    let pays: Vec<String> = answering(all).filter_map(pays).collect();
    let _ = writeln!(
        out,
        "Measured from Rust. How many times as long Python takes for the same step, interleaved with ours. {}.",
        pays.join(". ")
    );
    out
}

/// What the answer would be for somebody who writes the same two steps in Python, by the interleaved ratios.
fn in_python(kept: &PublishedBaseline, cases: [Case; 2]) -> Option<String> {
    let speed = |case: &Case| {
        let (_, median, _) = measured(find(&kept.results, case))?;
        Some(rate(case.shape, median).0 * kept.python_result(case)?.ratio)
    };
    let speeds = [speed(&cases[0])?, speed(&cases[1])?];
    let first = if speeds[0] >= speeds[1] { 0 } else { 1 };
    let name = |i: usize| cases[i].backend.framework().names().0;
    Some(format!(
        "  Written in Python, the same two steps: {} {} times as fast, {} against {}.\n",
        name(first),
        tables::digits(speeds[first] / speeds[1 - first]),
        tables::digits(speeds[first]),
        tables::digits(speeds[1 - first])
    ))
}

/// `NVIDIA H100: PyTorch f32 1.27 …`: how much longer Python takes for the headline's steps.
fn pays(kept: &PublishedBaseline) -> Option<String> {
    let shape = kept.results.headline();
    let of = |twin: &PythonResult| {
        let case: Case = twin.case.parse().ok()?;
        (case.shape == shape && case.workload == Workload::TrainStep).then_some(())?;
        let name = case.backend.framework().names().0;
        Some(format!("{name} {} {:.2}", case.method, 1.0 / twin.ratio))
    };
    let all: Vec<String> = kept.twins.iter().filter_map(of).collect();
    (!all.is_empty()).then(|| format!("{}: {}", kept.title(), all.join(", ")))
}

/// criterion-baselines/README.md's tables: what each machine printed of its headline.
fn printed(all: &[PublishedBaseline]) -> Result<String> {
    let mut out = String::new();
    for kept in answering(all) {
        let table = tables::first(&kept.results).context("a training step was measured")?;
        let m = &kept.results.machine;
        let version = |name: &str| m.versions.iter().find(|v| v.0 == name).map_or("?", |v| v.1.as_str());
        let _ = writeln!(
            out,
            "{}, {}, {}: PyTorch {}, MLX {}, commit {} (`{}`):\n",
            kept.title(),
            kept.results.headline(),
            m.date,
            version("PyTorch"),
            version("MLX"),
            m.commit,
            kept.name
        );
        markdown::table(&mut out, table.header, &table.rows);
    }
    Ok(out)
}

/// criterion-baselines/README.md's table of what is kept.
fn listed(all: &[PublishedBaseline]) -> String {
    let rows: Vec<Vec<String>> = all
        .iter()
        .map(|kept| {
            let m = &kept.results.machine;
            let measured = all_measured(&kept.results).len();
            let date = if m.date.is_empty() { "–" } else { &m.date };
            vec![
                format!("`{}`", kept.name),
                kept.title(),
                date.to_owned(),
                m.commit.clone(),
                measured.to_string(),
                kept.results.interleaved.len().to_string(),
            ]
        })
        .collect();
    let mut out = String::new();
    markdown::table(&mut out, &["baseline", "machine", "date", "commit", "cases", "in turns"], &rows);
    out
}

/// criterion-baselines/README.md's tables of Python's figures, a machine each.
fn interleaved(root: &Path) -> Result<String> {
    let mut folders: Vec<PathBuf> = fs::read_dir(root)?.flatten().map(|entry| entry.path()).collect();
    folders.sort();
    let mut out = String::new();
    for folder in folders {
        let rows: Vec<Vec<String>> = twins(&folder)?
            .iter()
            .map(|twin| {
                vec![
                    format!("`{}`", twin.case),
                    format!("{:.2}", twin.ours_ms),
                    format!("{} {:.2}", twin.python, twin.python_ms),
                    format!("{:.2}", twin.ratio),
                    twin.date.clone(),
                ]
            })
            .collect();
        if !rows.is_empty() {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let _ = writeln!(out, "`{name}`:\n");
            markdown::table(&mut out, &["case", "ours, ms", "Python, ms", "ratio", "date"], &rows);
        }
    }
    Ok(out)
}

/// Puts a text between the marks of its name.
///
/// # Errors
/// Where the page has no such marks.
pub fn between(page: &str, name: &str, text: &str) -> Result<String> {
    let marks = [format!("<!-- {name} -->"), format!("<!-- end of {name} -->")];
    let (before, rest) = page.split_once(&marks[0]).with_context(|| format!("{} is missing", marks[0]))?;
    let (_, after) = rest.split_once(&marks[1]).with_context(|| format!("{} is missing", marks[1]))?;
    Ok(format!("{before}{}\n{}\n{}{after}", marks[0], text.trim_end(), marks[1]))
}

/// Every file that shows figures of baselines, as it should be; `root` is the project's.
///
/// # Errors
/// Where a baseline is damaged, or a page has lost its marks.
pub fn files(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let folder = root.join("criterion-baselines");
    let all = published_baselines(&folder)?;
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("{} could not be read", path.display()))
    };
    let front = root.join("README.md");
    let page = between(&read(&front)?, "answer", &answer(&all))?;
    let data = folder.join("README.md");
    let mut kept_page = between(&read(&data)?, "baselines", &listed(&all))?;
    kept_page = between(&kept_page, "printed", &printed(&all)?)?;
    kept_page = between(&kept_page, "python", &interleaved(&folder)?)?;
    let shown: Vec<&PublishedBaseline> = answering(&all).collect();
    let trials = pictures::trials(&read(&root.join("src/compare/README.md"))?)?;
    let mut files = vec![
        (front, page),
        (data, kept_page),
        (folder.join("answer.svg"), pictures::answer(&shown)?),
        (root.join("src/compare/power.svg"), pictures::power(&trials)?),
    ];
    for kept in &all {
        let report = markdown::render(&kept.results, &kept.command);
        files.push((folder.join(&kept.name).join("report.md"), report));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::scratch;

    #[test]
    fn every_published_figure_is_a_baselines() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for (path, text) in files(root).unwrap() {
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{} is not what the baselines say: run ./scripts/publish", path.display());
        }
    }

    #[test]
    fn a_users_own_baselines_are_not_published() {
        let root = scratch("publish");
        let folder = root.join("m/own");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("baseline.json"), "damaged").unwrap();
        // Without git all of them count, and a damaged one is told.
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
    fn text_goes_between_its_marks_alone() {
        let page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb";
        assert_eq!(between(page, "x", "new\n").unwrap(), "a\n<!-- x -->\nnew\n<!-- end of x -->\nb");
        assert!(between(page, "y", "").unwrap_err().to_string().contains("<!-- y -->"));
    }
}

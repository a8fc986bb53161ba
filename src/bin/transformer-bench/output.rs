//! The result of a comparison as text, Markdown and JSON.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use transformer_bench::compare::baseline_level;
use transformer_bench::compare::decision::{Estimate, Rule, SequentialTest, Verdict};
use transformer_bench::compare::rounds::{self, Failure, Row};
use transformer_bench::results::EnvEffect;
use transformer_bench::statistics::REPORT_CONFIDENCE;
use transformer_bench::suite::Case;
use transformer_bench::text;

const COLUMNS: [&str; 6] = ["verdict", "head / base", "99 % interval", "base", "head", "case"];

/// Largest absolute log ratio of a finished comparison: a factor of 10¹³ between two step times, more than between a
/// nanosecond and an hour.
const MAX_LOG_RATIO: f64 = 30.0;

/// A line of a finished comparison, as [`Report::json`] writes it.
#[derive(Deserialize)]
struct SavedLine {
    id: String,
    verdict: Verdict,
    ratio: Option<f64>,
    ci: Option<[Option<f64>; 2]>,
    base_ns: Option<f64>,
    head_ns: Option<f64>,
    #[serde(default)]
    rounds: usize,
    #[serde(default)]
    observations: Vec<[f64; 2]>,
    failed_side: Option<usize>,
    #[serde(default)]
    reason: String,
}

impl SavedLine {
    /// Returns the interval of the ratio, unless it is unbounded.
    fn interval(&self) -> Option<[f64; 2]> {
        let [low, high] = self.ci?;
        Some([low?, high?])
    }

    /// Checks that a comparison can produce the line.
    ///
    /// # Errors
    /// Returns an error that names the case and the field.
    fn check(&self) -> Result<()> {
        let id = &self.id;
        let is_positive = |value: &f64| value.is_finite() && *value > 0.0;
        ensure!(
            [self.base_ns, self.head_ns, self.ratio].iter().flatten().all(is_positive),
            "{id} has a time or ratio that is not positive"
        );
        if let (Some(ratio), Some([low, high])) = (self.ratio, self.interval()) {
            // The lower end of a wide interval is rounded to 0.
            ensure!(
                0.0 <= low && low <= ratio && ratio <= high,
                "{id}: {low} to {high} is not an interval of {ratio}"
            );
        }
        let plausible = |[centre, error]: &[f64; 2]| {
            centre.abs() <= MAX_LOG_RATIO && (0.0..=MAX_LOG_RATIO).contains(error)
        };
        ensure!(self.observations.iter().all(plausible), "{id} has an observation that cannot be");
        ensure!(self.failed_side.is_none_or(|side| side < 2), "{id}: failed_side is neither 0 nor 1");
        Ok(())
    }
}

/// The result for one case.
pub struct Line {
    pub id: String,
    pub verdict: Verdict,
    pub estimate: Option<Estimate>,
    /// 95 % interval of the ratio, for the report of a run.
    report_ci: Option<[f64; 2]>,
    /// Step times in seconds, base and head.
    pub times: Option<[f64; 2]>,
    pub rounds: usize,
    /// Observations of the rounds, from which another threshold can be applied.
    observations: Vec<[f64; 2]>,
    pub reason: String,
    /// Index of the side that failed: 0 base, 1 head.
    failed_side: Option<usize>,
}

impl Line {
    pub fn named(id: &str, verdict: Verdict) -> Self {
        Self {
            id: id.to_owned(),
            verdict,
            estimate: None,
            report_ci: None,
            times: None,
            rounds: 0,
            observations: Vec::new(),
            reason: String::new(),
            failed_side: None,
        }
    }

    pub fn without(case: &Case, verdict: Verdict) -> Self {
        Self::named(&case.to_string(), verdict)
    }

    pub fn failed(case: &Case, reason: &str) -> Self {
        Self { reason: reason.to_owned(), failed_side: Some(1), ..Self::without(case, Verdict::Failed) }
    }

    pub fn judged(case: &Case, verdict: Verdict, estimate: Estimate, times: [f64; 2], rounds: usize) -> Self {
        Self { estimate: Some(estimate), times: Some(times), rounds, ..Self::without(case, verdict) }
    }

    /// Returns the result with base and head swapped.
    fn mirrored(mut self) -> Self {
        self.verdict = match self.verdict {
            Verdict::Slower => Verdict::Faster,
            Verdict::Faster => Verdict::Slower,
            Verdict::New => Verdict::Removed,
            Verdict::Removed => Verdict::New,
            same => same,
        };
        self.estimate =
            self.estimate.map(|e| Estimate { ratio: 1.0 / e.ratio, ci: [1.0 / e.ci[1], 1.0 / e.ci[0]] });
        self.times = self.times.map(|[base, head]| [head, base]);
        self.failed_side = self.failed_side.map(|side| 1 - side);
        self
    }

    /// Returns the bounds on the change of an inconclusive case.
    fn bound(&self) -> Option<String> {
        self.estimate.filter(|_| self.verdict == Verdict::Inconclusive)?.describe_bounds()
    }

    /// Applies another rule to a line of a finished comparison.
    fn reevaluate(saved: SavedLine, rule: Rule) -> Self {
        let interval = saved.interval();
        let mut line = Self::named(&saved.id, saved.verdict);
        line.reason = saved.reason;
        line.rounds = saved.rounds;
        line.failed_side = saved.failed_side.filter(|_| saved.verdict == Verdict::Failed);
        line.times = saved.base_ns.zip(saved.head_ns).map(|(base, head)| [base * 1e-9, head * 1e-9]);
        line.observations = saved.observations;
        if !line.observations.is_empty() {
            let judge = SequentialTest::replay(rule, &line.observations);
            line.verdict = judge.verdict().unwrap_or(Verdict::Inconclusive);
            line.estimate = judge.estimate();
        } else if let (Some(ratio), Some(ci)) = (saved.ratio, interval) {
            // A comparison with a baseline has no rounds, but its interval is enough.
            let estimate = Estimate { ratio, ci };
            line.verdict = baseline_level::reevaluate(&estimate, rule.threshold);
            line.estimate = Some(estimate);
        }
        line
    }

    /// Returns the result of a row of rounds.
    pub fn from_row(row: &Row, names: &[String; 2]) -> Self {
        let verdict = row.verdict().unwrap_or(Verdict::Inconclusive);
        let mut line = Self::without(&row.base, verdict);
        if row.base != row.head {
            // The id of a pair of backends has no backend.
            line.id = format!("{}/{}/{}", row.base.workload, row.base.method, row.base.shape);
        }
        if let Some(Failure { side, reason, .. }) = &row.failed {
            line.reason = format!("{}: {reason}", names[*side]);
            line.failed_side = Some(*side);
            return line;
        }
        line.estimate = row.estimate();
        line.report_ci = row.test.estimate_at(REPORT_CONFIDENCE).map(|estimate| estimate.ci);
        line.rounds = row.test.rounds();
        line.observations = row.test.observations();
        line.times = (line.rounds > 0).then(|| [row.step_time(0), row.step_time(1)]);
        line
    }
}

/// The result of a comparison.
pub struct Report {
    pub names: [String; 2],
    pub lines: Vec<Line>,
    notes: Vec<String>,
    threshold: f64,
    elapsed: Duration,
}

impl Report {
    pub fn new(
        names: [String; 2],
        mut lines: Vec<Line>,
        notes: Vec<String>,
        threshold: f64,
        elapsed: Duration,
    ) -> Self {
        let rank = |v: Verdict| Verdict::BY_SEVERITY.iter().position(|&w| w == v);
        let size = |l: &Line| l.estimate.map_or(0.0, |e| -e.ratio.ln().abs());
        lines.sort_by(|a, b| rank(a.verdict).cmp(&rank(b.verdict)).then(size(a).total_cmp(&size(b))));
        Self { names, lines, notes, threshold, elapsed }
    }

    /// Reads a finished comparison and applies another threshold, in percent.
    ///
    /// # Errors
    /// Returns an error if the JSON is not a comparison, or if a comparison cannot produce one of its values.
    pub fn reevaluate(json: Value, threshold: f64) -> Result<Self> {
        #[derive(Deserialize)]
        struct Saved {
            base: String,
            head: String,
            threshold: Option<f64>,
            #[serde(default)]
            notes: Vec<String>,
            cases: Vec<SavedLine>,
        }
        let mut saved: Saved = serde_json::from_value(json)?;
        ensure!(saved.threshold.is_none_or(|t| t > 0.0 && t <= 1.0), "its threshold is not a share");
        let mut ids = HashSet::new();
        for line in &saved.cases {
            line.check()?;
            ensure!(ids.insert(&line.id), "{} occurs twice", line.id);
        }
        let rule = rounds::rule(threshold / 100.0, saved.cases.len());
        let lines = saved.cases.into_iter().map(|case| Line::reevaluate(case, rule)).collect();
        saved.notes.push("another threshold for a finished comparison: nothing was measured now".to_owned());
        Ok(Self::new([saved.base, saved.head], lines, saved.notes, threshold, Duration::ZERO))
    }

    /// Returns the comparison with base and head swapped, from a comparison without rounds.
    pub fn mirrored(self) -> Self {
        let [base, head] = self.names;
        let lines = self.lines.into_iter().map(Line::mirrored).collect();
        Self::new([head, base], lines, self.notes, self.threshold, self.elapsed)
    }

    /// Returns 1 for a regression, 3 for an inconclusive comparison, else 0.
    pub fn exit_code(&self, strict: bool) -> u8 {
        let any = |verdict| self.lines.iter().any(|l| l.verdict == verdict);
        // A case that fails only on the head is a regression.
        let broken = self.lines.iter().any(|l| l.verdict == Verdict::Failed && l.failed_side == Some(1));
        let decided =
            [Verdict::Equivalent, Verdict::Faster, Verdict::New, Verdict::Removed].into_iter().any(any);
        if any(Verdict::Slower) || broken {
            1
        } else if !decided || (strict && (any(Verdict::Inconclusive) || any(Verdict::Failed))) {
            3
        } else {
            0
        }
    }

    fn summary(&self) -> String {
        let counts: Vec<String> = Verdict::BY_SEVERITY
            .iter()
            .filter_map(|&v| {
                let count = self.lines.iter().filter(|l| l.verdict == v).count();
                (count > 0).then(|| format!("{count} {}", v.id()))
            })
            .collect();
        let time = (!self.elapsed.is_zero()).then(|| format!(", {:.0} s", self.elapsed.as_secs_f64()));
        format!("{} (threshold {} %{})", counts.join(", "), self.threshold, time.unwrap_or_default())
    }

    /// Returns the comparison as text, JSON or Markdown.
    pub fn text(&self, json: bool, markdown: bool) -> String {
        if json {
            return format!("{:#}\n", self.json());
        }
        let rows: Vec<[String; 6]> = self.lines.iter().map(cells).collect();
        let mut out = String::new();
        let mut line = |text: &str| {
            out.push_str(text.trim_end());
            out.push('\n');
        };
        if markdown {
            let [base, head] = self.names.each_ref().map(|name| text::markdown(name));
            line(&format!("### {head} against {base}\n\n{}\n", self.summary()));
            line(&format!("\n| {} |\n|{}", COLUMNS.join(" | "), " --- |".repeat(COLUMNS.len())));
            rows.iter().for_each(|row| {
                line(&format!("| {} |", row.each_ref().map(|cell| text::markdown(cell)).join(" | ")));
            });
            line("");
            self.notes.iter().for_each(|note| line(&format!("- {}", text::markdown(note))));
            return out;
        }
        line(&format!("base: {}\nhead: {}\n", self.names[0], self.names[1]));
        line("");
        let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).chain([COLUMNS[i].len()]).max();
        let widths: Vec<usize> = (0..COLUMNS.len()).filter_map(width).collect();
        let padded = |row: &[String]| -> String {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(c, w)| format!("{c:<w$}")).collect();
            cells.join("  ")
        };
        line(&padded(&COLUMNS.map(str::to_owned)));
        rows.iter().for_each(|row| line(&padded(row)));
        line(&format!("\n{}", self.summary()));
        self.notes.iter().for_each(|note| line(&format!("note: {note}")));
        out
    }

    /// Returns the effect of the head's environment variables on each case that both sides ran.
    pub fn env_effects(&self, variables: &str, commit: &str) -> Vec<EnvEffect> {
        let effect = |line: &Line| {
            let ([base, head], estimate, ratio_ci) = (line.times?, line.estimate?, line.report_ci?);
            let finite = ratio_ci.iter().all(|c| c.is_finite());
            finite.then(|| EnvEffect {
                variables: variables.to_owned(),
                id: line.id.clone(),
                without_ns: base * 1e9,
                with_ns: head * 1e9,
                ratio: estimate.ratio,
                ratio_ci,
                commit: commit.to_owned(),
            })
        };
        self.lines.iter().filter_map(effect).collect()
    }

    /// Returns the comparison as JSON. Numbers that are not finite are null.
    pub fn json(&self) -> Value {
        let case = |line: &Line| {
            let undecided = line.estimate.filter(|_| line.verdict == Verdict::Inconclusive);
            let bounds = undecided.and_then(|estimate| estimate.bounds());
            json!({
                "id": line.id,
                "verdict": line.verdict,
                "ratio": line.estimate.map(|estimate| estimate.ratio),
                "ci": line.estimate.map(|estimate| estimate.ci),
                "base_ns": line.times.map(|[base, _]| base * 1e9),
                "head_ns": line.times.map(|[_, head]| head * 1e9),
                "rounds": line.rounds,
                "bounds": bounds.map(|[slower, faster]| json!({"slower_at_most": slower, "faster_at_most": faster})),
                "observations": line.observations,
                "failed_side": line.failed_side,
                "reason": line.reason,
            })
        };
        json!({
            "base": self.names[0],
            "head": self.names[1],
            "threshold": self.threshold / 100.0,
            "seconds": self.elapsed.as_secs_f64(),
            "notes": self.notes,
            "cases": self.lines.iter().map(case).collect::<Vec<Value>>(),
        })
    }
}

/// Returns the columns of a line: verdict, ratio, interval, both times, case.
fn cells(line: &Line) -> [String; 6] {
    let or = |text: Option<String>| text.unwrap_or_else(|| "–".to_owned());
    let remark = line.bound().unwrap_or_else(|| line.reason.clone());
    let case = if remark.is_empty() { line.id.clone() } else { format!("{} ({remark})", line.id) };
    [
        line.verdict.id().to_owned(),
        or(line.estimate.map(|e| format!("{:.3}", e.ratio))),
        or(line.estimate.map(|e| format!("{:.3} to {:.3}", e.ci[0], e.ci[1]))),
        or(line.times.map(|t| duration(t[0]))),
        or(line.times.map(|t| duration(t[1]))),
        case,
    ]
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.2} µs", s * 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdicts: &[Verdict]) -> Report {
        let lines = verdicts.iter().map(|&v| Line::named("a/b/c/d", v)).collect();
        Report::new(["a".to_owned(), "b".to_owned()], lines, Vec::new(), 2.0, Duration::ZERO)
    }

    #[test]
    fn exit_codes_are_what_a_merge_gate_needs() {
        use Verdict::*;
        for (verdicts, strict, code) in [
            (&[Equivalent, Faster][..], true, 0),
            (&[Equivalent, Slower], false, 1),
            (&[Equivalent, Inconclusive], false, 0),
            (&[Equivalent, Inconclusive], true, 3),
            (&[Inconclusive], false, 3),
            (&[New, Removed], true, 0),
            (&[Slower, Inconclusive], true, 1),
        ] {
            assert_eq!(report(verdicts).exit_code(strict), code, "{verdicts:?}");
        }
        let case: Case = "forward/torch-cpu/f32/indicator-b16".parse().unwrap();
        let failed = Report { lines: vec![Line::failed(&case, "it crashed")], ..report(&[]) };
        assert_eq!(failed.exit_code(false), 1);
    }

    #[test]
    fn inconclusive_cases_print_their_bounds() {
        let case: Case = "forward/torch-cpu/f32/indicator-b1".parse().unwrap();
        let estimate = Estimate { ratio: 1.01, ci: [0.996, 1.031] };
        let line = Line::judged(&case, Verdict::Inconclusive, estimate, [1e-3, 1.01e-3], 9);
        let shown = Report { lines: vec![line], ..report(&[]) };
        for markdown in [false, true] {
            let text = shown.text(false, markdown);
            assert!(text.contains("slower by at most 3.1 %, faster by at most 0.4 %"), "{text}");
        }
        let bounds = &shown.json()["cases"][0]["bounds"];
        assert!((bounds["slower_at_most"].as_f64().unwrap() - 0.031).abs() < 1e-9);
    }

    #[test]
    fn another_threshold_applies_to_a_finished_comparison() {
        let case: Case = "forward/torch-cpu/f32/indicator-b1".parse().unwrap();
        let estimate = Estimate { ratio: 1.03, ci: [1.029, 1.031] };
        let mut line = Line::judged(&case, Verdict::Slower, estimate, [1e-3, 1.03e-3], 12);
        // All rounds measure three percent.
        line.observations = (0..12).map(|i| [0.0296 + 1e-4 * f64::from(i % 3), 1e-4]).collect();
        let json = Report { lines: vec![line], ..report(&[]) }.json();
        let again = |threshold| Report::reevaluate(json.clone(), threshold).unwrap().lines[0].verdict;
        assert_eq!(again(2.0), Verdict::Slower);
        assert_eq!(again(5.0), Verdict::Equivalent);
        assert!(Report::reevaluate(json!({"base": "a"}), 2.0).is_err());
    }

    #[test]
    fn a_comparison_that_cannot_be_is_refused() {
        let line = json!({"id": "a/b/c/d", "verdict": "equivalent", "ratio": 1.0, "ci": [0.99, 1.01], "base_ns": 1.0,
                          "head_ns": 1.0, "observations": [[0.0, 0.001]]});
        let good = json!({"base": "a", "head": "b", "threshold": 0.02, "notes": [], "cases": [line]});
        assert!(Report::reevaluate(good.clone(), 2.0).is_ok());
        for (place, value) in [
            ("/cases/0/ratio", json!(-1)),
            ("/cases/0/ci", json!([2, 1])),
            ("/cases/0/ci", json!(["a", 1])),
            ("/cases/0/base_ns", json!(-5)),
            ("/cases/0/observations", json!([[1e308, 0.0]])),
            ("/cases/0/observations", json!([[0.0, -1.0]])),
            ("/cases/0/verdict", json!("fine")),
            ("/threshold", json!("x")),
            ("/notes", json!([1])),
            ("/cases", json!([line, line])),
        ] {
            let mut changed = good.clone();
            *changed.pointer_mut(place).unwrap() = value.clone();
            assert!(Report::reevaluate(changed, 2.0).is_err(), "{place} = {value}");
        }
    }

    #[test]
    fn names_and_reasons_are_text_in_markdown() {
        let mut shown = report(&[Verdict::Failed]);
        shown.names[0] = "<script>".to_owned();
        shown.lines[0].reason = "![i](http://x)".to_owned();
        let text = shown.text(false, true);
        assert!(text.contains("against &lt;script>") && text.contains("!\\[i](http://x)"), "{text}");
    }

    #[test]
    fn comparisons_of_older_versions_are_read() {
        let case = json!({"id": "a/b/c/d", "verdict": "gone"});
        let old = json!({"base": "a", "head": "b", "cases": [case]});
        let report = Report::reevaluate(old, 2.0).unwrap();
        assert_eq!(report.json()["cases"][0]["verdict"], "removed");
    }

    #[test]
    fn swapping_the_sides_inverts_the_result() {
        let case: Case = "forward/torch-cpu/f32/indicator-b1".parse().unwrap();
        let estimate = Estimate { ratio: 2.0, ci: [1.6, 2.5] };
        let line = Line::judged(&case, Verdict::Slower, estimate, [1.0, 2.0], 3);
        let lines = vec![line, Line::failed(&case, "it crashed"), Line::without(&case, Verdict::New)];
        let mirrored = Report { lines, ..report(&[]) }.mirrored();
        assert_eq!((mirrored.names[0].as_str(), mirrored.exit_code(false)), ("b", 0));
        let verdicts: Vec<Verdict> = mirrored.lines.iter().map(|line| line.verdict).collect();
        assert_eq!(verdicts, [Verdict::Failed, Verdict::Removed, Verdict::Faster]);
        let faster = &mirrored.lines[2];
        assert_eq!((faster.estimate.unwrap().ci, faster.times), ([0.4, 0.625], Some([2.0, 1.0])));
    }

    #[test]
    fn regressions_come_first() {
        let shown = report(&[Verdict::Equivalent, Verdict::Faster, Verdict::Slower]);
        assert_eq!(shown.lines[0].verdict, Verdict::Slower);
        assert_eq!(shown.lines[2].verdict, Verdict::Equivalent);
        let json = shown.json();
        assert_eq!(json["cases"][0]["verdict"], "slower");
        assert!(json["cases"][0]["ratio"].is_null());
    }
}

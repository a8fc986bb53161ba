//! `scripts/compare --bisect`: the first slower release or side, for one case.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use transformer_bench::compare::bisection::{self, Answer, Outcome};
use transformer_bench::compare::builds;
use transformer_bench::compare::decision::Verdict;
use transformer_bench::compare::revisions::{Source, Spec, title};
use transformer_bench::compare::worker::Side;
use transformer_bench::text;

use super::compare::{compare_sides, save};
use super::compare_arguments::{Arguments, no_case};
use super::options::print_progress;
use super::output::Report;

/// Compares sides with the first one until the first slower one is known, and prints it. Returns the exit code.
///
/// # Errors
/// Returns an error if the filter does not select one case, or if a side does not build or start.
pub fn run(arguments: &Arguments, sides: &[Source], filter: &str) -> Result<u8> {
    let pair = |index: usize| Spec {
        base: sides[0].clone(),
        head: sides[index].clone(),
        filter: filter.to_owned(),
        filter_hint: None,
    };
    let base = builds::build(&sides[0], &print_progress)?;
    check_one_case(arguments, &pair(1), &base)?;
    let mut reports = Vec::new();
    let outcome = bisection::first_slower(sides.len(), |index| {
        let spec = pair(index);
        let head = builds::build(&spec.head, &print_progress)?;
        print_progress(&format!("comparison {}: {} with {}", reports.len() + 1, head.name, base.name));
        let report = compare_sides(arguments, &spec, [base.clone(), head])?;
        save(&report)?;
        let answer = answer(&report)?;
        reports.push((index, report));
        Ok(answer)
    })?;
    let names: Vec<String> = sides.iter().map(title).collect();
    let conclusion = conclude(outcome, &names, &reports, arguments.threshold);
    super::show(&describe(arguments, outcome, &names, &reports, &conclusion))?;
    Ok(match outcome {
        Outcome::Found(_) => 1,
        Outcome::NoneSlower => 0,
        Outcome::Undecided { .. } => 3,
    })
}

/// Checks that the filter selects one case of the first side.
fn check_one_case(arguments: &Arguments, spec: &Spec, base: &Side) -> Result<()> {
    let cases = base.cases(arguments.set, &spec.filter, Instant::now() + arguments.minutes)?;
    match cases.as_slice() {
        [_] => Ok(()),
        [] => Err(no_case(spec, arguments.set)),
        [first, second, ..] => bail!(
            "--bisect follows one case, and the filter '{}' selects {}, such as {first} and {second}",
            spec.filter,
            cases.len()
        ),
    }
}

/// Returns the answer of a comparison of one case.
fn answer(report: &Report) -> Result<Answer> {
    let line = report.lines.first().context("the comparison has no case")?;
    Ok(match line.verdict {
        Verdict::Slower => Answer::Slower,
        Verdict::Equivalent | Verdict::Faster => Answer::NotSlower,
        Verdict::Inconclusive | Verdict::Failed | Verdict::New | Verdict::Removed => Answer::Unknown,
    })
}

/// Returns the result of the search as a sentence.
fn conclude(outcome: Outcome, names: &[String], reports: &[(usize, Report)], threshold: f64) -> String {
    let base = &names[0];
    let of_side =
        |index| reports.iter().find(|(i, _)| *i == index).and_then(|(_, report)| report.lines.first());
    match outcome {
        Outcome::Found(index) => {
            let percent = |ratio: f64| 100.0 * (ratio - 1.0);
            let change = of_side(index).and_then(|line| line.estimate).map_or_else(String::new, |e| {
                let [low, high] = e.ci.map(percent);
                format!(": by {:.1} % ({low:.1} to {high:.1}) compared with {base}", percent(e.ratio))
            });
            format!("first slower: {}{change}; {} is not slower", names[index], names[index - 1])
        }
        Outcome::NoneSlower => format!("none is slower than {base} by {threshold} %"),
        Outcome::Undecided { at, last_good, first_slow } => {
            let verdict = of_side(at).map_or("undecided", |line| line.verdict.id());
            let end = first_slow.map_or_else(
                || "if there is one".to_owned(),
                |index| format!("and is {} at the latest", names[index]),
            );
            format!(
                "undecided: {} is {verdict}. The first slower one comes after {}, {end}",
                names[at], names[last_good]
            )
        }
    }
}

/// Returns the search as text, Markdown or JSON.
fn describe(
    arguments: &Arguments,
    outcome: Outcome,
    names: &[String],
    reports: &[(usize, Report)],
    conclusion: &str,
) -> String {
    if arguments.json {
        let first = if let Outcome::Found(index) = outcome { Some(&names[index]) } else { None };
        let comparisons: Vec<Value> = reports.iter().map(|(_, report)| report.json()).collect();
        let all = json!({"base": names[0], "sides": names, "first_slower": first, "conclusion": conclusion,
                         "comparisons": comparisons});
        return format!("{all:#}\n");
    }
    let mut texts: Vec<String> =
        reports.iter().map(|(_, report)| report.text(false, arguments.markdown)).collect();
    let printed = if arguments.markdown { text::markdown(conclusion) } else { conclusion.to_owned() };
    texts.push(format!("{printed}\nsides: {}, comparisons: {}\n", names.len(), reports.len()));
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use transformer_bench::compare::decision::Estimate;

    use super::*;
    use crate::output::Line;

    fn report(verdict: Verdict) -> Report {
        let case = "forward/torch-cpu/f32/indicator-b1".parse().unwrap();
        let estimate = Estimate { ratio: 1.041, ci: [1.028, 1.054] };
        let line = Line::judged(&case, verdict, estimate, [1e-3, 1.041e-3], 12);
        Report::new(["a".to_owned(), "b".to_owned()], vec![line], Vec::new(), 2.0, Duration::ZERO)
    }

    #[test]
    fn only_a_decided_case_moves_the_search() {
        for (verdict, expected) in [
            (Verdict::Slower, Answer::Slower),
            (Verdict::Faster, Answer::NotSlower),
            (Verdict::Equivalent, Answer::NotSlower),
            (Verdict::Inconclusive, Answer::Unknown),
            (Verdict::Failed, Answer::Unknown),
            (Verdict::Removed, Answer::Unknown),
        ] {
            assert_eq!(answer(&report(verdict)).unwrap(), expected, "{verdict:?}");
        }
    }

    #[test]
    fn the_conclusion_names_the_side_and_its_change() {
        let names: Vec<String> = ["2.9", "2.10", "2.11", "2.12"].map(str::to_owned).into();
        let reports = [(2, report(Verdict::Slower)), (1, report(Verdict::Inconclusive))];
        assert_eq!(
            conclude(Outcome::Found(2), &names, &reports, 2.0),
            "first slower: 2.11: by 4.1 % (2.8 to 5.4) compared with 2.9; 2.10 is not slower"
        );
        assert_eq!(conclude(Outcome::NoneSlower, &names, &[], 2.0), "none is slower than 2.9 by 2 %");
        let undecided = Outcome::Undecided { at: 1, last_good: 0, first_slow: Some(2) };
        assert_eq!(
            conclude(undecided, &names, &reports, 2.0),
            "undecided: 2.10 is inconclusive. The first slower one comes after 2.9, and is 2.11 at the latest"
        );
    }
}

//! `report.html`: one file, no network.

use anyhow::{Context, Result};
use minijinja::{Environment, context};

use super::tables::{self, Table};
use super::{plots, summary};
use crate::results::Results;

fn value(table: &Table) -> minijinja::Value {
    context! { title => table.title, note => table.note, header => table.header, rows => table.rows }
}

/// The page. `timings` gives a case's timings in seconds, nothing where they are not known;
/// `command` measures the run again.
pub fn render(results: &Results, timings: &dyn Fn(&str) -> Vec<f64>, command: &str) -> Result<String> {
    let mut environment = Environment::new();
    // By the name's ending, everything that is printed is escaped.
    environment.add_template("page.html", include_str!("page.html"))?;
    let mut tables = tables::all(results);
    let every = match tables.last() {
        Some(last) if last.title == tables::EVERY_CASE => tables.pop(),
        _ => None,
    };
    let [hardware, versions] = tables::machine_lines(results);
    let m = &results.machine;
    let mut machine: Vec<(String, String)> = vec![
        ("CPU".to_owned(), format!("{}, {} cores", m.cpu, m.cores)),
        ("memory".to_owned(), format!("{:.1} GB", m.memory_bytes as f64 / 1e9)),
        ("GPU".to_owned(), if m.gpus.is_empty() { "none".to_owned() } else { m.gpus.join(", ") }),
        ("driver".to_owned(), m.driver.clone()),
        ("system".to_owned(), format!("{} ({})", m.os, m.arch)),
        (
            "commit".to_owned(),
            format!("{}{}", m.commit, if m.dirty { ", with uncommitted changes" } else { "" }),
        ),
        ("build".to_owned(), m.profile.clone()),
    ];
    machine.extend(m.versions.iter().chain(&m.power).chain(&m.environment).cloned());
    machine.retain(|(_, value)| !value.is_empty());
    let shown = |p: plots::Plot| context! { title => p.title, note => p.note, svg => p.svg };
    let picture = plots::training(results)?.map(shown);
    let plots: Vec<_> = plots::all(results, timings)?.into_iter().map(shown).collect();
    let (quiet, machine_was) = tables::quiet(results);
    let empty = Table { title: tables::EVERY_CASE.to_owned(), note: "", header: &[], rows: Vec::new() };
    environment
        .get_template("page.html")?
        .render(context! {
            model => tables::model_line(results),
            name => results.model.as_ref().map(|own| own.configuration.name),
            slug => m.slug(),
            hardware,
            versions,
            command,
            machine,
            quiet,
            machine_was,
            picture,
            plots,
            answer => summary::answer(results),
            limits => summary::limits(results),
            verdict => summary::verdict(results),
            first => tables::first(results).as_ref().map(value),
            tables => tables.iter().map(value).collect::<Vec<_>>(),
            every => value(every.as_ref().unwrap_or(&empty)),
            missing => tables::missing(results),
            invitation => tables::invitation(results),
            program => env!("CARGO_PKG_VERSION"),
        })
        .context("the page could not be made")
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::tests::{record, turn_of};
    use super::*;
    use crate::results::machine::Machine;
    use crate::results::{Record, Status};
    use crate::suite::{Set, cases};

    #[test]
    fn hostile_names_are_text() {
        let case = cases(Set::Quick)[0];
        let mut results = Results::new(
            Machine { cpu: "<script>alert(1)</script>".to_owned(), ..Machine::default() },
            vec![Record::unmeasured(&case, Status::Error, "<img src=x onerror=alert(1)>")],
        );
        results.machine.versions.push(("<b>".to_owned(), "&".to_owned()));
        let page = render(&results, &|_| Vec::new(), "./scripts/bench '<x>'").unwrap();
        assert!(!page.contains("<script>") && !page.contains("<img") && !page.contains("<b>"));
        assert!(page.contains("&lt;script&gt;") && page.contains("&lt;img"));
    }

    #[test]
    fn a_page_of_500_cases_is_made_quickly_and_stays_small() {
        let all: Vec<Record> = cases(Set::Full)
            .iter()
            .cycle()
            .take(500)
            .enumerate()
            .map(|(i, case)| record(&case.to_string(), 1e6 + 1e4 * i as f64))
            .collect();
        let results = Results::new(Machine::default(), all);
        let start = Instant::now();
        let page =
            render(&results, &|_| (0..100).map(|i| 1.0 + 0.001 * f64::from(i)).collect(), "x").unwrap();
        let seconds = start.elapsed().as_secs_f64();
        assert!(seconds < 2.0, "{seconds} s");
        assert!(page.len() < 3_000_000, "{} bytes", page.len());
        // The only address is the namespace of SVG, which nothing loads.
        assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    }

    #[test]
    fn every_headline_figure_and_its_command_is_on_the_page() {
        let ids = ["train-step/torch-cpu/f32/indicator-b16", "train-step/mlx-cpu/f32/indicator-b16"];
        let cases = vec![record(ids[0], 500e6), record(ids[1], 1000e6)];
        let mut results = Results::new(Machine::default(), cases);
        results.interleaved.push(turn_of(ids, 2.0, [1.9, 2.1]));
        let page = render(&results, &|_| Vec::new(), "./scripts/bench --quick").unwrap();
        let page = page.replace("&#x2f;", "/");
        let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("no {text}"));
        assert!(
            at("class=\"answer\"") < at("<svg") && at("<svg") < at("<table"),
            "the answer and the picture come first"
        );
        assert!(at("class=\"badge quiet\"") < at("<svg"));
        assert!(at("<table") < at("Not measured here"), "what is missing is folded below");
        for text in
            ["PyTorch is 2.00 times as fast as MLX", "32.0", "16.0", "./scripts/bench --quick", "<svg"]
        {
            assert!(page.contains(text), "{text}");
        }
    }
}

//! `report.html`: one file that loads nothing from the network.

use anyhow::{Context, Result};
use minijinja::{Environment, Value, context};

use super::table::Table;
use super::tables;
use super::{notes, plots, summary};
use crate::installation;
use crate::results::Results;

fn table(table: &Table) -> Value {
    let Table { title, note, header, rows } = table;
    context! { title, note, header, rows, numeric => table.numeric_columns() }
}

fn plot(plot: plots::Plot) -> Value {
    context! { title => plot.title, note => plot.note, svg => plot.svg }
}

/// Returns the machine as pairs of name and value.
fn machine(results: &Results) -> Vec<(String, String)> {
    let m = &results.machine;
    let mut rows = notes::hardware(results);
    rows.extend([("architecture", &m.arch), ("build", &m.profile)].map(|(k, v)| (k.to_owned(), v.clone())));
    rows.extend(notes::versions(results));
    rows.extend(m.power.iter().chain(&m.environment).cloned());
    rows.retain(|(_, value)| !value.is_empty());
    rows
}

/// Renders the page. `samples` returns the samples of a case in seconds, or nothing if they are unknown. `command`
/// repeats the run.
///
/// # Errors
/// Returns an error if a plot cannot be drawn.
pub fn render(results: &Results, samples: &dyn Fn(&str) -> Vec<f64>, command: &str) -> Result<String> {
    let mut environment = Environment::new();
    // The extension of the name turns on escaping.
    environment.add_template("page.html", include_str!("page.html"))?;
    let (all_cases, others): (Vec<Table>, Vec<Table>) =
        tables::all(results).into_iter().partition(|table| table.title == tables::ALL_CASES);
    let [hardware, versions] = notes::machine_lines(results);
    let (quiet, disturbance) = notes::disturbance(results);
    let plots: Vec<Value> = plots::all(results, samples)?.into_iter().map(plot).collect();
    environment
        .get_template("page.html")?
        .render(context! {
            model => notes::model_line(results),
            name => results.model.as_ref().map(|custom| custom.configuration.name),
            slug => results.machine.slug(),
            hardware,
            versions,
            command,
            machine => machine(results),
            quiet,
            disturbance,
            picture => plots::training(results)?.map(plot),
            plots,
            answer => summary::answer(results),
            limits => summary::limits(results),
            findings => summary::findings(results),
            first => tables::first(results).as_ref().map(table),
            tables => others.iter().map(table).collect::<Vec<_>>(),
            all_cases => all_cases.first().map(table),
            missing => notes::not_measured(results),
            invitation => notes::invitation(results),
            bench => installation::command("bench"),
            program => env!("CARGO_PKG_VERSION"),
        })
        .context("the page could not be rendered")
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::tests::{interleaved, record, run};
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
    fn a_page_of_500_cases_renders_quickly_and_stays_small() {
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
        // The only address is the namespace of SVG, which is not loaded.
        assert_eq!(page.matches("http").count(), page.matches("http://www.w3.org/2000/svg").count());
    }

    #[test]
    fn the_page_begins_with_the_answer_and_has_every_speed_and_the_command() {
        let ids = ["train-step/torch-cpu/f32/indicator-b16", "train-step/mlx-cpu/f32/indicator-b16"];
        let mut results = run(&[(ids[0], 500e6), (ids[1], 1000e6)]);
        results.interleaved.push(interleaved(ids, 2.0, [1.9, 2.1]));
        let page = render(&results, &|_| Vec::new(), "./scripts/bench --quick").unwrap();
        let page = page.replace("&#x2f;", "/");
        let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("no {text}"));
        assert!(
            at("class=\"answer\"") < at("<svg") && at("<svg") < at("<table"),
            "the answer and the picture come first"
        );
        assert!(at("class=\"badge quiet\"") < at("<svg"));
        assert!(at("<table") < at("Not measured</summary>"), "missing results are folded below the table");
        for text in [
            "PyTorch trains indicator 2.00 times as fast as MLX",
            "32.0",
            "16.0",
            "./scripts/bench --quick",
            "<svg",
        ] {
            assert!(page.contains(text), "{text}");
        }
    }
}

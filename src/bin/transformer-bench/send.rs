//! `scripts/baseline save NAME --send`: the text of an issue with which a user can send results.

use std::path::Path;

use anyhow::Result;
use transformer_bench::files;
use transformer_bench::report::notes;
use transformer_bench::results::baseline::Baseline;
use transformer_bench::results::{self, Results, Status};
use transformer_bench::text::{markdown, printable};

/// Fields of `.github/ISSUE_TEMPLATE/baseline.yml`, in its order.
const FIELDS: [&str; 4] =
    ["Machine", "Which other programs were running?", "baseline.json", "What did not work?"];

/// Writes the text of an issue about a saved baseline next to the results, and prints it. Sends nothing.
///
/// # Errors
/// Returns an error if the text cannot be written.
pub fn write(saved: &Baseline, file: &Path) -> Result<()> {
    let text = issue(&saved.results(), file);
    let path = results::folder().join("issue.md");
    files::write_atomic(&path, &text)?;
    super::show(&format!(
        "\n{text}\nNothing was sent. The text above is in {}: open an issue with the form \"Results of a machine\", copy \
         the answers, and attach {}.\n",
        path.display(),
        file.display()
    ))
}

/// Returns the title of an issue and the answer to each field of the form.
fn issue(results: &Results, file: &Path) -> String {
    let [machine, versions] = notes::machine_lines(results);
    let (_, disturbance) = notes::disturbance(results);
    let attach = format!("Attach the file {}.", printable(&file.to_string_lossy()));
    let answers = [format!("{machine}\n{versions}"), disturbance, attach, failures(results)];
    let mut text = format!("Results: {}\n", results.machine.slug());
    for (field, answer) in FIELDS.iter().zip(answers) {
        text.push_str(&format!("\n### {field}\n\n{answer}\n"));
    }
    text
}

/// Lists the cases that failed. Skipped cases did what they should.
fn failures(results: &Results) -> String {
    let failed = results.cases.iter().filter(|r| !matches!(r.status, Status::Measured | Status::Skipped));
    let lines: Vec<String> = failed.map(|r| markdown(&format!("{}: {}", r.id, r.reason))).collect();
    if lines.is_empty() {
        "Every case that this machine supports was measured.".to_owned()
    } else {
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use transformer_bench::results::Record;
    use transformer_bench::results::machine::Machine;

    use super::*;

    #[test]
    fn the_text_answers_every_field_of_the_form() {
        let form = include_str!("../../../.github/ISSUE_TEMPLATE/baseline.yml");
        let labels: Vec<&str> = form.lines().filter_map(|line| line.trim().strip_prefix("label: ")).collect();
        assert_eq!(labels, FIELDS);
        let record = |id: &str, status, reason| Record::unmeasured(&id.parse().unwrap(), status, reason);
        let records = vec![
            record("train-step/torch-mps/f32/indicator-b16", Status::Error, "Metal <failed>"),
            record("train-step/torch-cuda/f32/indicator-b16", Status::Skipped, "no NVIDIA GPU"),
        ];
        let machine = Machine { cpu: "Apple M4".to_owned(), cores: 10, ..Machine::default() };
        let text = issue(&Results::new(machine, records), Path::new("/data/first/baseline.json"));
        assert!(text.starts_with("Results: apple-m4"), "{text}");
        for label in labels {
            assert!(text.contains(&format!("\n### {label}\n")), "{text}");
        }
        assert!(
            text.contains("f32/indicator-b16: Metal &lt;failed>") && !text.contains("no NVIDIA GPU"),
            "{text}"
        );
        assert!(text.contains("Attach the file /data/first/baseline.json."), "{text}");
    }
}

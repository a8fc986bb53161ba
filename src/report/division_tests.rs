//! A reader can divide the printed speeds: the result is the printed ratio, up to rounding.

use std::path::Path;

use regex::Regex;

use super::markdown::render;
use super::publish;
use super::tests::{interleaved, record, run};

/// Returns a printed number.
fn number(text: &str) -> f64 {
    text.replace(',', "").parse().unwrap_or_else(|_| panic!("'{text}' is not a number"))
}

/// Returns the largest relative error of a number through its rounding.
fn rounding(text: &str) -> f64 {
    let places = text.split_once('.').map_or(0, |(_, decimals)| decimals.len() as i32);
    0.5 * 10f64.powi(-places) / number(text)
}

/// Checks that two printed speeds divide to a printed ratio.
fn check(speed: &str, other: &str, ratio: &str) {
    let error = (number(speed) / number(other) / number(ratio)).ln().abs();
    // Speeds from 1,000 on are rounded to integers, and so are intervals of three digits.
    let allowed = [speed, other, ratio].map(rounding).iter().sum::<f64>();
    assert!(error <= 1.01 * allowed, "{speed} / {other} is not {ratio}");
}

/// Checks every ratio with its two speeds in a Markdown page. Returns their number.
fn check_page(page: &str) -> usize {
    let sentence =
        Regex::new(r"trains \S+ ([\d.,]+) times as fast as [^:]*: ([\d.,]+) \S+ with \S+ and ([\d.,]+) ");
    let answer_row = Regex::new(r"\| +([\d.,]+) \(`[^|]*\| +([\d.,]+) \(`[^|]*\| +\**([\d.]+)×");
    let mut pairs = 0;
    for found in sentence.unwrap().captures_iter(page) {
        check(&found[2], &found[3], &found[1]);
        pairs += 1;
    }
    for found in answer_row.unwrap().captures_iter(page) {
        check(&found[1], &found[2], &found[3]);
        pairs += 1;
    }
    pairs + check_speed_tables(page)
}

/// Checks the columns `samples/s` and `vs <first row>` of the tables of speeds.
fn check_speed_tables(page: &str) -> usize {
    let (mut columns, mut base, mut pairs) = (None, String::new(), 0);
    for line in page.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let column = |name: &str| cells.iter().position(|cell| cell.starts_with(name));
        if let (Some(speed), Some(ratio)) = (column("samples/s").or(column("tokens/s")), column("vs ")) {
            columns = Some((speed, ratio));
            base.clear();
        } else if !line.starts_with('|') {
            columns = None;
        }
        let Some((speed, ratio)) = columns else { continue };
        let Some(ratio) = cells[ratio].strip_suffix('×') else { continue };
        if base.is_empty() {
            cells[speed].clone_into(&mut base);
        }
        check(cells[speed], &base, ratio);
        pairs += 1;
    }
    pairs
}

#[test]
fn printed_speeds_divide_to_the_printed_ratio() {
    let ids =
        ["train-step/torch-cpu/mixed-compile/indicator-b16", "train-step/mlx-cpu/f32-tuned/indicator-b16"];
    for ratio in [4.54, 0.218, 1.003, 17.37] {
        // The medians of one run differ from the times of the rounds.
        let mut results = run(&[(ids[0], 222e6), (ids[1], 230e6 * ratio)]);
        results.cases.push(record("train-step/torch-cpu/f32/indicator-b16", 700e6));
        assert!(check_page(&render(&results, "x")) > 0);
        results.interleaved.push(interleaved(ids, ratio, [0.95 * ratio, 1.05 * ratio]));
        let page = render(&results, "x");
        assert!(page.contains("| 3 rounds"), "{page}");
        assert!(check_page(&page) >= 3, "{page}");
    }
}

#[test]
fn published_speeds_divide_to_the_published_ratio() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages: Vec<_> = publish::files(root).unwrap();
    let pairs = |page: &(std::path::PathBuf, String)| check_page(&page.1);
    assert!(pages.iter().map(pairs).sum::<usize>() > 10);
}

#[test]
#[should_panic(expected = "11,611 / 1,545 is not 6.29")]
fn speeds_of_another_source_are_found() {
    check_page(
        "**PyTorch trains indicator 6.29 times as fast as MLX (x): 11,611 samples/s with a and 1,545 samples/s**",
    );
}

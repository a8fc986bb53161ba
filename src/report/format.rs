//! Numbers as text. Every table, sentence and picture formats them here.

use super::{Ratio, rate};
use crate::suite::Shape;

/// Formats a number with `count` significant digits and with all digits before the point: `0.012`, `11,611`.
pub fn significant(value: f64, count: i32) -> String {
    let places = if value == 0.0 { 0 } else { count - 1 - value.abs().log10().floor() as i32 };
    let text = format!("{value:.*}", places.clamp(0, 9) as usize);
    let whole = text.find('.').unwrap_or(text.len());
    let mut grouped = String::new();
    for (i, c) in text.chars().enumerate() {
        if i > 0 && i < whole && (whole - i).is_multiple_of(3) && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(c);
    }
    grouped
}

/// Formats a number with three significant digits.
pub fn digits(value: f64) -> String {
    significant(value, 3)
}

/// Formats a number with an SI prefix, ready for a unit: `1.23 M`.
pub fn prefixed(value: f64) -> String {
    let (scale, prefix) = match value {
        v if v >= 1e12 => (1e12, " T"),
        v if v >= 1e9 => (1e9, " G"),
        v if v >= 1e6 => (1e6, " M"),
        v if v >= 1e4 => (1e3, " k"),
        _ => (1.0, " "),
    };
    digits(value / scale) + prefix
}

/// Formats nanoseconds with a suitable unit.
pub fn time(ns: f64) -> String {
    match ns {
        n if n >= 1e9 => digits(n / 1e9) + " s",
        n if n >= 1e6 => digits(n / 1e6) + " ms",
        n if n >= 1e3 => digits(n / 1e3) + " µs",
        n => digits(n) + " ns",
    }
}

pub fn megabytes(bytes: u64) -> String {
    digits(bytes as f64 / 1e6) + " MB"
}

/// Formats the speed at a step time in nanoseconds: `28.6 samples/s`.
pub fn speed(shape: Shape, ns: f64) -> String {
    let (value, unit) = rate(shape, ns);
    format!("{} {unit}", digits(value))
}

pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Formats a share with its interval: `98.3 % (97.8 to 98.6)`.
pub fn percent_with_range(Ratio { value, range: [low, high] }: Ratio) -> String {
    format!("{} ({:.1} to {:.1})", percent(value), 100.0 * low, 100.0 * high)
}

/// Formats an interval with three significant digits: `1.90 to 5.38`.
pub fn range([low, high]: [f64; 2]) -> String {
    format!("{} to {}", digits(low), digits(high))
}

/// Formats a count with its noun: `1 case`, `2 cases`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Returns the text, or a dash if there is none.
pub fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "–".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_one_thousands_separator() {
        for (value, text) in [
            (1.23456, "1.23"),
            (123.456, "123"),
            (1234.56, "1,235"),
            (11611.4, "11,611"),
            (9999.7, "10,000"),
            (1_234_567.0, "1,234,567"),
            (-1234.5, "-1,234"),
            (-123_456.0, "-123,456"),
            (0.012345, "0.0123"),
            (0.0, "0"),
        ] {
            assert_eq!(digits(value), text);
        }
        assert_eq!([significant(6.29, 2), significant(11.6, 2)], ["6.3", "12"]);
        assert_eq!(prefixed(2.5e9), "2.50 G");
        assert_eq!(time(1.5e6), "1.50 ms");
        assert_eq!([count(1, "case"), count(2, "case")], ["1 case", "2 cases"]);
    }
}

//! Text from files and other programs. It is cleaned once where it is read, and escaped for where it goes.
//!
//! | source or target | function |
//! | --- | --- |
//! | any text, when it is read | [`printable`], [`one_line`], [`shortened`], [`parse_json`] |
//! | an error | [`error_line`] |
//! | an environment variable | [`variable`] |
//! | a line or cell of Markdown | [`markdown`] |
//! | text or an attribute of HTML and SVG | [`html`] |
//! | a cell of a spreadsheet | [`csv_cell`] |
//! | a terminal | [`terminal`] |

use anyhow::{Result, bail};
use serde_json::{Map, Value};

/// Maximum length of [`one_line`] in characters.
const MAX_LINE: usize = 300;

/// Returns true for a character that changes how the text around it is shown: control characters of both ranges (C0 and
/// C1), line and paragraph separators, and bidirectional controls (Unicode Standard Annex #9, table 1).
fn is_control(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{61c}' | '\u{200e}' | '\u{200f}')
        || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Replaces control characters by spaces: a file may come from anybody and must not control a terminal or a page.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if is_control(c) { ' ' } else { c }).collect()
}

/// Shortens a text to one printable line: a framework may return the whole output of a compiler.
pub fn one_line(text: &str) -> String {
    let mut line = String::new();
    for word in printable(text).split_whitespace() {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    shortened(line, MAX_LINE)
}

/// Maximum length of [`error_line`] in characters: room for a list of differences.
const MAX_ERROR: usize = 2000;

/// Formats an error with its causes in one printable line.
pub fn error_line(error: &anyhow::Error) -> String {
    shortened(printable(&format!("{error:#}")), MAX_ERROR)
}

/// Cuts a text after `length` characters, and marks the cut.
pub fn shortened(mut line: String, length: usize) -> String {
    if let Some((end, _)) = line.char_indices().nth(length) {
        line.replace_range(end.., "…");
    }
    line
}

/// Parses JSON and makes all of its strings printable.
///
/// # Errors
/// Returns an error if the text is not JSON.
pub fn parse_json(text: &str) -> serde_json::Result<Value> {
    let mut value = serde_json::from_str(text)?;
    clean_value(&mut value);
    Ok(value)
}

fn clean_value(value: &mut Value) {
    match value {
        Value::String(text) if text.contains(is_control) => *text = printable(text),
        Value::Array(values) => values.iter_mut().for_each(clean_value),
        Value::Object(fields) => {
            fields.values_mut().for_each(clean_value);
            if fields.keys().any(|name| name.contains(is_control)) {
                let cleaned: Map<String, Value> =
                    std::mem::take(fields).into_iter().map(|(name, v)| (printable(&name), v)).collect();
                *fields = cleaned;
            }
        }
        _ => {}
    }
}

/// Returns an environment variable, or `None` if it is unset or empty.
///
/// # Errors
/// Returns an error if the value is not UTF-8.
pub fn variable(name: &str) -> Result<Option<String>> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(value)) => {
            bail!("{name}={} is not UTF-8", printable(&value.to_string_lossy()))
        }
    }
}

/// Escapes text for a line or cell of Markdown. The result has no HTML, column, line break, code, link, image, heading or
/// quote.
pub fn markdown(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '|' | '\\' | '`' | '[' => out.extend(['\\', c]),
            '#' | '>' if out.trim_start().is_empty() => out.extend(['\\', c]),
            '<' => out.push_str("&lt;"),
            '&' if rest.peek().is_some_and(|next| next.is_ascii_alphanumeric() || *next == '#') => {
                out.push_str("&amp;");
            }
            c if is_control(c) => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Returns text as a code span of Markdown. It contains no backtick, because a longer fence would be hard to read.
pub fn markdown_code(text: &str) -> String {
    format!("`{}`", printable(text).replace('`', "'"))
}

/// Escapes text for the content or an attribute of an element of HTML or SVG.
pub fn html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if is_control(c) => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Escapes text for a cell of a spreadsheet, which computes a cell that begins like a formula
/// (<https://owasp.org/www-community/attacks/CSV_Injection>).
pub fn csv_cell(text: &str) -> String {
    let text = printable(text);
    if text.trim_start().starts_with(['=', '+', '-', '@']) { format!("'{text}") } else { text }
}

/// Replaces control characters other than line feeds by spaces.
pub fn terminal(text: &str) -> String {
    text.chars().map(|c| if is_control(c) && c != '\n' { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An escape sequence in both forms, line ends of several kinds, and text that is shown from right to left.
    const HOSTILE: &str = "a\u{1b}[31mb\u{9b}31mc\r\nd\u{85}e\u{2028}f\u{202e}g\u{2066}h\u{7}";

    #[test]
    fn no_control_character_is_printable() {
        let clean = printable(HOSTILE);
        assert_eq!(clean, "a [31mb 31mc  d e f g h ");
        for text in [markdown(HOSTILE), html(HOSTILE), csv_cell(HOSTILE), markdown_code(HOSTILE)] {
            assert!(!text.contains(is_control), "{text:?}");
        }
        assert_eq!(terminal("a\n\u{9b}b\rc"), "a\n b c");
        assert_eq!(printable("µs → ×, ü"), "µs → ×, ü");
    }

    #[test]
    fn a_reason_is_one_short_line() {
        assert_eq!(one_line("a\n  b\tc "), "a b c");
        let long = one_line(&"é".repeat(1000));
        assert!(long.ends_with("é…") && long.chars().count() == 301, "{long}");
        let error = anyhow::anyhow!("{HOSTILE}{}", "é".repeat(5000));
        assert!(error_line(&error).chars().count() == 2001 && !error_line(&error).contains(is_control));
    }

    #[test]
    fn strings_and_names_of_json_become_printable() {
        let value = parse_json(r#"{"a\u001b": ["\u009b", {"b": "x\ny"}], "c": 1.5}"#).unwrap();
        assert_eq!(value.to_string(), r#"{"a ":[" ",{"b":"x y"}],"c":1.5}"#);
        assert!(parse_json("{").is_err());
    }

    #[test]
    fn markdown_has_no_html_link_image_code_or_heading() {
        for (text, escaped) in [
            ("a|b<script>", "a\\|b&lt;script>"),
            ("[l](javascript:x) ![i](http://x)", "\\[l](javascript:x) !\\[i](http://x)"),
            ("\\[l](x) `code`", "\\\\\\[l](x) \\`code\\`"),
            ("# h", "\\# h"),
            (" > q", " \\> q"),
            ("&lt; & AT&#65;", "&amp;lt; & AT&amp;#65;"),
            ("2 > 1, #3", "2 > 1, #3"),
        ] {
            assert_eq!(markdown(text), escaped);
        }
        assert_eq!(markdown_code("a`b|c"), "`a'b|c`");
    }

    #[test]
    fn other_targets_are_escaped() {
        assert_eq!(html("<a href=\"x\">&'"), "&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
        for formula in ["=1+1", "+1", "-1", "@x", " =1", "\t=1"] {
            assert!(csv_cell(formula).starts_with('\''), "{formula:?}");
        }
        assert_eq!(csv_cell("no Mac"), "no Mac");
    }
}

//! Translates files of older versions: `results.json` and baselines, before they are read.
//!
//! | version | change |
//! | --- | --- |
//! | 2 | PyTorch's autocast is a precision of its own; `-captured` is `-graph` (PyTorch) or `-compile` (MLX) |
//! | 3 | ids and fields have the names of the PyTorch and MLX documentation: see [`RENAMED_WORDS`] and [`RENAMED_KEYS`] |
//! | 4 | intervals of comparisons are 95 % intervals, like those of the cases, and no longer 99 % |

use once_cell::sync::Lazy;
use regex::Regex;
use serde_json::Value;

use crate::statistics::{REPORT_CONFIDENCE, student_t_two_sided, trim};
use crate::suite::{BackendId, Framework};

/// The version of `results.json` and of baselines that is written, and the newest that is read.
pub const VERSION: u64 = 4;

/// Keys of version 2 and their names in version 3.
const RENAMED_KEYS: &[(&str, &str)] = &[
    ("others", "background_load"),
    ("vectors", "simd"),
    ("turns", "interleaved"),
    ("settings", "env_effects"),
    ("setting", "variables"),
    ("waiting_share", "cpu_wait_share"),
    ("exposed", "exposed_communication"),
    ("engine", "comm_backend"),
];

/// Fields of a custom model in version 2 and their names in version 3.
const RENAMED_MODEL_KEYS: &[(&str, &str)] =
    &[("hidden", "ffn-width"), ("norm-place", "norm-order"), ("query-key-norm", "qk-norm"), ("gated", "glu")];

/// Parts of ids of version 2, and of filters over them, with their names in version 3. `amp` goes first:
/// version 2 used it for `mixed`, and `autocast` for the present `amp`.
const RENAMED_WORDS: &[(&str, &str)] = &[
    (r"\bamp\b", "mixed"),
    (r"\bautocast\b", "amp"),
    (r"-opt\b", "-tuned"),
    (r"\b(f32|tf32|bf16|f16|mixed|amp)-attention\b", "$1-sdpa"),
    (r"\b(f32|tf32|bf16|f16|mixed|amp)-optimizer\b", "$1-fused-adamw"),
    (r"\b(f32|tf32|bf16|f16|mixed|amp)-graph\b", "$1-cudagraph"),
    (r"-r(\d+)\b", "-dp$1"),
    (r"\b(b\d+(?:-h\d+)?)-n(\d+)-d", "$1-t$2-d"),
    (r"\bm(\d+)\b", "${1}mib"),
    (r"\bm(\([\d|]+\))", "${1}mib"),
];

/// Keys whose text is an id, a part of one or a filter over ids.
const KEYS_OF_IDS: &[&str] = &[
    "id",
    "precision",
    "shape",
    "base",
    "head",
    "command",
    "filter",
    "function_id",
    "value_str",
    "full_id",
    "directory_name",
    "title",
];

/// Texts of version 2 about malloc, in the versions and environment of a machine and in environment effects.
const RENAMED_TEXTS: &[(&str, &str)] = &[
    (r"^heap$", "malloc"),
    (r"\bfreed memory kept$", "retains freed memory"),
    (r"\bfreed memory given back at will$", "default policy"),
    (r"\bTRANSFORMER_BENCH_HEAP=system\b", "TRANSFORMER_BENCH_MALLOC=default"),
    (r"\bTRANSFORMER_BENCH_HEAP=kept\b", "TRANSFORMER_BENCH_MALLOC=retain"),
    (r"\bTRANSFORMER_BENCH_HEAP\b", "TRANSFORMER_BENCH_MALLOC"),
];

/// Translates a parsed file of `version` into the present one.
pub fn upgrade(file: &mut Value, version: u64) {
    if version < 3 {
        upgrade_value(file, version, None);
    }
    if version < VERSION {
        narrow_intervals(file);
        // Anything else is not a file of this suite, and its reader says so.
        if let Value::Object(fields) = file {
            fields.insert("version".to_owned(), VERSION.into());
        }
    }
}

/// A number of rounds from which Student's t hardly depends on it.
const MANY_ROUNDS: u64 = 1000;

/// Turns 99 % intervals into 95 % intervals. Both are intervals of a log ratio by Student's t, so their widths have the
/// ratio of two critical values.
fn narrow_intervals(file: &mut Value) {
    for list in ["interleaved", "env_effects"] {
        for result in file.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            // Effects of variables lack the number of rounds. For many rounds, the interval shrinks the least.
            let rounds =
                result.get("rounds").and_then(Value::as_u64).unwrap_or(MANY_ROUNDS).clamp(2, MANY_ROUNDS);
            let rounds = rounds as usize;
            let freedom = (rounds - 2 * trim(rounds) - 1) as f64;
            let critical = |confidence| student_t_two_sided(freedom, 1.0 - confidence);
            let share = critical(REPORT_CONFIDENCE) / critical(0.99);
            let Some(ratio) = result.get("ratio").and_then(Value::as_f64) else { continue };
            for end in result.get_mut("ratio_ci").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(value) = end.as_f64() {
                    *end = (ratio * (value / ratio).powf(share)).into();
                }
            }
        }
    }
}

fn upgrade_value(value: &mut Value, version: u64, key: Option<&str>) {
    match value {
        Value::Object(fields) => {
            let table = match key {
                Some("configuration") => RENAMED_MODEL_KEYS,
                Some("rotary") => &[("base", "theta")],
                _ => RENAMED_KEYS,
            };
            for (key, mut value) in std::mem::take(fields) {
                upgrade_value(&mut value, version, Some(&key));
                let renamed = table.iter().find(|(old, _)| *old == key).map(|(_, new)| *new);
                fields.insert(renamed.map_or(key, str::to_owned), value);
            }
            // The fields of a record repeat its id, which alone names the framework.
            let id = fields.get("id").and_then(Value::as_str).map(str::to_owned);
            for (field, place) in [("precision", 2), ("shape", 3)] {
                if let Some(part) = id.as_deref().and_then(|id| id.split('/').nth(place))
                    && fields.contains_key(field)
                {
                    fields.insert(field.to_owned(), part.into());
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| upgrade_value(value, version, key)),
        Value::String(text) => match key {
            Some(key) if KEYS_OF_IDS.contains(&key) => *text = upgrade_id(text, version),
            Some("norm-place") => {
                *text = match text.as_str() {
                    "before" => "pre-norm",
                    _ => "post-norm",
                }
                .to_owned();
            }
            Some("versions" | "environment" | "setting") => *text = rename_texts(text),
            Some("output") if text == "masked" => *text = "mlm-head".to_owned(),
            _ => {}
        },
        _ => {}
    }
}

type Replacements = Vec<(Regex, &'static str)>;

fn compile(table: &[(&'static str, &'static str)]) -> Replacements {
    table.iter().map(|&(old, new)| (Regex::new(old).expect("a constant pattern"), new)).collect()
}

fn replace(patterns: &Replacements, text: String) -> String {
    patterns.iter().fold(text, |text, (old, new)| old.replace_all(&text, *new).into_owned())
}

fn rename_texts(text: &str) -> String {
    static PATTERNS: Lazy<Replacements> = Lazy::new(|| compile(RENAMED_TEXTS));
    replace(&PATTERNS, text.to_owned())
}

/// Returns the present id (or filter) for one of an older version.
pub fn upgrade_id(id: &str, version: u64) -> String {
    static PATTERNS: Lazy<Replacements> = Lazy::new(|| compile(RENAMED_WORDS));
    replace(&PATTERNS, if version < 2 { id_of_version_2(id) } else { id.to_owned() })
}

fn id_of_version_2(id: &str) -> String {
    let parts: Vec<&str> = id.split('/').collect();
    let [workload, backend, precision, shape] = parts[..] else { return id.to_owned() };
    let Ok(framework) = backend.parse::<BackendId>().map(BackendId::framework) else {
        return id.to_owned();
    };
    let precision = match (framework, precision) {
        (Framework::Torch, "amp" | "amp-attention" | "amp-optimizer") => precision.replace("amp", "autocast"),
        (Framework::Torch, _) => precision.replace("-captured", "-graph"),
        (Framework::Mlx, _) => precision.replace("-captured", "-compile"),
    };
    format!("{workload}/{backend}/{precision}/{shape}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::suite::Case;

    #[test]
    fn ids_of_older_versions_are_translated() {
        for (version, old, new) in [
            (1, "torch-cuda/f32-captured/indicator-b16", "torch-cuda/f32-cudagraph/indicator-b16"),
            (1, "mlx-cpu/amp-captured/indicator-b16", "mlx-cpu/mixed-compile/indicator-b16"),
            (1, "torch-cpu/amp/indicator-b16", "torch-cpu/amp/indicator-b16"),
            (1, "torch-cpu/amp-opt/indicator-b16", "torch-cpu/mixed-tuned/indicator-b16"),
            (1, "mlx-cpu/amp/indicator-b16", "mlx-cpu/mixed/indicator-b16"),
            (2, "torch-cpu/amp/indicator-b16", "torch-cpu/mixed/indicator-b16"),
            (2, "torch-cpu/autocast/indicator-b16", "torch-cpu/amp/indicator-b16"),
            (2, "torch-cuda/amp-graph/indicator-b16", "torch-cuda/mixed-cudagraph/indicator-b16"),
            (2, "mlx-cpu/f32-attention/indicator-b16", "mlx-cpu/f32-sdpa/indicator-b16"),
            (2, "mlx-cpu/f32-optimizer/indicator-b16", "mlx-cpu/f32-fused-adamw/indicator-b16"),
            (2, "torch-cuda/bf16-opt/gpt2-b8-t1024-r2", "torch-cuda/bf16-tuned/gpt2-b8-t1024-dp2"),
        ] {
            let [old, new] = [old, new].map(|rest| format!("train-step/{rest}"));
            assert_eq!(upgrade_id(&old, version), new);
            assert!(new.parse::<Case>().is_ok(), "{new}");
        }
        for (old, new) in [
            ("attention/torch-cpu/f32/b16-h8-n111-d32", "attention/torch-cpu/f32/b16-h8-t111-d32"),
            ("feed-forward/mlx-cpu/f32/b1-n111-d256-f1024", "feed-forward/mlx-cpu/f32/b1-t111-d256-f1024"),
            ("matmul-peak/torch-cpu/f32/n1024", "matmul-peak/torch-cpu/f32/n1024"),
            ("copy-peak/torch-cpu/f32/m256", "copy-peak/torch-cpu/f32/256mib"),
            ("all-reduce/torch-cuda/f32/m18-r2", "all-reduce/torch-cuda/f32/18mib-dp2"),
        ] {
            assert_eq!(upgrade_id(old, 2), new);
            assert!(new.parse::<Case>().is_ok(), "{new}");
        }
        assert_eq!(upgrade_id("nonsense", 1), "nonsense");
        assert_eq!(upgrade_id("(f32|amp)(-opt)?/x-b16-r2$", 2), "(f32|mixed)(-tuned)?/x-b16-dp2$");
    }

    #[test]
    fn fields_of_older_versions_are_translated() {
        let mut file = json!({
            "version": 1,
            "machine": {"others": 0.5, "vectors": "AVX2",
                        "versions": [["heap", "glibc 2.36, freed memory kept"]]},
            "settings": [{"setting": "TRANSFORMER_BENCH_HEAP=system"}],
            "model": {"configuration": {"hidden": 4, "norm-place": "before", "output": "masked",
                                        "dropout": {"hidden": 0.5}, "position": {"rotary": {"base": 1.0}}}},
            "cases": [{"id": "train-step/torch-cpu/amp/indicator-b16-r2", "precision": "amp",
                       "shape": "indicator-b16-r2", "waiting_share": 0.1}],
            "turns": [{"base": "train-step/torch-cpu/f32-opt/indicator-b16"}],
        });
        upgrade(&mut file, 1);
        let expected = json!({
            "version": VERSION,
            "machine": {"background_load": 0.5, "simd": "AVX2",
                        "versions": [["malloc", "glibc 2.36, retains freed memory"]]},
            "env_effects": [{"variables": "TRANSFORMER_BENCH_MALLOC=default"}],
            "model": {"configuration": {"ffn-width": 4, "norm-order": "pre-norm", "output": "mlm-head",
                                        "dropout": {"hidden": 0.5}, "position": {"rotary": {"theta": 1.0}}}},
            "cases": [{"id": "train-step/torch-cpu/amp/indicator-b16-dp2", "precision": "amp",
                       "shape": "indicator-b16-dp2", "cpu_wait_share": 0.1}],
            "interleaved": [{"base": "train-step/torch-cpu/f32-tuned/indicator-b16"}],
        });
        assert_eq!(file, expected);
        let unchanged = file.clone();
        upgrade(&mut file, VERSION);
        assert_eq!(file, unchanged);
    }

    #[test]
    fn intervals_of_99_percent_become_intervals_of_95_percent() {
        let mut file = json!({"interleaved": [{"ratio": 2.0, "ratio_ci": [1.0, 4.0], "rounds": 3}]});
        upgrade(&mut file, 3);
        let end = |i: usize| file["interleaved"][0]["ratio_ci"][i].as_f64().unwrap();
        // Student's t with two degrees of freedom: 4.303 and 9.925.
        let share = 4.302_65 / 9.924_84;
        assert!((end(1) - 2.0 * 2f64.powf(share)).abs() < 1e-4, "{file}");
        assert!((end(0) * end(1) - 4.0).abs() < 1e-9, "{file}");
    }
}

//! Tests of models from files.

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Map, Value};

use super::*;
use crate::files::tests::scratch;
use crate::model::parameters::parameter_count;
use crate::model::{GPT2, INDICATOR};

fn parse(text: &str, file: &str) -> Result<ParsedModel> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let folder = scratch(&format!("config-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(file);
    fs::write(&path, text).unwrap();
    let model = read(&path);
    fs::remove_dir_all(folder).unwrap();
    model
}

fn parse_json(text: &str) -> Result<ParsedModel> {
    parse(text, "some-model.json")
}

fn json_model(text: &str) -> Model {
    parse_json(text).unwrap().model
}

fn parameters(model: Model) -> usize {
    parameter_count(&model, None)
}

const SMOLLM2: &str = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
    "tie_word_embeddings": true, "vocab_size": 49152}"#;

#[test]
fn parameter_counts_match_the_published_ones() {
    // SmolLM2-135M: 134,515,008.
    let parsed = parse_json(SMOLLM2).unwrap();
    assert!(parsed.notes.is_empty(), "{:?}", parsed.notes);
    let m = parsed.model;
    assert_eq!((m.name, m.tokens, m.key_value_heads, m.head_width), ("some-model", 8192, 3, 64));
    assert_eq!(parameters(m), 134_515_008);
    // Qwen2.5-0.5B: 494,032,768.
    let qwen2 = r#"{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": true, "use_sliding_window": false,
        "vocab_size": 151936}"#;
    assert_eq!(parameters(json_model(qwen2)), 494_032_768);
    // Qwen3-0.6B: 596,049,920.
    let qwen3 = r#"{"model_type": "qwen3", "attention_bias": false, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 1000000,
        "tie_word_embeddings": true, "vocab_size": 151936}"#;
    assert_eq!(parameters(json_model(qwen3)), 596_049_920);
    // BERT base, uncased, with its head for masked tokens: 109,514,298. The row of 768 for the second sentence is
    // omitted here.
    let bert = r#"{"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072,
        "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 30522, "type_vocab_size": 2}"#;
    assert_eq!(parameters(json_model(bert)), 109_514_298 - 768);
    // GPT-2 small: 124,439,808.
    let gpt2 = r#"{"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}"#;
    assert_eq!(parameters(json_model(gpt2)), 124_439_808);
    // Mistral 7B: 7,241,732,096.
    let mistral = r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "vocab_size": 32000}"#;
    let mistral = json_model(mistral);
    assert_eq!((parameters(mistral), mistral.tokens, mistral.window), (7_241_732_096, 32768, Some(4096)));
}

#[test]
fn the_presets_equal_their_files() {
    let gpt2 = r#"{"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50304,
        "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}"#;
    assert_eq!(Model { name: "gpt2", ..json_model(gpt2) }, GPT2);
    let indicator = parse(include_str!("../indicator.toml"), "indicator.toml").unwrap().model;
    assert_eq!(Model { name: "indicator", ..indicator }, INDICATOR);
    assert_eq!(indicator.name, "own-indicator");
    let back: Model = toml::from_str(&toml::to_string(&INDICATOR).unwrap()).unwrap();
    assert_eq!(back, INDICATOR);
}

#[test]
fn an_error_names_the_field_that_is_not_implemented() {
    let with = |change: &str| {
        let (name, _) = change.split_once(':').unwrap();
        let old: Map<String, Value> = serde_json::from_str(SMOLLM2).unwrap();
        let mut new: Map<String, Value> = serde_json::from_str(&format!("{{{change}}}")).unwrap();
        for (key, value) in old {
            new.entry(key).or_insert(value);
        }
        (name.trim_matches('"').to_owned(), parse_json(&Value::Object(new).to_string()))
    };
    for change in [
        r#""rope_scaling": {"factor": 8.0, "rope_type": "llama3"}"#,
        r#""rope_scaling": {"factor": -8.0, "rope_type": "linear"}"#,
        r#""rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}"#,
        r#""rope_scaling": "yarn""#,
        r#""rope_parameters": {"rope_theta": 10000.0, "rope_type": "ntk"}"#,
        r#""partial_rotary_factor": 0.5"#,
        r#""rope_interleaved": true"#,
        r#""num_local_experts": 8"#,
        r#""layer_types": ["full_attention", "sliding_attention"]"#,
        r#""is_causal": 3"#,
        r#""hidden_act": "laplace""#,
        r#""model_type": "gemma3n""#,
        r#""hidden_size": -576"#,
        r#""num_hidden_layers": "many""#,
        r#""vocab_size": 99999999999"#,
        r#""num_hidden_layers": null"#,
        r#""rms_norm_eps": true"#,
    ] {
        let (name, read) = with(change);
        let error = format!("{:#}", read.unwrap_err());
        assert!(error.contains(&name) && !error.contains('\n'), "{change}: {error}");
    }
    for (change, word) in [
        (r#""num_key_value_heads": 4"#, "do not divide"),
        (r#""num_attention_heads": 7"#, "do not divide"),
        (r#""attention_dropout": 1.5"#, "under 1"),
    ] {
        let error = format!("{:#}", with(change).1.unwrap_err());
        assert!(error.contains(word), "{change}: {error}");
    }
    // An unknown field is a note. A field that is known to change nothing is not.
    let read = with(r#""use_mup": true, "use_mrope": false, "temperature": 0.7"#).1.unwrap();
    assert!(read.notes.len() == 1 && read.notes[0].contains("use_mup (true)"), "{:?}", read.notes);
}

#[test]
fn an_invalid_file_is_an_error_of_one_line() {
    for (text, file, word) in [
        ("{", "a.json", "is not JSON"),
        ("[]", "a.json", "not a JSON object"),
        ("{}", "a.json", "model_type is missing: use gpt2, llama"),
        ("{\"model_type\": \"\u{1b}[31m\u{9b}31m\u{202e}\"}", "a.json", "not JSON"),
        (
            "{\"model_type\": \"\\u001b[31m\\u009b31m\u{202e}\"}",
            "a.json",
            "\" [31m 31m \", which is not implemented",
        ),
        ("name = 3", "a.toml", "name"),
        ("name = 'a'\nwidht = 3", "a.toml", "widht"),
        (&"[".repeat(100_000), "a.toml", "TOML parse error"),
        (&format!("{{\"model_type\": \"{}\"}}", "x".repeat(100_000)), "a.json", "…"),
    ] {
        let error = format!("{:#}", parse(text, file).unwrap_err());
        assert!(error.contains(word) && error.len() < 1000 && !error.contains(['\n', '\u{1b}']), "{error}");
    }
    for path in ["/nowhere/config.json", "/dev/zero"] {
        let error = format!("{:#}", read(Path::new(path)).unwrap_err());
        assert!(error.contains("could not be read") && error.contains("use a config.json"), "{error}");
    }
}

#[test]
fn sizes_of_toml_are_in_range() {
    let indicator = include_str!("../indicator.toml");
    for (old, new, word) in [
        ("market = 10", "market = 0", "market is 0"),
        ("market = 10", "market = 9999999999", "market is 9999999999"),
        ("market = 10", "market = 99999999999999999999", "99999999999999999999"),
        ("heads = 8", "heads = 4194304\nhead-width = 4194304\nkey-value-heads = 1", "heads times head-width"),
        ("heads = 8", "heads = 0", "heads is 0"),
        ("layers = 6", "layers = -1", "layers"),
    ] {
        assert!(indicator.contains(old), "{old}");
        let error = parse(&indicator.replacen(old, new, 1), "a.toml").unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(word), "{new}: {error}");
    }
}

#[test]
fn a_model_in_the_cache_of_hugging_face_has_its_own_name() {
    let hub = scratch("hub");
    let cached = hub.join("models--HuggingFaceTB--SmolLM2-135M");
    let snapshot = cached.join("snapshots/93efa2f097d58c2a");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(cached.join("blobs")).unwrap();
    fs::create_dir_all(cached.join("refs")).unwrap();
    fs::write(cached.join("blobs/0ddbb8e8dd1bbf7b"), SMOLLM2).unwrap();
    std::os::unix::fs::symlink("../../blobs/0ddbb8e8dd1bbf7b", snapshot.join("config.json")).unwrap();
    fs::write(cached.join("refs/main"), "93efa2f097d58c2a").unwrap();
    for path in [&snapshot, &snapshot.join("config.json"), &cached] {
        assert_eq!(read(path).unwrap().model.name, "smollm2-135m", "{}", path.display());
    }
    fs::remove_dir_all(hub).unwrap();
    for (name_or_path, name) in [
        ("gpt2-medium/", Some("gpt2-medium")),
        ("openai-community/gpt2-medium", Some("gpt2-medium")),
        ("/root/hub/models--O--N/snapshots/93efa2f0", Some("N")),
        ("/fsx/checkpoints/500000", None),
        ("./", None),
        ("", None),
    ] {
        assert_eq!(published_name(name_or_path).as_deref(), name, "{name_or_path}");
        // The file's own name comes first.
        let config = SMOLLM2.replacen('{', &format!("{{\"_name_or_path\": \"{name_or_path}\", "), 1);
        assert_eq!(json_model(&config).name, "some-model", "{name_or_path}");
    }
    assert_eq!(name_from_path(Path::new("/config.json")), "");
}

#[test]
fn another_head_is_reported() {
    let notes = |name: &str| parse_json(&SMOLLM2.replace("LlamaForCausalLM", name)).unwrap().notes;
    assert!(notes("LlamaForCausalLM").is_empty() && notes("BertForMaskedLM").is_empty());
    let notes = notes("BertForSequenceClassification");
    assert!(notes[0].contains("instead of that of BertForSequenceClassification"), "{notes:?}");
}

#[test]
fn names_get_the_form_of_ids() {
    for (text, name) in [
        ("SmolLM2-135M", "smollm2-135m"),
        ("Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("Meta Llama 3.1 8B Instruct", "meta-llama-3.1-8b-instruct"),
        ("phi-1_5", "phi-1_5"),
        ("b16", "m-b16"),
        ("gpt2", "own-gpt2"),
        ("___", "m"),
        ("../x", "x"),
    ] {
        assert_eq!(id_name(text), name);
    }
}

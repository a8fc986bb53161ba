//! A small configuration of each family, with the options that it must have.

use serde_json::{Value, json};

use super::hugging_face::parse;
use super::validate::complete_and_check;
use crate::model::parameters::parameter_count;
use crate::model::{Activation, Biases, Caps, Model, NormKind, NormOrder, Output, Position, Rotary};

/// Returns the model of a configuration: that of a small Llama, with changes.
fn model(family: &str, changes: &Value) -> Model {
    read(family, changes).0
}

fn read(family: &str, changes: &Value) -> (Model, Vec<String>) {
    let mut all = json!({
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_hidden_layers": 3, "vocab_size": 80, "max_position_embeddings": 256
    });
    let object = all.as_object_mut().expect("an object");
    object.extend(changes.as_object().expect("an object").clone());
    let parsed = parse(&all).unwrap_or_else(|error| panic!("{family}: {error:#}"));
    let model = complete_and_check(Model { name: "m", ..parsed.model });
    (model.unwrap_or_else(|error| panic!("{family}: {error:#}")), parsed.notes)
}

fn error(family: &str, changes: &Value) -> String {
    let all = json!({
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_hidden_layers": 3, "vocab_size": 80
    });
    let mut object = all.as_object().expect("an object").clone();
    object.extend(changes.as_object().expect("an object").clone());
    match parse(&Value::Object(object)) {
        Ok(_) => panic!("{family} with {changes} is accepted"),
        Err(error) => format!("{error:#}"),
    }
}

fn rotary(position: Position) -> Rotary {
    let Position::Rotary(rotary) = position else { panic!("{position:?} is not rotary") };
    rotary
}

fn assert_close(found: &[f64], expected: &[f64]) {
    let is_close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-6 * b.abs();
    assert!(found.len() == expected.len() && found.iter().zip(expected).all(is_close), "{found:?}");
}

#[test]
fn scaled_positions_have_the_frequencies_of_transformers() {
    // The expected numbers are those of transformers 5.24 for heads of 16 features.
    let frequencies = |scaling: Value| {
        let changes = json!({"max_position_embeddings": 4096, "rope_scaling": scaling});
        let rotary = rotary(model("llama", &changes).position);
        (rotary.frequencies(16), rotary.factor)
    };
    let plain = Rotary::new(1e4).frequencies(16);
    let (linear, _) = frequencies(json!({"type": "linear", "factor": 4.0}));
    assert_close(&linear, &plain.iter().map(|w| w / 4.0).collect::<Vec<_>>());
    assert_close(&frequencies(json!({"type": "dynamic", "factor": 4.0})).0, &plain);
    let (llama3, factor) = frequencies(json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512
    }));
    assert_eq!(factor, 1.0);
    assert_close(&llama3, LLAMA3);
    let (yarn, factor) = frequencies(json!({
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256
    }));
    assert_close(&yarn, YARN);
    assert_close(&[factor], &[0.1 * 16f64.ln() + 1.0]);
    let short = [1.0, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 2.0];
    let long = json!({
        "type": "longrope", "short_factor": short, "long_factor": short, "original_max_position_embeddings": 512
    });
    let changes = json!({"max_position_embeddings": 4096, "rope_scaling": long});
    let (phi, notes) = read("phi3", &changes);
    assert_close(
        &rotary(phi.position).frequencies(16),
        &std::array::from_fn::<_, 8, _>(|i| plain[i] / short[i]),
    );
    assert_close(&[rotary(phi.position).factor], &[(1.0 + 8f64.ln() / 512f64.ln()).sqrt()]);
    assert!(phi.tokens == 512 && notes[0].contains("at most 512 tokens"), "{notes:?}");
}

const LLAMA3: &[f64] =
    &[1.0, 0.316227764, 0.1, 0.0170903075, 3.12499993e-4, 9.88211832e-5, 3.12500015e-5, 9.88211832e-6];
const YARN: &[f64] = &[
    1.0,
    0.242111877,
    0.0531250015,
    0.00938801281,
    6.24999986e-4,
    1.97642366e-4,
    6.2500003e-5,
    1.97642366e-5,
];

#[test]
fn decoders_have_the_options_of_their_family() {
    let gemma = model("gemma", &json!({"hidden_act": "gelu", "head_dim": 16, "num_key_value_heads": 1}));
    assert!(gemma.glu && gemma.activation == Activation::GeluTanh && gemma.output == Output::Tied);
    assert!(
        gemma.norm.has_offset() && gemma.scale.embedding == 8.0 && gemma.norm_order == NormOrder::PreNorm
    );
    let gemma2 = model("gemma2", &json!({"head_dim": 16, "query_pre_attn_scalar": 64, "sliding_window": 8}));
    assert_eq!(gemma2.cap, Caps { scores: Some(50.0), logits: Some(30.0) });
    assert_eq!((gemma2.norm_order, gemma2.scale.scores), (NormOrder::SandwichNorm, Some(0.125)));
    assert_eq!([0, 1, 2].map(|layer| gemma2.attention_kind(layer).window), [Some(8), None, Some(8)]);
    let gemma3 = model(
        "gemma3_text",
        &json!({
            "head_dim": 16, "sliding_window": 8, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "final_logit_softcapping": null
        }),
    );
    let rotaries = [0, 1].map(|layer| rotary(gemma3.attention_kind(layer).position));
    assert_eq!(
        rotaries.map(|rotary| (rotary.theta, rotary.frequencies.is_some())),
        [(1e4, false), (1e6, true)]
    );
    assert!(gemma3.cap == Caps::NONE && gemma3.qk_norm == Some(gemma3.norm));
    let granite = model(
        "granite",
        &json!({
            "embedding_multiplier": 12.0, "attention_multiplier": 0.5, "residual_multiplier": 0.25, "logits_scaling": 8.0
        }),
    );
    let s = granite.scale;
    assert_eq!(
        [s.embedding, s.scores.unwrap(), s.residual, s.hidden, s.logits],
        [12.0, 0.5, 0.25, 1.0, 0.125]
    );
    let minicpm = model("minicpm", &json!({"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}));
    let s = minicpm.scale;
    assert_close(&[s.embedding, s.residual, s.hidden, s.logits], &[12.0, 1.4 / 3f64.sqrt(), 0.25, 1.0]);
    let neox = model("gpt_neox", &json!({"rotary_pct": 0.25, "rotary_emb_base": 5000}));
    assert_eq!(
        (neox.norm_order, neox.bias, rotary(neox.position).width(16)),
        (NormOrder::Parallel, Biases::ALL, 4)
    );
    assert_eq!(rotary(neox.position).theta, 5000.0);
    let phi = model("phi", &json!({"partial_rotary_factor": 0.5, "embd_pdrop": 0.1}));
    assert!(
        phi.norm_order == NormOrder::ParallelSharedNorm && phi.bias.output && phi.dropout.embedding == 0.1
    );
    let stablelm = model("stablelm", &json!({"use_qkv_bias": true}));
    assert!(
        stablelm.glu && stablelm.bias.qkv && !stablelm.bias.out && rotary(stablelm.position).share == 0.25
    );
    let olmo = model("olmo", &json!({}));
    assert_eq!(olmo.norm, NormKind::Layer { eps: 1e-5, weight: false, bias: false });
    let olmo2 = model("olmo2", &json!({}));
    assert!(olmo2.norm_order == NormOrder::OutputNorm && olmo2.qk_norm_widths() == [64, 64]);
    let olmo3 = model("olmo3", &json!({"sliding_window": 8, "num_hidden_layers": 4}));
    assert_eq!([2, 3].map(|layer| olmo3.attention_kind(layer).window), [Some(8), None]);
    let smollm3 = model("smollm3", &json!({"no_rope_layers": [1, 1, 0], "num_key_value_heads": 2}));
    assert_eq!([1, 2].map(|layer| smollm3.attention_kind(layer).position == Position::None), [false, true]);
    assert!(rotary(model("ernie4_5", &json!({"head_dim": 16})).position).pairs);
    let starcoder2 = model("starcoder2", &json!({"embedding_dropout": 0.1, "sliding_window": 8}));
    assert!(
        starcoder2.window == Some(8) && starcoder2.bias == Biases::ALL && starcoder2.dropout.embedding == 0.1
    );
    let nanochat = model("nanochat", &json!({"hidden_act": "relu2"}));
    assert!(
        nanochat.cap.logits == Some(15.0)
            && !nanochat.norm.has_weight_and_bias().0
            && nanochat.embedding_norm
    );
}

#[test]
fn known_parts_have_the_sizes_of_their_family() {
    let bigcode = model("gpt_bigcode", &json!({"n_embd": 64, "n_layer": 3, "n_head": 4}));
    assert_eq!((bigcode.key_value_heads, bigcode.ffn_width), (1, 256));
    let opt = model("opt", &json!({"ffn_dim": 96, "dropout": 0.1}));
    assert!(opt.activation == Activation::Relu && opt.final_norm && opt.dropout.residual == 0.1);
    let opt = model("opt", &json!({"ffn_dim": 96, "do_layer_norm_before": false}));
    assert!(opt.norm_order == NormOrder::PostNorm && !opt.final_norm);
    let roberta = model("roberta", &json!({"max_position_embeddings": 514, "type_vocab_size": 1}));
    assert!(roberta.tokens == 512 && roberta.token_type && roberta.output == Output::MlmHead);
    let distilbert = model("distilbert", &json!({"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 96}));
    assert_eq!((distilbert.token_type, distilbert.dropout.attention()), (false, 0.0));
    // Phi 3 and InternLM 2 are Llama in stacked matrices.
    let llama = model("llama", &json!({}));
    for family in ["phi3", "internlm2"] {
        let same = model(family, &json!({"bias": false, "rms_norm_eps": 1e-6}));
        assert_eq!(same, llama, "{family}");
    }
    assert_eq!(parameter_count(&llama, None), 2 * 80 * 64 + 64 + 3 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64));
    let qwen =
        model("qwen2", &json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2}));
    assert_eq!([1, 2].map(|layer| qwen.attention_kind(layer).window), [None, Some(8)]);
    let qwen = model("qwen2", &json!({"use_sliding_window": false, "sliding_window": 8}));
    assert_eq!((qwen.window, qwen.second_attention), (None, None));
    assert_eq!(model("mistral", &json!({"sliding_window": 8})).window, Some(8));
}

#[test]
fn the_text_part_of_a_multimodal_model_is_read() {
    let text = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 80,
        "model_type": "qwen3_vl_text",
        "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": true}
    });
    let all = json!({"model_type": "qwen3_vl", "text_config": text, "vision_config": {}, "tie_word_embeddings": true});
    let parsed = parse(&all).unwrap();
    assert!(parsed.model.qk_norm.is_some() && parsed.model.output == Output::Tied);
    assert_eq!(parsed.notes, ["the measured model is the text part (text_config), without vision_config"]);
    let other = json!({"model_type": "a", "text_config": {"model_type": "qwen3_5_text"}});
    assert!(format!("{:#}", parse(&other).err().unwrap()).starts_with("text_config: model_type is"));
}

#[test]
fn a_missing_model_type_follows_from_the_fields() {
    let gpt2 = json!({"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 80});
    let parsed = parse(&gpt2).unwrap();
    assert!(
        parsed.model.width == 64 && parsed.notes[0].contains("as that of a gpt2 model"),
        "{:?}",
        parsed.notes
    );
    let sizes = json!({
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 80
    });
    for (class, glu) in [("LlamaForCausalLM", true), ("BertForMaskedLM", false)] {
        let mut all = sizes.clone();
        all["architectures"] = json!([class]);
        assert_eq!(parse(&all).unwrap().model.glu, glu, "{class}");
    }
    assert!(parse(&sizes).is_err());
}

#[test]
fn quantization_and_direction_are_reported() {
    let (_, notes) = read("llama", &json!({"quantization": {"bits": 4, "group_size": 64}}));
    assert!(notes[0].contains("unquantized"), "{notes:?}");
    let (both, notes) = read("qwen2", &json!({"is_causal": false}));
    assert!(!both.causal && notes[0].contains("both directions"), "{notes:?}");
}

#[test]
fn options_that_are_not_implemented_are_refused_by_name() {
    for (family, name, value) in [
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "layer_types", json!(["full_attention", "linear_attention", "full_attention"])),
        ("mistral", "layer_types", json!(["full_attention"])),
        ("olmo2", "layer_types", json!(["full_attention", "sliding_attention", "full_attention"])),
        ("phi", "qk_layernorm", json!(true)),
        ("phi", "tie_word_embeddings", json!(true)),
        ("stablelm", "qk_layernorm", json!(true)),
        ("olmo", "clip_qkv", json!(8.0)),
        ("opt", "word_embed_proj_dim", json!(32)),
        ("opt", "layerdrop", json!(0.1)),
        ("phi3", "embd_pdrop", json!(0.1)),
        ("roberta", "hidden_act", json!("relu")),
        ("distilbert", "sinusoidal_pos_embds", json!(true)),
        ("smollm3", "no_rope_layers", json!([1])),
        ("gemma2", "final_logit_softcapping", json!(-1.0)),
        ("granite", "logits_scaling", json!(0.0)),
        ("starcoder2", "norm_type", json!("rms_norm")),
        ("gpt_neox", "rope_scaling", json!({"type": "ntk", "factor": 2.0})),
        ("llama", "num_local_experts", json!(8)),
        ("bert", "is_decoder", json!(true)),
    ] {
        let text = error(family, &json!({name: value, "ffn_dim": 96, "dim": 64}));
        assert!(text.contains(name) && !text.contains('\n'), "{family}: {text}");
    }
}

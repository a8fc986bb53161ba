//! The fields of a configuration.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::model::config::validate::MAX_SIZE;
use crate::model::{Activation, Output};
use crate::text::shortened;

/// Fields that do not change the computation of a training step.
const IGNORED_FIELDS: &str = "
    _attn_implementation_autoset _commit_hash _name_or_path _num_labels architectures attention_softmax_in_fp32
    attn_implementation auto_map bad_words_ids begin_suppress_tokens boi_token_index bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout classifier_pooling cls_token_id decoder_start_token_id directionality
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eoi_token_index eos_token_id
    exponential_decay_length_penalty finetuning_task flash_attn flash_rotary forced_bos_token_id forced_eos_token_id
    fused_dense gradient_checkpointing id2label image_token_id image_token_index init_std initializer_range
    is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length max_window_layers min_length mm_tokens_per_image
    model_type n_ctx n_special no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_past output_scores pad_token_id pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type predict_special_tokens prefix
    pretraining_tp problem_type projector_hidden_act pruned_heads qa_dropout remove_invalid_values repetition_penalty
    return_dict return_dict_in_generate runner_max_sequence_length scale_attention_softmax_in_fp32 sep_token_id
    seq_classif_dropout summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_weights_ tokenizer_class top_k top_p
    torch_dtype torchscript transformers.js_config transformers_version typical_p unsloth_version use_bfloat16
    use_cache use_return_dict video_token_id vision_end_token_id vision_start_token_id";

/// Fields that change nothing if they are false.
const IGNORED_IF_FALSE: &str = "use_mrope tie_encoder_decoder cross_attention_hidden_size";

/// The fields of a configuration, and messages about them.
pub struct Fields<'a> {
    pub all: &'a Map<String, Value>,
    /// The names of the fields that were read.
    used: RefCell<BTreeSet<&'static str>>,
    notes: RefCell<Vec<String>>,
    max_tokens: Cell<Option<usize>>,
}

impl<'a> Fields<'a> {
    pub fn new(all: &'a Map<String, Value>) -> Self {
        Self { all, used: RefCell::default(), notes: RefCell::default(), max_tokens: Cell::default() }
    }

    /// Adds a message for the user.
    pub fn note(&self, text: String) {
        self.notes.borrow_mut().push(text);
    }

    /// Limits the number of tokens, for a reason that the user reads.
    pub fn limit_tokens(&self, tokens: usize, reason: &str) {
        self.max_tokens.set(Some(tokens.min(self.max_tokens.get().unwrap_or(tokens))));
        self.note(format!("at most {tokens} tokens, because {reason}"));
    }

    pub fn max_tokens(&self) -> usize {
        self.max_tokens.get().unwrap_or(usize::MAX)
    }

    /// Returns all messages, with those about fields that were not read.
    pub fn into_notes(self) -> Vec<String> {
        let unknown = self.unknown_fields();
        self.notes.into_inner().into_iter().chain(unknown).collect()
    }

    /// Requires that all layers have the same attention, if the family has not read `layer_types`.
    pub fn require_equal_layers(&self) -> Result<()> {
        if self.used.borrow().contains("layer_types") {
            return Ok(());
        }
        let Some(types) = self.get("layer_types") else { return Ok(()) };
        let is_full = types.as_array().is_some_and(|all| all.iter().all(|kind| kind == "full_attention"));
        ensure!(
            is_full,
            "layer_types is {}, which is not implemented: use full_attention only",
            short(types)
        );
        Ok(())
    }

    /// Returns a field, or `None` if it is missing or null.
    pub fn get(&self, name: &'static str) -> Option<&'a Value> {
        self.used.borrow_mut().insert(name);
        self.all.get(name).filter(|value| !value.is_null())
    }

    pub fn optional_size(&self, name: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let size = value.as_u64().filter(|&n| n > 0 && n <= MAX_SIZE as u64);
        let error = || format!("{name} is {}: use a whole number from 1 to {MAX_SIZE}", short(value));
        Ok(Some(size.with_context(error)? as usize))
    }

    pub fn size(&self, name: &'static str) -> Result<usize> {
        self.optional_size(name)?.with_context(|| format!("{name} is missing"))
    }

    pub fn size_or(&self, name: &'static str, default: usize) -> Result<usize> {
        Ok(self.optional_size(name)?.unwrap_or(default))
    }

    pub fn optional_number(&self, name: &'static str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_f64().map(Some).with_context(|| format!("{name} is {}: use a number", short(value)))
    }

    pub fn number(&self, name: &'static str, default: f64) -> Result<f64> {
        Ok(self.optional_number(name)?.unwrap_or(default))
    }

    /// Returns a number above 0, which another value is divided by or multiplied with.
    pub fn factor(&self, name: &'static str, default: f64) -> Result<f64> {
        let number = self.number(name, default)?;
        if number.is_finite() && number > 0.0 {
            return Ok(number);
        }
        bail!("{name} is {number}: use a number above 0")
    }

    pub fn flag(&self, name: &'static str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().with_context(|| format!("{name} is {}: use true or false", short(value)))
    }

    pub fn tied_or_untied(&self, default: bool) -> Result<Output> {
        Ok(if self.flag("tie_word_embeddings", default)? { Output::Tied } else { Output::Untied })
    }

    /// Refuses a field with a value that is not in `allowed`. A missing field and null are allowed.
    pub fn require_one_of(&self, name: &'static str, allowed: &[Value]) -> Result<()> {
        match self.get(name) {
            Some(value) if !allowed.contains(value) => {
                let words: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                let words = if words.is_empty() { "null".to_owned() } else { words.join(" or ") };
                bail!("{name} is {}, which is not implemented: use {words}", short(value))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a field that is not 0.
    pub fn require_zero(&self, name: &'static str) -> Result<()> {
        self.require_one_of(name, &[0.into(), 0.0.into()])
    }

    pub fn activation(&self, name: &'static str, default: &str) -> Result<Activation> {
        let value = self.get(name).map_or(Ok(default), |v| {
            v.as_str().with_context(|| format!("{name} is {}: use a text", short(v)))
        })?;
        Ok(match value {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "silu" | "swish" => Activation::Silu,
            "relu" => Activation::Relu,
            "relu2" => Activation::ReluSquared,
            _ => bail!(
                "{name} is {}, which is not implemented: use gelu, gelu_new, silu, relu or relu2",
                short(&value.into())
            ),
        })
    }

    /// Returns a note about the fields that were not read, or `None` if there are none.
    fn unknown_fields(&self) -> Option<String> {
        let used = self.used.borrow();
        let is_in = |list: &str, name: &str| list.split_whitespace().any(|field| field == name);
        let ignored = |name: &str, value: &Value| {
            is_in(IGNORED_FIELDS, name) || value == false && is_in(IGNORED_IF_FALSE, name) || value.is_null()
        };
        let unknown: Vec<String> = self
            .all
            .iter()
            .filter(|(name, value)| !used.contains(name.as_str()) && !ignored(name, value))
            .map(|(name, value)| format!("{} ({})", shortened(name.clone(), MAX_CHARS), short(value)))
            .collect();
        let fields = if unknown.len() == 1 { "field" } else { "fields" };
        let shown = unknown[..unknown.len().min(MAX_FIELDS)].join(", ");
        let more = match unknown.len().saturating_sub(MAX_FIELDS) {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        (!unknown.is_empty()).then(|| format!("ignores the unknown {fields} {shown}{more}"))
    }
}

/// Largest number of unknown fields in a note.
const MAX_FIELDS: usize = 20;

/// Largest number of characters of a name or value in a message, before the mark of the cut.
const MAX_CHARS: usize = 60;

/// Formats a value for a message.
pub fn short(value: &Value) -> String {
    shortened(value.to_string(), MAX_CHARS)
}

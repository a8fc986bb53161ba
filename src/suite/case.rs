//! A case and its id, `workload/backend/precision/shape`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use regex::Regex;

use super::{BackendId, Device, Framework, Method, Optimizer, Precision, Shape, Variant, Workload, cost};
use crate::model::Dropout;

/// One benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    pub workload: Workload,
    pub backend: BackendId,
    pub method: Method,
    pub shape: Shape,
}

impl Case {
    /// Returns the dropout of the case. Only training workloads have dropout.
    pub fn dropout(&self) -> Dropout {
        if self.workload.trains() { self.shape.dropout() } else { Dropout::NONE }
    }

    /// Returns true if the loss is a cross-entropy over a vocabulary.
    pub fn is_language_model(&self) -> bool {
        self.shape.model().is_some_and(|(model, _)| model.is_language_model())
    }

    /// Returns true if the model has adapters, and all its other parameters are frozen.
    pub fn has_adapters(&self) -> bool {
        self.shape.model().is_some_and(|(model, _)| model.lora.is_some())
    }

    /// Returns the precision in which the optimizer runs. Adapters and their state are in f32.
    pub fn optimizer_precision(&self) -> Precision {
        if self.has_adapters() { Precision::F32 } else { self.method.precision }
    }

    /// Returns true if a fused kernel computes attention. Its backward pass rounds differently.
    pub fn fuses_attention(&self) -> bool {
        let variant = self.method.variant;
        if self.caps_scores() {
            return false;
        }
        // The network that PyTorch compiles calls fused attention.
        variant.uses_sdpa() || (variant == Variant::Compile && self.backend.framework() == Framework::Torch)
    }

    /// Returns true if attention has a soft cap of the scores, which no fused kernel of the frameworks has.
    pub fn caps_scores(&self) -> bool {
        self.shape.model().is_some_and(|(model, _)| model.cap.scores.is_some())
    }

    /// Returns a description from which a program in another language can build the same step. It is null for
    /// peak cases, for several devices and for several micro-batches.
    pub fn description(&self) -> serde_json::Value {
        let Some((model, batch)) = self.shape.model().filter(|_| self.shape.undivided() == self.shape) else {
            return serde_json::Value::Null;
        };
        let mut description = serde_json::json!({
            "workload": self.workload.id(),
            "trains": self.workload.trains(),
            "optimizes": self.workload.optimizes(),
            "device": match self.backend.device() {
                Device::Cpu => "cpu",
                Device::AppleGpu => "mps",
                Device::NvidiaGpu => "cuda",
            },
            "precision": self.method.precision.id(),
            "batch": batch,
            "dropout": self.dropout(),
            "model": *model,
        });
        if self.shape.optimizer() != Optimizer::Adamw {
            description["optimizer"] = self.shape.optimizer().id().into();
        }
        description
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.workload, self.backend, self.method, self.shape)
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split('/').collect();
        let [workload, backend, method, shape] = parts[..] else {
            return Err(format!("'{text}' is not a case id of the form workload/backend/precision/shape"));
        };
        let mut case = Self {
            workload: workload.parse()?,
            backend: backend.parse()?,
            method: method.parse()?,
            shape: shape.parse()?,
        };
        if let Shape::Model { model, batch, .. } = case.shape
            && case.shape == Shape::for_model(model, batch)
            && !model.is_preset()
            && model.lora.is_none()
        {
            case.shape = Shape::for_workload(case.workload, model, batch);
        }
        let fits = match case.workload {
            workload if workload.block().is_some() => {
                matches!(case.shape, Shape::Block { block, .. } if Some(block) == workload.block())
            }
            Workload::MatmulPeak => matches!(case.shape, Shape::Square { .. }),
            Workload::CopyPeak => matches!(case.shape, Shape::Buffer { ranks: 1, .. }),
            Workload::AllReduce => matches!(case.shape, Shape::Buffer { ranks: 2.., .. }),
            Workload::TrainStep => matches!(case.shape, Shape::Model { .. }),
            Workload::OptimizerStep => matches!(case.shape, Shape::Model { ranks: 1, micro_batches: 1, .. }),
            _ => {
                matches!(case.shape, Shape::Model { model, batch, .. } if case.shape == Shape::for_model(model, batch))
            }
        };
        if !fits {
            return Err(format!("'{text}': {workload} has no shape '{shape}'"));
        }
        // A preset with the largest batch is far below the limit, and reports parse many of its ids.
        let is_preset = case.shape.model().is_some_and(|(model, _)| model.is_preset());
        if !is_preset && !cost::is_computable(&case) {
            return Err(format!("'{text}' is too large: it has over 2^64 FLOPs or bytes"));
        }
        Ok(case)
    }
}

/// Longest filter in bytes, over ten times the longest of a published run. Baselines from elsewhere contain filters, and
/// a longer one takes seconds to compile.
const MAX_FILTER: usize = 10_000;

/// Parses a filter over ids.
///
/// # Errors
/// Returns an error if it is too long or not a regular expression.
pub fn parse_filter(text: &str) -> Result<Regex> {
    ensure!(text.len() <= MAX_FILTER, "the filter has {} bytes: use at most {MAX_FILTER}", text.len());
    Regex::new(text).with_context(|| format!("'{text}' is not a regular expression"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::ModelId;
    use crate::suite::{Block, HEADLINE_SHAPE, Optimizer, Set, cases};

    #[test]
    fn ids_are_short_lower_case_unique_and_parse_to_their_case() {
        for &set in Set::ALL {
            let mut seen = HashSet::new();
            for case in cases(set) {
                let id = case.to_string();
                assert!(id.len() < 72, "{id}");
                assert!(
                    id.split('/').all(|part| !part.is_empty()
                        && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')),
                    "{id}"
                );
                assert_eq!(id.parse::<Case>().as_ref(), Ok(&case), "{id}");
                assert!(seen.insert(id.clone()), "{id} twice");
            }
        }
    }

    #[test]
    fn ids_read_as_documented() {
        let case: Case = "train-step/torch-cuda/mixed-tuned/indicator-b16".parse().unwrap();
        assert_eq!(case.method, Method::tuned(Precision::Mixed));
        assert_eq!(case.shape, HEADLINE_SHAPE);
        let model = ModelId::indicator();
        let block = Shape::Block { block: Block::Attention, model, batch: 16 };
        assert_eq!(block.to_string(), "b16-h8-t111-d32");
        let gpt2 = Shape::for_model(ModelId::named("gpt2").unwrap(), 8);
        assert_eq!(gpt2.to_string(), "gpt2-b8-t1024");
        let accumulated = gpt2.with_micro_batches(2).with_ranks(4);
        assert_eq!(accumulated.to_string(), "gpt2-b8-t1024-a2-dp4");
        assert_eq!("gpt2-b8-t1024-a2-dp4".parse(), Ok(accumulated));
        assert_eq!(accumulated.micro_batch().to_string(), "gpt2-b1-t1024");
        let muon = gpt2.with_optimizer(Optimizer::Muon);
        assert_eq!(muon.to_string(), "gpt2-b8-t1024-muon");
        let divided = muon.with_micro_batches(2).with_ranks(4);
        assert_eq!("gpt2-b8-t1024-muon-a2-dp4".parse(), Ok(divided));
        assert_eq!(divided.undivided(), muon);
        let adapted = "gpt2-b8-t1024-lora16qv-a2-dp4";
        let case: Case = format!("train-step/torch-cpu/f32/{adapted}").parse().unwrap();
        assert_eq!(case.shape.to_string(), adapted);
        assert_eq!(case.shape.micro_batch().to_string(), "gpt2-b1-t1024-lora16qv");
    }

    #[test]
    fn a_wrong_id_is_an_error_that_names_the_wrong_part() {
        for (id, word) in [
            ("train-step/torch-cpu/f32", "workload/backend/precision/shape"),
            ("train/torch-cpu/f32/indicator-b16", "unknown workload"),
            ("train-step/torch/f32/indicator-b16", "unknown backend"),
            ("train-step/torch-cpu/f64/indicator-b16", "unknown precision"),
            ("train-step/torch-cpu/f32-fast/indicator-b16", "unknown variant"),
            ("train-step/torch-cpu/f32-eager/indicator-b16", "no suffix"),
            ("train-step/torch-cpu/f32/indicator-b0", "at least 1"),
            ("train-step/torch-cpu/f32/indicator-b9223372036854775807", "at most 65536"),
            ("matmul-peak/torch-cpu/f32/n4294967295", "at most 65536"),
            ("matmul-peak/torch-cpu/f32/n65536-x65536", "too large"),
            ("all-reduce/torch-cpu/f32/1mib-dp99999999999", "at most 65536"),
            ("train-step/torch-cpu/f32/bert-b1", "unknown model"),
            ("train-step/torch-cpu/f32/indicator-b1-t7", "unknown shape"),
            ("train-step/torch-cpu/f32/gpt2-b8-t99", "unknown shape"),
            ("train-step/torch-cpu/f32/n64", "has no shape"),
            ("train-step/torch-cpu/f32/indicator-b16-dp1", "at least 2"),
            ("train-step/torch-cpu/f32/indicator-b16-dp3", "cannot divide a batch of 16"),
            ("forward/torch-cpu/f32/indicator-b16-dp2", "has no shape"),
            ("train-step/torch-cpu/f32/indicator-b16-a1", "use 2 to"),
            ("train-step/torch-cpu/f32/indicator-b16-a3", "cannot divide a batch of 16"),
            (
                "train-step/torch-cpu/f32/indicator-b16-a8-dp4",
                "4 ranks with 8 micro-batches each cannot divide",
            ),
            ("train-step/torch-cpu/f32/indicator-b16-dp2-a2", "write -a2 before -dp2"),
            ("forward/torch-cpu/f32/indicator-b16-a4", "has no shape"),
            ("matmul-peak/torch-cpu/f32/n64-a2", "cannot be divided into micro-batches"),
            ("attention/torch-cpu/f32/indicator-b16-lora16", "has no shape"),
            ("train-step/torch-cpu/f32/indicator-b16-a4-lora16", "write -lora16 behind"),
            ("train-step/torch-cpu/f32/indicator-b16-lora0", "unknown shape"),
            ("copy-peak/torch-cpu/f32/1mib-lora8", "write -lora8 behind"),
            ("forward/torch-cpu/f32/indicator-b16-muon", "has no shape"),
            ("train-step/torch-cpu/f32/indicator-b16-adamw", "AdamW is the default"),
            ("train-step/torch-cpu/f32/indicator-b16-lora16-muon", "adapters are trained with AdamW"),
            ("train-step/torch-cpu/f32/indicator-b16-a4-muon", "write -muon behind"),
            ("matmul-peak/torch-cpu/f32/n64-muon", "write -muon behind"),
            ("all-reduce/torch-cpu/f32/1mib", "has no shape"),
            ("copy-peak/torch-cpu/f32/1mib-dp2", "has no shape"),
            ("matmul-peak/torch-cpu/f32/n64-dp2", "cannot be divided between ranks"),
            ("attention/torch-cpu/f32/b1-h8-t111", "unknown shape"),
            ("attention/torch-cpu/f32/b1-t111-d256-f1024", "has no shape"),
        ] {
            let error = id.parse::<Case>().unwrap_err();
            assert!(error.contains(word), "{id}: {error}");
        }
    }

    #[test]
    fn the_readme_explains_every_part_of_an_id() {
        let readme = include_str!("README.md");
        let mut parts: Vec<String> = Workload::ALL.iter().map(|w| w.to_string()).collect();
        parts.extend(BackendId::ALL.iter().map(|b| b.to_string()));
        parts.extend(Precision::ALL.iter().map(|p| p.to_string()));
        parts.extend(Variant::ALL.iter().filter(|&&v| v != Variant::Eager).map(|v| format!("-{v}")));
        parts.extend(ModelId::all().map(|m| m.to_string()));
        parts.extend(Optimizer::ALL.iter().map(|o| o.to_string()));
        for part in parts {
            assert!(readme.contains(&format!("`{part}`")), "src/suite/README.md does not explain {part}");
        }
    }
}

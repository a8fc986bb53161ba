//! A case, and the id that names it everywhere: `workload/backend/precision/shape`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use regex::Regex;

use super::{BackendId, Device, Framework, Method, Shape, Variant, Workload};
use crate::model::Dropout;

/// One row of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    pub workload: Workload,
    pub backend: BackendId,
    pub method: Method,
    pub shape: Shape,
}

impl Case {
    /// Dropout in force: none outside training.
    pub fn dropout(&self) -> Dropout {
        if self.workload.trains() { self.shape.dropout() } else { Dropout::NONE }
    }

    /// Whether fused kernels compute attention, whose backward pass rounds in another way.
    pub fn fuses_attention(&self) -> bool {
        let recipe = self.method.variant;
        // PyTorch compiles a network that is written with it.
        recipe.uses_sdpa() || (recipe == Variant::Compile && self.backend.framework() == Framework::Torch)
    }

    /// What a program in another language needs to build the same step; null where the case has no
    /// model, or several devices share it.
    pub fn description(&self) -> serde_json::Value {
        let Some((model, batch)) = self.shape.model().filter(|_| self.shape.ranks() == 1) else {
            return serde_json::Value::Null;
        };
        serde_json::json!({
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
        })
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
        let [workload, backend, precision, shape] = parts[..] else {
            return Err(format!("'{text}' is no case id: workload/backend/precision/shape"));
        };
        let mut case = Self {
            workload: workload.parse()?,
            backend: backend.parse()?,
            method: precision.parse()?,
            shape: shape.parse()?,
        };
        if let (Some(part), Shape::Model { model, batch, ranks: 1 }) = (case.workload.block(), case.shape)
            && !model.is_preset()
        {
            case.shape = Shape::Block { part, model, batch };
        }
        let fits = match case.workload {
            workload if workload.block().is_some() => {
                matches!(case.shape, Shape::Block { part, .. } if Some(part) == workload.block())
            }
            Workload::MatmulPeak => matches!(case.shape, Shape::Square { .. }),
            Workload::CopyPeak => matches!(case.shape, Shape::Buffer { ranks: 1, .. }),
            Workload::AllReduce => matches!(case.shape, Shape::Buffer { ranks: 2.., .. }),
            Workload::TrainStep => matches!(case.shape, Shape::Model { .. }),
            _ => matches!(case.shape, Shape::Model { ranks: 1, .. }),
        };
        if fits { Ok(case) } else { Err(format!("'{text}': {workload} has no shape '{shape}'")) }
    }
}

/// A filter over ids.
pub fn parse_filter(text: &str) -> Result<Regex> {
    Regex::new(text).with_context(|| format!("'{text}' is no regular expression"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::ModelId;
    use crate::suite::{Block, HEADLINE_SHAPE, Precision, Set, cases};

    #[test]
    fn ids_are_short_lower_case_and_unique_and_parse_back() {
        for &set in Set::ALL {
            let mut seen = HashSet::new();
            for case in cases(set) {
                let id = case.to_string();
                assert!(id.len() < 64, "{id}");
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
        let block = Shape::Block { part: Block::Attention, model, batch: 16 };
        assert_eq!(block.to_string(), "b16-h8-t111-d32");
        let gpt2 = Shape::of_model(ModelId::named("gpt2").unwrap(), 8);
        assert_eq!(gpt2.to_string(), "gpt2-b8-t1024");
    }

    #[test]
    fn wrong_ids_are_refused_with_what_is_wrong() {
        for (id, word) in [
            ("train-step/torch-cpu/f32", "workload/backend/precision/shape"),
            ("train/torch-cpu/f32/indicator-b16", "unknown workload"),
            ("train-step/torch/f32/indicator-b16", "unknown backend"),
            ("train-step/torch-cpu/f64/indicator-b16", "unknown precision"),
            ("train-step/torch-cpu/f32-fast/indicator-b16", "unknown variant"),
            ("train-step/torch-cpu/f32-eager/indicator-b16", "no suffix"),
            ("train-step/torch-cpu/f32/indicator-b0", "at least 1"),
            ("train-step/torch-cpu/f32/bert-b1", "unknown model"),
            ("train-step/torch-cpu/f32/indicator-b1-t7", "unknown shape"),
            ("train-step/torch-cpu/f32/gpt2-b8-t99", "unknown shape"),
            ("train-step/torch-cpu/f32/n64", "has no shape"),
            ("train-step/torch-cpu/f32/indicator-b16-dp1", "2 at least"),
            ("train-step/torch-cpu/f32/indicator-b16-dp3", "can't share a batch of 16"),
            ("forward/torch-cpu/f32/indicator-b16-dp2", "has no shape"),
            ("all-reduce/torch-cpu/f32/1mib", "has no shape"),
            ("copy-peak/torch-cpu/f32/1mib-dp2", "has no shape"),
            ("matmul-peak/torch-cpu/f32/n64-dp2", "not divided among ranks"),
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
        parts.extend(Precision::ALL.iter().map(|c| c.to_string()));
        parts.extend(Variant::ALL.iter().filter(|&&r| r != Variant::Eager).map(|r| format!("-{r}")));
        parts.extend(ModelId::all().map(|m| m.to_string()));
        for part in parts {
            assert!(readme.contains(&format!("`{part}`")), "src/suite/README.md does not explain {part}");
        }
    }
}

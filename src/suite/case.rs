//! A case, and the id that names it everywhere: `workload/backend/precision/shape`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};
use regex::Regex;

use super::{BackendId, Device, Framework, Precision, Recipe, Shape, Workload};
use crate::model::Dropout;

/// One row of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    pub workload: Workload,
    pub backend: BackendId,
    pub precision: Precision,
    pub shape: Shape,
}

impl Case {
    /// Dropout in force: none outside training.
    pub fn dropout(&self) -> Dropout {
        if self.workload.trains() { self.shape.dropout() } else { Dropout::NONE }
    }

    /// Whether fused kernels compute attention, whose backward pass rounds in another way.
    pub fn fuses_attention(&self) -> bool {
        let recipe = self.precision.recipe;
        // PyTorch compiles a network that is written with it.
        recipe.fused_attention()
            || (recipe == Recipe::Compile && self.backend.framework() == Framework::Torch)
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
            "compute": self.precision.compute.id(),
            "batch": batch,
            "dropout": self.dropout(),
            "model": *model,
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.workload, self.backend, self.precision, self.shape)
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
            precision: precision.parse()?,
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

impl Case {
    /// The id of today for one that was written by version 1 of a file: `-captured` was a
    /// CUDA graph in PyTorch and the compiler in MLX, and `amp` in PyTorch was its autocast
    /// unless the step was captured.
    pub fn id_of_version_1(id: &str) -> String {
        let parts: Vec<&str> = id.split('/').collect();
        let [workload, backend, precision, shape] = parts[..] else { return id.to_owned() };
        let Ok(framework) = backend.parse::<BackendId>().map(BackendId::framework) else {
            return id.to_owned();
        };
        let precision = match (framework, precision) {
            (Framework::Torch, "amp") => "autocast".to_owned(),
            (Framework::Torch, "amp-attention" | "amp-optimizer") => precision.replace("amp", "autocast"),
            (Framework::Torch, _) => precision.replace("-captured", "-graph"),
            (Framework::Mlx, _) => precision.replace("-captured", "-compile"),
        };
        format!("{workload}/{backend}/{precision}/{shape}")
    }
}

/// A filter over ids.
pub fn pattern(text: &str) -> Result<Regex> {
    Regex::new(text).with_context(|| format!("'{text}' is no regular expression"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::model::ModelId;
    use crate::suite::{Block, Compute, HEADLINE_SHAPE, Set, cases};

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
        let case: Case = "train-step/torch-cuda/amp-opt/indicator-b16".parse().unwrap();
        assert_eq!(case.precision, Precision::opt(Compute::Amp));
        assert_eq!(case.shape, HEADLINE_SHAPE);
        let model = ModelId::indicator();
        let block = Shape::Block { part: Block::Attention, model, batch: 16 };
        assert_eq!(block.to_string(), "b16-h8-n111-d32");
        let gpt2 = Shape::of(ModelId::named("gpt2").unwrap(), 8);
        assert_eq!(gpt2.to_string(), "gpt2-b8-t1024");
    }

    #[test]
    fn wrong_ids_are_refused_with_what_is_wrong() {
        for (id, word) in [
            ("train-step/torch-cpu/f32", "workload/backend/precision/shape"),
            ("train/torch-cpu/f32/indicator-b16", "unknown workload"),
            ("train-step/torch/f32/indicator-b16", "unknown backend"),
            ("train-step/torch-cpu/f64/indicator-b16", "unknown precision"),
            ("train-step/torch-cpu/f32-fast/indicator-b16", "unknown recipe"),
            ("train-step/torch-cpu/f32-eager/indicator-b16", "no suffix"),
            ("train-step/torch-cpu/f32/indicator-b0", "at least 1"),
            ("train-step/torch-cpu/f32/bert-b1", "unknown model"),
            ("train-step/torch-cpu/f32/indicator-b1-t7", "unknown shape"),
            ("train-step/torch-cpu/f32/gpt2-b8-t99", "unknown shape"),
            ("train-step/torch-cpu/f32/n64", "has no shape"),
            ("train-step/torch-cpu/f32/indicator-b16-r1", "2 at least"),
            ("train-step/torch-cpu/f32/indicator-b16-r3", "can't share a batch of 16"),
            ("forward/torch-cpu/f32/indicator-b16-r2", "has no shape"),
            ("all-reduce/torch-cpu/f32/m1", "has no shape"),
            ("copy-peak/torch-cpu/f32/m1-r2", "has no shape"),
            ("matmul-peak/torch-cpu/f32/n64-r2", "not divided among ranks"),
            ("attention/torch-cpu/f32/b1-h8-n111", "unknown shape"),
            ("attention/torch-cpu/f32/b1-n111-d256-f1024", "has no shape"),
        ] {
            let error = id.parse::<Case>().unwrap_err();
            assert!(error.contains(word), "{id}: {error}");
        }
    }

    #[test]
    fn ids_of_version_1_are_known() {
        for (old, new) in [
            (
                "train-step/torch-cuda/f32-captured/indicator-b16",
                "train-step/torch-cuda/f32-graph/indicator-b16",
            ),
            ("train-step/mlx-cpu/amp-captured/indicator-b16", "train-step/mlx-cpu/amp-compile/indicator-b16"),
            ("train-step/torch-cpu/amp/indicator-b16", "train-step/torch-cpu/autocast/indicator-b16"),
            ("train-step/torch-cpu/amp-opt/indicator-b16", "train-step/torch-cpu/amp-opt/indicator-b16"),
            ("train-step/mlx-cpu/amp/indicator-b16", "train-step/mlx-cpu/amp/indicator-b16"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(Case::id_of_version_1(old), new);
            assert!(new == "nonsense" || new.parse::<Case>().is_ok(), "{new}");
        }
    }

    #[test]
    fn the_readme_explains_every_part_of_an_id() {
        let readme = include_str!("../../README.md");
        let mut parts: Vec<String> = Workload::ALL.iter().map(|w| w.to_string()).collect();
        parts.extend(BackendId::ALL.iter().map(|b| b.to_string()));
        parts.extend(Compute::ALL.iter().map(|c| c.to_string()));
        parts.extend(Recipe::ALL.iter().filter(|&&r| r != Recipe::Eager).map(|r| format!("-{r}")));
        parts.extend(ModelId::all().map(|m| m.to_string()));
        for part in parts {
            assert!(readme.contains(&format!("`{part}`")), "README.md does not explain {part}");
        }
    }
}

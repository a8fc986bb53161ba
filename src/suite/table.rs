//! The table of cases: rows to read, and what they mean.

use super::{BackendId, Case, Framework, Given, Precision, Set, Shape, Workload, given};
use crate::model::ModelId;

/// The batch and shape that the headline tables stand for.
pub const HEADLINE_BATCH: usize = 16;
pub const HEADLINE_SHAPE: Shape = Shape::of(ModelId::indicator(), HEADLINE_BATCH);

/// Where a row is measured.
#[derive(Clone, Copy)]
enum On {
    Any,
    Cpu,
    Gpu,
    /// By one framework alone.
    Of(Framework),
    GpuOf(Framework),
}

/// What a row is measured at.
#[derive(Clone, Copy)]
enum At {
    /// Models (or their blocks) and batches.
    Models(&'static [(&'static str, usize)]),
    /// Widths of square products.
    Square(&'static [usize]),
    /// MiB of a buffer.
    Buffer(&'static [usize]),
    /// Models, whole batches and ranks.
    Among(&'static [(&'static str, usize, usize)]),
    /// MiB of each rank's buffer, and ranks.
    Summed(&'static [(usize, usize)]),
}

struct Row {
    set: Set,
    workloads: &'static [Workload],
    on: On,
    at: At,
    /// Ids, apart by spaces.
    precisions: &'static str,
}

const fn row(set: Set, workloads: &'static [Workload], on: On, at: At, precisions: &'static str) -> Row {
    Row { set, workloads, on, at, precisions }
}

use At::{Among, Buffer, Models, Square, Summed};
use Framework::{Mlx, Torch};
use On::{Any, Cpu, Gpu, GpuOf, Of};
use Set::{Compare, Full, Quick, Smoke};
use Workload::{
    AllReduce, Attention, AttentionGrad, CopyPeak, FeedForward, FeedForwardGrad, Forward, ForwardBackward,
    MatmulPeak, OptimizerStep, TrainStep,
};

const INFER: &[Workload] = &[Attention, FeedForward, Forward];
const GRAD: &[Workload] = &[AttentionGrad, FeedForwardGrad, ForwardBackward];
const MODEL: &[Workload] =
    &[Attention, AttentionGrad, FeedForward, FeedForwardGrad, Forward, ForwardBackward, OptimizerStep];

const BLOCKS: &[Workload] = &[Attention, AttentionGrad, FeedForward, FeedForwardGrad];

const TINY: At = Models(&[("indicator-tiny", 2), ("gpt2-tiny", 2)]);
const ONE_TINY: At = Models(&[("indicator-tiny", 2)]);
const B1: At = Models(&[("indicator", 1)]);
const B2: At = Models(&[("indicator", 2)]);
const B16: At = Models(&[("indicator", 16)]);
const GPT2_B8: At = Models(&[("gpt2", 8)]);
const ALL: At =
    Models(&[("indicator", 1), ("indicator", 16), ("indicator", 64), ("indicator", 256), ("gpt2", 8)]);
// The sweep over batches.
const SWEEP: At = Models(&[
    ("indicator", 1),
    ("indicator", 4),
    ("indicator", 16),
    ("indicator", 64),
    ("indicator", 256),
    ("gpt2", 8),
]);
const BOTH: At = Models(&[("indicator", 16), ("gpt2", 8)]);

/// The same batch on more devices, and the same batch a device.
const TWO: At = Among(&[("indicator", 16, 2), ("indicator", 32, 2)]);
const MORE: At = Among(&[
    ("indicator", 16, 2),
    ("indicator", 32, 2),
    ("indicator", 512, 2),
    ("gpt2", 32, 2),
    ("gpt2", 64, 2),
    ("indicator", 16, 4),
    ("indicator", 64, 4),
    ("indicator", 1024, 4),
    ("gpt2", 128, 4),
    ("indicator", 16, 8),
    ("indicator", 128, 8),
    ("indicator", 2048, 8),
    ("gpt2", 256, 8),
]);
// The gradients of the indicator and of GPT-2 in f32, and sizes about them.
const SUMMED: At = Summed(&[
    (1, 2),
    (18, 2),
    (475, 2),
    (1024, 2),
    (1, 4),
    (18, 4),
    (475, 4),
    (1024, 4),
    (1, 8),
    (18, 8),
    (475, 8),
    (1024, 8),
]);

const STORED: &str = "f32 bf16 f16";
const MIXED: &str = "amp f32-opt bf16-opt amp-opt";
const TF32: &str = "tf32 tf32-opt";
/// What each optimisation brings alone.
const SINGLE: &str = "f32-attention f32-optimizer amp-attention amp-optimizer";

#[rustfmt::skip]
const TABLE: &[Row] = &[
    // Every case at its miniature: the suite's own test.
    row(Smoke, MODEL,         Any,       TINY,                        STORED),
    row(Smoke, &[TrainStep],  Any,       TINY,                        STORED),
    row(Smoke, GRAD,          Any,       TINY,                        MIXED),
    row(Smoke, &[TrainStep],  Any,       TINY,                        MIXED),
    row(Smoke, GRAD,          Of(Torch), TINY,                        "autocast"),
    row(Smoke, &[TrainStep],  Of(Torch), TINY,                        "autocast"),
    row(Smoke, &[TrainStep],  Any,       TINY,                        TF32),
    row(Smoke, &[TrainStep],  Any,       TINY,                        SINGLE),
    row(Smoke, &[TrainStep],  Of(Torch), TINY,                        "f32-graph amp-graph"),
    row(Smoke, &[TrainStep],  Of(Mlx),   TINY,                        "f32-compile amp-compile"),
    // Its code takes half a minute a case to make.
    row(Smoke, &[TrainStep],  Of(Torch), ONE_TINY,                    "f32-compile"),
    row(Smoke, &[MatmulPeak], Any,       Square(&[64]),               "f32 tf32 bf16 f16"),
    row(Smoke, &[CopyPeak],   Any,       Buffer(&[1]),                STORED),
    row(Smoke, &[TrainStep],  Any,       Among(&[("indicator-tiny", 2, 2)]), "f32 f32-overlap f32-opt amp-overlap"),
    row(Smoke, &[AllReduce],  Any,       Summed(&[(1, 2)]),           "f32"),
    // True widths, and steps of which a comparison sees hundreds within a minute.
    row(Compare, MODEL,        Cpu,       B1,                          "f32"),
    row(Compare, &[TrainStep], Cpu,       B1,                          "f32 f32-opt"),
    row(Compare, BLOCKS,       Cpu,       B2,                          "f32"),
    row(Compare, MODEL,        Gpu,       B16,                         "f32"),
    row(Compare, &[TrainStep], Gpu,       B16,                         "f32 f32-opt amp amp-opt bf16-opt"),
    // What the headline tables need.
    row(Quick, MODEL,         Any,       B16,                         "f32"),
    row(Quick, &[TrainStep],  Any,       B16,                         "f32 f32-opt"),
    // MLX has no bf16 arithmetic on a CPU: a step took 13 s on two cores.
    row(Quick, &[TrainStep],  Of(Torch), B16,                         "amp amp-opt autocast"),
    row(Quick, &[TrainStep],  Gpu,       B16,                         "amp amp-opt bf16 bf16-opt"),
    row(Quick, &[TrainStep],  Of(Torch), B16,                         "f32-compile amp-compile"),
    // In f32 it takes long and answers nothing quickly.
    row(Quick, &[TrainStep],  Gpu,       GPT2_B8,                     "bf16 bf16-opt amp amp-opt"),
    row(Quick, &[MatmulPeak], Cpu,       Square(&[1024]),             "f32"),
    row(Quick, &[MatmulPeak], Gpu,       Square(&[8192]),             "f32 bf16"),
    row(Quick, &[CopyPeak],   Cpu,       Buffer(&[256]),              "f32"),
    row(Quick, &[CopyPeak],   Gpu,       Buffer(&[1024]),             "f32"),
    row(Quick, &[TrainStep],  Gpu,       TWO,                         "f32 f32-opt amp-opt bf16-opt"),
    row(Quick, &[AllReduce],  Any,       Summed(&[(18, 2)]),          "f32"),
    // Everything.
    row(Full,  INFER,         Any,       ALL,                         STORED),
    row(Full,  GRAD,          Any,       ALL,                         STORED),
    row(Full,  GRAD,          Any,       ALL,                         MIXED),
    row(Full,  GRAD,          Of(Torch), ALL,                         "autocast"),
    // The optimizer's work does not depend on the batch.
    row(Full,  &[OptimizerStep], Any,    BOTH,                        STORED),
    row(Full,  &[TrainStep],  Any,       SWEEP,                       STORED),
    row(Full,  &[TrainStep],  Any,       SWEEP,                       MIXED),
    row(Full,  &[TrainStep],  Any,       SWEEP,                       TF32),
    row(Full,  &[TrainStep],  Of(Torch), SWEEP,                       "autocast"),
    row(Full,  &[TrainStep],  Any,       B16,                         SINGLE),
    row(Full,  &[TrainStep],  Of(Torch), B16,                         "f32-graph amp-graph"),
    row(Full,  &[TrainStep],  Of(Mlx),   B16,                         "f32-compile amp-compile"),
    row(Full,  &[TrainStep],  Of(Torch), ALL,                         "f32-compile bf16-compile amp-compile tf32-compile"),
    row(Full,  GRAD,          Of(Torch), B16,                         "f32-compile amp-compile"),
    row(Full,  &[Forward],    Of(Torch), B16,                         "f32-compile amp-compile"),
    row(Full,  &[MatmulPeak], Cpu,       Square(&[1024, 2048]),       "f32 tf32 bf16 f16"),
    row(Full,  &[MatmulPeak], Gpu,       Square(&[1024, 4096, 8192]), "f32 tf32 bf16 f16"),
    row(Full,  &[CopyPeak],   Cpu,       Buffer(&[256]),              STORED),
    row(Full,  &[CopyPeak],   Gpu,       Buffer(&[1024]),             STORED),
    row(Full,  &[TrainStep],  Cpu,       TWO,                         "f32 f32-overlap f32-opt"),
    row(Full,  &[TrainStep],  Gpu,       MORE,                        "f32 f32-overlap f32-opt bf16 bf16-overlap bf16-opt amp-opt"),
    row(Full,  &[TrainStep],  Of(Torch), TWO,                         "f32-compile amp-compile"),
    row(Full,  &[TrainStep],  GpuOf(Torch), MORE,                     "bf16-compile"),
    row(Full,  &[TrainStep],  GpuOf(Torch), Models(&[("gpt2", 32)]),  "bf16-compile"),
    row(Full,  &[TrainStep],  Gpu,       Models(&[("gpt2", 32)]),     "f32 f32-opt bf16 bf16-opt amp-opt"),
    row(Full,  &[AllReduce],  Cpu,       Summed(&[(1, 2), (18, 2)]),  "f32"),
    row(Full,  &[AllReduce],  Gpu,       SUMMED,                      "f32"),
];

impl On {
    fn holds(self, backend: BackendId) -> bool {
        match self {
            Self::Any => true,
            Self::Cpu => backend.is_cpu(),
            Self::Gpu => !backend.is_cpu(),
            Self::Of(framework) => backend.framework() == framework,
            Self::GpuOf(framework) => !backend.is_cpu() && backend.framework() == framework,
        }
    }
}

impl At {
    fn shapes(self, workload: Workload, given: Option<Given>) -> Vec<Shape> {
        let of_a_model = |&(name, batch): &(&str, usize)| {
            let own = ModelId::named(name).unwrap_or_else(|| panic!("the table names no model '{name}'"));
            let (model, batch) = match given {
                // A model that is given stands in the indicator's place, and its batch in that of 16.
                Some(given) if own.miniature() == ModelId::indicator().miniature() => {
                    if own.is_miniature() {
                        (given.model.miniature(), batch)
                    } else {
                        (given.model, (given.batch * batch).div_ceil(HEADLINE_BATCH))
                    }
                }
                Some(_) => return None,
                None => (own, batch),
            };
            Some(match workload.block() {
                Some(part) => Shape::Block { part, model, batch },
                None => Shape::of(model, batch),
            })
        };
        let mut all: Vec<Shape> = match self {
            Self::Models(list) => list.iter().filter_map(of_a_model).collect(),
            Self::Square(list) => list.iter().map(|&n| Shape::Square { n, chain: 1 }).collect(),
            Self::Buffer(list) => list.iter().map(|&mib| Shape::Buffer { mib, ranks: 1 }).collect(),
            Self::Summed(list) => list.iter().map(|&(mib, ranks)| Shape::Buffer { mib, ranks }).collect(),
            Self::Among(list) => {
                let divided = |&(name, batch, ranks)| Some(of_a_model(&(name, batch))?.over(ranks));
                // The batch of a given model may not divide.
                let fits = |shape: &Shape| shape.batch().is_multiple_of(shape.ranks());
                list.iter().filter_map(divided).filter(fits).collect()
            }
        };
        all.dedup();
        all
    }
}

/// The cases of a set, in the order in which they run: by workload, backend, the rows' shapes,
/// and precision. Every backend is listed whether or not this machine has it.
pub fn cases(set: Set) -> Vec<Case> {
    cases_of(set, given::taken())
}

/// The same, with a model that is given in place of the suite's own.
pub fn cases_of(set: Set, given: Option<Given>) -> Vec<Case> {
    let mut all = Vec::new();
    for &workload in Workload::ALL {
        let rows: Vec<&Row> =
            TABLE.iter().filter(|r| r.set == set && r.workloads.contains(&workload)).collect();
        for &backend in BackendId::ALL {
            let mut found: Vec<(Shape, Vec<Precision>)> = Vec::new();
            for row in rows.iter().filter(|r| r.on.holds(backend)) {
                for shape in row.at.shapes(workload, given) {
                    let precisions = row.precisions.split(' ').map(|id| id.parse().expect("the table's own"));
                    match found.iter_mut().find(|(known, _)| *known == shape) {
                        Some((_, list)) => list.extend(precisions),
                        None => found.push((shape, precisions.collect())),
                    }
                }
            }
            for (shape, mut precisions) in found {
                precisions.sort();
                precisions.dedup();
                all.extend(precisions.into_iter().map(|precision| Case {
                    workload,
                    backend,
                    precision,
                    shape,
                }));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::{Compute, Recipe};

    #[test]
    fn the_table_has_every_precision_recipe_and_model() {
        let full = cases(Full);
        for &compute in Compute::ALL {
            assert!(full.iter().any(|c| c.precision.compute == compute), "no case in {compute}");
        }
        for &recipe in Recipe::ALL {
            assert!(full.iter().any(|c| c.precision.recipe == recipe), "no case of {recipe}");
        }
        for model in ModelId::all() {
            assert!(
                full.iter().any(|c| c.shape.model().is_some_and(|(m, _)| m == model)),
                "no case of {model}"
            );
        }
    }

    #[test]
    fn a_given_model_stands_in_the_place_of_the_suites_own() {
        let model = ModelId::add(crate::model::Model { name: "mine", ..*ModelId::named("gpt2").unwrap() });
        for &set in Set::ALL {
            let all = cases_of(set, Some(Given { model, batch: 4 }));
            let of_a_model = || all.iter().filter_map(|c| c.shape.model());
            assert!(of_a_model().all(|(m, _)| m == model || m == model.miniature()));
            for &workload in Workload::ALL.iter().filter(|w| set != Compare || w.trains()) {
                assert!(all.iter().any(|c| c.workload == workload), "{set} has no {workload}");
            }
        }
        let full = cases_of(Full, Some(Given { model, batch: 4 }));
        let alone = full.iter().filter(|c| c.shape.ranks() == 1);
        let mut batches: Vec<usize> = alone.filter_map(|c| c.shape.model()).map(|(_, b)| b).collect();
        batches.sort_unstable();
        batches.dedup();
        assert_eq!(batches, [1, 4, 16, 64]);
    }

    #[test]
    fn quick_covers_every_workload_on_every_backend() {
        let quick = cases(Quick);
        for &workload in Workload::ALL {
            for &backend in BackendId::ALL {
                assert!(quick.iter().any(|c| c.workload == workload && c.backend == backend));
            }
        }
    }
}

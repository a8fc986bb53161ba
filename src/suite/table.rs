//! The table of cases: rows to read, and what they mean.

use super::{BackendId, Case, CustomModel, Framework, Method, Set, Shape, Workload, custom_model};
use crate::model::ModelId;

/// The batch and shape that the headline tables stand for.
pub const HEADLINE_BATCH: usize = 16;
pub const HEADLINE_SHAPE: Shape = Shape::of_model(ModelId::indicator(), HEADLINE_BATCH);

/// Where a row is measured.
#[derive(Clone, Copy)]
enum BackendFilter {
    Any,
    Cpu,
    Gpu,
    /// By one framework alone.
    Only(Framework),
    GpuOnly(Framework),
}

/// What a row is measured at.
#[derive(Clone, Copy)]
enum Sizes {
    /// Models (or their blocks) and batches.
    Models(&'static [(&'static str, usize)]),
    /// Widths of square products.
    Square(&'static [usize]),
    /// MiB of a buffer.
    Buffer(&'static [usize]),
    /// Models, whole batches and ranks.
    DataParallel(&'static [(&'static str, usize, usize)]),
    /// MiB of each rank's buffer, and ranks.
    AllReduceBuffers(&'static [(usize, usize)]),
}

struct Row {
    set: Set,
    workloads: &'static [Workload],
    on: BackendFilter,
    at: Sizes,
    /// Ids, apart by spaces.
    precisions: &'static str,
}

const fn row(
    set: Set,
    workloads: &'static [Workload],
    on: BackendFilter,
    at: Sizes,
    precisions: &'static str,
) -> Row {
    Row { set, workloads, on, at, precisions }
}

use BackendFilter::{Any, Cpu, Gpu, GpuOnly, Only};
use Framework::{Mlx, Torch};
use Set::{Compare, Full, Quick, Smoke};
use Sizes::{AllReduceBuffers, Buffer, DataParallel, Models, Square};
use Workload::{
    AllReduce, Attention, AttentionGrad, CopyPeak, FeedForward, FeedForwardGrad, Forward, ForwardBackward,
    MatmulPeak, OptimizerStep, TrainStep,
};

const INFER: &[Workload] = &[Attention, FeedForward, Forward];
const GRAD: &[Workload] = &[AttentionGrad, FeedForwardGrad, ForwardBackward];
const MODEL: &[Workload] =
    &[Attention, AttentionGrad, FeedForward, FeedForwardGrad, Forward, ForwardBackward, OptimizerStep];

const BLOCKS: &[Workload] = &[Attention, AttentionGrad, FeedForward, FeedForwardGrad];

const TINY: Sizes = Models(&[("indicator-tiny", 2), ("gpt2-tiny", 2)]);
const ONE_TINY: Sizes = Models(&[("indicator-tiny", 2)]);
const B1: Sizes = Models(&[("indicator", 1)]);
const B2: Sizes = Models(&[("indicator", 2)]);
const B16: Sizes = Models(&[("indicator", 16)]);
const GPT2_B8: Sizes = Models(&[("gpt2", 8)]);
const ALL_MODELS: Sizes =
    Models(&[("indicator", 1), ("indicator", 16), ("indicator", 64), ("indicator", 256), ("gpt2", 8)]);
// The sweep over batches.
const SWEEP: Sizes = Models(&[
    ("indicator", 1),
    ("indicator", 4),
    ("indicator", 16),
    ("indicator", 64),
    ("indicator", 256),
    ("gpt2", 8),
]);
const BOTH_MODELS: Sizes = Models(&[("indicator", 16), ("gpt2", 8)]);

/// The same batch on more devices, and the same batch a device.
const DP2: Sizes = DataParallel(&[("indicator", 16, 2), ("indicator", 32, 2)]);
const SCALING: Sizes = DataParallel(&[
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
const BUFFERS: Sizes = AllReduceBuffers(&[
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
const MIXED: &str = "mixed f32-tuned bf16-tuned mixed-tuned";
const TF32: &str = "tf32 tf32-tuned";
/// What each optimisation brings alone.
const SINGLE: &str = "f32-sdpa f32-fused-adamw mixed-sdpa mixed-fused-adamw";

#[rustfmt::skip]
const TABLE: &[Row] = &[
    // Every case at its miniature: the suite's own test.
    row(Smoke, MODEL,         Any,       TINY,                        STORED),
    row(Smoke, &[TrainStep],  Any,       TINY,                        STORED),
    row(Smoke, GRAD,          Any,       TINY,                        MIXED),
    row(Smoke, &[TrainStep],  Any,       TINY,                        MIXED),
    row(Smoke, GRAD,          Only(Torch), TINY,                        "amp"),
    row(Smoke, &[TrainStep],  Only(Torch), TINY,                        "amp"),
    row(Smoke, &[TrainStep],  Any,       TINY,                        TF32),
    row(Smoke, &[TrainStep],  Any,       TINY,                        SINGLE),
    row(Smoke, &[TrainStep],  Only(Torch), TINY,                        "f32-cudagraph mixed-cudagraph"),
    row(Smoke, &[TrainStep],  Only(Mlx),   TINY,                        "f32-compile mixed-compile"),
    // Its code takes half a minute a case to make.
    row(Smoke, &[TrainStep],  Only(Torch), ONE_TINY,                    "f32-compile"),
    row(Smoke, &[MatmulPeak], Any,       Square(&[64]),               "f32 tf32 bf16 f16"),
    row(Smoke, &[CopyPeak],   Any,       Buffer(&[1]),                STORED),
    row(Smoke, &[TrainStep],  Any,       DataParallel(&[("indicator-tiny", 2, 2)]), "f32 f32-overlap f32-tuned mixed-overlap"),
    row(Smoke, &[AllReduce],  Any,       AllReduceBuffers(&[(1, 2)]),           "f32"),
    // True widths, and steps of which a comparison sees hundreds within a minute.
    row(Compare, MODEL,        Cpu,       B1,                          "f32"),
    row(Compare, &[TrainStep], Cpu,       B1,                          "f32 f32-tuned"),
    row(Compare, BLOCKS,       Cpu,       B2,                          "f32"),
    row(Compare, MODEL,        Gpu,       B16,                         "f32"),
    row(Compare, &[TrainStep], Gpu,       B16,                         "f32 f32-tuned mixed mixed-tuned bf16-tuned"),
    // What the headline tables need.
    row(Quick, MODEL,         Any,       B16,                         "f32"),
    row(Quick, &[TrainStep],  Any,       B16,                         "f32 f32-tuned"),
    // MLX has no bf16 arithmetic on a CPU: a step took 13 s on two cores.
    row(Quick, &[TrainStep],  Only(Torch), B16,                         "mixed mixed-tuned amp"),
    row(Quick, &[TrainStep],  Gpu,       B16,                         "mixed mixed-tuned bf16 bf16-tuned"),
    row(Quick, &[TrainStep],  Only(Torch), B16,                         "f32-compile mixed-compile"),
    // In f32 it takes long and answers nothing quickly.
    row(Quick, &[TrainStep],  Gpu,       GPT2_B8,                     "bf16 bf16-tuned mixed mixed-tuned"),
    row(Quick, &[MatmulPeak], Cpu,       Square(&[1024]),             "f32"),
    row(Quick, &[MatmulPeak], Gpu,       Square(&[8192]),             "f32 bf16"),
    row(Quick, &[CopyPeak],   Cpu,       Buffer(&[256]),              "f32"),
    row(Quick, &[CopyPeak],   Gpu,       Buffer(&[1024]),             "f32"),
    row(Quick, &[TrainStep],  Gpu,       DP2,                         "f32 f32-tuned mixed-tuned bf16-tuned"),
    row(Quick, &[AllReduce],  Any,       AllReduceBuffers(&[(18, 2)]),          "f32"),
    // Everything.
    row(Full,  INFER,         Any,       ALL_MODELS,                         STORED),
    row(Full,  GRAD,          Any,       ALL_MODELS,                         STORED),
    row(Full,  GRAD,          Any,       ALL_MODELS,                         MIXED),
    row(Full,  GRAD,          Only(Torch), ALL_MODELS,                         "amp"),
    // The optimizer's work does not depend on the batch.
    row(Full,  &[OptimizerStep], Any,    BOTH_MODELS,                        STORED),
    row(Full,  &[TrainStep],  Any,       SWEEP,                       STORED),
    row(Full,  &[TrainStep],  Any,       SWEEP,                       MIXED),
    row(Full,  &[TrainStep],  Any,       SWEEP,                       TF32),
    row(Full,  &[TrainStep],  Only(Torch), SWEEP,                       "amp"),
    row(Full,  &[TrainStep],  Any,       B16,                         SINGLE),
    row(Full,  &[TrainStep],  Only(Torch), B16,                         "f32-cudagraph mixed-cudagraph"),
    row(Full,  &[TrainStep],  Only(Mlx),   B16,                         "f32-compile mixed-compile"),
    row(Full,  &[TrainStep],  Only(Torch), ALL_MODELS,                         "f32-compile bf16-compile mixed-compile tf32-compile"),
    row(Full,  GRAD,          Only(Torch), B16,                         "f32-compile mixed-compile"),
    row(Full,  &[Forward],    Only(Torch), B16,                         "f32-compile mixed-compile"),
    row(Full,  &[MatmulPeak], Cpu,       Square(&[1024, 2048]),       "f32 tf32 bf16 f16"),
    row(Full,  &[MatmulPeak], Gpu,       Square(&[1024, 4096, 8192]), "f32 tf32 bf16 f16"),
    row(Full,  &[CopyPeak],   Cpu,       Buffer(&[256]),              STORED),
    row(Full,  &[CopyPeak],   Gpu,       Buffer(&[1024]),             STORED),
    row(Full,  &[TrainStep],  Cpu,       DP2,                         "f32 f32-overlap f32-tuned"),
    row(Full,  &[TrainStep],  Gpu,       SCALING,                        "f32 f32-overlap f32-tuned bf16 bf16-overlap bf16-tuned mixed-tuned"),
    row(Full,  &[TrainStep],  Only(Torch), DP2,                         "f32-compile mixed-compile"),
    row(Full,  &[TrainStep],  GpuOnly(Torch), SCALING,                     "bf16-compile"),
    row(Full,  &[TrainStep],  GpuOnly(Torch), Models(&[("gpt2", 32)]),  "bf16-compile"),
    row(Full,  &[TrainStep],  Gpu,       Models(&[("gpt2", 32)]),     "f32 f32-tuned bf16 bf16-tuned mixed-tuned"),
    row(Full,  &[AllReduce],  Cpu,       AllReduceBuffers(&[(1, 2), (18, 2)]),  "f32"),
    row(Full,  &[AllReduce],  Gpu,       BUFFERS,                      "f32"),
];

impl BackendFilter {
    fn accepts(self, backend: BackendId) -> bool {
        match self {
            Self::Any => true,
            Self::Cpu => backend.is_cpu(),
            Self::Gpu => !backend.is_cpu(),
            Self::Only(framework) => backend.framework() == framework,
            Self::GpuOnly(framework) => !backend.is_cpu() && backend.framework() == framework,
        }
    }
}

impl Sizes {
    fn shapes(self, workload: Workload, given: Option<CustomModel>) -> Vec<Shape> {
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
                None => Shape::of_model(model, batch),
            })
        };
        let mut all: Vec<Shape> = match self {
            Self::Models(list) => list.iter().filter_map(of_a_model).collect(),
            Self::Square(list) => list.iter().map(|&n| Shape::Square { n, chain: 1 }).collect(),
            Self::Buffer(list) => list.iter().map(|&mib| Shape::Buffer { mib, ranks: 1 }).collect(),
            Self::AllReduceBuffers(list) => {
                list.iter().map(|&(mib, ranks)| Shape::Buffer { mib, ranks }).collect()
            }
            Self::DataParallel(list) => {
                let divided = |&(name, batch, ranks)| Some(of_a_model(&(name, batch))?.with_ranks(ranks));
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
    cases_for(set, custom_model::custom_model())
}

/// The same, with a model that is given in place of the suite's own.
pub fn cases_for(set: Set, given: Option<CustomModel>) -> Vec<Case> {
    let mut all = Vec::new();
    for &workload in Workload::ALL {
        let rows: Vec<&Row> =
            TABLE.iter().filter(|r| r.set == set && r.workloads.contains(&workload)).collect();
        for &backend in BackendId::ALL {
            let mut found: Vec<(Shape, Vec<Method>)> = Vec::new();
            for row in rows.iter().filter(|r| r.on.accepts(backend)) {
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
                    method: precision,
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
    use crate::suite::{Precision, Variant};

    #[test]
    fn the_table_has_every_precision_recipe_and_model() {
        let full = cases(Full);
        for &compute in Precision::ALL {
            assert!(full.iter().any(|c| c.method.precision == compute), "no case in {compute}");
        }
        for &recipe in Variant::ALL {
            assert!(full.iter().any(|c| c.method.variant == recipe), "no case of {recipe}");
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
        let model = ModelId::intern(crate::model::Model { name: "mine", ..*ModelId::named("gpt2").unwrap() });
        for &set in Set::ALL {
            let all = cases_for(set, Some(CustomModel { model, batch: 4 }));
            let of_a_model = || all.iter().filter_map(|c| c.shape.model());
            assert!(of_a_model().all(|(m, _)| m == model || m == model.miniature()));
            for &workload in Workload::ALL.iter().filter(|w| set != Compare || w.trains()) {
                assert!(all.iter().any(|c| c.workload == workload), "{set} has no {workload}");
            }
        }
        let full = cases_for(Full, Some(CustomModel { model, batch: 4 }));
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

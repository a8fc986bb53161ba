//! The table of cases.

use super::{
    BackendId, Case, CustomModel, Framework, Method, Optimizer, Set, Shape, Variant, Workload, custom_model,
};
use crate::model::ModelId;

/// The batch and the shape of the headline tables.
pub const HEADLINE_BATCH: usize = 16;
pub const HEADLINE_SHAPE: Shape = Shape::for_model(ModelId::indicator(), HEADLINE_BATCH);

/// The backends of a row.
#[derive(Clone, Copy)]
enum BackendFilter {
    Any,
    Cpu,
    Gpu,
    Only(Framework),
    GpuOnly(Framework),
}

/// A product of workloads, backends, shapes and methods.
struct Row {
    set: Set,
    workloads: &'static [Workload],
    backends: BackendFilter,
    /// Ids separated by spaces. A workload that runs a block takes it from the model.
    shapes: &'static str,
    /// Ids separated by spaces.
    methods: &'static str,
}

const fn row(
    set: Set,
    workloads: &'static [Workload],
    backends: BackendFilter,
    shapes: &'static str,
    methods: &'static str,
) -> Row {
    Row { set, workloads, backends, shapes, methods }
}

use BackendFilter::{Any, Cpu, Gpu, GpuOnly, Only};
use Framework::{Mlx, Torch};
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

/// The workloads of models with adapters.
const ADAPTED: &[Workload] = &[Forward, ForwardBackward, OptimizerStep, TrainStep];

const TINY: &str = "indicator-tiny-b2 gpt2-tiny-b2-t16";
const BATCHES: &str = "indicator-b1 indicator-b16 indicator-b64 indicator-b256 gpt2-b8-t1024";
/// The batches of training steps.
const SWEEP: &str = "indicator-b1 indicator-b4 indicator-b16 indicator-b64 indicator-b256 gpt2-b8-t1024";
/// An unchanged global batch (strong scaling), and an unchanged batch per device (weak scaling).
const DP2: &str = "indicator-b16-dp2 indicator-b32-dp2";
const SCALING: &str = "indicator-b16-dp2 indicator-b32-dp2 indicator-b512-dp2 gpt2-b32-t1024-dp2 gpt2-b64-t1024-dp2 \
     indicator-b16-dp4 indicator-b64-dp4 indicator-b1024-dp4 gpt2-b128-t1024-dp4 \
     indicator-b16-dp8 indicator-b128-dp8 indicator-b2048-dp8 gpt2-b256-t1024-dp8";
const LORA: &str = "indicator-b16-lora16 gpt2-b8-t1024-lora16";
/// 18 MiB and 475 MiB are the f32 gradients of the indicator and of GPT-2.
const BUFFERS: &str = "1mib-dp2 18mib-dp2 475mib-dp2 1024mib-dp2 1mib-dp4 18mib-dp4 475mib-dp4 1024mib-dp4 \
     1mib-dp8 18mib-dp8 475mib-dp8 1024mib-dp8";

const STORED: &str = "f32 bf16 f16";
const MIXED: &str = "mixed f32-tuned bf16-tuned mixed-tuned";
const TF32: &str = "tf32 tf32-tuned";
/// One optimization each.
const SINGLE: &str = "f32-sdpa f32-fused-adamw mixed-sdpa mixed-fused-adamw";
/// Variants that need less memory. A model without a vocabulary has only the first of each precision.
const MEMORY: &str = "f32-checkpoint f32-chunked-loss mixed-checkpoint mixed-chunked-loss";

#[rustfmt::skip]
const TABLE: &[Row] = &[
    // Every case at its miniature.
    row(Smoke,   MODEL,            Any,            TINY,                          STORED),
    row(Smoke,   &[TrainStep],     Any,            TINY,                          STORED),
    row(Smoke,   GRAD,             Any,            TINY,                          MIXED),
    row(Smoke,   &[TrainStep],     Any,            TINY,                          MIXED),
    row(Smoke,   GRAD,             Only(Torch),    TINY,                          "amp"),
    row(Smoke,   &[TrainStep],     Only(Torch),    TINY,                          "amp"),
    row(Smoke,   &[TrainStep],     Any,            TINY,                          TF32),
    row(Smoke,   &[TrainStep],     Any,            TINY,                          SINGLE),
    row(Smoke,   &[TrainStep],     Any,            TINY,                          MEMORY),
    row(Smoke,   &[TrainStep],     Only(Torch),    TINY,                          "amp-checkpoint amp-chunked-loss"),
    row(Smoke,   &[TrainStep],     Only(Torch),    TINY,                          "f32-cudagraph mixed-cudagraph"),
    row(Smoke,   &[TrainStep],     Only(Mlx),      TINY,                          "f32-compile mixed-compile"),
    // The compiler takes half a minute per case.
    row(Smoke,   &[TrainStep],     Only(Torch),    "indicator-tiny-b2",           "f32-compile"),
    row(Smoke,   &[MatmulPeak],    Any,            "n64",                         "f32 tf32 bf16 f16"),
    row(Smoke,   &[CopyPeak],      Any,            "1mib",                        STORED),
    row(Smoke,   &[TrainStep],     Any,            "indicator-tiny-b2-dp2",       "f32 f32-overlap f32-tuned mixed-overlap"),
    // Four micro-batches run the code of the first, of a later and of the last one.
    row(Smoke,   &[TrainStep],     Any,            "indicator-tiny-b8-a4",        "f32 bf16 mixed f32-tuned mixed-tuned"),
    row(Smoke,   &[TrainStep],     Only(Torch),    "indicator-tiny-b8-a4",        "f32-compile"),
    row(Smoke,   &[TrainStep],     Any,            "indicator-tiny-b8-a2-dp2",    "f32 f32-overlap f32-tuned"),
    // Adapters of all layers of the blocks, and of queries and values alone.
    row(Smoke,   ADAPTED,          Any,            "indicator-tiny-b2-lora4",     "f32"),
    row(Smoke,   &[TrainStep],     Any,            "indicator-tiny-b2-lora4",     "bf16 mixed f32-tuned bf16-tuned"),
    row(Smoke,   &[TrainStep],     Only(Torch),    "indicator-tiny-b2-lora4",     "f32-compile"),
    row(Smoke,   &[TrainStep],     Any,            "gpt2-tiny-b2-t16-lora4qv",    "f32 f32-tuned"),
    // Muon for square, tall and wide matrices.
    row(Smoke,   &[OptimizerStep], Any,            "indicator-tiny-b2-muon",      "f32 bf16 f32-tuned bf16-tuned"),
    row(Smoke,   &[TrainStep],     Any,            "indicator-tiny-b2-muon",      "f32 bf16 mixed f32-tuned bf16-tuned mixed-tuned"),
    row(Smoke,   &[TrainStep],     Only(Torch),    "indicator-tiny-b2-muon",      "amp f32-compile f32-fused-adamw f32-cudagraph"),
    row(Smoke,   &[TrainStep],     Only(Mlx),      "indicator-tiny-b2-muon",      "f32-compile"),
    row(Smoke,   &[TrainStep],     Any,            "gpt2-tiny-b2-t16-muon",       "f32 f32-tuned"),
    row(Smoke,   &[TrainStep],     Any,            "indicator-tiny-b8-muon-a2-dp2", "f32 f32-tuned"),
    row(Smoke,   &[TrainStep],     Any,            "nanochat-d12-tiny-b2-t16 nanochat-d4-tiny-b2-t16-muon", "f32 f32-tuned"),
    row(Smoke,   &[TrainStep],     Any,            "nanochat-d4-tiny-b2-t16-muon", "bf16 mixed-tuned"),
    row(Smoke,   &[AllReduce],     Any,            "1mib-dp2",                    "f32"),
    // Real widths, and steps so short that a comparison has hundreds of them within a minute.
    row(Compare, MODEL,            Cpu,            "indicator-b1",                "f32"),
    row(Compare, &[TrainStep],     Cpu,            "indicator-b1",                "f32 f32-tuned"),
    row(Compare, BLOCKS,           Cpu,            "indicator-b2",                "f32"),
    row(Compare, MODEL,            Gpu,            "indicator-b16",               "f32"),
    row(Compare, &[TrainStep],     Gpu,            "indicator-b16",               "f32 f32-tuned mixed mixed-tuned bf16-tuned"),
    // The cases of the headline tables.
    row(Quick,   MODEL,            Any,            "indicator-b16",               "f32"),
    row(Quick,   &[TrainStep],     Any,            "indicator-b16",               "f32 f32-tuned"),
    // MLX has no bf16 arithmetic on a CPU, where a step took 13 s on two cores.
    row(Quick,   &[TrainStep],     Only(Torch),    "indicator-b16",               "mixed mixed-tuned amp"),
    row(Quick,   &[TrainStep],     Gpu,            "indicator-b16",               "mixed mixed-tuned bf16 bf16-tuned"),
    row(Quick,   &[TrainStep],     Only(Torch),    "indicator-b16",               "f32-compile mixed-compile"),
    // What Muon costs over AdamW. On two cores it took 29 s of a run of 318 s, so a CPU has it in the full set.
    row(Quick,   &[TrainStep],     Gpu,            "indicator-b16-muon",          "f32-tuned"),
    // f32 takes long and is not needed for the headline.
    row(Quick,   &[TrainStep],     Gpu,            "gpt2-b8-t1024",               "bf16 bf16-tuned mixed mixed-tuned"),
    row(Quick,   &[MatmulPeak],    Cpu,            "n1024",                       "f32"),
    row(Quick,   &[MatmulPeak],    Gpu,            "n8192",                       "f32 bf16"),
    row(Quick,   &[CopyPeak],      Cpu,            "256mib",                      "f32"),
    row(Quick,   &[CopyPeak],      Gpu,            "1024mib",                     "f32"),
    row(Quick,   &[TrainStep],     Gpu,            DP2,                           "f32 f32-tuned mixed-tuned bf16-tuned"),
    row(Quick,   &[AllReduce],     Any,            "18mib-dp2",                   "f32"),
    // Every case.
    row(Full,    INFER,            Any,            BATCHES,                       STORED),
    row(Full,    GRAD,             Any,            BATCHES,                       STORED),
    row(Full,    GRAD,             Any,            BATCHES,                       MIXED),
    row(Full,    GRAD,             Only(Torch),    BATCHES,                       "amp"),
    // The optimizer's work does not depend on the batch.
    row(Full,    &[OptimizerStep], Any,            "indicator-b16 gpt2-b8-t1024", STORED),
    row(Full,    &[TrainStep],     Any,            SWEEP,                         STORED),
    row(Full,    &[TrainStep],     Any,            SWEEP,                         MIXED),
    row(Full,    &[TrainStep],     Any,            SWEEP,                         TF32),
    row(Full,    &[TrainStep],     Only(Torch),    SWEEP,                         "amp"),
    row(Full,    &[TrainStep],     Any,            "indicator-b16",               SINGLE),
    row(Full,    &[TrainStep],     Any,            "indicator-b16 gpt2-b8-t1024", MEMORY),
    row(Full,    &[TrainStep],     Any,            "indicator-b16-a4",            "f32 f32-tuned f32-compile mixed-tuned"),
    row(Full,    &[OptimizerStep], Any,            "indicator-b16-muon",          "f32 f32-tuned bf16 bf16-tuned"),
    row(Full,    &[OptimizerStep], Gpu,            "gpt2-b8-t1024-muon",          "f32 f32-tuned bf16 bf16-tuned"),
    row(Full,    &[OptimizerStep], Gpu,            "gpt2-b8-t1024",               "f32-tuned bf16-tuned"),
    row(Full,    &[TrainStep],     Any,            "indicator-b16-muon",          "f32 f32-tuned f32-compile mixed mixed-tuned"),
    row(Full,    &[TrainStep],     Only(Torch),    "indicator-b16-muon",          "f32-cudagraph mixed-compile amp"),
    row(Full,    &[TrainStep],     Gpu,            "gpt2-b8-t1024-muon",          "bf16 bf16-tuned mixed mixed-tuned"),
    row(Full,    &[TrainStep],     GpuOnly(Torch), "gpt2-b8-t1024-muon",          "bf16-compile mixed-compile"),
    row(Full,    &[TrainStep],     Any,            "indicator-b16-muon-dp2",      "f32 f32-tuned"),
    row(Full,    &[TrainStep],     Any,            "nanochat-d4-b1-t2048 nanochat-d4-b1-t2048-muon", "f32 f32-tuned"),
    row(Full,    &[TrainStep],     Gpu,            "nanochat-d12-b8-t2048 nanochat-d12-b8-t2048-muon", "bf16 bf16-tuned mixed mixed-tuned"),
    row(Full,    &[TrainStep],     GpuOnly(Torch), "nanochat-d12-b8-t2048 nanochat-d12-b8-t2048-muon", "bf16-compile mixed-compile"),
    row(Full,    &[OptimizerStep], Gpu,            "nanochat-d12-b8-t2048 nanochat-d12-b8-t2048-muon", "f32 f32-tuned"),
    row(Full,    &[Forward, OptimizerStep], Any,   LORA,                          "f32"),
    row(Full,    &[ForwardBackward, TrainStep], Any, LORA,                        "f32 f32-tuned bf16 bf16-tuned"),
    row(Full,    &[TrainStep],     Only(Torch),    LORA,                          "f32-compile bf16-compile"),
    row(Full,    &[TrainStep],     Only(Torch),    "indicator-b16",               "f32-cudagraph mixed-cudagraph"),
    row(Full,    &[TrainStep],     Only(Mlx),      "indicator-b16",               "f32-compile mixed-compile"),
    row(Full,    &[TrainStep],     Only(Torch),    BATCHES,                       "f32-compile bf16-compile mixed-compile tf32-compile"),
    row(Full,    GRAD,             Only(Torch),    "indicator-b16",               "f32-compile mixed-compile"),
    row(Full,    &[Forward],       Only(Torch),    "indicator-b16",               "f32-compile mixed-compile"),
    row(Full,    &[MatmulPeak],    Cpu,            "n1024 n2048",                 "f32 tf32 bf16 f16"),
    row(Full,    &[MatmulPeak],    Gpu,            "n1024 n4096 n8192",           "f32 tf32 bf16 f16"),
    row(Full,    &[CopyPeak],      Cpu,            "256mib",                      STORED),
    row(Full,    &[CopyPeak],      Gpu,            "1024mib",                     STORED),
    row(Full,    &[TrainStep],     Cpu,            DP2,                           "f32 f32-overlap f32-tuned"),
    row(Full,    &[TrainStep],     Gpu,            SCALING,                       "f32 f32-overlap f32-tuned bf16 bf16-overlap bf16-tuned mixed-tuned"),
    row(Full,    &[TrainStep],     Only(Torch),    DP2,                           "f32-compile mixed-compile"),
    row(Full,    &[TrainStep],     GpuOnly(Torch), SCALING,                       "bf16-compile"),
    row(Full,    &[TrainStep],     GpuOnly(Torch), "gpt2-b32-t1024",              "bf16-compile"),
    row(Full,    &[TrainStep],     Gpu,            "gpt2-b32-t1024",              "f32 f32-tuned bf16 bf16-tuned mixed-tuned"),
    row(Full,    &[AllReduce],     Cpu,            "1mib-dp2 18mib-dp2",          "f32"),
    row(Full,    &[AllReduce],     Gpu,            BUFFERS,                       "f32"),
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

/// Returns the shapes of a row for a workload. A custom model replaces the indicator, and its batch replaces 16. Its
/// training steps have several lengths. The list is empty if the row has no case for the custom model.
fn shapes_for(workload: Workload, shape: Shape, custom: Option<&CustomModel>) -> Vec<Shape> {
    let Shape::Model { model, batch, optimizer, ranks, micro_batches } = shape else { return vec![shape] };
    let (model, batch) = match custom {
        None => (model, batch),
        Some(_) if model.miniature() != ModelId::indicator().miniature() => return Vec::new(),
        // Adapters are trained with AdamW.
        Some(custom) if custom.model.lora.is_some() && optimizer != Optimizer::Adamw => return Vec::new(),
        Some(custom) if model.is_miniature() => (custom.model.miniature(), batch),
        // `--accumulate` applies to all training steps of a custom model.
        Some(_) if micro_batches > 1 => return Vec::new(),
        // So does `--optimizer`.
        Some(_) if optimizer != Optimizer::Adamw => return Vec::new(),
        Some(custom) if workload == TrainStep && (batch, ranks) == (HEADLINE_BATCH, 1) => {
            return custom.step_shapes();
        }
        Some(custom) => (custom.model, (custom.batch * batch).div_ceil(HEADLINE_BATCH)),
    };
    let micro_batches = match custom {
        Some(custom) if workload == TrainStep && !model.is_miniature() => custom.micro_batches,
        _ => micro_batches,
    };
    let optimizer = match custom {
        Some(custom) if workload.optimizes() && !model.is_miniature() => custom.optimizer,
        _ => optimizer,
    };
    let shape = Shape::for_workload(workload, model, batch)
        .with_optimizer(optimizer)
        .with_ranks(ranks)
        .with_micro_batches(micro_batches);
    // The ranks and micro-batches may not divide the batch of a custom model.
    shape.divides_evenly().then_some(shape).into_iter().collect()
}

/// Returns the cases of a set in the order in which they run: by workload, backend, shape and method. The list
/// does not depend on the backends that this machine has.
pub fn cases(set: Set) -> Vec<Case> {
    cases_for(set, custom_model::custom_model().as_ref())
}

/// Returns true if a case of the quick set takes minutes. PyTorch's wheel for macOS lacks oneDNN, so its matrix products
/// in bf16 on a CPU are plain loops.
fn is_slow_on_macos(case: &Case) -> bool {
    let precision = case.method.precision;
    case.backend == BackendId::TorchCpu && (precision.is_half() || precision.is_mixed_precision())
}

/// Returns the cases of a set with a custom model instead of the built-in ones.
pub fn cases_for(set: Set, custom: Option<&CustomModel>) -> Vec<Case> {
    let mut all = all_cases_for(set, custom);
    if set == Quick && cfg!(target_os = "macos") {
        all.retain(|case| !is_slow_on_macos(case));
    }
    all
}

/// Returns the cases of a set for every system.
fn all_cases_for(set: Set, custom: Option<&CustomModel>) -> Vec<Case> {
    let mut all = Vec::new();
    for &workload in Workload::ALL {
        let rows: Vec<&Row> =
            TABLE.iter().filter(|r| r.set == set && r.workloads.contains(&workload)).collect();
        for &backend in BackendId::ALL {
            let mut by_shape: Vec<(Shape, Vec<Method>)> = Vec::new();
            for row in rows.iter().filter(|r| r.backends.accepts(backend)) {
                let shapes = row.shapes.split(' ').map(|id| id.parse().expect("a shape of the table"));
                for shape in shapes.flat_map(|shape| shapes_for(workload, shape, custom)) {
                    let methods = row.methods.split(' ').map(|id| id.parse().expect("a method of the table"));
                    match by_shape.iter_mut().find(|(known, _)| *known == shape) {
                        Some((_, known)) => known.extend(methods),
                        None => by_shape.push((shape, methods.collect())),
                    }
                }
            }
            for (shape, mut methods) in by_shape {
                methods.sort();
                methods.dedup();
                let cases = methods.into_iter().map(|method| Case { workload, backend, method, shape });
                let chunks = |case: &Case| case.method.variant == Variant::ChunkedLoss;
                all.extend(cases.filter(|case| !chunks(case) || case.is_language_model()));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::Precision;

    #[test]
    fn the_table_has_every_precision_variant_and_model() {
        let full = cases(Full);
        for &precision in Precision::ALL {
            assert!(full.iter().any(|c| c.method.precision == precision), "no case in {precision}");
        }
        for &variant in Variant::ALL {
            assert!(full.iter().any(|c| c.method.variant == variant), "no case of {variant}");
        }
        for model in ModelId::all() {
            let has_model = |c: &Case| c.shape.model().is_some_and(|(m, _)| m == model);
            assert!(full.iter().any(has_model), "no case of {model}");
        }
    }

    #[test]
    fn a_custom_model_replaces_the_built_in_ones() {
        let model = ModelId::intern(crate::model::Model { name: "mine", ..*ModelId::named("gpt2").unwrap() });
        let own = CustomModel::plain(model, 4);
        let custom = Some(&own);
        for &set in Set::ALL {
            let all = cases_for(set, custom);
            let mut models = all.iter().filter_map(|c| c.shape.model());
            assert!(models.all(|(m, _)| m == model || m == model.miniature()));
            for &workload in Workload::ALL.iter().filter(|w| set != Compare || w.trains()) {
                assert!(all.iter().any(|c| c.workload == workload), "{set} has no {workload}");
            }
        }
        let full = cases_for(Full, custom);
        let single = full.iter().filter(|c| c.shape.ranks() == 1);
        let batches: std::collections::BTreeSet<usize> =
            single.filter_map(|c| c.shape.model()).map(|(_, batch)| batch).collect();
        assert_eq!(Vec::from_iter(batches), [1, 4, 16, 64]);
        let swept = CustomModel { other_lengths: vec![model.tokens / 2], ..own.clone() };
        let lengths = |workload| {
            let quick = cases_for(Quick, Some(&swept));
            let single = quick.iter().filter(|c| c.workload == workload && c.shape.ranks() == 1);
            let tokens = single.filter_map(|c| c.shape.model()).map(|(m, batch)| (m.tokens, batch));
            tokens.collect::<std::collections::BTreeSet<_>>().len()
        };
        assert_eq!([lengths(TrainStep), lengths(Forward)], [2, 1]);
        let accumulated = CustomModel { micro_batches: 2, ..own.clone() };
        let steps = cases_for(Full, Some(&accumulated)).into_iter().filter(|c| c.workload == TrainStep);
        assert!(steps.clone().all(|c| c.shape.micro_batches() == 2), "all training steps accumulate");
        assert!(steps.clone().any(|c| c.shape.to_string() == "mine-b4-t1024-a2"));
        let muon = CustomModel { optimizer: Optimizer::Muon, ..own.clone() };
        for case in cases_for(Full, Some(&muon)) {
            assert_eq!(case.shape.optimizer() == Optimizer::Muon, case.workload.optimizes(), "{case}");
        }
        let adapted = model.with_lora("16".parse().ok());
        let all = cases_for(Full, Some(&CustomModel { model: adapted, ..own.clone() }));
        let lora_of = |workload| {
            let mut models = all.iter().filter(|c| c.workload == workload).filter_map(|c| c.shape.model());
            models.next().map(|(m, _)| m.lora.is_some())
        };
        assert_eq!(
            [lora_of(TrainStep), lora_of(Forward), lora_of(Attention)],
            [Some(true), Some(true), Some(false)]
        );
    }

    #[test]
    fn quick_on_a_mac_has_no_slow_steps_of_pytorch_on_the_cpu() {
        let mut quick = all_cases_for(Quick, None);
        let ids = |cases: &[Case]| -> Vec<String> {
            let steps = cases.iter().filter(|c| c.workload == TrainStep && c.shape == HEADLINE_SHAPE);
            let steps = steps.filter(|c| c.backend == BackendId::TorchCpu);
            steps.map(|c| c.method.to_string()).collect()
        };
        assert!(ids(&quick).contains(&"mixed-compile".to_owned()), "{:?}", ids(&quick));
        quick.retain(|case| !is_slow_on_macos(case));
        assert_eq!(ids(&quick), ["f32", "f32-compile", "f32-tuned"]);
        for backend in [BackendId::TorchMps, BackendId::MlxMetal] {
            let mixed = Method::eager(Precision::Mixed);
            assert!(quick.iter().any(|c| c.backend == backend && c.method == mixed), "{backend}");
        }
    }

    #[test]
    fn quick_has_every_workload_on_every_backend() {
        let quick = cases(Quick);
        for &workload in Workload::ALL {
            for &backend in BackendId::ALL {
                assert!(quick.iter().any(|c| c.workload == workload && c.backend == backend));
            }
        }
    }
}

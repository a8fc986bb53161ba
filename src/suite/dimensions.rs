//! The dimensions of the suite. Each value has an id, and one row defines it.

use std::fmt;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Block;

/// Defines an enum whose values have ids, with `ALL`, `id()` and parsing.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $($(#[$vdoc:meta])* $variant:ident => $id:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            pub const ALL: &[$name] = &[$($name::$variant,)+];

            pub fn id(self) -> &'static str {
                match self { $($name::$variant => $id,)+ }
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|v| v.id() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|v| v.id()).collect();
                    format!("unknown {} '{text}': one of {}", $what, known.join(", "))
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.id())
            }
        }
    };
}

named! {
    /// The work of one iteration.
    Workload, "workload", {
        /// Multi-head self-attention with its four projections, forward only.
        Attention => "attention",
        /// Attention with dropout, and the gradients of its input and parameters.
        AttentionGrad => "attention-grad",
        /// Linear, activation, linear, forward only.
        FeedForward => "feed-forward",
        /// The feed-forward block with dropout, and the gradients of its input and parameters.
        FeedForwardGrad => "feed-forward-grad",
        /// The whole model, forward only.
        Forward => "forward",
        /// Loss and every gradient, with dropout.
        ForwardBackward => "forward-backward",
        /// The optimizer over every parameter, with fixed gradients.
        OptimizerStep => "optimizer-step",
        /// Forward, loss, backward and the optimizer.
        TrainStep => "train-step",
        /// A square matrix product: the measured limit of arithmetic.
        MatmulPeak => "matmul-peak",
        /// Reads a buffer and writes its negation: the measured limit of memory traffic.
        CopyPeak => "copy-peak",
        /// Sums a buffer over the ranks: the measured limit of communication.
        AllReduce => "all-reduce",
    }
}

impl Workload {
    /// Returns true if dropout is part of the work.
    pub fn trains(self) -> bool {
        matches!(self, Self::AttentionGrad | Self::FeedForwardGrad | Self::ForwardBackward | Self::TrainStep)
    }

    /// Returns the block that it runs, or `None` if it does not run a single block.
    pub fn block(self) -> Option<Block> {
        match self {
            Self::Attention | Self::AttentionGrad => Some(Block::Attention),
            Self::FeedForward | Self::FeedForwardGrad => Some(Block::FeedForward),
            _ => None,
        }
    }

    /// Returns true if the loss of a model and its gradients are part of the work.
    pub fn has_loss(self) -> bool {
        matches!(self, Self::ForwardBackward | Self::TrainStep)
    }

    /// Returns true if the optimizer is part of the work.
    pub fn optimizes(self) -> bool {
        matches!(self, Self::OptimizerStep | Self::TrainStep)
    }

    /// Returns true if the shape is a whole model.
    pub fn takes_model(self) -> bool {
        matches!(self, Self::Forward | Self::ForwardBackward | Self::OptimizerStep | Self::TrainStep)
    }
}

named! {
    /// The optimizer of a training step. Ids name the default, AdamW, only by leaving it out.
    Optimizer, "optimizer", {
        /// AdamW for every parameter.
        Adamw => "adamw",
        /// Muon for the matrices of the blocks, and AdamW for all other parameters.
        Muon => "muon",
    }
}

impl Optimizer {
    /// Returns its name in text.
    pub fn label(self) -> &'static str {
        match self {
            Self::Adamw => "AdamW",
            Self::Muon => "Muon",
        }
    }
}

impl Serialize for Optimizer {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.id())
    }
}

impl<'de> Deserialize<'de> for Optimizer {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

named! {
    /// A machine-learning library.
    Framework, "framework", {
        Torch => "torch",
        Mlx => "mlx",
    }
}

impl Framework {
    /// Returns its name in text.
    pub fn label(self) -> &'static str {
        match self {
            Self::Torch => "PyTorch",
            Self::Mlx => "MLX",
        }
    }

    /// Returns the prefix of the file names of its shared libraries.
    pub fn library_prefix(self) -> &'static str {
        match self {
            Self::Torch => "libtorch",
            Self::Mlx => "libmlx",
        }
    }
}

named! {
    /// The hardware that a backend runs on. Only backends on the same device are compared.
    Device, "device", {
        Cpu => "the CPU",
        AppleGpu => "Apple's GPU",
        NvidiaGpu => "the NVIDIA GPU",
    }
}

/// Defines the backends, one per row: id, label, framework and device.
macro_rules! backends {
    ($($variant:ident => $id:literal, $label:literal, $framework:ident, $device:ident;)+) => {
        named! {
            /// A framework on a device.
            BackendId, "backend", { $($variant => $id,)+ }
        }

        impl BackendId {
            /// Returns its name in tables.
            pub fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }

            pub fn framework(self) -> Framework {
                match self { $(Self::$variant => Framework::$framework,)+ }
            }

            pub fn device(self) -> Device {
                match self { $(Self::$variant => Device::$device,)+ }
            }
        }
    };
}

backends! {
    TorchCpu => "torch-cpu", "PyTorch CPU", Torch, Cpu;
    TorchMps => "torch-mps", "PyTorch MPS", Torch, AppleGpu;
    TorchCuda => "torch-cuda", "PyTorch CUDA", Torch, NvidiaGpu;
    MlxCpu => "mlx-cpu", "MLX (CPU)", Mlx, Cpu;
    MlxMetal => "mlx-metal", "MLX (Metal)", Mlx, AppleGpu;
    MlxCuda => "mlx-cuda", "MLX (CUDA)", Mlx, NvidiaGpu;
}

impl BackendId {
    pub fn is_cpu(self) -> bool {
        self.device() == Device::Cpu
    }

    /// Returns the backends of other frameworks on the same device.
    pub fn counterparts(self) -> impl Iterator<Item = Self> {
        let same_device = move |b: &Self| b.device() == self.device() && b.framework() != self.framework();
        Self::ALL.iter().copied().filter(same_device)
    }
}

named! {
    /// The number formats of parameters and arithmetic.
    Precision, "precision", {
        /// Strict f32, with TF32 off in both frameworks.
        F32 => "f32",
        /// Stored in f32; matrix products may round their inputs to TF32.
        Tf32 => "tf32",
        /// Parameters, optimizer state and compute in bf16.
        Bf16 => "bf16",
        /// Parameters and compute in f16.
        F16 => "f16",
        /// f32 master weights and bf16 compute. Every step casts the parameters and inputs to bf16, and the
        /// loss is f32. Both frameworks do the same computation.
        Mixed => "mixed",
        /// `torch.autocast` with bf16 and f32 parameters: matrix products in bf16; norms, softmax
        /// and the residual stream in f32. PyTorch only.
        Amp => "amp",
    }
}

impl Precision {
    /// Returns true if parameters and inputs are stored in a 16-bit type.
    pub fn is_half(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16)
    }

    /// Returns true if parameters are stored in f32 and matrix products run in bf16.
    pub fn is_mixed_precision(self) -> bool {
        matches!(self, Self::Mixed | Self::Amp)
    }

    /// Returns the bytes of a stored parameter.
    pub fn parameter_bytes(self) -> usize {
        if self.is_half() { 2 } else { 4 }
    }
}

named! {
    /// The way a step is written: plain eager code, with one optimization, or with all.
    Variant, "variant", {
        /// Plain code, operation by operation.
        Eager => "eager",
        /// Fused attention, and a single projection for q, k and v if the framework gains from it.
        Sdpa => "sdpa",
        /// AdamW in one kernel, and Muon in products of stacked matrices.
        FusedAdamw => "fused-adamw",
        /// The step recorded as a CUDA graph and replayed.
        CudaGraph => "cudagraph",
        /// Data-parallel steps only: gradients are all-reduced in buckets during the backward pass.
        Overlap => "overlap",
        /// The step compiled by the framework's compiler.
        Compile => "compile",
        /// Activations of a layer recomputed in the backward pass.
        Checkpoint => "checkpoint",
        /// The cross-entropy and its logits computed for a part of the tokens at a time.
        ChunkedLoss => "chunked-loss",
        /// All hand-written optimizations that do not change the result.
        Tuned => "tuned",
    }
}

impl Variant {
    /// Returns true if the network calls fused attention. A compiler may insert it in other variants.
    pub fn uses_sdpa(self) -> bool {
        matches!(self, Self::Sdpa | Self::Tuned)
    }

    /// Returns true if the step calls a fused AdamW. Muon then stacks matrices of one shape.
    pub fn uses_fused_adamw(self) -> bool {
        matches!(self, Self::FusedAdamw | Self::Tuned)
    }

    /// Returns true if it only reduces the memory of a backward pass.
    pub fn reduces_memory(self) -> bool {
        matches!(self, Self::Checkpoint | Self::ChunkedLoss)
    }

    /// Returns true if ranks all-reduce gradients in buckets during the backward pass.
    pub fn overlaps_communication(self) -> bool {
        matches!(self, Self::Overlap | Self::Tuned)
    }

    /// Returns true if the full step is captured or compiled once, if the framework can do so on the device.
    pub fn captures_full_step(self) -> bool {
        matches!(self, Self::CudaGraph | Self::Compile | Self::Tuned)
    }
}

/// A precision with a variant, such as `mixed-tuned`. The id of the eager variant has no suffix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Method {
    pub precision: Precision,
    pub variant: Variant,
}

impl Method {
    pub const fn eager(precision: Precision) -> Self {
        Self { precision, variant: Variant::Eager }
    }

    pub const fn tuned(precision: Precision) -> Self {
        Self { precision, variant: Variant::Tuned }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.variant {
            Variant::Eager => write!(f, "{}", self.precision),
            variant => write!(f, "{}-{variant}", self.precision),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((precision, variant)) = text.split_once('-') else {
            return Ok(Self::eager(text.parse()?));
        };
        match variant.parse()? {
            Variant::Eager => Err(format!("'{text}': the eager variant has no suffix")),
            variant => Ok(Self { precision: precision.parse()?, variant }),
        }
    }
}

named! {
    /// A part of the table of cases.
    Set, "set", {
        /// Every case at its miniature shape, as a test of the suite.
        Smoke => "smoke",
        /// Real widths, at batches with steps short enough for a comparison.
        Compare => "compare",
        /// The cases of the headline table, at `indicator-b16`.
        Quick => "quick",
        /// Every case.
        Full => "full",
    }
}

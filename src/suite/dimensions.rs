//! The axes of the suite: each value has an id, and its row says everything of it.

use std::fmt;
use std::str::FromStr;

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
    /// What one iteration does.
    Workload, "workload", {
        /// Multi-head self-attention with its four projections, inference.
        Attention => "attention",
        /// The same with dropout, and the gradients of its input and parameters.
        AttentionGrad => "attention-grad",
        /// Linear, GELU, linear, inference.
        FeedForward => "feed-forward",
        /// The same with dropout, and the gradients of its input and parameters.
        FeedForwardGrad => "feed-forward-grad",
        /// The whole model, inference.
        Forward => "forward",
        /// Loss and every gradient, in training mode.
        ForwardBackward => "forward-backward",
        /// AdamW over every parameter of the model, with fixed gradients.
        OptimizerStep => "optimizer-step",
        /// Forward, loss, backward and AdamW.
        TrainStep => "train-step",
        /// A square matrix product: the ceiling for arithmetic.
        MatmulPeak => "matmul-peak",
        /// Reads a buffer and writes its negation: the ceiling for memory traffic.
        CopyPeak => "copy-peak",
        /// Sums a buffer of each rank, which all have then: the ceiling for exchanging gradients.
        AllReduce => "all-reduce",
    }
}

impl Workload {
    /// Whether dropout is part of the work.
    pub fn trains(self) -> bool {
        matches!(self, Self::AttentionGrad | Self::FeedForwardGrad | Self::ForwardBackward | Self::TrainStep)
    }

    /// The part of a block that it runs, where it runs one alone.
    pub fn block(self) -> Option<Block> {
        match self {
            Self::Attention | Self::AttentionGrad => Some(Block::Attention),
            Self::FeedForward | Self::FeedForwardGrad => Some(Block::FeedForward),
            _ => None,
        }
    }

    /// Whether AdamW is part of the work.
    pub fn optimizes(self) -> bool {
        matches!(self, Self::OptimizerStep | Self::TrainStep)
    }

    /// Whether the shape is a whole model.
    pub fn takes_model(self) -> bool {
        matches!(self, Self::Forward | Self::ForwardBackward | Self::OptimizerStep | Self::TrainStep)
    }
}

named! {
    /// The library that computes.
    Framework, "framework", {
        Torch => "torch",
        Mlx => "mlx",
    }
}

impl Framework {
    /// Its name in prose, and how its libraries' file names begin.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Torch => ("PyTorch", "libtorch"),
            Self::Mlx => ("MLX", "libmlx"),
        }
    }
}

named! {
    /// Where it computes. Backends on the same device can be compared.
    Device, "device", {
        Cpu => "the CPU",
        AppleGpu => "Apple's GPU",
        NvidiaGpu => "the NVIDIA GPU",
    }
}

/// Defines the backends: a row each of its id, its label, its framework and its device.
macro_rules! backends {
    ($($variant:ident => $id:literal, $label:literal, $framework:ident, $device:ident;)+) => {
        named! {
            /// A framework on a device.
            BackendId, "backend", { $($variant => $id,)+ }
        }

        impl BackendId {
            /// Its name in tables.
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

    /// Its place in the list.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The backends of other frameworks on the same device.
    pub fn counterparts(self) -> impl Iterator<Item = Self> {
        let rival = move |b: &Self| b.device() == self.device() && b.framework() != self.framework();
        Self::ALL.iter().copied().filter(rival)
    }
}

named! {
    /// The number formats of parameters and arithmetic.
    Precision, "precision", {
        /// Strict: no TF32 in either framework.
        F32 => "f32",
        /// f32 storage; matrix products may round their inputs to TF32.
        Tf32 => "tf32",
        /// Parameters, optimizer state and compute in bf16.
        Bf16 => "bf16",
        /// Parameters and compute in f16.
        F16 => "f16",
        /// f32 master weights and bf16 compute. Every step casts the parameters and inputs to bf16; the
        /// loss is f32. The same computation in both frameworks.
        Mixed => "mixed",
        /// `torch.autocast` with bf16 and f32 parameters: matrix products in bf16; norms, softmax
        /// and the residual stream in f32. PyTorch only.
        Amp => "amp",
    }
}

impl Precision {
    /// Whether parameters and inputs are stored in a 16-bit type.
    pub fn is_half(self) -> bool {
        matches!(self, Self::Bf16 | Self::F16)
    }

    /// Whether parameters are f32 and products bf16.
    pub fn is_mixed_precision(self) -> bool {
        matches!(self, Self::Mixed | Self::Amp)
    }

    /// Bytes of a stored parameter.
    pub fn parameter_bytes(self) -> usize {
        if self.is_half() { 2 } else { 4 }
    }
}

named! {
    /// How the step is written: eager as a newcomer writes it, with one optimisation, or with all.
    Variant, "variant", {
        /// As a newcomer writes it.
        Eager => "eager",
        /// Fused attention, and one product for q, k and v where the framework gains by it.
        Sdpa => "sdpa",
        /// The optimizer in one kernel.
        FusedAdamw => "fused-adamw",
        /// The step recorded as a CUDA graph and replayed.
        CudaGraph => "cudagraph",
        /// Of several ranks: gradients exchanged in buckets, while the backward pass goes on.
        Overlap => "overlap",
        /// The step compiled by the framework's compiler.
        Compile => "compile",
        /// Everything the framework offers that keeps the mathematics.
        Tuned => "tuned",
    }
}

impl Variant {
    /// Whether the network is written with it; a compiler may put it in.
    pub fn uses_sdpa(self) -> bool {
        matches!(self, Self::Sdpa | Self::Tuned)
    }

    pub fn uses_fused_adamw(self) -> bool {
        matches!(self, Self::FusedAdamw | Self::Tuned)
    }

    /// Whether ranks exchange gradients in buckets.
    pub fn overlaps_communication(self) -> bool {
        matches!(self, Self::Overlap | Self::Tuned)
    }

    /// Whether the step is made once as a whole, where the framework can on the device.
    pub fn captures_full_step(self) -> bool {
        matches!(self, Self::CudaGraph | Self::Compile | Self::Tuned)
    }
}

/// A number format and a recipe, which an id names behind a hyphen unless it is eager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Method {
    pub precision: Precision,
    pub variant: Variant,
}

impl Method {
    pub const fn eager(compute: Precision) -> Self {
        Self { precision: compute, variant: Variant::Eager }
    }

    pub const fn tuned(compute: Precision) -> Self {
        Self { precision: compute, variant: Variant::Tuned }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.variant {
            Variant::Eager => write!(f, "{}", self.precision),
            recipe => write!(f, "{}-{recipe}", self.precision),
        }
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((compute, recipe)) = text.split_once('-') else {
            return Ok(Self::eager(text.parse()?));
        };
        match recipe.parse()? {
            Variant::Eager => Err(format!("'{text}': the eager recipe has no suffix")),
            recipe => Ok(Self { precision: compute.parse()?, variant: recipe }),
        }
    }
}

named! {
    /// How much of the table a run takes.
    Set, "set", {
        /// Every case at its miniature shape: the suite's own test.
        Smoke => "smoke",
        /// True widths at batches whose steps are short enough for a comparison to decide.
        Compare => "compare",
        /// What the headline table needs, at indicator-b16.
        Quick => "quick",
        /// Everything.
        Full => "full",
    }
}

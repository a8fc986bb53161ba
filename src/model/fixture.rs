//! The seeded inputs, targets and initial parameters of a case, loaded into every
//! backend alike. Each part is made on first use and kept for the case's life.

use half::{bf16, f16};
use once_cell::sync::OnceCell;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::parameters::{self, Init, ParameterSpec};
use super::{Dropout, Input, Model};
use crate::suite::{Case, Precision, Shape, Workload};

const SEED: u64 = 0x7261_6e73_666f_726d;

/// A named array of f32 values, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<usize>,
    pub data: Vec<f32>,
}

/// AdamW (Loshchilov and Hutter 2019) with bias correction; weight decay is
/// multiplied by the learning rate and applied to every parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl AdamW {
    /// What the timed workloads train with.
    pub const TRAINING: Self = Self { lr: 2e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-5 };

    /// Large enough that a dropped or misplaced term shows in one step.
    pub const PARITY: Self = Self { lr: 0.1, weight_decay: 0.5, ..Self::TRAINING };
}

/// Everything that a backend needs for one case.
#[derive(Debug)]
pub struct Fixture {
    pub case: Case,
    /// None in parity runs, whatever the case says.
    pub dropout: Dropout,
    pub adamw: AdamW,
    /// Which sample stands at each place of the batch.
    samples: Vec<usize>,
    /// Whose part of the batch the inputs are; None for all of it.
    rank: Option<usize>,
    /// Whether ranks leave the exchange of gradients out: what it costs shows in that.
    pub silent: bool,
    inputs: OnceCell<Vec<Tensor>>,
    parameters: OnceCell<Vec<Tensor>>,
    gradients: OnceCell<Vec<Tensor>>,
}

/// Rounds to what the precision stores, so that every side starts from equal values.
pub fn round_to(compute: Precision, values: &mut [f32]) {
    match compute {
        Precision::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        Precision::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        Precision::F32 | Precision::Tf32 | Precision::Mixed | Precision::Amp => {}
    }
}

/// Tokens of which the samples of a parity run may differ: the oracle takes about a second
/// for so many, and every kernel of a backend still runs at its full size.
const DISTINCT_TOKENS: usize = 1024;

/// The samples of a parity run: the first ones differ, and later places repeat some of them, the
/// lower numbers more often, so that what leaves out a part of the batch changes every mean.
fn repeated(shape: Shape) -> Vec<usize> {
    let Some((model, batch)) = shape.model() else { return vec![0] };
    let distinct = (DISTINCT_TOKENS / model.tokens).max(2).min(batch);
    let mut draw = Draw::new("samples");
    (0..batch)
        .map(|place| {
            let skewed = draw.unit().powi(2) * distinct as f32;
            if place < distinct { place } else { skewed as usize }
        })
        .collect()
}

struct Draw(ChaCha8Rng);

impl Draw {
    /// A stream of its own for each name, so that no tensor depends on another's size.
    fn new(name: &str) -> Self {
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(ChaCha8Rng::seed_from_u64(SEED ^ hash))
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    fn uniform(&mut self, bound: f32) -> f32 {
        (2.0 * self.unit() - 1.0) * bound
    }
}

impl Fixture {
    /// The fixture of a timed case.
    pub fn new(case: Case) -> Self {
        Self {
            case,
            dropout: case.dropout(),
            adamw: AdamW::TRAINING,
            samples: (0..case.shape.batch()).collect(),
            rank: None,
            silent: false,
            inputs: OnceCell::new(),
            parameters: OnceCell::new(),
            gradients: OnceCell::new(),
        }
    }

    /// The fixture of a parity run: no dropout, an optimizer whose every term shows, and in a
    /// large batch few samples, each several times, so that the oracle can follow.
    pub fn for_parity(case: Case) -> Self {
        let samples = repeated(case.shape);
        Self { dropout: Dropout::NONE, adamw: AdamW::PARITY, samples, ..Self::new(case) }
    }

    /// Whether it is of a parity run.
    pub fn is_for_parity(&self) -> bool {
        self.adamw == AdamW::PARITY
    }

    /// What all ranks' buffers add up to; this fixture is of none of them.
    pub fn sum_over_ranks(&self) -> Vec<f32> {
        let data = &self.input("buffer").data;
        let mut sum = vec![0.0; data.len()];
        for rank in 0..self.case.shape.ranks() {
            let own = data.iter().cycle().skip(shift(rank, data.len()));
            sum.iter_mut().zip(own).for_each(|(sum, v)| *sum += v);
        }
        sum
    }

    /// One rank's: its part of the batch, or its own buffer.
    pub fn for_rank(self, rank: usize) -> Self {
        Self { rank: Some(rank), inputs: OnceCell::new(), ..self }
    }

    /// The rank whose part it is; 0 where there is one device.
    pub fn rank(&self) -> usize {
        self.rank.unwrap_or(0)
    }

    /// Which sample stands at each place of the batch; the same number is the same sample.
    pub fn samples(&self) -> &[usize] {
        &self.samples
    }

    /// The initial parameters, in the order of [`parameters::parameters`].
    pub fn parameters(&self) -> &[Tensor] {
        self.parameters.get_or_init(|| {
            self.like_parameters("parameter", |draw, spec| match spec.init {
                Init::Uniform(bound) => draw.uniform(bound),
                Init::NearOne => 1.0 + draw.uniform(0.1),
            })
        })
    }

    /// The fixed gradients of an optimizer step, in the same order.
    pub fn gradients(&self) -> &[Tensor] {
        self.gradients.get_or_init(|| self.like_parameters("gradient", |draw, _| draw.uniform(0.01)))
    }

    /// What the model reads, in this order:
    /// indicator: `values` [B, N], `market` [B, 10], `usefulness` [B, N] in {0, 1};
    /// gpt2: `tokens` and `next` [B, T], whole numbers below V;
    /// blocks: `x` [B, N, D] and `upstream` [B, N, D], the gradient that arrives from above;
    /// peaks: `a` and `b` [n, n], or `buffer` [n].
    pub fn inputs(&self) -> &[Tensor] {
        self.inputs.get_or_init(|| {
            let mut all = self.make_inputs();
            if let Some(rank) = self.rank {
                all.iter_mut().for_each(|tensor| take_rank_share(tensor, self.case.shape, rank));
            }
            all
        })
    }

    /// An input by its name.
    pub fn input(&self, name: &str) -> &Tensor {
        self.inputs()
            .iter()
            .find(|tensor| tensor.name == name)
            .unwrap_or_else(|| panic!("{} has no input {name}", self.case))
    }

    /// Replaces a parameter's values: how tests build a backend that is wrong on purpose.
    pub fn edit_parameter(&mut self, name: &str, edit: impl FnOnce(&mut Vec<f32>)) {
        self.parameters();
        let all = self.parameters.get_mut().expect("just made");
        let one = all.iter_mut().find(|t| t.name == name);
        edit(&mut one.unwrap_or_else(|| panic!("no parameter {name}")).data);
    }

    /// Whether the shape has a parameter of a name.
    pub fn has_parameter(&self, name: &str) -> bool {
        self.parameters().iter().any(|t| t.name == name)
    }

    /// Replaces an input's values.
    pub fn edit_input(&mut self, name: &str, edit: impl FnOnce(&mut Vec<f32>)) {
        self.inputs();
        let all = self.inputs.get_mut().expect("just made");
        let one = all.iter_mut().find(|t| t.name == name);
        edit(&mut one.unwrap_or_else(|| panic!("no input {name}")).data);
    }

    fn like_parameters(&self, kind: &str, value: impl Fn(&mut Draw, &ParameterSpec) -> f32) -> Vec<Tensor> {
        parameters::parameters(self.case.shape)
            .into_iter()
            .map(|spec| {
                let mut draw = Draw::new(&format!("{kind} {}", spec.name));
                let mut data: Vec<f32> = (0..spec.len()).map(|_| value(&mut draw, &spec)).collect();
                round_to(self.case.method.precision, &mut data);
                Tensor { name: spec.name, dims: spec.dims, data }
            })
            .collect()
    }

    fn make_inputs(&self) -> Vec<Tensor> {
        let compute = self.case.method.precision;
        let make = |name: &str, dims: &[usize], value: &dyn Fn(&mut Draw) -> f32| {
            let mut draw = Draw::new(&format!("input {name}"));
            let mut data: Vec<f32> = (0..dims.iter().product()).map(|_| value(&mut draw)).collect();
            if !matches!(name, "tokens" | "next") {
                round_to(compute, &mut data);
            }
            if self.samples.iter().enumerate().any(|(place, &sample)| place != sample) {
                let each = data.len() / self.samples.len();
                data = self.samples.iter().flat_map(|i| data[i * each..(i + 1) * each].to_vec()).collect();
            }
            Tensor { name: name.to_owned(), dims: dims.to_vec(), data }
        };
        let signed = |draw: &mut Draw| draw.uniform(1.0);
        match self.case.shape {
            Shape::Model { model, batch, .. } => model_inputs(&model, batch, &make),
            Shape::Block { model, batch, .. } => {
                let dims = [batch, model.tokens, model.width];
                vec![make("x", &dims, &signed), make("upstream", &dims, &signed)]
            }
            Shape::Square { n, .. } => {
                // Scaled so that a chain of products neither grows nor fades.
                let bound = (3.0 / n as f32).sqrt();
                let value = |draw: &mut Draw| draw.uniform(bound);
                vec![make("a", &[n, n], &value), make("b", &[n, n], &value)]
            }
            Shape::Buffer { mib, .. } => {
                let bytes = if compute.is_half() { 2 } else { 4 };
                // Sums over ranks are exact in any order.
                let coarse = |draw: &mut Draw| (draw.uniform(1.0) * 256.0).round() / 256.0;
                let value: &dyn Fn(&mut Draw) -> f32 =
                    if self.case.workload == Workload::AllReduce { &coarse } else { &signed };
                vec![make("buffer", &[(mib << 20) / bytes], value)]
            }
        }
    }
}

/// By how much a rank's buffer is rotated: by a prime, so that no two of any number of ranks have the same.
fn shift(rank: usize, length: usize) -> usize {
    rank * 104_729 % length
}

/// What a rank has of an input: its rows of the batch; of a buffer the same numbers elsewhere.
fn take_rank_share(tensor: &mut Tensor, shape: Shape, rank: usize) {
    if let Shape::Buffer { .. } = shape {
        let by = shift(rank, tensor.data.len());
        tensor.data.rotate_left(by);
        return;
    }
    let each = tensor.data.len() / shape.ranks();
    tensor.data = tensor.data[rank * each..(rank + 1) * each].to_vec();
    tensor.dims[0] /= shape.ranks();
}

/// Makes an input of a name, dims and values.
type Make<'a> = &'a dyn Fn(&str, &[usize], &dyn Fn(&mut Draw) -> f32) -> Tensor;

fn model_inputs(m: &Model, batch: usize, make: Make<'_>) -> Vec<Tensor> {
    let (rows, signed) = ([batch, m.tokens], |draw: &mut Draw| draw.uniform(1.0));
    match m.input {
        Input::Tokens => {
            let token = |draw: &mut Draw| (draw.unit() * m.vocabulary as f32).floor();
            m.input_names().iter().map(|name| make(name, &rows, &token)).collect()
        }
        Input::Indicator { market } => vec![
            make("values", &rows, &signed),
            make("market", &[batch, market], &signed),
            make("usefulness", &rows, &|draw| f32::from(draw.unit() < 0.3)),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(id: &str) -> Fixture {
        Fixture::new(id.parse().unwrap())
    }

    #[test]
    fn the_same_case_gives_the_same_values_and_backends_share_them() {
        let a = fixture("train-step/torch-cpu/f32/indicator-tiny-b2");
        let b = fixture("train-step/mlx-cuda/mixed/indicator-tiny-b2");
        assert_eq!(a.parameters(), b.parameters());
        assert_eq!(a.inputs(), b.inputs());
        assert_ne!(a.parameters()[0].data, a.gradients()[0].data);
    }

    #[test]
    fn a_large_parity_batch_repeats_few_samples_unevenly() {
        let case = "train-step/torch-cpu/f32/indicator-b64".parse().unwrap();
        let parity = Fixture::for_parity(case);
        let times = |i| parity.samples().iter().filter(|&&s| s == i).count();
        assert_eq!(parity.samples()[..9], [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(parity.samples().iter().all(|&s| s < 9) && times(0) > 2 * times(8), "{:?}", parity.samples());
        let half = &parity.samples()[..32];
        assert!((0..9).any(|i| 2 * half.iter().filter(|&&s| s == i).count() != times(i)));
        let (all, few) = (Fixture::new(case), &parity.input("values").data);
        for (place, &sample) in parity.samples().iter().enumerate() {
            let of = |data: &[f32], at: usize| data[at * 111..(at + 1) * 111].to_vec();
            assert_eq!(of(few, place), of(&all.input("values").data, sample));
        }
        let tiny = Fixture::for_parity("train-step/torch-cpu/f32/indicator-tiny-b2".parse().unwrap());
        assert_eq!(tiny.samples(), [0, 1]);
    }

    #[test]
    fn ranks_share_a_batch_and_nothing_else() {
        let whole = fixture("train-step/torch-cpu/f32/indicator-b4");
        let of = |rank| fixture("train-step/torch-cpu/f32/indicator-b4-dp2").for_rank(rank);
        let (first, second) = (of(0), of(1));
        for (name, dims) in [("values", vec![2, 111]), ("market", vec![2, 10])] {
            let both = [&first.input(name).data[..], &second.input(name).data[..]].concat();
            assert!(first.input(name).dims == dims && both == whole.input(name).data, "{name}");
        }
        assert_eq!(first.parameters(), whole.parameters());
        let buffer =
            |rank| fixture("all-reduce/torch-cpu/f32/1mib-dp2").for_rank(rank).input("buffer").data.clone();
        let sum = fixture("all-reduce/torch-cpu/f32/1mib-dp2").sum_over_ranks();
        assert!(sum.iter().zip(buffer(0).iter().zip(buffer(1))).all(|(sum, (a, b))| *sum == a + b));
        assert!(buffer(0) != buffer(1) && buffer(0).iter().all(|v| (v * 256.0).fract() == 0.0));
    }

    #[test]
    fn halves_are_rounded_once_and_for_all() {
        let full = fixture("forward/torch-cpu/f32/indicator-tiny-b2");
        let half = fixture("forward/torch-cpu/bf16/indicator-tiny-b2");
        let (x, y) = (&full.parameters()[0].data, &half.parameters()[0].data);
        assert_ne!(x, y);
        for (x, y) in x.iter().zip(y) {
            assert_eq!(bf16::from_f32(*y).to_f32(), *y);
            assert!((x - y).abs() <= x.abs() / 256.0);
        }
        let tokens = fixture("forward/torch-cpu/bf16/gpt2-b8-t1024");
        assert!(tokens.input("tokens").data.iter().all(|t| t.fract() == 0.0 && *t < 50304.0));
        assert!(tokens.input("tokens").data.iter().any(|t| *t > 256.0 && *t % 256.0 != 0.0));
    }
}

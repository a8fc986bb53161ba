//! The seeded inputs, targets and initial parameters of a case, identical for every backend. Each part is
//! generated on first use and cached.

mod hyperparameters;

use half::{bf16, f16};
use once_cell::sync::OnceCell;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::model::parameters::{Init, ParameterSpec, Role};
use crate::model::{Dropout, Input, Model};
use crate::suite::{Case, Precision, Shape, Workload};
pub use hyperparameters::{AdamW, Muon};

mod operation;
pub use operation::{OperationFixture, fill_hidden};

const SEED: u64 = 0x7261_6e73_666f_726d;

/// A named array of f32 values, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dims: Vec<usize>,
    pub data: Vec<f32>,
}

/// The data that a backend needs for a case.
#[derive(Debug)]
pub struct Fixture {
    pub case: Case,
    /// The dropout of the case. Parity fixtures have none.
    pub dropout: Dropout,
    pub adamw: AdamW,
    pub muon: Muon,
    /// The sample at each position of the batch.
    samples: Vec<usize>,
    /// Number of the batch that the inputs and fixed gradients are.
    batch: usize,
    /// The rank whose share of the batch the inputs are, or `None` for the whole batch.
    rank: Option<usize>,
    /// True if ranks skip the all-reduce of gradients (DDP's `no_sync`), to measure exposed communication.
    pub no_sync: bool,
    inputs: OnceCell<Vec<Tensor>>,
    parameters: OnceCell<Vec<Tensor>>,
    gradients: OnceCell<Vec<Tensor>>,
}

/// Rounds values to the storage format of a precision, so that every backend starts from equal values.
pub fn round_to(precision: Precision, values: &mut [f32]) {
    match precision {
        Precision::Bf16 => values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
        Precision::F16 => values.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        Precision::F32 | Precision::Tf32 | Precision::Mixed | Precision::Amp => {}
    }
}

/// Standard deviation of attention scores that saturate softmax. The largest of 1,000 scores are then above 88.8, whose
/// exponential overflows in f32 unless the maximum is subtracted.
const SATURATED_DEVIATION: f32 = 30.0;

/// Number of tokens in the different samples of a parity batch. The reference takes about a second for them, and
/// every kernel of a backend still runs at its full size.
const DISTINCT_TOKENS: usize = 512;

/// Returns the samples of a parity batch. The first ones differ. Later positions repeat them, lower numbers more
/// often, so that a backend that leaves out a part of the batch changes every mean.
fn repeated_samples(shape: Shape, distinct: usize) -> Vec<usize> {
    let Some((_, batch)) = shape.model() else { return vec![0] };
    let distinct = distinct.min(batch);
    let mut random = Random::new("samples");
    (0..batch)
        .map(|position| {
            let skewed = random.unit().powi(2) * distinct as f32;
            if position < distinct { position } else { skewed as usize }
        })
        .collect()
}

struct Random(ChaCha8Rng);

impl Random {
    /// Creates the stream of a name. No tensor then depends on the size of another.
    fn new(name: &str) -> Self {
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        Self(ChaCha8Rng::seed_from_u64(SEED ^ hash))
    }

    /// Returns a number that is uniform in [0, 1).
    fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    /// Returns a number that is uniform in [-bound, bound).
    fn uniform(&mut self, bound: f32) -> f32 {
        (2.0 * self.unit() - 1.0) * bound
    }
}

impl Fixture {
    /// Creates the fixture of a timed case.
    pub fn new(case: Case) -> Self {
        Self {
            case,
            dropout: case.dropout(),
            adamw: AdamW::TRAINING,
            muon: Muon::TRAINING,
            samples: (0..case.shape.batch()).collect(),
            batch: 0,
            rank: None,
            no_sync: false,
            inputs: OnceCell::new(),
            parameters: OnceCell::new(),
            gradients: OnceCell::new(),
        }
    }

    /// Creates the fixture of a parity check: no dropout, large learning rates, and a large batch repeats a few samples.
    pub fn for_parity(case: Case) -> Self {
        let distinct = case.shape.model().map_or(1, |(model, _)| (DISTINCT_TOKENS / model.tokens).max(2));
        let samples = repeated_samples(case.shape, distinct);
        let (adamw, muon) = (AdamW::PARITY, Muon::PARITY);
        Self { dropout: Dropout::NONE, adamw, muon, samples, ..Self::new(case) }
    }

    /// Sets the learning rates to 0, so that the optimizer leaves the parameters unchanged.
    pub fn stop_updates(&mut self) {
        self.adamw = AdamW { lr: 0.0, weight_decay: 0.0, ..AdamW::TRAINING };
        self.muon = Muon { lr: 0.0, weight_decay: 0.0, ..Muon::TRAINING };
    }

    /// Returns a fixture with the inputs and fixed gradients of another batch.
    ///
    /// Later batches of a parity fixture have other parameters too, in f32 with saturated softmax. They have only two
    /// different samples, so that the reference is fast.
    pub fn with_batch(self, batch: usize) -> Self {
        // Ranks ask for the first batch again. A large parity batch has other samples than later ones.
        if batch == self.batch {
            return self;
        }
        let (inputs, gradients) = (OnceCell::new(), OnceCell::new());
        if !self.is_for_parity() {
            return Self { batch, inputs, gradients, ..self };
        }
        let samples = repeated_samples(self.case.shape, 2);
        let mut other = Self { batch, samples, inputs, gradients, parameters: OnceCell::new(), ..self };
        // In bf16, the error of a score near 100 hides everything.
        if matches!(self.case.method.precision, Precision::F32 | Precision::Tf32 | Precision::F16) {
            other.spread_scores(SATURATED_DEVIATION);
        }
        other
    }

    /// Returns a fixture whose samples are all equal.
    pub fn with_equal_samples(self) -> Self {
        let samples = vec![0; self.samples.len()];
        Self { samples, inputs: OnceCell::new(), ..self }
    }

    /// Returns the number of the batch that the inputs are. The first is 0.
    pub fn batch_number(&self) -> usize {
        self.batch
    }

    /// Returns the name of a random stream, which is another one for each batch.
    fn stream(&self, name: &str) -> String {
        if self.batch == 0 { name.to_owned() } else { format!("{name} of batch {}", self.batch) }
    }

    /// Returns true for the fixture of a parity check.
    pub fn is_for_parity(&self) -> bool {
        self.adamw == AdamW::PARITY
    }

    /// Returns the sum of the buffers of all ranks. The fixture must be that of the whole case.
    pub fn sum_over_ranks(&self) -> Vec<f32> {
        let data = &self.input("buffer").data;
        let mut sum = vec![0.0; data.len()];
        for rank in 0..self.case.shape.ranks() {
            let rotated = data.iter().cycle().skip(rotation(rank, data.len()));
            sum.iter_mut().zip(rotated).for_each(|(sum, v)| *sum += v);
        }
        sum
    }

    /// Returns the fixture of a rank, with its share of the batch or its buffer.
    pub fn for_rank(self, rank: usize) -> Self {
        Self { rank: Some(rank), inputs: OnceCell::new(), ..self }
    }

    /// Returns the rank of this fixture, or 0 for the whole case.
    pub fn rank(&self) -> usize {
        self.rank.unwrap_or(0)
    }

    /// Returns the number of the sample at each position of the batch. Equal numbers are equal samples.
    pub fn samples(&self) -> &[usize] {
        &self.samples
    }

    /// Returns the initial parameters in the order of [`Shape::parameter_specs`].
    pub fn parameters(&self) -> &[Tensor] {
        self.parameters.get_or_init(|| {
            let specs = self.case.shape.parameter_specs().into_iter();
            self.generate(specs, &self.stream("parameter"), |random, spec| match spec.init {
                Init::Uniform(bound) => random.uniform(bound),
                Init::NearOne => 1.0 + random.uniform(0.1),
            })
        })
    }

    /// Returns the parameters that are trained, in the same order.
    pub fn trained_parameters(&self) -> impl Iterator<Item = &Tensor> {
        let specs = self.case.shape.parameter_specs().into_iter();
        self.parameters().iter().zip(specs).filter_map(|(tensor, spec)| spec.is_trained().then_some(tensor))
    }

    /// Returns the fixed gradients of an optimizer step, of the trained parameters in the same order.
    pub fn gradients(&self) -> &[Tensor] {
        self.gradients.get_or_init(|| {
            let specs = self.case.shape.parameter_specs().into_iter().filter(ParameterSpec::is_trained);
            self.generate(specs, &self.stream("gradient"), |random, _| random.uniform(0.01))
        })
    }

    /// Returns the inputs and targets in this order.
    ///
    /// - indicator: `values` [B, T], `market` [B, 10], `usefulness` [B, T] in {0, 1}
    /// - language models: `tokens` and `next` [B, T], whole numbers below V
    /// - blocks: `x` [B, T, D] and `upstream` [B, T, D], the gradient of the output
    /// - peaks: `a` and `b` [n, n], or `buffer` [n]
    pub fn inputs(&self) -> &[Tensor] {
        self.inputs.get_or_init(|| {
            let mut all = self.generate_inputs();
            if let Some(rank) = self.rank {
                all.iter_mut().for_each(|tensor| take_rank_share(tensor, self.case.shape, rank));
            }
            all
        })
    }

    /// Returns the input of a name.
    ///
    /// # Panics
    /// Panics if the case has no such input.
    pub fn input(&self, name: &str) -> &Tensor {
        let found = self.inputs().iter().find(|tensor| tensor.name == name);
        found.unwrap_or_else(|| panic!("{} has no input {name}", self.case))
    }

    /// Changes the values of a parameter. Tests build wrong backends in this way.
    ///
    /// # Panics
    /// Panics if the case has no such parameter.
    pub fn edit_parameter(&mut self, name: &str, edit: impl FnOnce(&mut Vec<f32>)) {
        self.parameters();
        edit_tensor(&mut self.parameters, name, edit);
    }

    /// Scales the queries, so that attention scores have about this standard deviation.
    pub fn spread_scores(&mut self, deviation: f32) {
        let precision = self.case.method.precision;
        self.parameters();
        let all = self.parameters.get_mut().map(Vec::as_mut_slice).unwrap_or_default();
        let mean_square = |data: &[f32]| data.iter().map(|v| v * v).sum::<f32>() / data.len() as f32;
        let blocks: Vec<String> =
            all.iter().filter_map(|t| t.name.strip_suffix("q.weight").map(str::to_owned)).collect();
        for block in blocks {
            let find = |name: &str| all.iter().position(|t| t.name == format!("{block}{name}"));
            // Inputs have a mean square of about 1. Products of normed queries and keys have it too.
            let (names, square) = match (find("q-norm.weight"), find("k-norm.weight"), find("k.weight")) {
                (Some(q), Some(k), _) => (vec![q], mean_square(&all[q].data) * mean_square(&all[k].data)),
                (_, _, Some(k)) => {
                    let q = find("q.weight").expect("the block was found by it");
                    let width = all[q].dims[1] as f32;
                    let square = mean_square(&all[q].data) * mean_square(&all[k].data) * width * width;
                    ([q].into_iter().chain(find("q.bias")).collect(), square)
                }
                _ => continue,
            };
            for index in names {
                let data = &mut all[index].data;
                data.iter_mut().for_each(|v| *v *= deviation / square.sqrt());
                round_to(precision, data);
            }
        }
    }

    /// Returns true if the case has a parameter of this name.
    pub fn has_parameter(&self, name: &str) -> bool {
        self.parameters().iter().any(|t| t.name == name)
    }

    /// Changes the values of an input.
    ///
    /// # Panics
    /// Panics if the case has no such input.
    pub fn edit_input(&mut self, name: &str, edit: impl FnOnce(&mut Vec<f32>)) {
        self.inputs();
        edit_tensor(&mut self.inputs, name, edit);
    }

    /// Generates a tensor for each parameter. Matrices of adapters are in f32, and others in the precision of the case.
    fn generate(
        &self,
        specs: impl Iterator<Item = ParameterSpec>,
        kind: &str,
        value: impl Fn(&mut Random, &ParameterSpec) -> f32,
    ) -> Vec<Tensor> {
        specs
            .map(|spec| {
                let mut random = Random::new(&format!("{kind} {}", spec.name));
                let mut data: Vec<f32> = (0..spec.len()).map(|_| value(&mut random, &spec)).collect();
                if spec.role != Role::Adapter {
                    round_to(self.case.method.precision, &mut data);
                }
                Tensor { name: spec.name, dims: spec.dims, data }
            })
            .collect()
    }

    /// Makes the last token of each sample larger, so that a kernel that ignores it has a large error.
    fn emphasize_last_token(&self, dims: &[usize], data: &mut [f32]) {
        let width: usize = dims[2..].iter().product();
        for sample in data.chunks_mut(dims[1] * width) {
            let last = sample.len() - width;
            // A power of two is exact in every format.
            sample[last..].iter_mut().for_each(|v| *v *= 8.0);
        }
    }

    fn generate_inputs(&self) -> Vec<Tensor> {
        let precision = self.case.method.precision;
        let generate = |name: &str, dims: &[usize], value: &dyn Fn(&mut Random) -> f32| {
            let mut random = Random::new(&self.stream(&format!("input {name}")));
            let mut data: Vec<f32> = (0..dims.iter().product()).map(|_| value(&mut random)).collect();
            if !matches!(name, "tokens" | "next") {
                round_to(precision, &mut data);
            }
            if self.is_for_parity() && self.batch > 0 && matches!(name, "x" | "upstream" | "values") {
                self.emphasize_last_token(dims, &mut data);
            }
            if self.samples.iter().enumerate().any(|(position, &sample)| position != sample) {
                let each = data.len() / self.samples.len();
                data = self.samples.iter().flat_map(|i| data[i * each..(i + 1) * each].to_vec()).collect();
            }
            Tensor { name: name.to_owned(), dims: dims.to_vec(), data }
        };
        let signed = |random: &mut Random| random.uniform(1.0);
        match self.case.shape {
            Shape::Model { model, batch, .. } => model_inputs(&model, batch, &generate),
            Shape::Block { model, batch, .. } => {
                let dims = [batch, model.tokens, model.width];
                vec![generate("x", &dims, &signed), generate("upstream", &dims, &signed)]
            }
            Shape::Square { n, .. } => {
                // A chain of products with this bound neither grows nor vanishes.
                let bound = (3.0 / n as f32).sqrt();
                let value = |random: &mut Random| random.uniform(bound);
                vec![generate("a", &[n, n], &value), generate("b", &[n, n], &value)]
            }
            Shape::Buffer { mib, .. } => {
                let dims = [(mib << 20) / precision.parameter_bytes()];
                // Sums of multiples of 1/256 are exact in any order of the ranks.
                let coarse = |random: &mut Random| (random.uniform(1.0) * 256.0).round() / 256.0;
                let all_reduce = self.case.workload == Workload::AllReduce;
                vec![if all_reduce {
                    generate("buffer", &dims, &coarse)
                } else {
                    generate("buffer", &dims, &signed)
                }]
            }
        }
    }
}

fn edit_tensor(tensors: &mut OnceCell<Vec<Tensor>>, name: &str, edit: impl FnOnce(&mut Vec<f32>)) {
    let all = tensors.get_mut().expect("the caller generated the tensors");
    let tensor = all.iter_mut().find(|t| t.name == name);
    edit(&mut tensor.unwrap_or_else(|| panic!("no tensor {name}")).data);
}

/// Returns the rotation of a rank's buffer: multiples of a prime, so that the buffers of all ranks differ.
fn rotation(rank: usize, length: usize) -> usize {
    rank * 104_729 % length
}

/// Reduces an input to the share of a rank: its rows of the batch, or the rotated buffer.
fn take_rank_share(tensor: &mut Tensor, shape: Shape, rank: usize) {
    if let Shape::Buffer { .. } = shape {
        let by = rotation(rank, tensor.data.len());
        tensor.data.rotate_left(by);
        return;
    }
    let each = tensor.data.len() / shape.ranks();
    tensor.data = tensor.data[rank * each..(rank + 1) * each].to_vec();
    tensor.dims[0] /= shape.ranks();
}

/// Generates an input from its name, dimensions and distribution.
type Generate<'a> = &'a dyn Fn(&str, &[usize], &dyn Fn(&mut Random) -> f32) -> Tensor;

fn model_inputs(m: &Model, batch: usize, generate: Generate<'_>) -> Vec<Tensor> {
    let (rows, signed) = ([batch, m.tokens], |random: &mut Random| random.uniform(1.0));
    match m.input {
        Input::Tokens => {
            let token = |random: &mut Random| (random.unit() * m.vocabulary as f32).floor();
            m.input_names().iter().map(|name| generate(name, &rows, &token)).collect()
        }
        Input::Indicator { market } => vec![
            generate("values", &rows, &signed),
            generate("market", &[batch, market], &signed),
            generate("usefulness", &rows, &|random| f32::from(random.unit() < 0.3)),
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
    fn backends_and_precisions_share_the_values_of_a_case() {
        let a = fixture("train-step/torch-cpu/f32/indicator-tiny-b2");
        let b = fixture("train-step/mlx-cuda/mixed/indicator-tiny-b2");
        assert_eq!(a.parameters(), b.parameters());
        assert_eq!(a.inputs(), b.inputs());
        assert_ne!(a.parameters()[0].data, a.gradients()[0].data);
    }

    #[test]
    fn a_large_parity_batch_repeats_a_few_samples_unevenly() {
        let case = "train-step/torch-cpu/f32/indicator-b64".parse().unwrap();
        let parity = Fixture::for_parity(case);
        let samples = parity.samples();
        let count = |samples: &[usize], i| samples.iter().filter(|&&s| s == i).count();
        assert_eq!(samples[..4], [0, 1, 2, 3]);
        assert!(
            samples.iter().all(|&s| s < 4) && 2 * count(samples, 0) > 3 * count(samples, 3),
            "{samples:?}"
        );
        assert!((0..4).any(|i| 2 * count(&samples[..32], i) != count(samples, i)));
        let timed = Fixture::new(case);
        let row = |fixture: &Fixture, i: usize| fixture.input("values").data[i * 111..(i + 1) * 111].to_vec();
        for (position, &sample) in samples.iter().enumerate() {
            assert_eq!(row(&parity, position), row(&timed, sample));
        }
        assert_eq!(Fixture::for_parity(case).with_batch(0).samples(), samples);
        let tiny = Fixture::for_parity("train-step/torch-cpu/f32/indicator-tiny-b2".parse().unwrap());
        assert_eq!(tiny.samples(), [0, 1]);
    }

    #[test]
    fn ranks_divide_the_batch_and_share_the_parameters() {
        let whole = fixture("train-step/torch-cpu/f32/indicator-b4");
        let [first, second] =
            [0, 1].map(|rank| fixture("train-step/torch-cpu/f32/indicator-b4-dp2").for_rank(rank));
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
    fn fixtures_of_16_bit_precisions_are_rounded() {
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

//! Dropout as a distribution: that a backend drops where it should, as often and by the scale
//! that it should, anew in every step.
//!
//! Masks can be read off gradients. In a model of one token and one sample, the gradient of a
//! weight is one outer product, so a column of zeros is a hidden unit that was dropped and a row
//! of zeros is a dropped residual; in a block at its full size, gradients that arrive in one
//! element of each of some rows pick those rows out. Of the masks that were read, rate and
//! independence are tested, and with them the oracle computes the whole step again: loss and
//! gradients must be what these masks give.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::tolerance::expected_with_masks;
use super::{Mismatch, compare_tensors};
use crate::backend::{Backend, LoadedCase, Sums};
use crate::model::fixture::{AdamW, Fixture, Tensor};
use crate::model::reference::blocked::Site;
use crate::model::{Dropout, Model, ModelId};
use crate::suite::{Block, Case, Shape};

/// Standard deviations that a count may be off: chance goes beyond in one of 1.7 million.
const DEVIATIONS: f64 = 5.0;

/// Draws that are read of each kind of place: 5 deviations are then 3.4 points at p = 0.1.
const DRAWS: usize = 2000;

/// Steps whose masks the oracle follows: in a block one has tens of thousands.
const FOLLOWED: usize = 3;
const FOLLOWED_OF_BLOCK: usize = 1;

/// What a step kept at each site (of a sample), by places in order.
type Kept = BTreeMap<(usize, Site), Vec<bool>>;

/// Checks the dropout of a case that draws.
///
/// # Errors
/// Where the backend fails.
pub fn check(backend: &dyn Backend, case: Case) -> Result<Option<Mismatch>> {
    let probe = Probe::new(case);
    let prepared = backend.load(&probe.fixture());
    let mut prepared = prepared.with_context(|| format!("preparing {}", probe.case))?;
    check_with(&probe, prepared.as_mut(), backend.accumulation())
}

/// The same of what has been prepared for a probe; `sums` is [`Backend::sums`].
pub fn check_with(probe: &Probe, prepared: &mut dyn LoadedCase, sums: Sums) -> Result<Option<Mismatch>> {
    let case = probe.case;
    let fixture = probe.fixture();
    let mut all: Vec<Kept> = Vec::new();
    for index in 0..probe.steps() {
        prepared.step().with_context(|| format!("a step of {case}"))?;
        let mut found = prepared.outputs().with_context(|| format!("reading the results of {case}"))?;
        let Some(kept) = probe.read(&found) else {
            return Ok(Some(Mismatch::new(case, "a gradient is missing")));
        };
        if index < probe.followed() {
            let known = expected_with_masks(&fixture, sums, &|sample, site, [rows, columns]| {
                probe.factors(&kept, sample, site, rows, columns)
            });
            let known: Vec<_> = known.into_iter().filter(|k| probe.follows(&k.name)).collect();
            for tensor in &known {
                probe.hide(&tensor.name, &tensor.exact, &mut found);
            }
            if let Err(mismatch) = compare_tensors(case, &known, &found) {
                return Ok(Some(Mismatch::new(case, format!("with dropout, {}", mismatch.what))));
            }
        }
        all.push(kept);
    }
    let wrong = rates(probe, &all).or_else(|| dependence(probe, &all));
    Ok(wrong.map(|what| Mismatch::new(case, what)))
}

/// A training case whose masks can be read.
pub struct Probe {
    pub case: Case,
    model: Model,
    dropout: Dropout,
}

impl Probe {
    /// Of a model its miniature with one token, of a block itself.
    pub fn new(case: Case) -> Self {
        let (model, _) = case.shape.model().expect("a case that draws has a model");
        let shape = match case.shape {
            Shape::Model { .. } => {
                let small = if model.is_miniature() { model } else { model.miniature() };
                Shape::of_model(ModelId::intern(Model { tokens: 1, ..*small }), 1)
            }
            block => block,
        };
        let case = Case { shape, ..case };
        let (model, _) = shape.model().expect("as before");
        Self { case, model: *model, dropout: case.dropout() }
    }

    /// What it computes with; parameters stay as they are.
    pub fn fixture(&self) -> Fixture {
        let mut fixture = Fixture::new(self.case);
        fixture.adamw = AdamW { lr: 0.0, weight_decay: 0.0, ..AdamW::TRAINING };
        let m = &self.model;
        match self.case.shape {
            Shape::Block { part: Block::FeedForward, .. } => {
                // No unit is zero by itself.
                fixture.edit_parameter("feed-forward.up.bias", |b| b.iter_mut().for_each(|v| *v += 3.0));
                self.pick_rows(&mut fixture);
            }
            Shape::Block { part: Block::Attention, .. } => {
                // Every key weighs the same, and each column of v tells of one key alone.
                for name in ["q.weight", "q.bias", "k.weight", "k.bias", "v.bias"] {
                    let name = format!("attention.{name}");
                    if fixture.has_parameter(&name) {
                        fixture.edit_parameter(&name, |data| data.fill(0.0));
                    }
                }
                fixture.edit_parameter("attention.v.weight", |data| {
                    for (column, row) in data.chunks_mut(m.width).enumerate() {
                        row.fill(0.0);
                        row[self.told(column)] = 1.0;
                    }
                });
                fixture.edit_input("x", |data| {
                    data.fill(0.0);
                    for sample in data.chunks_mut(m.tokens * m.width) {
                        (0..self.keys()).for_each(|c| sample[self.key(c) * m.width + c] = 1.0);
                    }
                });
                self.pick_rows(&mut fixture);
            }
            _ if self.reads_head() => {
                let hidden = "selection.hidden.bias";
                fixture.edit_parameter(hidden, |b| b.iter_mut().for_each(|v| *v += 5.0));
            }
            _ => {}
        }
        fixture
    }

    /// With two tokens the second head's softmax would tell; with one it has no gradient.
    fn reads_head(&self) -> bool {
        matches!(self.model.output, crate::model::Output::IndicatorHeads)
    }

    /// Gradients arrive in one element of each of the rows that are read.
    fn pick_rows(&self, fixture: &mut Fixture) {
        let width = self.model.width;
        fixture.edit_input("upstream", |data| {
            data.fill(0.0);
            self.rows().enumerate().for_each(|(i, row)| data[row * width + i] = 1.0);
        });
    }

    /// The rows of a block that are read, out of the whole batch.
    fn rows(&self) -> impl Iterator<Item = usize> + use<> {
        let all = self.case.shape.batch() * self.model.tokens;
        let count = self.model.width.min(all);
        (0..count).map(move |i| i * all / count)
    }

    /// How many keys of attention are told apart.
    fn keys(&self) -> usize {
        self.model.tokens.min(self.model.width)
    }

    /// The token of a key that is told apart.
    fn key(&self, c: usize) -> usize {
        c * self.model.tokens / self.keys()
    }

    /// Which key a column of v tells of.
    fn told(&self, column: usize) -> usize {
        column % self.keys()
    }

    /// The columns of v that a head reads.
    fn columns(&self, head: usize) -> std::ops::Range<usize> {
        let m = &self.model;
        let first = head * m.key_value_heads / m.heads * m.head_width;
        first..first + m.head_width
    }

    /// Steps until every kind of place has drawn enough.
    fn steps(&self) -> usize {
        let m = &self.model;
        match self.case.shape {
            Shape::Model { .. } => {
                let d = &self.dropout;
                let draws = [
                    (d.embedding, m.width),
                    (d.weights, m.layers * m.heads),
                    (d.residual, 2 * m.layers * m.width),
                    (d.hidden, m.layers * m.ffn_width),
                    (if self.reads_head() { d.heads } else { 0.0 }, m.width / 2),
                ];
                let slow = draws.iter().filter(|(p, _)| *p > 0.0).map(|(_, each)| *each).min();
                DRAWS.div_ceil(slow.unwrap_or(DRAWS)).max(FOLLOWED)
            }
            _ => FOLLOWED,
        }
    }

    fn followed(&self) -> usize {
        if matches!(self.case.shape, Shape::Model { .. }) { FOLLOWED } else { FOLLOWED_OF_BLOCK }
    }

    fn probability(&self, site: Site) -> f64 {
        match site {
            Site::Embedding => self.dropout.embedding,
            Site::Weights { .. } => self.dropout.weights,
            Site::AttentionResidual { .. } | Site::FeedForwardResidual { .. } => self.dropout.residual,
            Site::Hidden { .. } => self.dropout.hidden,
            Site::Head { .. } => self.dropout.heads,
        }
    }

    /// Reads the masks of a step; None where a gradient is missing.
    fn read(&self, found: &[Tensor]) -> Option<Kept> {
        let gradient = |name: &str| {
            let name = format!("grad/{name}");
            found.iter().find(|t| t.name == name).map(|t| &t.data)
        };
        let m = &self.model;
        let inner = m.heads * m.head_width;
        let mut kept = Kept::new();
        match self.case.shape {
            Shape::Block { part: Block::FeedForward, .. } => {
                let down = gradient("feed-forward.down.weight")?;
                for (row, units) in self.rows().zip(down.chunks(m.ffn_width)) {
                    let all = kept.entry((row, Site::Hidden { layer: 0 })).or_default();
                    all.extend(units.iter().map(|v| *v != 0.0));
                }
            }
            Shape::Block { part: Block::Attention, .. } => {
                let mixed = gradient("attention.o.weight")?;
                for (row, values) in self.rows().zip(mixed.chunks(inner)) {
                    for (head, told) in values.chunks(m.head_width).enumerate() {
                        let seen = told.iter().enumerate().filter(|(d, _)| {
                            let key = self.key(self.told(self.columns(head).start + d));
                            !m.causal || key <= row % m.tokens
                        });
                        let seen = seen.map(|(_, v)| *v != 0.0).collect();
                        kept.insert((row, Site::Weights { layer: 0, head }), seen);
                    }
                }
            }
            _ => {
                // Behind the norm, or behind the positions: what was dropped has no gradient.
                let at = if m.embedding_norm { "embedding-norm.bias" } else { "position" };
                if let Some(embedded) = gradient(at) {
                    kept.insert((0, Site::Embedding), embedded.iter().map(|v| *v != 0.0).collect());
                }
                for layer in 0..m.layers {
                    let of = |name: &str| gradient(&format!("blocks.{layer}.{name}"));
                    let (down, o) = (of("feed-forward.down.weight")?, of("attention.o.weight")?);
                    let column = |data: &[f32], width: usize, at: usize| {
                        data.iter().skip(at).step_by(width).any(|v| *v != 0.0)
                    };
                    let alive = |data: &[f32]| data.iter().map(|v| *v != 0.0).collect::<Vec<_>>();
                    let hidden = (0..m.ffn_width).map(|j| column(down, m.ffn_width, j)).collect();
                    kept.insert((0, Site::Hidden { layer }), hidden);
                    // A bias tells of each column, or else the row of the weights that leads there.
                    let rows = |name: &str, weights: &[f32]| match of(&format!("{name}.bias")) {
                        Some(bias) => alive(bias),
                        None => weights
                            .chunks(weights.len() / m.width)
                            .map(|row| row.iter().any(|v| *v != 0.0))
                            .collect(),
                    };
                    kept.insert((0, Site::FeedForwardResidual { layer }), rows("feed-forward.down", down));
                    kept.insert((0, Site::AttentionResidual { layer }), rows("attention.o", o));
                    for head in 0..m.heads {
                        let weights = (0..m.head_width).any(|d| column(o, inner, head * m.head_width + d));
                        kept.insert((0, Site::Weights { layer, head }), vec![weights]);
                    }
                }
                if self.reads_head() {
                    let head = gradient("selection.out.weight")?;
                    kept.insert((0, Site::Head { index: 0 }), head.iter().map(|v| *v != 0.0).collect());
                }
            }
        }
        kept.retain(|(_, site), _| self.probability(*site) > 0.0);
        Some(kept)
    }

    /// What the oracle multiplies with; 1 where nothing was read, since nothing shows there.
    fn factors(
        &self,
        kept: &Kept,
        sample: usize,
        site: Site,
        rows: usize,
        columns: usize,
    ) -> Option<Vec<f64>> {
        let p = self.probability(site);
        let factor = |kept: bool| if kept { 1.0 / (1.0 - p) } else { 0.0 };
        if let Shape::Model { .. } = self.case.shape {
            return Some(kept.get(&(0, site))?.iter().map(|k| factor(*k)).collect());
        }
        let m = &self.model;
        let mut all = vec![1.0; rows * columns];
        for row in self.rows().filter(|row| row / m.tokens == sample) {
            let into = &mut all[row % m.tokens * columns..][..columns];
            let mut read = kept.get(&(row, site))?.iter();
            match site {
                Site::Weights { head, .. } => {
                    for column in self.columns(head) {
                        let key = self.key(self.told(column));
                        if !m.causal || key <= row % m.tokens {
                            into[key] = factor(*read.next()?);
                        }
                    }
                }
                _ => into.iter_mut().zip(read).for_each(|(f, k)| *f = factor(*k)),
            }
        }
        Some(all)
    }

    /// Whether keys of attention are there whose masks no gradient tells.
    fn partial(&self) -> bool {
        matches!(self.case.shape, Shape::Block { part: Block::Attention, .. })
            && self.model.tokens > self.model.head_width
    }

    /// Whether the masks that were read determine a tensor, or a part of it.
    fn follows(&self, name: &str) -> bool {
        !(self.partial() && matches!(name, "grad/x" | "grad/attention.v.bias"))
    }

    /// Puts the truth where the masks that were read do not determine a number.
    fn hide(&self, name: &str, exact: &[f64], found: &mut [Tensor]) {
        if !self.partial() || name != "grad/attention.v.weight" {
            return;
        }
        let m = &self.model;
        let Some(tensor) = found.iter_mut().find(|t| t.name == name && t.data.len() == exact.len()) else {
            return;
        };
        for (index, value) in tensor.data.iter_mut().enumerate() {
            // The heads that share a column of v all tell of the same keys.
            let (shared, c) = (index / m.width / m.head_width, index % m.width);
            let first = shared * m.head_width;
            if !(first..first + m.head_width).any(|column| self.told(column) == c) {
                *value = exact[index] as f32;
            }
        }
    }
}

/// Whether `hits` of `all` draws are within chance of a probability.
fn likely(hits: usize, all: usize, probability: f64) -> bool {
    let all = all as f64;
    let deviation = (probability * (1.0 - probability) / all).sqrt();
    (hits as f64 / all - probability).abs() <= DEVIATIONS * deviation
}

/// A kind of place, in words.
fn kind(site: Site) -> &'static str {
    match site {
        Site::Embedding => "the embedding",
        Site::Weights { .. } => "attention's weights",
        Site::AttentionResidual { .. } => "attention's residual",
        Site::Hidden { .. } => "the hidden units",
        Site::FeedForwardResidual { .. } => "the feed-forward residual",
        Site::Head { .. } => "the output head",
    }
}

/// The kind of place that drops too often or too seldom.
fn rates(probe: &Probe, steps: &[Kept]) -> Option<String> {
    let mut counts: BTreeMap<&str, (usize, usize, f64)> = BTreeMap::new();
    for ((_, site), kept) in steps.iter().flatten() {
        let count = counts.entry(kind(*site)).or_insert((0, 0, probe.probability(*site)));
        count.0 += kept.iter().filter(|k| !**k).count();
        count.1 += kept.len();
    }
    let wrong = counts.iter().find(|(_, (dropped, all, p))| !likely(*dropped, *all, *p));
    wrong.map(|(kind, (dropped, all, p))| {
        format!("dropout of {kind}: {dropped} of {all} dropped, which p = {p} does not give")
    })
}

/// Masks that follow each other too closely: from step to step, between places, within one.
fn dependence(probe: &Probe, steps: &[Kept]) -> Option<String> {
    // How many pairs agreed, how many would by chance given the one side, how many there were,
    // and the variance of such a count.
    let mut pairs: BTreeMap<String, [f64; 4]> = BTreeMap::new();
    let mut pair = |what: String, p: f64, given: &[bool], drawn: &[bool]| {
        let entry = pairs.entry(what).or_default();
        for (given, drawn) in given.iter().zip(drawn) {
            let by_chance = if *given { 1.0 - p } else { p };
            let now = [f64::from(u8::from(given == drawn)), by_chance, 1.0, p * (1.0 - p)];
            entry.iter_mut().zip(now).for_each(|(sum, v)| *sum += v);
        }
    };
    for (index, step) in steps.iter().enumerate() {
        for (place, kept) in step {
            let p = probe.probability(place.1);
            let of = kind(place.1);
            if index > 0 {
                pair(format!("{of} and those of the step before"), p, &steps[index - 1][place], kept);
            }
            if index > 1 {
                pair(format!("{of} and those of the first step"), p, &steps[0][place], kept);
            }
            pair(
                format!("neighbours in {of}"),
                p,
                &kept[..kept.len().saturating_sub(1)],
                &kept[1.min(kept.len())..],
            );
        }
        // Each place with the next of its size: other rows, heads, layers and parts.
        let all: Vec<_> = step.iter().collect();
        for (at, (place, kept)) in all.iter().enumerate() {
            let p = probe.probability(place.1);
            let next = all[at + 1..].iter().find(|(other, _)| {
                (kind(place.1) == kind(other.1) || probe.case.shape.batch() == 1)
                    && probe.probability(other.1) == p
                    && step[*other].len() == kept.len()
            });
            if let Some((other, theirs)) = next {
                pair(format!("{} and {}", kind(place.1), kind(other.1)), p, kept, theirs);
            }
        }
    }
    let off = |[same, chance, _, variance]: [f64; 4]| (same - chance).abs() > DEVIATIONS * variance.sqrt();
    let wrong = pairs.iter().find(|(_, counts)| off(**counts));
    wrong.map(|(what, [same, chance, all, _])| {
        format!("dropout's masks of {what} agree in {same} of {all} places, by chance in about {chance:.0}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chance_is_allowed_and_no_more() {
        assert!(likely(200, 2000, 0.1) && likely(230, 2000, 0.1) && likely(170, 2000, 0.1));
        assert!(!likely(400, 2000, 0.1) && !likely(20, 2000, 0.1) && !likely(0, 2000, 0.1));
    }

    #[test]
    fn masks_that_repeat_are_found() {
        let probe = Probe::new("train-step/torch-cpu/f32/indicator-b16".parse().unwrap());
        let site = Site::Hidden { layer: 0 };
        let draw = |seed: u64| -> Vec<bool> {
            let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut next = || {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                !x.is_multiple_of(10)
            };
            (0..2000).map(|_| next()).collect()
        };
        let steps = |seeds: [u64; 3]| seeds.map(|s| Kept::from([((0, site), draw(s))])).to_vec();
        assert_eq!(rates(&probe, &steps([1, 2, 3])), None);
        assert_eq!(dependence(&probe, &steps([1, 2, 3])), None);
        assert!(dependence(&probe, &steps([1, 2, 2])).unwrap().contains("step before"));
        assert!(dependence(&probe, &steps([1, 2, 1])).unwrap().contains("first step"));
        let none = Kept::from([((0, site), vec![true; 2000])]);
        assert!(rates(&probe, &[none]).unwrap().contains("0 of 2000"));
    }
}

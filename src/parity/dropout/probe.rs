//! A training case from whose gradients the dropout masks can be read.
//!
//! In a model with one token and one sample, the gradient of a weight is an outer product. A zero column is then a
//! dropped hidden unit, and a zero row is a dropped residual. In a block at its full size, the gradient of the output
//! has a single non-zero element in each of some rows, which selects these rows.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::fixture::{Fixture, Tensor};
use crate::model::{Block, Dropout, Model, ModelId, Output, Position};
use crate::reference::Site;
use crate::suite::{Case, Shape};

/// The masks of a step: true for each value that was not dropped. The key has the site, and the row of a block or 0.
pub type Masks = BTreeMap<(usize, Site), Vec<bool>>;

/// Number of values that are read per kind of site. 6 standard deviations are then 6 percentage points at p = 0.1.
const MIN_VALUES: usize = 1000;

/// Number of values per kind of site at several positions. At 1/16, 6 standard deviations are then 5 percentage points.
/// Masks that two positions share give 1/4, and a missing dropout gives 0.
const MIN_SHARED_VALUES: usize = 1000;

/// Number of steps that are compared with the reference. A step of a block has tens of thousands of values.
const COMPARED_STEPS_OF_MODEL: usize = 3;
const COMPARED_STEPS_OF_BLOCK: usize = 1;

fn nonzero(values: &[f32]) -> Vec<bool> {
    values.iter().map(|v| *v != 0.0).collect()
}

fn has_nonzero<'a>(mut values: impl Iterator<Item = &'a f32>) -> bool {
    values.any(|v| *v != 0.0)
}

/// The gradients of a step by parameter.
struct Gradients<'a>(&'a [Tensor]);

impl Gradients<'_> {
    fn get(&self, parameter: &str) -> Option<&[f32]> {
        let name = format!("grad/{parameter}");
        self.0.iter().find(|t| t.name == name).map(|t| &t.data[..])
    }
}

/// Returns the dropout probability of a site.
pub fn probability(dropout: &Dropout, site: Site) -> f64 {
    match site {
        Site::Embedding => dropout.embedding,
        Site::Weights { .. } => dropout.weights,
        Site::AttentionResidual { .. } => dropout.attention(),
        Site::FeedForwardResidual { .. } => dropout.residual,
        Site::Hidden { .. } => dropout.hidden,
        Site::Head { .. } => dropout.heads,
    }
}

/// A training case from whose gradients masks are read.
pub struct Probe {
    pub case: Case,
    model: Model,
    dropout: Dropout,
}

/// Dropout probability of a probe with several positions. A gradient shows a dropped value only if it is dropped at
/// each of them, which must not be rare.
const SHARED_PROBABILITY: f64 = 0.5;

impl Probe {
    /// Returns the probe that reads each mask: for a model all its layers with one sample and one token, for a block
    /// the case itself.
    ///
    /// The probe of a model with adapters has none, because the gradients of the frozen layers show the masks.
    /// [`super::NoiseProbe`] checks dropout next to the adapters.
    ///
    /// # Panics
    /// Panics if the case has no model.
    pub fn new(case: Case) -> Self {
        let (model, _) = case.shape.model().expect("a case with dropout has a model");
        let model = model.with_lora(None);
        let shape = match case.shape {
            Shape::Model { .. } => Self::model_shape(model, 1, 1),
            block => block,
        };
        let case = Case { shape, ..case };
        let (model, _) = shape.model().expect("as before");
        Self { case, model: *model, dropout: case.dropout() }
    }

    /// Returns the probe of two samples with two tokens each, if the case is a model. It shows which values are
    /// dropped at all four positions, and so whether positions share masks.
    pub fn of_several_positions(case: Case) -> Option<Self> {
        let Shape::Model { model, .. } = case.shape else { return None };
        let case = Case { shape: Self::model_shape(model.with_lora(None), 2, 2), ..case };
        let (model, _) = case.shape.model()?;
        let shared = |p: f64| if p > 0.0 { SHARED_PROBABILITY } else { 0.0 };
        let d = case.dropout();
        let dropout = Dropout {
            embedding: shared(d.embedding),
            // The weights of a head are at several keys, and no gradient shows one of them.
            weights: 0.0,
            residual: shared(d.residual),
            attention: d.attention.map(shared),
            hidden: shared(d.hidden),
            heads: shared(d.heads),
        };
        Some(Self { case, model: *model, dropout })
    }

    /// Returns the shape of a model with all its layers, at the width of its miniature. A few thousand masks of each
    /// kind are then read in milliseconds.
    fn model_shape(model: ModelId, batch: usize, tokens: usize) -> Shape {
        let narrow = if model.is_miniature() { *model } else { *model.miniature() };
        let mut probed =
            Model { tokens, layers: model.layers, second_attention: model.second_attention, ..narrow };
        // The rows of a token table show the dropout of the embedding, if the output does not use the same table.
        if probed.dropout.embedding > 0.0 && !probed.embedding_norm && probed.position != Position::Learned {
            probed.output = Output::Untied;
        }
        Shape::for_model(ModelId::intern(probed), batch)
    }

    /// Returns the number of positions whose gradients add up, for a model.
    fn positions(&self) -> usize {
        match self.case.shape {
            Shape::Model { batch, .. } => batch * self.model.tokens,
            _ => 1,
        }
    }

    /// Returns the fixture of the probe. Its learning rate is 0, so the parameters do not change.
    pub fn fixture(&self) -> Fixture {
        let mut fixture = Fixture::new(self.case);
        fixture.stop_updates();
        fixture.dropout = self.dropout;
        let mut raise = |bias: &str, by: f32| {
            fixture.edit_parameter(bias, |data| data.iter_mut().for_each(|v| *v += by));
        };
        match self.case.shape {
            Shape::Block { block: Block::FeedForward, .. } => {
                // Without dropout, no hidden unit is zero.
                raise("feed-forward.up.bias", 3.0);
                self.select_rows(&mut fixture);
            }
            Shape::Block { block: Block::Attention, .. } => {
                self.edit_attention(&mut fixture);
                self.select_rows(&mut fixture);
            }
            _ if self.has_indicator_heads() => {
                raise("selection.hidden.bias", 5.0);
                raise("allocation.hidden.bias", 5.0);
            }
            _ => {}
        }
        fixture
    }

    /// Gives every key the same weight, and makes each column of v depend on a single key.
    fn edit_attention(&self, fixture: &mut Fixture) {
        let m = &self.model;
        for name in ["q.weight", "q.bias", "k.weight", "k.bias", "v.bias"] {
            let name = format!("attention.{name}");
            if fixture.has_parameter(&name) {
                fixture.edit_parameter(&name, |data| data.fill(0.0));
            }
        }
        fixture.edit_parameter("attention.v.weight", |data| {
            for (column, row) in data.chunks_mut(m.width).enumerate() {
                row.fill(0.0);
                row[self.key_of_column(column)] = 1.0;
            }
        });
        fixture.edit_input("x", |data| {
            data.fill(0.0);
            for sample in data.chunks_mut(m.tokens * m.width) {
                (0..self.key_count()).for_each(|key| sample[self.token_of_key(key) * m.width + key] = 1.0);
            }
        });
    }

    /// Sets the gradient of the output to one element in each selected row.
    fn select_rows(&self, fixture: &mut Fixture) {
        let width = self.model.width;
        fixture.edit_input("upstream", |data| {
            data.fill(0.0);
            self.selected_rows().enumerate().for_each(|(i, row)| data[row * width + i] = 1.0);
        });
    }

    /// Returns the rows of the batch that are read in a block: pairs of rows with the same token in two samples.
    fn selected_rows(&self) -> impl Iterator<Item = usize> + use<> {
        let (tokens, batch) = (self.model.tokens, self.case.shape.batch());
        let count = self.model.width.min(batch * tokens);
        (0..count).map(move |i| {
            let row = i / 2 * 2 * batch * tokens / count;
            let sample = (row / tokens + i % 2) % batch;
            sample * tokens + row % tokens
        })
    }

    /// Returns the row of the same token in the next sample.
    pub fn row_of_next_sample(&self, row: usize) -> usize {
        (row + self.model.tokens) % (self.case.shape.batch() * self.model.tokens)
    }

    /// Returns true if the output heads are read. The second has no gradient with one token, because of its softmax.
    fn has_indicator_heads(&self) -> bool {
        matches!(self.model.output, Output::IndicatorHeads)
    }

    /// Returns the number of keys that the columns of v can distinguish.
    fn key_count(&self) -> usize {
        self.model.tokens.min(self.model.width)
    }

    fn token_of_key(&self, key: usize) -> usize {
        key * self.model.tokens / self.key_count()
    }

    /// Returns the key that a column of v shows. Two neighboring heads show the same keys, so that their masks can be
    /// compared.
    fn key_of_column(&self, column: usize) -> usize {
        let (head, column) = (column / self.model.head_width, column % self.model.head_width);
        (head / 2 * self.model.head_width + column) % self.key_count()
    }

    /// Returns the columns of v that a head reads.
    fn columns_of_head(&self, head: usize) -> Range<usize> {
        let m = &self.model;
        let first = head * m.key_value_heads / m.heads * m.head_width;
        first..first + m.head_width
    }

    /// Returns the tokens whose attention weights a row of a head can show, in the order of the columns of v.
    fn visible_tokens(&self, row: usize, head: usize) -> impl Iterator<Item = (usize, usize)> {
        let (m, columns) = (&self.model, self.columns_of_head(head));
        let first = columns.start;
        let tokens =
            columns.map(move |column| (column - first, self.token_of_key(self.key_of_column(column))));
        let visible = m.visible_tokens(0, row % m.tokens);
        tokens.filter(move |(_, token)| visible.contains(token))
    }

    /// Returns the number of steps until every kind of site has enough values.
    pub fn steps(&self) -> usize {
        let (m, d) = (&self.model, &self.dropout);
        if !matches!(self.case.shape, Shape::Model { .. }) {
            return COMPARED_STEPS_OF_MODEL;
        }
        let weights = if self.positions() == 1 { d.weights } else { 0.0 };
        let values = [
            (d.embedding, m.width),
            (weights, m.layers * m.heads),
            (d.attention.unwrap_or(0.0), m.layers * m.width),
            (d.residual, if d.attention.is_some() { 1 } else { 2 } * m.layers * m.width),
            (d.hidden, m.layers * m.ffn_width),
            (if self.has_indicator_heads() { d.heads } else { 0.0 }, m.width / 2),
        ];
        let fewest = values.iter().filter(|(p, _)| *p > 0.0).map(|(_, count)| *count).min();
        let needed = if self.positions() == 1 { MIN_VALUES } else { MIN_SHARED_VALUES };
        needed.div_ceil(fewest.unwrap_or(needed)).max(COMPARED_STEPS_OF_MODEL)
    }

    /// Returns the number of steps that are compared with the reference.
    pub fn compared_steps(&self) -> usize {
        match self.case.shape {
            Shape::Model { .. } if self.positions() == 1 => COMPARED_STEPS_OF_MODEL,
            // Masks of single positions are unknown.
            Shape::Model { .. } => 0,
            _ => COMPARED_STEPS_OF_BLOCK,
        }
    }

    /// Returns the probability that a gradient shows a value of a site as dropped.
    pub fn zero_probability(&self, site: Site) -> f64 {
        self.probability(site).powi(self.positions() as i32)
    }

    fn probability(&self, site: Site) -> f64 {
        probability(&self.dropout, site)
    }

    /// Reads the masks from the results of a step. Returns `None` if a gradient is missing.
    pub fn read_masks(&self, results: &[Tensor]) -> Option<Masks> {
        let gradients = Gradients(results);
        let mut masks = match self.case.shape {
            Shape::Block { block: Block::FeedForward, .. } => self.read_feed_forward(&gradients)?,
            Shape::Block { block: Block::Attention, .. } => self.read_attention(&gradients)?,
            _ => self.read_model(&gradients)?,
        };
        masks.retain(|(_, site), _| self.probability(*site) > 0.0);
        if self.positions() > 1 {
            masks.retain(|(_, site), _| !matches!(site, Site::Weights { .. }));
        }
        Some(masks)
    }

    fn read_feed_forward(&self, gradients: &Gradients<'_>) -> Option<Masks> {
        let down = gradients.get("feed-forward.down.weight")?.chunks(self.model.ffn_width);
        let rows = self.selected_rows().zip(down);
        Some(rows.map(|(row, units)| ((row, Site::Hidden { layer: 0 }), nonzero(units))).collect())
    }

    fn read_attention(&self, gradients: &Gradients<'_>) -> Option<Masks> {
        let m = &self.model;
        let mut masks = Masks::new();
        let rows = gradients.get("attention.o.weight")?.chunks(m.heads * m.head_width);
        for (row, values) in self.selected_rows().zip(rows) {
            for (head, values) in values.chunks(m.head_width).enumerate() {
                let mask = self.visible_tokens(row, head).map(|(column, _)| values[column] != 0.0);
                masks.insert((row, Site::Weights { layer: 0, head }), mask.collect());
            }
        }
        Some(masks)
    }

    fn read_model(&self, gradients: &Gradients<'_>) -> Option<Masks> {
        let m = &self.model;
        let inner = m.heads * m.head_width;
        let mut masks = Masks::new();
        // The parameter before the dropout of the embedding has no gradient for a dropped value.
        let before_dropout = match (m.embedding_norm, m.position) {
            (true, _) => "embedding-norm.bias",
            (false, Position::Learned) => "position",
            (false, _) => "token",
        };
        if let Some(gradient) = gradients.get(before_dropout) {
            let has_column = |column| has_nonzero(gradient.iter().skip(column).step_by(m.width));
            masks.insert((0, Site::Embedding), (0..m.width).map(has_column).collect());
        }
        for layer in 0..m.layers {
            let of_layer = |name: &str| gradients.get(&format!("blocks.{layer}.{name}"));
            let (down, o) = (of_layer("feed-forward.down.weight")?, of_layer("attention.o.weight")?);
            let has_column =
                |data: &[f32], width, column| has_nonzero(data.iter().skip(column).step_by(width));
            let hidden = (0..m.ffn_width).map(|j| has_column(down, m.ffn_width, j)).collect();
            masks.insert((0, Site::Hidden { layer }), hidden);
            // The bias shows each value, or without a bias the row of the weight.
            let residual = |name: &str, weight: &[f32]| match of_layer(&format!("{name}.bias")) {
                Some(bias) => nonzero(bias),
                None => weight.chunks(weight.len() / m.width).map(|row| has_nonzero(row.iter())).collect(),
            };
            masks.insert((0, Site::FeedForwardResidual { layer }), residual("feed-forward.down", down));
            masks.insert((0, Site::AttentionResidual { layer }), residual("attention.o", o));
            for head in 0..m.heads {
                let weight = (0..m.head_width).any(|d| has_column(o, inner, head * m.head_width + d));
                masks.insert((0, Site::Weights { layer, head }), vec![weight]);
            }
        }
        if self.has_indicator_heads() {
            let heads = ["selection", "allocation"].iter().take(m.tokens.min(2)).enumerate();
            for (index, name) in heads {
                let head = gradients.get(&format!("{name}.out.weight"))?;
                masks.insert((0, Site::Head { index }), nonzero(head));
            }
        }
        Some(masks)
    }

    /// Returns the factors of the masks for the reference. Values that were not read have the factor 1, because they
    /// do not affect the compared results.
    pub fn factors(
        &self,
        masks: &Masks,
        sample: usize,
        site: Site,
        [rows, columns]: [usize; 2],
    ) -> Option<Vec<f64>> {
        let p = self.probability(site);
        let factor = |kept: &bool| if *kept { 1.0 / (1.0 - p) } else { 0.0 };
        if let Shape::Model { .. } = self.case.shape {
            return Some(masks.get(&(0, site))?.iter().map(factor).collect());
        }
        let tokens = self.model.tokens;
        let mut all = vec![1.0; rows * columns];
        for row in self.selected_rows().filter(|row| row / tokens == sample) {
            let factors = &mut all[row % tokens * columns..][..columns];
            let mask = masks.get(&(row, site))?.iter().map(factor);
            match site {
                Site::Weights { head, .. } => {
                    let visible = self.visible_tokens(row, head);
                    visible.zip(mask).for_each(|((_, token), value)| factors[token] = value);
                }
                _ => factors.iter_mut().zip(mask).for_each(|(factor, value)| *factor = value),
            }
        }
        Some(all)
    }

    /// Returns true if attention has keys whose masks no gradient shows.
    fn has_unread_keys(&self) -> bool {
        matches!(self.case.shape, Shape::Block { block: Block::Attention, .. })
            && self.model.tokens > self.model.head_width
    }

    /// Returns true if the masks determine a tensor, or a part of it.
    pub fn determines(&self, name: &str) -> bool {
        !(self.has_unread_keys() && matches!(name, "grad/x" | "grad/attention.v.bias"))
    }

    /// Replaces the values that the masks do not determine by the exact ones.
    pub fn replace_undetermined(&self, name: &str, exact: &[f64], results: &mut [Tensor]) {
        if !self.has_unread_keys() || name != "grad/attention.v.weight" {
            return;
        }
        let m = &self.model;
        let tensor = results.iter_mut().find(|t| t.name == name && t.data.len() == exact.len());
        let Some(tensor) = tensor else { return };
        for (index, value) in tensor.data.iter_mut().enumerate() {
            // All query heads that share a column of v show the same keys.
            let (head, key) = (index / m.width / m.head_width, index % m.width);
            let mut columns = head * m.head_width..(head + 1) * m.head_width;
            if !columns.any(|column| self.key_of_column(column) == key) {
                *value = exact[index] as f32;
            }
        }
    }
}

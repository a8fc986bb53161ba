//! A training case from whose gradients the dropout masks can be read.
//!
//! In a model with one token and one sample, the gradient of a weight is an outer product. A zero column is then a
//! dropped hidden unit, and a zero row is a dropped residual. In a block at its full size, the gradient of the output
//! has a single non-zero element in each of some rows, which selects these rows.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::fixture::{AdamW, Fixture, Tensor};
use crate::model::{Block, Dropout, Model, ModelId, Output};
use crate::reference::Site;
use crate::suite::{Case, Shape};

/// The masks of a step: true for each value that was not dropped. The key has the site, and the row of a block or 0.
pub type Masks = BTreeMap<(usize, Site), Vec<bool>>;

/// Number of values that are read per kind of site. 5 standard deviations are then 3.4 percentage points at p = 0.1.
const MIN_VALUES: usize = 2000;

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

/// A case with one token per sample for a model, or a block at its own size.
pub struct Probe {
    pub case: Case,
    model: Model,
    dropout: Dropout,
}

impl Probe {
    /// Returns the probe of a case: for a model its miniature with one token, for a block the case itself.
    ///
    /// # Panics
    /// Panics if the case has no model.
    pub fn new(case: Case) -> Self {
        let (model, _) = case.shape.model().expect("a case with dropout has a model");
        let shape = match case.shape {
            Shape::Model { .. } => {
                let small = if model.is_miniature() { model } else { model.miniature() };
                Shape::for_model(ModelId::intern(Model { tokens: 1, ..*small }), 1)
            }
            block => block,
        };
        let case = Case { shape, ..case };
        let (model, _) = shape.model().expect("as before");
        Self { case, model: *model, dropout: case.dropout() }
    }

    /// Returns the fixture of the probe. Its learning rate is 0, so the parameters do not change.
    pub fn fixture(&self) -> Fixture {
        let mut fixture = Fixture::new(self.case);
        fixture.adamw = AdamW { lr: 0.0, weight_decay: 0.0, ..AdamW::TRAINING };
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
            _ if self.has_indicator_heads() => raise("selection.hidden.bias", 5.0),
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

    /// Returns the rows of the batch that are read in a block.
    fn selected_rows(&self) -> impl Iterator<Item = usize> + use<> {
        let all = self.case.shape.batch() * self.model.tokens;
        let count = self.model.width.min(all);
        (0..count).map(move |i| i * all / count)
    }

    /// Returns true if the first output head is read. The second has no gradient with one token, because of its
    /// softmax.
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

    fn key_of_column(&self, column: usize) -> usize {
        column % self.key_count()
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
        tokens.filter(move |(_, token)| !m.causal || *token <= row % m.tokens)
    }

    /// Returns the number of steps until every kind of site has enough values.
    pub fn steps(&self) -> usize {
        let (m, d) = (&self.model, &self.dropout);
        if !matches!(self.case.shape, Shape::Model { .. }) {
            return COMPARED_STEPS_OF_MODEL;
        }
        let values = [
            (d.embedding, m.width),
            (d.weights, m.layers * m.heads),
            (d.residual, 2 * m.layers * m.width),
            (d.hidden, m.layers * m.ffn_width),
            (if self.has_indicator_heads() { d.heads } else { 0.0 }, m.width / 2),
        ];
        let fewest = values.iter().filter(|(p, _)| *p > 0.0).map(|(_, count)| *count).min();
        MIN_VALUES.div_ceil(fewest.unwrap_or(MIN_VALUES)).max(COMPARED_STEPS_OF_MODEL)
    }

    /// Returns the number of steps that are compared with the reference.
    pub fn compared_steps(&self) -> usize {
        let model = matches!(self.case.shape, Shape::Model { .. });
        if model { COMPARED_STEPS_OF_MODEL } else { COMPARED_STEPS_OF_BLOCK }
    }

    /// Returns the configured dropout probability of a site.
    pub fn probability(&self, site: Site) -> f64 {
        match site {
            Site::Embedding => self.dropout.embedding,
            Site::Weights { .. } => self.dropout.weights,
            Site::AttentionResidual { .. } | Site::FeedForwardResidual { .. } => self.dropout.residual,
            Site::Hidden { .. } => self.dropout.hidden,
            Site::Head { .. } => self.dropout.heads,
        }
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
        // The parameter after the dropout of the embedding has no gradient for a dropped value.
        let after_embedding = if m.embedding_norm { "embedding-norm.bias" } else { "position" };
        if let Some(gradient) = gradients.get(after_embedding) {
            masks.insert((0, Site::Embedding), nonzero(gradient));
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
            let head = gradients.get("selection.out.weight")?;
            masks.insert((0, Site::Head { index: 0 }), nonzero(head));
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

//! Positions of tokens: rotary angles, attention windows, and the layers that have them.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{Model, one};

/// Encoding of token positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Position {
    /// A learned table [T, D] that is added to the embedding.
    Learned,
    Rotary(Rotary),
    None,
}

/// Rotary positions (Su et al. 2021): each pair of features of a head rotates by token · frequency.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rotary {
    /// Pair i of w rotating features has the frequency theta^(−2i/w).
    pub theta: f64,
    /// Share of a head's features that rotate. They are its first ones.
    #[serde(default = "one")]
    pub share: f64,
    /// The frequencies of all pairs, instead of those that follow from `theta`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "deserialize_list")]
    pub frequencies: Option<&'static [f64]>,
    /// Factor on the cosines and sines.
    #[serde(default = "one")]
    pub factor: f64,
    /// True if a pair is two neighboring features, as in GPT-J. By default it is a feature of the first half and its
    /// counterpart in the second half, as in GPT-NeoX.
    #[serde(default)]
    pub pairs: bool,
}

fn deserialize_list<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<&'static [f64]>, D::Error> {
    Ok(Option::<Vec<f64>>::deserialize(from)?.map(|list| &*list.leak()))
}

impl Rotary {
    pub const fn new(theta: f64) -> Self {
        Self { theta, share: 1.0, frequencies: None, factor: 1.0, pairs: false }
    }

    /// Returns the number of rotating features of a head.
    pub fn width(&self, head_width: usize) -> usize {
        2 * ((head_width as f64 * self.share / 2.0) as usize).max(1)
    }

    /// Returns the frequencies of the pairs of a head. A miniature has a part of its model's list.
    pub fn frequencies(&self, head_width: usize) -> Vec<f64> {
        let width = self.width(head_width);
        let pairs = width / 2;
        match self.frequencies {
            Some(list) => (0..pairs).map(|i| list[i * list.len() / pairs]).collect(),
            None => (0..pairs).map(|i| self.theta.powf(-2.0 * i as f64 / width as f64)).collect(),
        }
    }
}

/// Position and window of a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionKind {
    pub position: Position,
    /// A token attends to tokens at a distance below this number. `None` means all.
    pub window: Option<usize>,
}

/// A second kind of attention, and the layers that have it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SecondAttention {
    /// True for each layer of this kind. The list repeats.
    #[serde(deserialize_with = "deserialize_flags")]
    pub layers: &'static [bool],
    /// `rotary` or `none`.
    pub position: Position,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
}

fn deserialize_flags<'de, D: serde::Deserializer<'de>>(from: D) -> Result<&'static [bool], D::Error> {
    Ok(Vec::<bool>::deserialize(from)?.leak())
}

impl Model {
    /// Returns the kinds of attention in the model: one or two.
    pub fn attention_kinds(&self) -> Vec<AttentionKind> {
        let first = AttentionKind { position: self.position, window: self.window };
        let second = self.second_attention.map(|s| AttentionKind { position: s.position, window: s.window });
        [first].into_iter().chain(second).map(|kind| self.without_ineffective_window(kind)).collect()
    }

    /// Removes a window that contains every token.
    fn without_ineffective_window(&self, kind: AttentionKind) -> AttentionKind {
        AttentionKind { window: kind.window.filter(|window| *window < self.tokens), ..kind }
    }

    /// Returns the index of a layer's attention in [`Model::attention_kinds`].
    pub fn attention_index(&self, layer: usize) -> usize {
        self.second_attention.map_or(0, |second| usize::from(second.layers[layer % second.layers.len()]))
    }

    pub fn attention_kind(&self, layer: usize) -> AttentionKind {
        self.attention_kinds()[self.attention_index(layer)]
    }

    /// Returns the smallest window of any layer. It has an effect on longer samples only.
    pub fn smallest_window(&self) -> Option<usize> {
        self.window.into_iter().chain(self.second_attention.and_then(|second| second.window)).min()
    }

    /// Returns the tokens to which a token attends in a layer.
    pub fn visible_tokens(&self, layer: usize, token: usize) -> Range<usize> {
        let window = self.attention_kind(layer).window.unwrap_or(self.tokens);
        let end = if self.causal { token + 1 } else { (token + window).min(self.tokens) };
        (token + 1).saturating_sub(window)..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GPT2;

    #[test]
    fn partial_rotary_widths_match_published_ones() {
        // GPT-NeoX of Pythia-160M, Phi-2, Phi-4-mini.
        for (share, head_width, expected) in [(0.25, 64, 16), (0.4, 80, 32), (0.75, 128, 96), (1.0, 64, 64)] {
            assert_eq!(Rotary { share, ..Rotary::new(1e4) }.width(head_width), expected);
        }
    }

    #[test]
    fn frequencies_follow_from_theta_or_the_list() {
        assert_eq!(Rotary::new(1e4).frequencies(8), [1.0, 0.1, 0.01, 1e-3].map(|f: f64| f));
        let listed = Rotary { frequencies: Some(&[4.0, 3.0, 2.0, 1.0]), ..Rotary::new(1e4) };
        assert_eq!(listed.frequencies(8), [4.0, 3.0, 2.0, 1.0]);
        assert_eq!(listed.frequencies(4), [4.0, 2.0]);
    }

    #[test]
    fn windows_limit_what_a_token_sees() {
        let second = SecondAttention { layers: &[true, false], position: Position::None, window: Some(3) };
        let model = Model { tokens: 8, second_attention: Some(second), ..GPT2 };
        assert_eq!([0, 1, 2].map(|layer| model.attention_index(layer)), [1, 0, 1]);
        assert_eq!([model.visible_tokens(0, 5), model.visible_tokens(1, 5)], [3..6, 0..6]);
        let both_sides = Model { causal: false, ..model };
        assert_eq!([0, 5, 7].map(|token| both_sides.visible_tokens(0, token)), [0..3, 3..8, 5..8]);
        assert_eq!(both_sides.visible_tokens(1, 5), 0..8);
        // A window of all tokens has no effect.
        assert_eq!(Model { tokens: 3, ..model }.attention_kind(0).window, None);
        assert_eq!(model.smallest_window(), Some(3));
    }
}

//! FLOPs of the blocks of a model with adapters.
//!
//! A frozen weight has no gradient. The input of the first layer has none either, because the embedding is frozen. Both
//! frameworks leave out the products of such gradients.

use super::Block;
use super::cost::linear;
use crate::model::{Lora, Model};

/// FLOPs of the forward and of the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AdapterCost {
    pub forward: u128,
    pub backward: u128,
}

/// A linear layer of a block.
struct Part {
    block: Block,
    name: &'static str,
    from: usize,
    to: usize,
}

impl AdapterCost {
    /// Returns the FLOPs of all blocks.
    pub fn of_blocks(m: &Model, lora: Lora, batch: usize) -> Self {
        let of_layer = |is_first: bool| {
            let mut cost = Self::default();
            cost.add_layer(m, lora, batch, !is_first);
            cost
        };
        let (first, other, others) = (of_layer(true), of_layer(false), m.layers as u128 - 1);
        Self {
            forward: first.forward + others * other.forward,
            backward: first.backward + others * other.backward,
        }
    }

    /// Adds a layer. `needs` is true if its input needs a gradient.
    fn add_layer(&mut self, m: &Model, lora: Lora, batch: usize, needs: bool) {
        let rows = batch * m.tokens;
        let (q_width, kv_width) = m.qkv_widths();
        let attention = |name, from, to| Part { block: Block::Attention, name, from, to };
        let feed_forward = |name, from, to| Part { block: Block::FeedForward, name, from, to };
        let add = |cost: &mut Self, part: Part, needs| cost.add_linear(lora, rows, &part, needs);
        let q = add(self, attention("q", m.width, q_width), needs);
        let k = add(self, attention("k", m.width, kv_width), needs);
        let v = add(self, attention("v", m.width, kv_width), needs);
        // Queries with keys, and weights with values. Each of the four gradients is a product.
        let scores = linear(rows, q_width, m.tokens);
        self.forward += 2 * scores;
        self.backward += scores * [q, k, v, q || k].iter().map(|needs| u128::from(*needs)).sum::<u128>();
        let o = add(self, attention("o", q_width, m.width), q || k || v);
        let needs = if m.norm_order.is_parallel() { needs } else { needs || o };
        let gate = m.glu && add(self, feed_forward("gate", m.width, m.ffn_width), needs);
        let up = add(self, feed_forward("up", m.width, m.ffn_width), needs);
        add(self, feed_forward("down", m.ffn_width, m.width), gate || up);
    }

    /// Adds a linear layer. `needs` is true if its input needs a gradient. Returns true if its result needs one.
    fn add_linear(&mut self, lora: Lora, rows: usize, part: &Part, needs: bool) -> bool {
        let (of_input, has_adapter) = (u128::from(needs), lora.adapts(part.block, part.name));
        let base = linear(rows, part.from, part.to);
        self.forward += base;
        self.backward += of_input * base;
        if has_adapter {
            let (down, up) = (linear(rows, part.from, lora.rank), linear(rows, lora.rank, part.to));
            self.forward += down + up;
            // The gradients of A and B, of the result of A, and of the input.
            self.backward += (1 + of_input) * down + 2 * up;
        }
        needs || has_adapter
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AdaptedLayers, GPT2};

    #[test]
    fn flops_match_hand_computed_ones() {
        let m = Model { layers: 2, ..GPT2 };
        let square = linear(8192, 768, 768);
        let wide = linear(8192, 768, 3072);
        let scores = linear(8192, 768, 1024);
        let [low, low_wide] = [linear(8192, 768, 16), linear(8192, 3072, 16)];
        let all = AdapterCost::of_blocks(&m, Lora::new(16, AdaptedLayers::All), 8);
        assert_eq!(all.forward, 2 * (4 * square + 2 * wide + 2 * scores + 8 * low + 2 * low + 2 * low_wide));
        // In the first layer, the inputs of q, k and v need no gradient.
        let layer = 4 * square + 2 * wide + 4 * scores + 2 * (8 * low + 2 * low + 2 * low_wide);
        assert_eq!(all.backward, 2 * layer - 3 * square - 3 * low);

        let queries_values = AdapterCost::of_blocks(&m, Lora::new(16, AdaptedLayers::QueriesValues), 8);
        assert_eq!(queries_values.forward, 2 * (4 * square + 2 * wide + 2 * scores + 4 * low));
        // In the first layer, keys need no gradient either.
        let layer = 4 * square + 2 * wide + 4 * scores + 8 * low;
        assert_eq!(queries_values.backward, 2 * layer - 3 * square - 2 * low - scores);
    }
}

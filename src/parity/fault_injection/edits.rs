//! Changes of the inputs and of the results of a backend.

use crate::fixture::{Fixture, Tensor};
use crate::model::{Model, ModelId, Position, Rotary};
use crate::suite::Case;

pub fn scale(f: &mut Fixture, name: &str, factor: f32) {
    f.edit_parameter(name, |data| data.iter_mut().for_each(|v| *v *= factor));
}

pub fn fill(f: &mut Fixture, name: &str, value: f32) {
    f.edit_parameter(name, |data| data.fill(value));
}

pub fn scale_queries(f: &mut Fixture, name: &str, factor: f32) {
    scale(f, &format!("{name}.q.weight"), factor);
    scale(f, &format!("{name}.q.bias"), factor);
}

pub fn edit_rotary(m: &mut Model, change: fn(&mut Rotary)) {
    if let Position::Rotary(rotary) = &mut m.position {
        change(rotary);
    }
}

pub fn model_of(f: &Fixture) -> ModelId {
    f.case.shape.model().expect("a case with a model").0
}

/// Reorders the features of each query and key head. Rotation in halves then has the result of rotation in pairs.
pub fn pair_rotary_features(f: &mut Fixture) {
    let model = model_of(f);
    let each = model.head_width;
    for name in ["q.weight", "q.bias", "k.weight", "k.bias"] {
        f.edit_parameter(&format!("attention.{name}"), |data| {
            let row = if name.ends_with("weight") { model.width } else { 1 };
            for head in data.chunks_mut(each * row) {
                let old = head.to_vec();
                for i in 0..each {
                    let from = if i < each / 2 { 2 * i } else { 2 * i - each + 1 };
                    head[i * row..(i + 1) * row].copy_from_slice(&old[from * row..(from + 1) * row]);
                }
            }
        });
    }
}

/// Swaps the second and the third of four heads, so that each reads the keys and values of the other.
pub fn swap_two_heads(f: &mut Fixture) {
    let model = model_of(f);
    let each = model.head_width;
    for (name, row) in [("q.weight", model.width), ("q.bias", 1)] {
        f.edit_parameter(&format!("attention.{name}"), |data| {
            data[each * row..3 * each * row].rotate_left(each * row);
        });
    }
    f.edit_parameter("attention.o.weight", |data| {
        data.chunks_mut(model.qkv_widths().0).for_each(|row| row[each..3 * each].rotate_left(each));
    });
}

pub fn copy_first_half_to_second(data: &mut [f32]) {
    let half = data.len() / 2;
    data.copy_within(..half, half);
}

pub fn copy_first_key_head(f: &mut Fixture) {
    for name in ["k.weight", "k.bias"] {
        f.edit_parameter(&format!("attention.{name}"), |data| copy_first_half_to_second(data));
    }
}

pub fn repeat_first_half(f: &mut Fixture) {
    for name in ["values", "market", "usefulness"] {
        f.edit_input(name, |data| copy_first_half_to_second(data));
    }
}

/// Replaces the other micro-batches of four by the last one, so that the mean is that of the last one.
pub fn repeat_last_quarter(f: &mut Fixture) {
    for name in ["values", "market", "usefulness"] {
        f.edit_input(name, |data| {
            let quarter = data.len() / 4;
            (0..3).for_each(|part| data.copy_within(3 * quarter.., part * quarter));
        });
    }
}

/// Replaces both matrices of an adapter of a square layer by the transpose of the other.
pub fn swap_adapter(f: &mut Fixture) {
    let [a, b] = ["lora-a", "lora-b"].map(|part| format!("blocks.0.attention.o.{part}"));
    swap_parameters(f, &a, &b);
    let width = model_of(f).width;
    let transpose = |data: &mut Vec<f32>, rows: usize| {
        let columns = data.len() / rows;
        *data = (0..data.len()).map(|i| data[i % rows * columns + i / rows]).collect();
    };
    // The first had the rows of B, one per feature, and the second those of A.
    f.edit_parameter(&a, |data| transpose(data, width));
    f.edit_parameter(&b, |data| {
        let rows = data.len() / width;
        transpose(data, rows);
    });
}

pub fn swap_parameters(f: &mut Fixture, a: &str, b: &str) {
    let mut other = Vec::new();
    f.edit_parameter(a, |data| other = std::mem::take(data));
    f.edit_parameter(b, |data| std::mem::swap(data, &mut other));
    f.edit_parameter(a, |data| *data = other);
}

/// Returns the results of the last step, with a change to the tensors whose names begin with `prefix`.
pub fn edit(steps: &[Vec<Tensor>], prefix: &str, change: impl Fn(&mut [f32])) -> Vec<Tensor> {
    let mut last = steps.last().cloned().unwrap_or_default();
    last.iter_mut().filter(|t| t.name.starts_with(prefix)).for_each(|t| change(&mut t.data));
    last
}

pub fn swap_norm_gradients(steps: &[Vec<Tensor>]) -> Vec<Tensor> {
    let mut last = steps.last().cloned().unwrap_or_default();
    let index = |name: &str| last.iter().position(|t| t.name == name).expect("a gradient of the model");
    let (a, b) = (index("grad/blocks.0.norm1.weight"), index("grad/blocks.0.norm2.weight"));
    let data = std::mem::take(&mut last[a].data);
    last[a].data = std::mem::replace(&mut last[b].data, data);
    last
}

/// Returns the results of the first step, with the sum of the gradients of all steps.
pub fn accumulate_gradients(steps: &[Vec<Tensor>]) -> Vec<Tensor> {
    let mut sum = steps[0].clone();
    for step in &steps[1..] {
        for (sum, now) in sum.iter_mut().zip(step).filter(|(t, _)| t.name.starts_with("grad/")) {
            sum.data.iter_mut().zip(&now.data).for_each(|(a, b)| *a += b);
        }
    }
    sum
}

pub fn enlarge_even_gradients(steps: &[Vec<Tensor>]) -> Vec<Tensor> {
    let factor = if steps.len().is_multiple_of(2) { 1.5 } else { 1.0 };
    edit(steps, "grad/", |g| g.iter_mut().for_each(|v| *v *= factor))
}

/// Doubles the difference of gradients between steps, as masks do that four equal samples share.
pub fn double_noise(steps: &[Vec<Tensor>]) -> Vec<Tensor> {
    let (first, mut last) = (&steps[0], steps[steps.len() - 1].clone());
    for (tensor, first) in last.iter_mut().zip(first).filter(|(tensor, _)| tensor.name.starts_with("grad/")) {
        tensor.data.iter_mut().zip(&first.data).for_each(|(v, first)| *v += *v - first);
    }
    last
}

/// Replaces a parameter by its initial value.
pub fn undo_update(steps: &[Vec<Tensor>]) -> Vec<Tensor> {
    let name = "blocks.0.feed-forward.down.weight";
    let case: Case = "train-step/torch-cpu/f32/indicator-tiny-b2".parse().expect("an id");
    let fixture = Fixture::for_parity(case);
    let start = fixture.parameters().iter().find(|t| t.name == name).expect("a parameter");
    edit(steps, &format!("param/{name}"), |data| data.copy_from_slice(&start.data))
}

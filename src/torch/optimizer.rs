//! The optimizers: AdamW and Muon on lists of leaves.

use std::ffi::c_int;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use transformer_bench::fixture::{AdamW, Fixture, Muon};
use transformer_bench::suite::Precision;

use crate::extension::{RawTensor, as_raw_list, check_status};
use crate::params::ParameterLayout;

unsafe extern "C" {
    fn tb_adamw(
        parameters: *const RawTensor,
        gradients: *const RawTensor,
        first: *const RawTensor,
        second: *const RawTensor,
        count: usize,
        step: i64,
        options: AdamW,
        foreach: bool,
    ) -> c_int;
    fn tb_fused_adamw(
        parameters: *const RawTensor,
        gradients: *const RawTensor,
        first: *const RawTensor,
        second: *const RawTensor,
        steps: *const RawTensor,
        count: usize,
        options: AdamW,
    ) -> c_int;
    fn tb_muon(
        parameters: *const RawTensor,
        gradients: *const RawTensor,
        moments: *const RawTensor,
        count: usize,
        options: Muon,
        bf16: bool,
        stacked: bool,
    ) -> c_int;
}

/// State of the optimizer in the type of the parameters, as in torch.optim.
pub struct OptimizerState {
    /// First moments, one per trained leaf.
    first: Vec<Tensor>,
    /// Second moments, one per trained leaf that AdamW updates.
    second: Vec<Option<Tensor>>,
    step: i64,
    /// Step counters on the device, one per leaf of AdamW, for the fused kernel.
    device_steps: Option<Vec<Tensor>>,
    /// Rows of the matrices in each trained leaf that Muon updates. It is empty for a leaf of AdamW, and a packed leaf has
    /// several.
    matrices: Vec<Vec<i64>>,
    muon: Muon,
    /// True if the iterations of Muon run in bf16.
    bf16: bool,
}

impl OptimizerState {
    /// Creates the state of the trained leaves. The fused one has AdamW in one kernel, and stacks matrices of Muon.
    pub fn new(fixture: &Fixture, layout: &ParameterLayout, trained: &[Tensor], fused: bool) -> Self {
        let matrices = layout.trained_matrices();
        assert_eq!(matrices.len(), trained.len());
        let zeros = |p: &Tensor| p.detach().zeros_like();
        let second = |(p, rows): (&Tensor, &Vec<i64>)| rows.is_empty().then(|| zeros(p));
        let second: Vec<Option<Tensor>> = trained.iter().zip(&matrices).map(second).collect();
        let counter = |moment: &Tensor| Tensor::zeros([1i64; 0], (Kind::Float, moment.device()));
        Self {
            first: trained.iter().map(zeros).collect(),
            step: 0,
            device_steps: fused.then(|| second.iter().flatten().map(counter).collect()),
            second,
            muon: fixture.muon,
            bf16: !matches!(fixture.case.method.precision, Precision::F32 | Precision::Tf32),
            matrices,
        }
    }

    /// Returns the tensors that a step changes, except the parameters.
    pub fn tensors(&self) -> Vec<Tensor> {
        let steps = self.device_steps.iter().flatten();
        let moments = self.first.iter().chain(self.second.iter().flatten());
        moments.chain(steps).map(Tensor::shallow_clone).collect()
    }

    /// Resets the step counter on the host. During a capture, a change of the counters on the device would become a
    /// part of the graph.
    pub fn reset_host_count(&mut self) {
        self.step = 0;
    }

    /// Returns the first and second moments of each trained leaf. Muon has no second one.
    pub fn moments(&self) -> [Vec<Option<&Tensor>>; 2] {
        [self.first.iter().map(Some).collect(), self.second.iter().map(Option::as_ref).collect()]
    }

    /// Returns the number of steps so far.
    pub fn step_count(&self) -> i64 {
        let on_device = self.device_steps.iter().flatten().next();
        on_device.map_or(self.step, |count| count.double_value(&[]) as i64)
    }

    /// Sets the number of steps, on the host and on the device.
    pub fn set_step_count(&mut self, count: i64) {
        self.step = count;
        for counter in self.device_steps.iter_mut().flatten() {
            let _ = counter.fill_(count);
        }
    }

    /// Returns the tensors of the leaves that AdamW updates, from those of all trained leaves.
    fn of_adamw(&self, tensors: &[Tensor]) -> Vec<Tensor> {
        let selected = tensors.iter().zip(&self.matrices).filter(|(_, rows)| rows.is_empty());
        selected.map(|(tensor, _)| tensor.shallow_clone()).collect()
    }

    /// Returns views of the matrices that Muon updates, from the tensors of all trained leaves.
    fn of_muon(&self, tensors: &[Tensor]) -> Vec<Tensor> {
        let views = |(tensor, rows): (&Tensor, &Vec<i64>)| match rows[..] {
            [] => Vec::new(),
            [_] => vec![tensor.detach()],
            _ => tensor.detach().split_with_sizes(rows, 0),
        };
        tensors.iter().zip(&self.matrices).flat_map(views).collect()
    }

    /// Updates the parameters in place.
    pub fn step(&mut self, options: &AdamW, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        assert_eq!([parameters.len(), gradients.len()], [self.matrices.len(); 2]);
        self.step_muon(parameters, gradients)?;
        let lists = [parameters, gradients, &self.first].map(|list| self.of_adamw(list));
        let [p, g, m] = lists.each_ref().map(|list| as_raw_list(list));
        let second: Vec<Tensor> = self.second.iter().flatten().map(Tensor::shallow_clone).collect();
        let v = as_raw_list(&second);
        let count = p.len();
        let (p, g, m, v) = (p.as_ptr(), g.as_ptr(), m.as_ptr(), v.as_ptr());
        self.step += 1;
        // As in torch.optim, the default on an accelerator is the `_foreach_` implementation.
        let foreach = parameters.first().is_some_and(|p| p.device() != Device::Cpu);
        // SAFETY: lists of `count` live tensors.
        check_status(unsafe {
            match &self.device_steps {
                Some(steps) => tb_fused_adamw(p, g, m, v, as_raw_list(steps).as_ptr(), count, *options),
                None => tb_adamw(p, g, m, v, count, self.step, *options, foreach),
            }
        })
    }

    /// Updates the matrices of Muon in place, one after the other, or stacked in the fused step.
    fn step_muon(&self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        let lists = [parameters, gradients, &self.first].map(|list| self.of_muon(list));
        if lists[0].is_empty() {
            return Ok(());
        }
        let [p, g, m] = lists.each_ref().map(|list| as_raw_list(list));
        let stacked = self.device_steps.is_some();
        // SAFETY: lists of `p.len()` live tensors.
        check_status(unsafe {
            tb_muon(p.as_ptr(), g.as_ptr(), m.as_ptr(), p.len(), self.muon, self.bf16, stacked)
        })
    }
}

#[cfg(test)]
mod tests {
    use transformer_bench::suite::Case;

    use super::*;

    #[test]
    fn muon_has_the_matrices_of_the_blocks_and_no_second_moment() {
        for (method, leaves) in [("f32", 2 * 6), ("f32-tuned", 2 * 4)] {
            let case: Case = format!("train-step/torch-cpu/{method}/indicator-tiny-b2-muon").parse().unwrap();
            let fixture = Fixture::new(case);
            let layout = ParameterLayout::new(case.shape, method == "f32-tuned");
            let trained = layout.load(fixture.parameters(), Device::Cpu, Kind::Float);
            let state = OptimizerState::new(&fixture, &layout, &trained, true);
            let [first, second] = state.moments();
            assert_eq!(first.len() - second.iter().flatten().count(), leaves, "{method}");
            // Queries, keys and values are three matrices, also in one leaf.
            assert_eq!(state.of_muon(&trained).len(), 2 * 6, "{method}");
            assert_eq!(state.device_steps.unwrap().len(), trained.len() - leaves, "{method}");
        }
    }
}

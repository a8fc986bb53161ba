//! Compares the f64 reference with PyTorch in f64, for every workload, every model option, AdamW and Muon.
//!
//! This side writes inputs, parameters and the reference's results to a folder. `reference.py` computes the results
//! again with the networks of `src/torch/inductor/network.py`, `torch.autograd` and `torch.optim`, and compares.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use transformer_bench::fixture::{AdamW, Fixture, Muon, Tensor};
use transformer_bench::model::Block;
use transformer_bench::reference::muon::muon;
use transformer_bench::reference::{DropoutMasks, Format, Rounding, Site, adamw, compute, test_data};
use transformer_bench::suite::{Case, Shape, Workload};

/// The tensors of all cases in the order of their descriptions, as little-endian f64.
#[derive(Default)]
struct Dump {
    cases: Vec<Value>,
    values: Vec<u8>,
}

impl Dump {
    /// Writes a tensor and returns its description.
    fn tensor(&mut self, name: &str, dims: &[usize], data: impl IntoIterator<Item = f64>) -> Value {
        let before = self.values.len();
        self.values.extend(data.into_iter().flat_map(f64::to_le_bytes));
        assert_eq!(self.values.len() - before, 8 * dims.iter().product::<usize>(), "{name}");
        json!([name, dims])
    }

    fn fixture_tensors(&mut self, all: &[Tensor]) -> Vec<Value> {
        all.iter().map(|t| self.tensor(&t.name, &t.dims, t.data.iter().map(|&v| v.into()))).collect()
    }

    /// Adds the results of a case without those of the optimizer.
    fn add_step(&mut self, case: Case, masked: bool) {
        let fixture = Fixture::for_parity(case);
        let parameters = self.fixture_tensors(fixture.parameters());
        let inputs = self.fixture_tensors(fixture.inputs());
        let masks = if masked { self.masks(case) } else { Vec::new() };
        let masked: Option<DropoutMasks<'_>> = if masked { Some(&test_data::masks) } else { None };
        let results = compute::<f64>(&fixture, Rounding::NONE, masked);
        let results: Vec<_> =
            results.into_iter().map(|r| self.tensor(&r.name, &[r.data.len()], r.data)).collect();
        let chain = if let Shape::Square { chain, .. } = case.shape { chain } else { 0 };
        self.cases.push(json!({
            "id": case.to_string(), "workload": case.workload.id(), "case": case.description(), "chain": chain,
            "parameters": parameters, "inputs": inputs, "masks": masks, "results": results,
        }));
    }

    /// Writes the dropout masks [B, …] of a case in the order in which a network applies them.
    fn masks(&mut self, case: Case) -> Vec<Value> {
        let (m, batch) = case.shape.model().expect("a model or a block");
        let residual = |name, site| (name, vec![site], [m.tokens, m.width]);
        let weights = |layer| {
            let heads = (0..m.heads).map(|head| Site::Weights { layer, head }).collect();
            ("weights", heads, [m.tokens, m.tokens])
        };
        let hidden = |layer| ("hidden", vec![Site::Hidden { layer }], [m.tokens, m.ffn_width]);
        let mut sites = Vec::new();
        match case.workload.block() {
            Some(Block::Attention) => sites.push(weights(0)),
            Some(Block::FeedForward) => sites.push(hidden(0)),
            None => {
                sites.push(("embedding", vec![Site::Embedding], [m.tokens, m.width]));
                for layer in 0..m.layers {
                    sites.extend([weights(layer), residual("attention", Site::AttentionResidual { layer })]);
                    sites.extend([hidden(layer), residual("residual", Site::FeedForwardResidual { layer })]);
                }
                if !m.is_language_model() {
                    let head = |index| ("heads", vec![Site::Head { index }], [m.tokens, m.width / 2]);
                    sites.extend([0, 1].map(head));
                }
            }
        }
        let write = |(name, parts, [rows, columns]): (&str, Vec<Site>, [usize; 2])| {
            let mut dims = vec![batch, rows, columns];
            if name == "weights" {
                dims.insert(1, parts.len());
            }
            let factors = (0..batch).flat_map(|sample| {
                let factors =
                    |&site| test_data::masks(sample, site, [rows, columns]).expect("every site drops");
                parts.iter().flat_map(factors).collect::<Vec<_>>()
            });
            self.tensor(name, &dims, factors)
        };
        sites.into_iter().map(write).collect()
    }

    /// Adds two steps of the optimizer.
    fn add_optimizer(&mut self, case: Case, options: AdamW, muon_options: Muon) {
        let fixture = Fixture::for_parity(case);
        let trained: Vec<Tensor> = fixture.trained_parameters().cloned().collect();
        let parameters = self.fixture_tensors(&trained);
        let mut gradients = Vec::new();
        let mut results = Vec::new();
        let specs = case.shape.parameter_specs();
        let matrices: Vec<&str> =
            specs.iter().filter(|s| case.shape.uses_muon_for(s)).map(|s| &*s.name).collect();
        for (parameter, first) in trained.iter().zip(fixture.gradients()) {
            let second = Tensor { data: first.data.iter().rev().copied().collect(), ..first.clone() };
            let start: Vec<f64> = parameter.data.iter().copied().map(f64::from).collect();
            let mut state = [start, vec![0.0; parameter.data.len()], vec![0.0; parameter.data.len()]];
            for (step, gradient) in (1..).zip([first, &second]) {
                if matrices.contains(&&*parameter.name) {
                    let dims = [parameter.dims[0], parameter.dims[1]];
                    let before = [&state[0][..], &state[1]];
                    let [p, m] = muon::<f64>(&muon_options, before, &gradient.data, dims, &Rounding::NONE);
                    (state[0], state[1]) = (p, m);
                } else {
                    state = adamw::<f64>(&options, &state, &gradient.data, step, Format::Unrounded);
                }
            }
            let [updated, ..] = state;
            results.push((first, updated));
            gradients.extend(self.fixture_tensors(&[first.clone(), second.clone()]));
        }
        let results: Vec<_> =
            results.into_iter().map(|(t, data)| self.tensor(&t.name, &t.dims, data)).collect();
        let options = json!({
            "lr": options.lr, "betas": [options.beta1, options.beta2], "eps": options.eps,
            "weight_decay": options.weight_decay,
        });
        let muon_options = json!({
            "lr": muon_options.lr, "momentum": muon_options.momentum, "weight_decay": muon_options.weight_decay,
            "eps": muon_options.eps, "ns_coefficients": muon_options.coefficients,
            "ns_steps": muon_options.iterations,
        });
        self.cases.push(json!({
            "id": format!("{case} {options}"), "workload": case.workload.id(), "options": options,
            "muon": muon_options, "matrices": matrices,
            "parameters": parameters, "inputs": gradients, "masks": [], "results": results,
        }));
    }
}

/// Returns true if PyTorch for Python can be absent: set-up recorded a reason that it cannot change. On Linux these
/// are an unsupported Python and a custom libtorch.
fn can_be_absent() -> bool {
    let reason = env!("TRANSFORMER_BENCH_NO_INDUCTOR");
    let final_reason = reason.contains("needs Python") || reason.contains("your LIBTORCH");
    !reason.is_empty() && (final_reason || !cfg!(target_os = "linux"))
}

#[test]
fn the_reference_agrees_with_pytorch_in_f64() {
    if can_be_absent() {
        println!("skipped: {}", env!("TRANSFORMER_BENCH_NO_INDUCTOR"));
        return;
    }
    let mut dump = Dump::default();
    for case in test_data::cases() {
        if case.workload == Workload::OptimizerStep {
            for (options, muon) in [(AdamW::PARITY, Muon::PARITY), (AdamW::TRAINING, Muon::TRAINING)] {
                dump.add_optimizer(case, options, muon);
            }
            continue;
        }
        dump.add_step(case, false);
        if case.shape.model().is_some() {
            dump.add_step(case, true);
        }
    }
    dump.add_step("matmul-peak/torch-cpu/f32/n64-x3".parse().expect("a case"), false);
    let folder = std::env::temp_dir().join(format!("transformer-bench-reference-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a temporary folder");
    fs::write(folder.join("cases.json"), Value::from(dump.cases).to_string()).expect("a file of cases");
    fs::write(folder.join("values"), dump.values).expect("a file of values");
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = vec![package.join("inductor")];
    paths.extend(Some(env!("TRANSFORMER_BENCH_PYTHONPATH")).filter(|path| !path.is_empty()).map(Into::into));
    let status = Command::new(env!("TRANSFORMER_BENCH_PYTHON"))
        .arg(package.join("tests/reference.py"))
        .arg(&folder)
        .env("PYTHONPATH", std::env::join_paths(paths).expect("paths without a colon"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status();
    let _ = fs::remove_dir_all(&folder);
    assert!(
        status.expect("Python starts; run ./scripts/setup").success(),
        "the reference differs from PyTorch"
    );
}

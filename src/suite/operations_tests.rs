//! Tests of the operations of a step.

use std::collections::HashSet;

use super::operations::{
    Operand, OperandRole, Operation, OperationPass, Pass, check_separable, operation_passes, operations,
};
use super::{Case, Shape, cost};
use crate::model::Output;

fn case(id: &str) -> Case {
    id.parse().unwrap()
}

#[test]
fn the_products_of_all_operations_are_the_flops_of_the_step() {
    for shape in ["indicator-b16", "indicator-b16-a4", "gpt2-b8-t1024", "gpt2-tiny-b2-t16"] {
        for method in ["f32", "f32-sdpa"] {
            let case = case(&format!("train-step/torch-cpu/{method}/{shape}"));
            let flops = |part: &OperationPass| part.flops() * part.operation.count as u64;
            let sum: u64 = operation_passes(&case).iter().map(flops).sum();
            assert_eq!(sum, cost::flops(&case), "{case}");
        }
    }
}

#[test]
fn the_parameters_of_all_operations_are_those_of_the_model() {
    for shape in ["indicator-b16", "gpt2-b8-t1024"] {
        let case = case(&format!("train-step/torch-cpu/f32/{shape}"));
        let Shape::Model { model, .. } = case.shape else { unreachable!() };
        let is_parameter = |operand: &&Operand| operand.role == OperandRole::Parameter;
        let parameters = |operation: &Operation| {
            operation.count * operation.operands.iter().filter(is_parameter).map(Operand::len).sum::<usize>()
        };
        let sum: usize = operations(&case).iter().map(parameters).sum();
        // A position is an operand of an addition, and the output head shares the table of tokens.
        let tied = if model.output == Output::Tied { model.vocabulary * model.width } else { 0 };
        assert_eq!(sum + model.tokens * model.width, case.shape.parameter_count() + tied, "{case}");
    }
}

#[test]
fn bytes_match_hand_computed_ones() {
    let all = operation_passes(&case("train-step/torch-cpu/f32/indicator-b16"));
    let bytes = |name: &str| all.iter().find(|part| part.to_string() == name).unwrap().bytes(4);
    let (x, hidden, weight) = (1776 * 256, 1776 * 1024, 1024 * 256);
    assert_eq!(bytes("feed-forward-up/forward"), 4 * (x + weight + 1024 + hidden));
    assert_eq!(bytes("feed-forward-up/by-input"), 4 * (hidden + weight + x));
    assert_eq!(bytes("feed-forward-up/by-weight"), 4 * (hidden + x + weight + 1024));
    assert_eq!(bytes("activation/forward"), 4 * 2 * hidden);
    assert_eq!(bytes("activation/backward"), 4 * 3 * hidden);
    assert_eq!(bytes("residual-sum/forward"), 4 * 3 * x);
}

#[test]
fn names_are_unique_and_passes_have_gradients() {
    for shape in ["indicator-tiny-b2", "gpt2-tiny-b2-t16"] {
        let all = operation_passes(&case(&format!("train-step/mlx-cpu/f32/{shape}")));
        let names: HashSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all.len());
        for part in &all {
            assert_eq!(part.pass != Pass::Forward, part.differentiated().next().is_some(), "{part}");
        }
        // An input of the model has no gradient.
        assert!(!names.contains("value-embedding/by-input"));
    }
}

#[test]
fn only_eager_steps_are_separable() {
    for (id, separable) in [
        ("train-step/torch-cpu/f32/indicator-b16", true),
        ("train-step/torch-cpu/f32-sdpa/gpt2-b8-t1024", true),
        ("train-step/torch-cpu/f32-sdpa/indicator-b16", false),
        ("train-step/torch-cpu/f32-tuned/indicator-b16", false),
        ("train-step/torch-cpu/f32/indicator-b16-lora16", false),
        ("attention/torch-cpu/f32/b16-h8-t111-d32", false),
    ] {
        assert_eq!(check_separable(&case(id)).is_ok(), separable, "{id}");
    }
}

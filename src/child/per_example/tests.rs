//! The squares of the CPU and those of a GPU, tried on the CPU's tensors, against loops in float64.

use serde_json::json;
use tch::Kind;

use super::*;
use crate::data::Encoded;
use crate::model::{Classifier, Labels, ModelConfig, Pass, loss};
use crate::random::{Key, fill_normal};

/// Activations and gradients of a few examples of uneven lengths.
pub(super) struct Case {
    pub gradient: Vec<f32>,
    pub input: Vec<f32>,
    pub examples: Examples,
    outputs: usize,
    inputs: usize,
    further: bool,
}

/// Sums in float64: squares, fourth powers, totals.
pub(super) type Sums = (Vec<f64>, Vec<f64>, Vec<f64>);

impl Case {
    pub fn new(outputs: usize, inputs: usize, copies: usize, further: bool) -> Self {
        let lengths = [3, 1, 7, 2, 39].into_iter().flat_map(|length| std::iter::repeat_n(length, copies));
        let examples = Examples::new(lengths, copies);
        let normal = |count: usize, stream: u32| {
            let mut values = vec![0f32; count];
            fill_normal(&mut values, 1.0, Key([1, 2]), stream);
            values
        };
        let (gradient, input) = (normal(examples.rows() * outputs, 0), normal(examples.rows() * inputs, 1));
        Self { gradient, input, examples, outputs, inputs, further }
    }

    /// Sums of a parameter that nothing was added to.
    pub fn nothing(&self, weights: usize) -> Moments {
        let zeros = |count: usize, kind: Kind| Tensor::zeros([count as i64], (kind, Device::Cpu));
        let further = self.further.then(|| FurtherMoments {
            fourths: zeros(weights, Kind::Float),
            totals: zeros(self.examples.count(), Kind::Double),
        });
        Moments { squares: zeros(weights, Kind::Float), further }
    }

    /// Squares and sums the gradients of a parameter's weights, where `add` adds the part of a row.
    fn sums(&self, weights: usize, add: impl Fn(usize, &mut [f64])) -> Sums {
        let (mut squares, mut fourths) = (vec![0f64; weights], vec![0f64; weights]);
        let mut totals = Vec::new();
        for example in 0..self.examples.count() {
            let mut own = vec![0f64; weights];
            for rows in self.examples.parts_of(example) {
                let mut gradient = vec![0f64; weights];
                rows.for_each(|row| add(row, &mut gradient));
                own.iter_mut().zip(gradient).for_each(|(own, gradient)| *own += gradient.powi(2));
            }
            for (weight, own) in own.iter().enumerate() {
                squares[weight] += own;
                fourths[weight] += own.powi(2);
            }
            totals.push(own.iter().sum());
        }
        (squares, fourths, totals)
    }

    pub fn products(&self) -> Sums {
        let Self { outputs, inputs, .. } = *self;
        self.sums(outputs * inputs, |row, sums| {
            for (output, sums) in sums.chunks_mut(inputs).enumerate() {
                let gradient = f64::from(self.gradient[row * outputs + output]);
                for (sum, input) in sums.iter_mut().zip(&self.input[row * inputs..]) {
                    *sum += gradient * f64::from(*input);
                }
            }
        })
    }

    fn tensor(values: &[f32], width: usize) -> Tensor {
        Tensor::from_slice(values).view([-1, width as i64])
    }
}

pub(super) fn assert_close(what: &str, found: &Moments, (squares, fourths, totals): &Sums) {
    let close = |found: &Tensor, expected: &[f64]| {
        let expected = Tensor::from_slice(expected);
        let difference = (found.to_kind(Kind::Double).view([-1]) - &expected).abs().max();
        let bound = 1e-5 * expected.abs().max().double_value(&[]);
        assert!(difference.double_value(&[]) <= bound, "{what}: {difference}");
    };
    close(&found.squares, squares);
    if let Some(further) = &found.further {
        close(&further.fourths, fourths);
        close(&further.totals, totals);
    }
}

/// All cases of a matrix 13 × 37.
fn cases() -> Vec<Case> {
    let kinds = [(1, false), (1, true), (2, false), (2, true)];
    kinds.into_iter().map(|(copies, further)| Case::new(13, 37, copies, further)).collect()
}

#[test]
fn a_matrix_on_a_device_adds_up_what_a_loop_does() {
    for case in cases() {
        let found = case.nothing(13 * 37).try_map(|sums| Ok(sums.f_view([13, 37])?)).unwrap();
        let (gradient, input) = (Case::tensor(&case.gradient, 13), Case::tensor(&case.input, 37));
        device::add_squared_products(&found, &gradient, &input, &case.examples).unwrap();
        assert_close("device", &found, &case.products());
    }
}

#[test]
fn a_vector_adds_up_what_a_loop_does() {
    for case in cases() {
        let factor: Vec<f32> = case.gradient.iter().rev().copied().collect();
        for factor in [None, Some(&factor)] {
            let expected = case.sums(13, |row, sums| {
                for (column, sum) in sums.iter_mut().enumerate() {
                    let place = row * 13 + column;
                    let factor = factor.map_or(1.0, |factor| f64::from(factor[place]));
                    *sum += f64::from(case.gradient[place]) * factor;
                }
            });
            let mut found = case.nothing(13);
            let sums = found.slices().unwrap();
            rows::add_squared_vector(sums, &case.gradient, factor.map(Vec::as_slice), &case.examples);
            assert_close("host", &found, &expected);
            let gradient = Case::tensor(&case.gradient, 13);
            let factor = factor.map(|factor| Case::tensor(factor, 13));
            let found = case.nothing(13);
            device::add_squared_vector(&found, &gradient, factor.as_ref(), &case.examples).unwrap();
            assert_close("device", &found, &expected);
        }
    }
}

/// Entries that one example uses more than once, that several use, and that none does.
#[test]
fn a_table_adds_up_what_a_loop_does() {
    for case in cases() {
        // The copies of an example are the same tokens.
        let mut entries = vec![0i64; case.examples.rows()];
        for part in case.examples.parts() {
            let length = part.len();
            part.enumerate().for_each(|(place, row)| entries[row] = [4, 1, 4, 0, 6][(place * length) % 5]);
        }
        let expected = case.sums(8 * 13, |row, sums| {
            let start = entries[row] as usize * 13;
            for (sum, gradient) in sums[start..start + 13].iter_mut().zip(&case.gradient[row * 13..]) {
                *sum += f64::from(*gradient);
            }
        });
        let mut found = case.nothing(8 * 13);
        rows::add_squared_entries(found.slices().unwrap(), &case.gradient, &entries, &case.examples);
        assert_close("host", &found, &expected);
        let found = case.nothing(8 * 13).try_map(|sums| Ok(sums.f_view([8, 13])?)).unwrap();
        let (gradient, entries) = (Case::tensor(&case.gradient, 13), Tensor::from_slice(&entries));
        device::add_squared_entries(&found, &gradient, &entries, &case.examples).unwrap();
        assert_close("device", &found, &expected);
    }
}

/// What a GPU does in bfloat16, with its kernels on the CPU: layers that share kernels are seen as single ones are.
#[test]
fn layers_with_kernels_in_common_are_observed() {
    let labels = Labels::Classes(vec!["no".into(), "yes".into()]);
    let config = json!({
        "model_type": "bert", "vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256, "max_position_embeddings": 30, "initializer_range": 0.06,
    });
    let config = ModelConfig::from_values(config.as_object().cloned().unwrap());
    let mut model = Classifier::untrained(config, labels, Device::Cpu).unwrap();
    model.reset(3).unwrap();
    let example = |length: u32| Encoded {
        ids: (0..length).map(|place| place * 7 % 40 + length).collect(),
        token_types: (0..length).map(|place| place / 5 % 2).collect(),
    };
    let examples = [9, 4, 21].map(example);
    let batch = PackedBatch::pack(&examples.each_ref(), 0, Device::Cpu).unwrap();
    let weights = model.parameters.compute_weights(Kind::BFloat16).unwrap();
    let weights: Vec<Tensor> = weights.iter().map(Tensor::detach).collect();
    let squares = |joined: bool| {
        let sums = Moments { squares: model.parameters.values().zeros_like(), further: None };
        let observer = SquaredGradients::new(&model.parameters, &sums, MaskScope::All, &batch, 1);
        let places: Vec<_> = weights.iter().filter(|_| joined).map(|_| None).collect();
        let pass = Pass::new(&weights, &batch, None).observed(&observer).collecting(&places);
        let logits = model.logits(&pass).unwrap();
        loss(&logits, &Tensor::from_slice(&[0i64, 1, 1]), 1).unwrap().backward();
        sums.squares.shallow_clone()
    };
    let [single, joined] = [false, true].map(squares);
    for (_, parameter) in model.parameters.iter() {
        let [expected, found] = [&single, &joined].map(|flat| span(flat, &parameter.range).unwrap().sqrt());
        // Keys' biases have gradients of nothing but rounding.
        let smallest = 1e-3 * single.sqrt().norm().double_value(&[]);
        let difference = (&found - &expected).norm() / expected.norm().clamp_min(smallest);
        assert!(difference.double_value(&[]) < 0.05, "{}: {difference}", parameter.name);
    }
}

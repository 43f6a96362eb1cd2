//! What a device can do at most: the rate of a large matrix product, and the operations that a training needs.

use std::time::Instant;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::Shape;
use crate::error::Result;
use crate::libtorch::synchronize;
use crate::model::Precision;
use crate::statistics::median;
use crate::values::yaml_name;

const ROUNDS: usize = 5;
const PRODUCTS: usize = 5;

/// How fast one large product of square matrices runs.
#[derive(Clone, Debug, Serialize)]
pub struct MatrixRate {
    /// Spelling of the precision in YAML.
    pub precision: String,
    /// Rows and columns of each matrix.
    pub size: i64,
    /// Operations a second, a multiplication and an addition counted as two: the median of the rounds.
    pub operations_per_second: f64,
}

/// Measures the matrix rate in a precision, on random numbers: zeros would run faster.
///
/// # Errors
/// Fails if libtorch refuses the product.
pub(super) fn matrix_rate(precision: Precision, size: i64, device: Device) -> Result<MatrixRate> {
    let _products = precision.matrix_products(device)?;
    let matrix = || Tensor::f_randn([size, size], (Kind::Float, device))?.f_to_kind(precision.kind());
    let (left, right) = (matrix()?, matrix()?);
    let mut product = left.f_matmul(&right)?;
    let mut rates = Vec::new();
    for _ in 0..ROUNDS {
        synchronize(device)?;
        let started = Instant::now();
        for _ in 0..PRODUCTS {
            product = product.f_matmul_out(&left, &right)?;
        }
        synchronize(device)?;
        let operations = PRODUCTS as f64 * 2.0 * (size as f64).powi(3);
        rates.push(operations / started.elapsed().as_secs_f64());
    }
    let operations_per_second = median(&rates).unwrap_or(f64::NAN);
    Ok(MatrixRate { precision: yaml_name(&precision), size, operations_per_second })
}

/// Returns the operations of a training step on an example: those of the encoder's matrix products, forward and twice as many
/// backward. Embeddings, the pooler and the head are not counted.
pub(super) fn operations(shape: &Shape, tokens: usize) -> f64 {
    let (layers, hidden, tokens) = (shape.layers as f64, shape.hidden as f64, tokens as f64);
    // Queries, keys, values and output, and a feed-forward layer four times as wide; scores, and sums of values by them.
    let forward = layers * tokens * (2.0 * 12.0 * hidden * hidden + 2.0 * 2.0 * tokens * hidden);
    3.0 * forward
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_six_a_weight_and_token_and_attention_beside() {
        let shape = Shape::BERT_LARGE;
        let weights = 24.0 * 12.0 * 1024.0 * 1024.0;
        let attention = 12.0 * 24.0 * 1024.0 * 128.0 * 128.0;
        assert_eq!(operations(&shape, 128), 6.0 * weights * 128.0 + attention);
        assert!(matrix_rate(Precision::Float32, 64, Device::Cpu).unwrap().operations_per_second > 0.0);
    }
}

//! How far two predictions of the same examples are apart.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Σ KL(p‖q) + KL(q‖p) over examples, of the distributions that two tensors of logits stand for, `[examples, classes]`: a
/// scalar. That is Σ (p − q) (ln p − ln q).
///
/// # Errors
/// Fails if shapes do not match.
pub fn symmetric_kl(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let logs = [left, right].map(|logits| logits.f_log_softmax(-1, Kind::Float));
    let [left, right] = logs;
    let (left, right) = (left?, right?);
    Ok(left.f_exp()?.f_sub(&right.f_exp()?)?.f_mul(&left.f_sub(&right)?)?.f_sum(Kind::Float)?)
}

/// Σ KL(p̄‖q) over examples, of the distributions that two tensors of logits stand for, `[examples, classes]`, the first a constant:
/// a scalar.
///
/// # Errors
/// Fails if shapes do not match.
pub fn divergence_from_constant(constant: &Tensor, other: &Tensor) -> Result<Tensor> {
    let constant = constant.f_detach()?.f_log_softmax(-1, Kind::Float)?;
    let apart = constant.f_sub(&other.f_log_softmax(-1, Kind::Float)?)?;
    Ok(constant.f_exp()?.f_mul(&apart)?.f_sum(Kind::Float)?)
}

/// Σ (f − g)² over examples, of scores `[examples, 1]`: a scalar.
///
/// # Errors
/// Fails if shapes do not match.
pub fn squared_difference(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    Ok(left.f_sub(right)?.f_square()?.f_sum(Kind::Float)?)
}

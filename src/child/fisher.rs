//! Diagonal empirical Fisher information: how much each weight matters to the task's likelihood.
//!
//! The paper's definition (section 3.2) is the mean over examples of the squared gradient of log p(y | x; w); the
//! released code squares the gradient of each batch's mean loss instead. Both are here, by their names.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::hooks::GradientHooks;
use super::network::MaskScope;
use super::per_example::SquaredGradients;
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::Tf32;
use crate::model::{Classifier, Dropout, Pass, loss};

/// What is squared and averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// F(w) = 1/|D| Σ_j (∂ log p(y_j | x_j) / ∂w)², the paper's definition.
    PerExample,
    /// F(w) = 1/B Σ_b (∂ mean loss of batch b / ∂w)², the released code's.
    Batch,
}

/// How Fisher information is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FisherOptions {
    /// What is squared and averaged.
    pub estimator: Estimator,
    /// Whether dropout is on while gradients are taken.
    pub dropout: bool,
    /// Largest norm of one tensor's gradient before it is squared; only with [`Estimator::Batch`].
    pub clip: Option<f64>,
}

/// One batch of the Fisher pass.
pub struct FisherBatch {
    /// The examples.
    pub batch: PackedBatch,
    /// Class ids or scores, `[examples]`.
    pub targets: Tensor,
    /// The dropout pattern, where dropout is on.
    pub dropout: Option<Dropout>,
}

/// Computes the Fisher information of every weight over the batches, in the layout of the flat parameter buffer.
/// Weights outside `scope` may be left at zero. The model's weights and gradients are as before afterwards.
///
/// `each` is called after every batch with its number of examples, and ends the pass with an error if it returns one.
///
/// # Errors
/// Fails if libtorch refuses an operation or `each` asks to stop.
pub fn fisher_information(
    classifier: &mut Classifier,
    batches: impl Iterator<Item = Result<FisherBatch>>,
    options: &FisherOptions,
    scope: MaskScope,
    mut each: impl FnMut(usize) -> Result<()>,
) -> Result<Tensor> {
    let _products = Tf32::allow(false)?;
    let mut information = classifier.parameters.values().f_zeros_like()?;
    let mut terms = 0;
    for batch in batches {
        let batch = batch?;
        let examples = batch.batch.examples();
        terms += match options.estimator {
            Estimator::PerExample => {
                add_per_example(classifier, &batch, scope, &information)?;
                examples
            }
            Estimator::Batch => {
                add_batch(classifier, &batch, options.clip, &mut information)?;
                1
            }
        };
        each(examples)?;
    }
    Ok(information.f_div_scalar(terms.max(1) as f64)?)
}

/// Adds each example's squared gradient, layer by layer inside one backward pass over the batch.
fn add_per_example(
    classifier: &Classifier,
    batch: &FisherBatch,
    scope: MaskScope,
    information: &Tensor,
) -> Result<()> {
    // Detached weights: backward then computes activation gradients only, and the observer does the rest.
    let weights =
        classifier.parameters.iter().map(|(id, _)| Ok(classifier.parameters.leaf(id).f_detach()?));
    let weights = weights.collect::<Result<Vec<Tensor>>>()?;
    let squares = SquaredGradients::new(&classifier.parameters, information, scope, &batch.batch);
    let pass = Pass::new(&weights, &batch.batch, batch.dropout).observed(&squares);
    let logits = classifier.logits(&pass)?;
    // The sum over examples: what arrives at an example's rows is the gradient of its own loss.
    loss(&logits, &batch.targets, 1)?.f_backward()?;
    Ok(())
}

/// Adds the squared gradient of the batch's mean loss.
fn add_batch(
    classifier: &mut Classifier,
    batch: &FisherBatch,
    clip: Option<f64>,
    information: &mut Tensor,
) -> Result<()> {
    let weights = classifier.parameters.compute_weights(Kind::Float)?;
    let hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None)?;
    let pass = Pass::new(&weights, &batch.batch, batch.dropout);
    loss(&classifier.logits(&pass)?, &batch.targets, batch.batch.examples())?.f_backward()?;
    hooks.end_step()?;
    let gradients = classifier.parameters.gradients()?;
    if let Some(limit) = clip {
        for (_, parameter) in classifier.parameters.iter() {
            let range = &parameter.range;
            let mut gradient = gradients.f_narrow(0, range.start as i64, range.len() as i64)?;
            // torch.nn.utils.clip_grad_norm_ on this tensor alone.
            let factor = gradient.f_norm()?.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(limit)?;
            let _ = gradient.f_mul_(&factor.f_clamp_max(1.0)?)?;
        }
    }
    let _ = information.f_addcmul_(gradients, gradients)?;
    Ok(())
}

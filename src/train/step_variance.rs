//! Theorem 1 of the paper, measured: mean and variance of one step of SGD under Child-Tuning_F.
//!
//! Let g be the mean gradient over all N examples, σ² the variance of the gradients of single examples around it (a sum
//! divided by N), both of one weight, and B the examples of a step, drawn without replacement. The mean gradient of the
//! batch has mean g and variance V = σ²/B · (N − B)/(N − 1). The mask M ~ Bernoulli(p) is independent of it, and the step
//! is Δw = −η s M ḡ, where s is 1/p (or 1 without rescaling). So
//!
//! - E\[Δw\] = −η s p g, and
//! - Var\[Δw\] = η² s² (E\[M²\] E\[ḡ²\] − p² g²) = η² s² (p V + p (1 − p) g²),
//!
//! which for s = 1/p is the theorem's η² (V/p + (1 − p) g²/p).

use std::sync::Arc;

use serde::Serialize;
use tch::{Kind, Tensor};

use super::control::{Control, Event, Progress};
use super::hyperparameters::Hyperparameters;
use super::prepare::prepare;
use crate::child::{
    Estimator, FisherBatch, FisherOptions, GradientHooks, GradientMask, MaskScope, fisher_information,
};
use crate::data::EncodedDataset;
use crate::error::{Error, Result};
use crate::method::{Method, Prepared};
use crate::model::{Classifier, Parameters, Pass, loss, span};
use crate::random::{self, Key, Purpose};
use crate::statistics::standard_deviation;

/// Fewer weights that all draws together keep say nothing of a variance.
const FEWEST_KEPT: f64 = 1000.0;

/// Mean and variance of a step as the theorem predicts and as draws show them. Sums and norms are over all weights in the
/// mask's scope.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepVariance {
    /// Share of the weights that a step keeps; 1 without a mask.
    pub p: f64,
    /// Examples of a step.
    pub batch_size: usize,
    /// Examples that batches are drawn from.
    pub examples: usize,
    /// Weights that are measured.
    pub weights: usize,
    /// Steps that were drawn.
    pub draws: u64,
    /// Length of a step for a gradient of length 1.
    pub learning_rate: f64,
    /// ‖E\[Δw\]‖.
    pub predicted_mean_norm: f64,
    /// ‖mean of the draws − E\[Δw\]‖.
    pub mean_error_norm: f64,
    /// What the above is in root mean square if the predicted variance is right.
    pub expected_mean_error_norm: f64,
    /// Σ Var\[Δw\].
    pub predicted_variance: f64,
    /// Σ Var\[Δw\] of the draws (a sum divided by draws − 1).
    pub measured_variance: f64,
    /// Measured / predicted variance; nothing where none is predicted, or where the masks of all draws keep too few weights to tell.
    pub ratio: Option<f64>,
    /// Standard error of the ratio.
    pub standard_error_of_ratio: Option<f64>,
    /// Share of the weights with a variance whose mean lies within three standard errors of the predicted one; nothing where none
    /// varies, or as for the ratio.
    pub within_three_standard_errors: Option<f64>,
}

/// Draws steps from the model's weights, each with another batch and mask, and compares them with the theorem. The weights
/// stay as they are.
///
/// Dropout, clipping, warm-up and weight decay are off, and passes are in float32: the theorem is about none of these. A
/// step is taken as −η times the masked gradient and not added to the weights, whose last bits would swallow small steps.
///
/// # Errors
/// Fails if the method has another mask or changes more than a mask does, on request ([`Error::Interrupted`]), or if libtorch refuses an operation.
pub fn step_variance(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    method: &dyn Method,
    hyperparameters: &Hyperparameters,
    seed: u64,
    draws: u64,
    control: &mut Control,
) -> Result<StepVariance> {
    let prepared = prepare(classifier, data, method, hyperparameters, seed, control)?;
    let (scope, p, scale) = match prepared.mask.as_deref() {
        None => (MaskScope::All, 1.0, 1.0),
        Some(GradientMask::Bernoulli(mask)) => (mask.scope(), mask.probability(), mask.scale()),
        Some(GradientMask::Fixed(_) | GradientMask::Adaptive(_)) => {
            return Err(Error::configuration("Theorem 1 is about masks that are drawn at every step"));
        }
    };
    let Some(rate) = shared_rate(&prepared, &classifier.parameters) else {
        return Err(Error::configuration("Theorem 1 is about steps that masks alone change"));
    };
    let maskable = classifier.parameters.iter().filter(|(_, parameter)| scope.covers(parameter));
    let kept = p * draws as f64 * maskable.map(|(_, parameter)| parameter.count() as f64).sum::<f64>();
    let learning_rate = hyperparameters.learning_rate * rate;
    let batch_size = hyperparameters.batch_size.min(data.len());
    let predicted = Moments::new(classifier, data, scope, batch_size, control)?.step(
        learning_rate * scale,
        p,
        batch_size,
        data.len(),
    )?;

    let hooks = collected(classifier, prepared.mask.as_ref())?;
    let mut drawn = Drawn::new(&predicted.mean)?;
    for draw in 0..draws {
        control.check()?;
        // A permutation of its own for every draw: the batches of one epoch are not independent.
        let order = random::permutation(data.len(), Key::derive(seed, Purpose::Order, draw));
        if let Some(mask) = &prepared.mask {
            mask.begin_step(draw)?;
        }
        hooks.begin_step();
        let mean_loss = add_gradient(classifier, data, &order[..batch_size], batch_size)?;
        hooks.end_step()?;
        let gradient = gathered(&classifier.parameters, classifier.parameters.gradients()?, scope)?;
        drawn.add(gradient.f_mul_scalar(-learning_rate)?.f_sub(&predicted.mean)?)?;
        let progress = Progress { done: draw + 1, total: draws };
        (control.report)(Event::Step { progress, loss: mean_loss });
    }

    let setting = Setting { p, kept, batch_size, examples: data.len(), learning_rate };
    drawn.against(&predicted, setting)
}

/// What a measurement is of, besides its weights.
struct Setting {
    p: f64,
    /// Weights that the masks of all draws let through, on average.
    kept: f64,
    batch_size: usize,
    examples: usize,
    learning_rate: f64,
}

/// Mean and variance of a step, of each weight, as the theorem has them.
struct Predicted {
    mean: Tensor,
    variance: Tensor,
}

/// Steps as they were drawn, each as its deviation from the predicted mean: sums of these lose no digits, however small they
/// are.
struct Drawn {
    sums: Tensor,
    sums_of_squares: Tensor,
    /// The squared length of each deviation.
    lengths: Vec<f64>,
}

impl Drawn {
    fn new(like: &Tensor) -> Result<Self> {
        Ok(Self { sums: like.f_zeros_like()?, sums_of_squares: like.f_zeros_like()?, lengths: Vec::new() })
    }

    fn add(&mut self, deviation: Tensor) -> Result<()> {
        self.lengths.push(total(&deviation.f_square()?)?);
        let _ = self.sums.f_add_(&deviation)?;
        let _ = self.sums_of_squares.f_addcmul_(&deviation, &deviation)?;
        Ok(())
    }

    /// Compares the draws, two at least, with what was predicted.
    fn against(self, predicted: &Predicted, setting: Setting) -> Result<StepVariance> {
        let Setting { p, kept, batch_size, examples, learning_rate } = setting;
        let count = self.lengths.len() as f64;
        let mean_error = self.sums.f_div_scalar(count)?;
        let squared_mean_error = total(&mean_error.f_square()?)?;
        let measured_variance = (total(&self.sums_of_squares)? - count * squared_mean_error) / (count - 1.0);
        let predicted_variance = total(&predicted.variance)?;
        let deviation = standard_deviation(&self.lengths).unwrap_or(f64::NAN);
        let tells = kept >= FEWEST_KEPT;
        let of_predicted =
            |number: f64| (tells && predicted_variance > 0.0).then(|| number / predicted_variance);
        let varies = predicted.variance.f_gt(0.0)?;
        let within = mean_error
            .f_square()?
            .f_le_tensor(&predicted.variance.f_mul_scalar(9.0 / count)?)?
            .f_logical_and(&varies)?;
        Ok(StepVariance {
            p,
            batch_size,
            examples,
            weights: predicted.mean.numel(),
            draws: self.lengths.len() as u64,
            learning_rate,
            predicted_mean_norm: total(&predicted.mean.f_square()?)?.sqrt(),
            mean_error_norm: squared_mean_error.sqrt(),
            expected_mean_error_norm: (predicted_variance / count).sqrt(),
            predicted_variance,
            measured_variance,
            ratio: of_predicted(measured_variance),
            standard_error_of_ratio: of_predicted(deviation / count.sqrt()),
            within_three_standard_errors: Some(total(&within)? / total(&varies)?)
                .filter(|share| tells && share.is_finite()),
        })
    }
}

fn total(values: &Tensor) -> Result<f64> {
    Ok(f64::try_from(values.f_sum(Kind::Double)?)?)
}

/// Mean and mean square of the gradients of single examples, of each weight in a scope, in float64.
struct Moments {
    mean: Tensor,
    mean_square: Tensor,
}

impl Moments {
    fn new(
        classifier: &mut Classifier,
        data: &EncodedDataset,
        scope: MaskScope,
        batch_size: usize,
        control: &mut Control,
    ) -> Result<Self> {
        let device = classifier.parameters.device();
        let numbers: Vec<usize> = (0..data.len()).collect();
        let batches = numbers.chunks(batch_size).map(|numbers| FisherBatch::plain(data, numbers, device));
        let options = FisherOptions::of(Estimator::PerExample);
        let mut done = 0;
        let information = fisher_information(classifier, batches, &options, scope, |examples| {
            done += examples;
            (control.report)(Event::Prepared(Progress::new(done, data.len())));
            control.check()
        })?;
        let hooks = collected(classifier, None)?;
        for numbers in numbers.chunks(batch_size) {
            add_gradient(classifier, data, numbers, data.len())?;
            control.check()?;
        }
        hooks.end_step()?;
        let parameters = &classifier.parameters;
        Ok(Self {
            mean: gathered(parameters, parameters.gradients()?, scope)?,
            mean_square: gathered(parameters, &information.values, scope)?,
        })
    }

    /// Returns mean and variance of a step of `step_length` times the masked mean gradient of `batch_size` of `examples`.
    fn step(&self, step_length: f64, p: f64, batch_size: usize, examples: usize) -> Result<Predicted> {
        let variance = self
            .variance_of_batch(batch_size, examples)?
            .f_mul_scalar(p)?
            .f_add(&self.mean.f_square()?.f_mul_scalar(p * (1.0 - p))?)?
            .f_mul_scalar(step_length.powi(2))?;
        Ok(Predicted { mean: self.mean.f_mul_scalar(-step_length * p)?, variance })
    }

    /// Returns the variance of the mean gradient of `batch_size` of `examples`, drawn without replacement.
    fn variance_of_batch(&self, batch_size: usize, examples: usize) -> Result<Tensor> {
        let (batch_size, examples) = (batch_size as f64, examples as f64);
        let remaining = (examples - batch_size) / (examples - 1.0).max(1.0);
        // Rounding may leave a negative variance where there is none.
        let variance = self.mean_square.f_sub(&self.mean.f_square()?)?.f_clamp_min(0.0)?;
        Ok(variance.f_mul_scalar(remaining / batch_size)?)
    }
}

/// Returns the factor on the learning rate of all parameters, if it is one and nothing but masks changes the step besides.
fn shared_rate(prepared: &Prepared, parameters: &Parameters) -> Option<f64> {
    let mut rates = parameters.iter().map(|(_, own)| prepared.rates.get(&own.name).copied().unwrap_or(1.0));
    let first = rates.next()?;
    let plain = prepared.parts.has_plain_passes() && prepared.parts.pulls.is_empty();
    (plain && rates.all(|rate| rate == first)).then_some(first)
}

/// Collects the gradients of all weights.
fn collected(classifier: &Classifier, mask: Option<&Arc<GradientMask>>) -> Result<GradientHooks> {
    let weights = classifier.parameters.compute_weights(Kind::Float)?;
    GradientHooks::collect(&classifier.parameters, &weights, |_| true, mask)
}

/// Adds the gradient of examples' summed loss, divided by `whole`, to the model's. Returns their loss.
fn add_gradient(
    classifier: &Classifier,
    data: &EncodedDataset,
    examples: &[usize],
    whole: usize,
) -> Result<f64> {
    let (batch, targets) = data.batch(examples, 0, classifier.parameters.device())?;
    let weights = classifier.parameters.compute_weights(Kind::Float)?;
    let loss = loss(&classifier.logits(&Pass::new(&weights, &batch, None))?, &targets, whole)?;
    loss.f_backward()?;
    Ok(f64::try_from(loss.f_detach()?)?)
}

/// Lays the weights in a scope one after the other, in float64.
fn gathered(parameters: &Parameters, flat: &Tensor, scope: MaskScope) -> Result<Tensor> {
    let parts = parameters.iter().filter(|(_, parameter)| scope.covers(parameter));
    let parts = parts.map(|(_, parameter)| span(flat, &parameter.range));
    Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?.f_to_kind(Kind::Double)?)
}

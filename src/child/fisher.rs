//! Diagonal Fisher information: how much each weight matters to the task's likelihood.
//!
//! The paper's definition is the mean over examples of the squared gradient of log p(y | x; w) at the labels
//! of the data; the released code squares the gradient of each batch's mean loss instead; and the Fisher information of
//! statistics takes the expectation over the labels that the model itself predicts. All three are here, by their names.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::hooks::GradientHooks;
use super::network::MaskScope;
use super::per_example::{FurtherMoments, Moments, SquaredGradients};
use crate::data::{EncodedDataset, PackedBatch};
use crate::error::{Error, Result};
use crate::model::{Classifier, Dropout, Labels, Pass, Precision, loss, span};

/// What is squared and averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// F(w) = 1/|D| Σ_j (∂ log p(y_j | x_j) / ∂w)², the paper's definition.
    PerExample,
    /// F(w) = 1/B Σ_b (∂ mean loss of batch b / ∂w)², the released code's.
    Batch,
    /// F(w) = 1/|D| Σ_j E_{y ~ p(y | x_j)} (∂ log p(y | x_j) / ∂w)², the model's own expectation.
    Expected,
}

impl Estimator {
    /// Returns how many copies of an example its estimate needs in a batch.
    ///
    /// With the probabilities p of C classes, the expected squared gradient is that of the quadratic form diag(p) − p pᵀ in
    /// the gradients of the logits. Its rank is C − 1, so that as many gradients make it up exactly.
    pub fn copies(self, labels: &Labels) -> usize {
        match (self, labels) {
            (Estimator::Expected, Labels::Classes(names)) => names.len().saturating_sub(1).max(1),
            _ => 1,
        }
    }
}

/// How Fisher information is computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FisherOptions {
    /// What is squared and averaged.
    pub estimator: Estimator,
    /// The number type of the passes; sums are float32 always.
    pub precision: Precision,
    /// Largest norm of one tensor's gradient before it is squared; only with [`Estimator::Batch`].
    pub clip: Option<f64>,
    /// Whether to add up what standard errors need, one more number a weight; not with [`Estimator::Batch`].
    pub spread: bool,
}

impl FisherOptions {
    /// Makes the options of an estimator, in float32 and with nothing besides.
    pub fn of(estimator: Estimator) -> Self {
        Self { estimator, precision: Precision::Float32, clip: None, spread: false }
    }
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

impl FisherBatch {
    /// Makes the batch of the examples with the given numbers, without dropout.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn plain(data: &EncodedDataset, numbers: &[usize], device: Device) -> Result<Self> {
        let (batch, targets) = data.batch(numbers, 0, device)?;
        Ok(Self { batch, targets, dropout: None })
    }
}

/// The Fisher information of a model's weights.
pub struct FisherInformation {
    /// F of every weight, in the layout of the flat parameter buffer.
    pub values: Tensor,
    /// How examples differ, where [`FisherOptions::spread`] asks for it.
    pub spread: Option<Spread>,
}

/// How the information of single examples spreads around its mean.
pub struct Spread {
    /// Mean of the squared information of single examples, in the layout of the flat parameter buffer.
    pub mean_squares: Tensor,
    /// Information of each example, all weights in the scope together.
    pub totals: Vec<f64>,
}

/// Computes the Fisher information of every weight over the batches. Weights outside `scope` may be left at zero. The
/// model's weights stay as they are; [`Estimator::Batch`] overwrites its gradients.
///
/// With [`Estimator::Expected`] the activations of a batch take [`Estimator::copies`] times their memory.
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
) -> Result<FisherInformation> {
    let _products = options.precision.matrix_products(classifier.parameters.device())?;
    let mut squares = classifier.parameters.values().f_zeros_like()?;
    let mut spread =
        options.spread.then(|| Ok::<_, Error>((squares.f_zeros_like()?, Vec::new()))).transpose()?;
    // Detached weights: backward then computes activation gradients only, and the observer does the rest.
    let weights = match options.estimator {
        Estimator::Batch => Vec::new(),
        _ => detached(classifier.parameters.compute_weights(options.precision.kind())?)?,
    };
    let mut terms = 0;
    for batch in batches {
        let batch = batch?;
        let examples = batch.batch.examples();
        if options.estimator == Estimator::Batch {
            add_batch(classifier, &batch, options, &mut squares)?;
            terms += 1;
        } else {
            let further = spread.as_ref().map(|(fourths, _)| {
                let totals = Tensor::f_zeros([examples as i64], (Kind::Double, squares.device()))?;
                Ok::<_, Error>(FurtherMoments { fourths: fourths.shallow_clone(), totals })
            });
            let sums = Moments { squares: squares.shallow_clone(), further: further.transpose()? };
            add_examples(classifier, &weights, &batch, options.estimator, scope, &sums)?;
            if let (Some((_, totals)), Some(further)) = (&mut spread, &sums.further) {
                totals.extend(Vec::<f64>::try_from(&further.totals)?);
            }
            terms += examples;
        }
        each(examples)?;
    }
    let mean = |sums: &mut Tensor| sums.f_div_scalar_(terms.max(1) as f64);
    let spread = spread
        .map(|(mut fourths, totals)| Ok::<_, Error>(Spread { mean_squares: mean(&mut fourths)?, totals }));
    Ok(FisherInformation { values: mean(&mut squares)?, spread: spread.transpose()? })
}

fn detached(weights: Vec<Tensor>) -> Result<Vec<Tensor>> {
    weights.iter().map(|weight| Ok(weight.f_detach()?)).collect()
}

/// Adds each example's squared gradient, layer by layer inside one backward pass over the batch.
fn add_examples(
    classifier: &Classifier,
    weights: &[Tensor],
    batch: &FisherBatch,
    estimator: Estimator,
    scope: MaskScope,
    sums: &Moments,
) -> Result<()> {
    let copies = estimator.copies(classifier.labels());
    if copies > 1 && batch.dropout.is_some() && classifier.parameters.device().is_cuda() {
        return Err(Error::configuration(
            "fisher: `estimator: expected` with `dropout: true` and more than two classes needs one dropout pattern for all copies of \
             an example, which a GPU does not draw; set `dropout: false`, or compute on the CPU",
        ));
    }
    let repeated = if copies > 1 { Some(batch.batch.repeated(copies)?) } else { None };
    let packed = repeated.as_ref().unwrap_or(&batch.batch);
    let squares = SquaredGradients::new(&classifier.parameters, sums, scope, packed, copies);
    let logits = classifier.logits(&Pass::new(weights, packed, batch.dropout.clone()).observed(&squares))?;
    // The sum over examples: what arrives at an example's rows is the gradient of its own loss.
    let sum = match estimator {
        Estimator::Expected => expectation(&logits, classifier.labels(), copies)?,
        _ => loss(&logits, &batch.targets, 1)?,
    };
    sum.f_backward()?;
    Ok(())
}

/// Returns the sum over a batch of scalars whose squared gradients add up, over the copies of an example, to the expected
/// squared gradient of its log-likelihood.
///
/// For classes these are the columns of the Cholesky factor of diag(p) − p pᵀ (Tanabe and Sagae, 1992), each times the
/// logits. A squared error (f − y)² is the likelihood N(f, 1/2), whose expected squared gradient is 2 (∂f/∂w)².
fn expectation(logits: &Tensor, labels: &Labels, copies: usize) -> Result<Tensor> {
    if *labels == Labels::Score {
        return Ok(logits.f_sum(Kind::Float)?.f_mul_scalar(2f64.sqrt())?);
    }
    let classes = logits.size()[1];
    let logits = logits.f_view([-1, copies as i64, classes])?;
    let probabilities = logits.f_detach()?.f_select(1, 0)?.f_softmax(-1, Kind::Double)?;
    // Of each class and all behind it, down to the smallest number: behind a certain class is nothing.
    let remaining = probabilities.f_flip([1])?.f_cumsum(1, Kind::Double)?.f_flip([1])?.f_clamp_min(1e-300)?;
    let columns = classes - 1;
    let (own, from) = (probabilities.f_narrow(1, 0, columns)?, remaining.f_narrow(1, 0, columns)?);
    let behind = remaining.f_narrow(1, 1, columns)?;
    let ratio = own.f_div(&from)?;
    let diagonal = ratio.f_mul(&behind)?.f_sqrt()?.f_unsqueeze(2)?;
    let below = ratio.f_div(&behind)?.f_sqrt()?.f_unsqueeze(2)?.f_mul(&probabilities.f_unsqueeze(1)?)?;
    let ones = Tensor::f_ones([columns, classes], (Kind::Double, logits.device()))?;
    let factor = diagonal.f_mul(&ones.f_tril(0)?.f_triu(0)?)?.f_sub(&below.f_mul(&ones.f_triu(1)?)?)?;
    Ok(logits.f_mul(&factor.f_to_kind(Kind::Float)?)?.f_sum(Kind::Float)?)
}

/// Adds the squared gradient of the batch's mean loss.
fn add_batch(
    classifier: &mut Classifier,
    batch: &FisherBatch,
    options: &FisherOptions,
    information: &mut Tensor,
) -> Result<()> {
    let weights = classifier.parameters.compute_weights(options.precision.kind())?;
    let hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None)?;
    let pass = Pass::new(&weights, &batch.batch, batch.dropout.clone());
    loss(&classifier.logits(&pass)?, &batch.targets, batch.batch.examples())?.f_backward()?;
    hooks.end_step()?;
    let gradients = classifier.parameters.gradients()?;
    if let Some(limit) = options.clip {
        for (_, parameter) in classifier.parameters.iter() {
            let mut gradient = span(gradients, &parameter.range)?;
            // torch.nn.utils.clip_grad_norm_ on this tensor alone.
            let factor = gradient.f_norm()?.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(limit)?;
            let _ = gradient.f_mul_(&factor.f_clamp_max(1.0)?)?;
        }
    }
    let _ = information.f_addcmul_(gradients, gradients)?;
    Ok(())
}

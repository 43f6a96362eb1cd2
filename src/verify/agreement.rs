//! Logits, losses, gradients, optimizer steps and predictions of a device against those of the CPU.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{Checks, Shape, difference, random_data};
use crate::child::{GradientHooks, GradientMask};
use crate::data::{EncodedDataset, LabelMap, Order, TaskCard};
use crate::error::{Error, Result};
use crate::method::Prepared;
use crate::model::{Classifier, Dropout, Labels, ModelConfig, Pass, Precision, loss, span};
use crate::random::{Key, Purpose};
use crate::train::{Hyperparameters, MicroBatch, Scored, Trainer, Warmup, evaluate, predict};

/// The seed of all weights.
pub(super) const SEED: u64 = 42;
const BATCH: usize = 8;
/// How much larger than the default of BERT the weights are drawn.
const SPREAD: f64 = 0.06;

/// The same model twice, and data for it.
pub(super) struct Pair {
    pub reference: Classifier,
    pub subject: Classifier,
    pub data: EncodedDataset,
}

impl Pair {
    pub fn new(shape: &Shape, labels: Labels, device: Device) -> Result<Self> {
        Self::of(&shape.config(0.0, SPREAD), shape.vocabulary, labels, device)
    }

    pub fn of(config: &ModelConfig, vocabulary: u32, labels: Labels, device: Device) -> Result<Self> {
        // The first eight are all of one length: the way without padding.
        let lengths: Vec<usize> =
            (0..10 * BATCH).map(|i| if i < BATCH { 24 } else { 3 + i * 7 % 41 }).collect();
        Self::with_lengths(config, vocabulary, labels, &lengths, device)
    }

    fn with_lengths(
        config: &ModelConfig,
        vocabulary: u32,
        labels: Labels,
        lengths: &[usize],
        device: Device,
    ) -> Result<Self> {
        let model = |device| -> Result<Classifier> {
            let mut model = Classifier::untrained(config.clone(), labels.clone(), device)?;
            model.reset(SEED)?;
            Ok(model)
        };
        let data = random_data(lengths, vocabulary, vocabulary, &labels);
        Ok(Self { reference: model(Device::Cpu)?, subject: model(device)?, data })
    }
}

/// Three classes, as most of GLUE's inference tasks have.
pub(super) fn classes() -> Labels {
    Labels::Classes(["entailment", "neutral", "contradiction"].map(String::from).to_vec())
}

/// What one pass over a batch gives.
struct Passed {
    logits: Tensor,
    loss: f64,
    gradient: Tensor,
}

/// How a pass runs.
#[derive(Clone, Copy)]
struct Way<'a> {
    precision: Precision,
    /// Whether attention reads packed tokens where it can.
    is_packed: bool,
    mask: Option<&'a Arc<GradientMask>>,
    drops: bool,
}

impl Way<'_> {
    /// The plain one in a precision.
    fn of(precision: Precision) -> Self {
        Self { precision, is_packed: true, mask: None, drops: false }
    }
}

/// Runs examples forward and backward.
fn pass(model: &Classifier, data: &EncodedDataset, numbers: &[usize], way: Way) -> Result<Passed> {
    let device = model.parameters.device();
    let _products = way.precision.matrix_products(device)?;
    let (mut batch, targets) = data.batch(numbers, 0, device)?;
    if !way.is_packed {
        batch = batch.without_flash();
    }
    let weights = model.parameters.compute_weights(way.precision.kind())?;
    let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, way.mask)?;
    let dropout = way.drops.then(|| Dropout::new(SEED, Purpose::Dropout, 0, 0, device)).transpose()?;
    let logits = model.logits(&Pass::new(&weights, &batch, dropout).collecting(hooks.places()))?;
    let mean = loss(&logits, &targets, numbers.len())?;
    mean.f_backward()?;
    hooks.end_step()?;
    Ok(Passed {
        logits: logits.f_detach()?,
        loss: f64::try_from(mean.f_detach()?)?,
        gradient: on_cpu(model.parameters.gradients()?)?,
    })
}

/// Returns the gradient of some examples in float32, masked if there is a mask, on the CPU.
pub(super) fn gradient(
    model: &Classifier,
    data: &EncodedDataset,
    numbers: &[usize],
    mask: Option<&Arc<GradientMask>>,
) -> Result<Tensor> {
    Ok(pass(model, data, numbers, Way { mask, ..Way::of(Precision::Float32) })?.gradient)
}

/// The settings of all trainings here: without clipping, and with an epsilon that keeps gradients which are zero but for
/// rounding, such as those of key biases, from becoming whole steps.
pub(super) fn settings(batch_size: usize) -> Hyperparameters {
    Hyperparameters {
        epochs: 100.0,
        batch_size,
        micro_batch: MicroBatch::Examples(batch_size),
        learning_rate: 1e-3,
        warmup: Warmup(0.0),
        max_gradient_norm: None,
        epsilon: 1e-4,
        order: Order::Sequential,
        ..Hyperparameters::default()
    }
}

/// Trains a number of steps; returns how the weights changed, on the CPU.
pub(super) fn change(
    model: &mut Classifier,
    data: &EncodedDataset,
    steps: usize,
    settings: &Hyperparameters,
    prepared: Prepared,
) -> Result<Tensor> {
    model.reset(SEED)?;
    let before = on_cpu(model.parameters.values())?;
    let mut trainer = Trainer::new(model, data, settings, prepared, SEED)?;
    let numbers: Vec<usize> = (0..data.len()).collect();
    for batch in numbers.chunks(settings.batch_size).cycle().take(steps) {
        let _loss = trainer.step(batch)?;
    }
    drop(trainer);
    let after = on_cpu(model.parameters.values())?;
    model.reset(SEED)?;
    Ok(after.f_sub(&before)?)
}

/// Copies a tensor to the CPU, also if it is there already.
pub(super) fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
    tch::no_grad(|| copy.f_copy_(tensor))?;
    Ok(copy)
}

/// Returns the largest difference of one parameter's gradient, relative to it. Where a gradient is less than a
/// ten-thousandth of the whole, relative to that: gradients that are zero but for rounding have no digits to compare.
fn largest_difference(model: &Classifier, subject: &Tensor, reference: &Tensor) -> Result<f64> {
    let norm = |tensor: &Tensor| -> Result<f64> { Ok(f64::try_from(tensor.f_norm()?)?) };
    let least = 1e-4 * norm(reference)?;
    let mut largest = 0f64;
    for (_, parameter) in model.parameters.iter() {
        let [subject, reference] = [subject, reference].map(|flat| span(flat, &parameter.range));
        let (subject, reference) = (subject?, reference?);
        let relative = norm(&subject.f_sub(&reference)?)? / norm(&reference)?.max(least);
        // `max` would lose a comparison that is no number.
        if relative.is_nan() {
            return Ok(f64::NAN);
        }
        largest = largest.max(relative);
    }
    Ok(largest)
}

/// Makes the checks for one shape.
pub(super) fn check(checks: &mut Checks, shape: &Shape, device: Device) -> Result<()> {
    for (labels, what) in [(classes(), "classes"), (Labels::Score, "score")] {
        let mut pair = Pair::new(shape, labels, device)?;
        let name = |about: &str| format!("{} {what}: {about}", shape.name);
        let batches: [(&str, Vec<usize>); 2] =
            [("equal lengths", (0..BATCH).collect()), ("mixed lengths", (BATCH..3 * BATCH).collect())];
        for (lengths, numbers) in batches {
            check_passes(checks, &mut pair, &numbers, |about| name(&format!("{about}, {lengths}")))?;
        }
        for (steps, allowed) in [(1, 1e-3), (10, 1e-2)] {
            let expected =
                change(&mut pair.reference, &pair.data, steps, &settings(BATCH), Prepared::default())?;
            let plural = if steps == 1 { "" } else { "s" };
            checks.at_most(
                "steps",
                name(&format!("change of all weights in {steps} AdamW step{plural}")),
                allowed,
                || {
                    let found =
                        change(&mut pair.subject, &pair.data, steps, &settings(BATCH), Prepared::default())?;
                    difference(&found, &expected)
                },
            );
        }
        check_ways(checks, &mut pair, &name)?;
        check_predictions(checks, &pair, &name)?;
    }
    check_long_examples(checks, shape, device)?;
    let config = shape.config_with_dropouts([0.3, 0.0], SPREAD);
    let pair = Pair::of(&config, shape.vocabulary, classes(), device)?;
    check_dropout(checks, &pair, |about| format!("{}: {about}", shape.name))?;
    for checkpointed in [false, true] {
        let way = if checkpointed { "checkpointed" } else { "plain" };
        let name =
            format!("{}: slope of the loss with dropout along the gradient of a {way} pass", shape.name);
        checks.at_most("passes", name, 1e-2, || slope_difference(shape, checkpointed, [1, 1], device));
    }
    Ok(())
}

/// Passes over examples so long, and so many tokens, that kernels go over them in several pieces: flash attention's backward
/// over more than 128 keys, that of embeddings over more than 3072 rows.
fn check_long_examples(checks: &mut Checks, shape: &Shape, device: Device) -> Result<()> {
    let lengths: Vec<usize> = (0..14).map(|example| 180 + example * 29 % 150).collect();
    let config = shape.config(0.0, SPREAD);
    let mut pair = Pair::with_lengths(&config, shape.vocabulary, classes(), &lengths, device)?;
    let numbers: Vec<usize> = (0..lengths.len()).collect();
    check_passes(checks, &mut pair, &numbers, |about| format!("{}: {about}, long examples", shape.name))
}

/// Passes of models with dropout of rows, whose patterns are the same on every device, and none of attention.
pub(super) fn check_dropout(checks: &mut Checks, pair: &Pair, name: impl Fn(&str) -> String) -> Result<()> {
    let numbers: Vec<usize> = (0..3 * BATCH).collect();
    let way = |precision| Way { drops: true, ..Way::of(precision) };
    let expected = pass(&pair.reference, &pair.data, &numbers, way(Precision::Float32))?;
    for (word, precision, allowed) in
        [("float32", Precision::Float32, [1e-4, 1e-4]), ("bf16", Precision::Bf16, [5e-2, 1e-1])]
    {
        let found = pass(&pair.subject, &pair.data, &numbers, way(precision));
        let found = || found.as_ref().map_err(|error| Error::Libtorch(error.to_string()));
        let name = |about: &str| name(&format!("{about} in {word}, with dropout of rows"));
        checks
            .at_most("passes", name("logits"), allowed[0], || difference(&found()?.logits, &expected.logits));
        checks.at_most("passes", name("gradient"), allowed[1], || {
            difference(&found()?.gradient, &expected.gradient)
        });
    }
    Ok(())
}

/// Returns how far the slope of the loss along its gradient is from the norm of that gradient, relative to it, with dropout.
/// A backward that dropped other elements than the forward pass would give the gradient of another function. `draws` number the
/// dropout of the gradient's pass and of those that measure the slope.
fn slope_difference(shape: &Shape, checkpointed: bool, draws: [u64; 2], device: Device) -> Result<f64> {
    let mut model = Classifier::untrained(shape.config(0.1, SPREAD), classes(), device)?;
    model.reset(SEED)?;
    let lengths = [24, 5, 31, 44, 12, 9, 40, 17];
    let data = random_data(&lengths, shape.vocabulary, shape.vocabulary, model.labels());
    let numbers: Vec<usize> = (0..data.len()).collect();
    let passed = |model: &Classifier, draw: u64| -> Result<(f64, Tensor)> {
        let (batch, targets) = data.batch(&numbers, 0, device)?;
        let weights = model.parameters.compute_weights(Kind::Float)?;
        let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None)?;
        let dropout = Dropout::of_key(Key::derive(SEED, Purpose::Dropout, draw), 0, device)?;
        let pass = Pass::new(&weights, &batch, Some(dropout)).collecting(hooks.places());
        let pass = if checkpointed { pass.checkpointed() } else { pass };
        let mean = loss(&model.logits(&pass)?, &targets, numbers.len())?;
        pass.backward(&mean)?;
        hooks.end_step()?;
        Ok((f64::try_from(mean.f_detach()?)?, on_cpu(model.parameters.gradients()?)?))
    };
    let start = on_cpu(model.parameters.values())?;
    let gradient = passed(&model, draws[0])?.1;
    let norm = f64::try_from(gradient.f_norm()?)?;
    // The loss changes by a hundredth on either side.
    let length = 0.01 / norm;
    let direction = gradient.f_mul_scalar(length / norm)?;
    let mut loss_at = |sign: f64| -> Result<f64> {
        model.parameters.restore(&start.f_add(&direction.f_mul_scalar(sign)?)?)?;
        Ok(passed(&model, draws[1])?.0)
    };
    let slope = (loss_at(1.0)? - loss_at(-1.0)?) / (2.0 * length);
    Ok((slope - norm).abs() / norm)
}

/// Steps that take less memory against plain steps.
fn check_ways(checks: &mut Checks, pair: &mut Pair, name: &impl Fn(&str) -> String) -> Result<()> {
    const STEPS: usize = 3;
    let plain = settings(BATCH);
    let expected = change(&mut pair.reference, &pair.data, STEPS, &plain, Prepared::default())?;
    for (way, settings) in [
        ("with gradients released", Hyperparameters { release_gradients: true, ..plain.clone() }),
        ("with gradient checkpointing", Hyperparameters { gradient_checkpointing: true, ..plain.clone() }),
        ("in micro-batches of 3", Hyperparameters { micro_batch: MicroBatch::Examples(3), ..plain.clone() }),
        ("in micro-batches that fit", Hyperparameters { micro_batch: MicroBatch::Auto, ..plain.clone() }),
    ] {
        let about = name(&format!("change of all weights in {STEPS} AdamW steps {way}"));
        checks.at_most("steps", about, 1e-2, || {
            difference(
                &change(&mut pair.subject, &pair.data, STEPS, &settings, Prepared::default())?,
                &expected,
            )
        });
    }
    Ok(())
}

/// Passes in every precision against float32 on the CPU, and flash attention against padded attention.
pub(super) fn check_passes(
    checks: &mut Checks,
    pair: &mut Pair,
    numbers: &[usize],
    name: impl Fn(&str) -> String,
) -> Result<()> {
    let Pair { reference, subject, data } = pair;
    let expected = pass(reference, data, numbers, Way::of(Precision::Float32))?;
    // Of the logits, the loss, and the gradient. Where TF32 is exactly float32, it must be.
    let tf32 = if subject.parameters.device().is_cuda() { [5e-3, 5e-3, 2e-2] } else { [0.0; 3] };
    let precisions = [
        ("float32", Precision::Float32, [1e-4, 1e-4, 1e-4]),
        ("tf32", Precision::Tf32, tf32),
        ("bf16", Precision::Bf16, [5e-2, 2e-2, 1e-1]),
    ];
    for (word, precision, allowed) in precisions {
        let found = pass(subject, data, numbers, Way::of(precision));
        let found = || found.as_ref().map_err(|error| Error::Libtorch(error.to_string()));
        checks.at_most("passes", name(&format!("logits in {word}")), allowed[0], || {
            difference(&found()?.logits, &expected.logits)
        });
        checks.at_most("passes", name(&format!("loss in {word}")), allowed[1], || {
            Ok((found()?.loss - expected.loss).abs() / expected.loss.abs())
        });
        checks.at_most("passes", name(&format!("gradient in {word}")), allowed[2], || {
            difference(&found()?.gradient, &expected.gradient)
        });
        if precision == Precision::Float32 {
            checks.at_most("passes", name("the gradient of each parameter in float32"), 1e-3, || {
                largest_difference(reference, &found()?.gradient, &expected.gradient)
            });
        }
    }
    let flash = name("flash attention against padded attention in bf16, gradient");
    if !crate::libtorch::flash_attention_runs(subject.parameters.device()) {
        checks.skip("attention", flash, "flash attention does not run on this device");
        return Ok(());
    }
    checks.at_most("attention", flash, 5e-2, || {
        let way = Way::of(Precision::Bf16);
        let packed = pass(subject, data, numbers, way)?;
        let padded = pass(subject, data, numbers, Way { is_packed: false, ..way })?;
        difference(&packed.gradient, &padded.gradient)
    });
    Ok(())
}

/// Predictions and scores; an example alone against the same example in company.
fn check_predictions(checks: &mut Checks, pair: &Pair, name: &impl Fn(&str) -> String) -> Result<()> {
    let Pair { reference, subject, data } = pair;
    let logits = |model: &Classifier| predict(model, &data.inputs, Precision::Float32, |_| Ok(()));
    let expected = logits(reference)?;
    checks.at_most("predictions", name("logits"), 1e-4, || difference(&logits(subject)?, &expected));
    checks.at_most("predictions", name("one by one against all together"), 1e-4, || {
        let alone = |input| predict(subject, std::slice::from_ref(input), Precision::Float32, |_| Ok(()));
        let rows = data.inputs.iter().map(alone).collect::<Result<Vec<Tensor>>>()?;
        difference(&Tensor::f_cat(&rows, 0)?, &expected)
    });
    let task = if *reference.labels() == Labels::Score { "stsb" } else { "mnli" };
    let Some(card) = TaskCard::builtin(task) else { return Ok(()) };
    let labels = LabelMap::identity(reference.labels().outputs() as usize);
    let scores = |model: &Classifier| {
        evaluate(model, Scored { data, card: &card, labels: &labels }, Precision::Float32, |_| Ok(()))
    };
    let expected = scores(reference)?;
    checks.at_most("predictions", name("loss of the evaluation"), 1e-4, || {
        Ok((scores(subject)?.loss - expected.loss).abs() / expected.loss.abs())
    });
    checks.at_most("predictions", name("headline metric"), 0.02, || {
        Ok((scores(subject)?.headline - expected.headline).abs())
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Check, Outcome};
    use super::*;
    use crate::libtorch::GradientPlace;

    /// What a GPU does in bfloat16, with its kernels on the CPU: dropout draws the same, and all gradients are there, at their
    /// places or by hooks; in two passes, of which the second adds, plain and checkpointed.
    #[test]
    fn operations_with_kernels_in_common_agree_with_single_ones() {
        let config = Shape::TINY.config_with_dropouts([0.3, 0.1], SPREAD);
        let pair = Pair::of(&config, Shape::TINY.vocabulary, classes(), Device::Cpu).unwrap();
        let numbers: Vec<usize> = (0..3 * BATCH).collect();
        let model = &pair.reference;
        let (batch, targets) = pair.data.batch(&numbers, 0, Device::Cpu).unwrap();
        let weights = model.parameters.compute_weights(Kind::BFloat16).unwrap();
        let run = |places: &[Option<GradientPlace>], is_checkpointed: bool| {
            let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None).unwrap();
            let mut last = None;
            for step in 0..2 {
                let dropout = Dropout::new(SEED, Purpose::Dropout, step, 0, Device::Cpu).unwrap();
                let mut pass = Pass::new(&weights, &batch, Some(dropout)).collecting(places);
                if is_checkpointed {
                    pass = pass.checkpointed();
                }
                let logits = model.logits(&pass).unwrap();
                pass.backward(&loss(&logits, &targets, numbers.len()).unwrap()).unwrap();
                last = Some(logits.detach());
            }
            let by_hooks = hooks.collected();
            hooks.end_step().unwrap();
            let gradient = on_cpu(model.parameters.gradients().unwrap()).unwrap();
            for ((_, parameter), place) in model.parameters.iter().zip(places) {
                if let Some(place) = place.as_ref().filter(|place| place.holds()) {
                    let mut part = span(&gradient, &parameter.range).unwrap();
                    assert_eq!(
                        f64::try_from(part.abs().max()).unwrap(),
                        0.0,
                        "{} came twice",
                        parameter.name
                    );
                    part.copy_(place.numbers());
                }
            }
            let placed = places.iter().flatten().filter(|place| place.holds()).count();
            assert_eq!(
                placed + by_hooks.into_iter().filter(|&any| any).count(),
                places.len().max(weights.len())
            );
            (last.unwrap(), gradient, placed)
        };
        let (logits, gradient, _) = run(&[], false);
        for is_checkpointed in [false, true] {
            let places: Vec<Option<GradientPlace>> = (model.parameters.iter())
                .map(|(_, parameter)| {
                    let zeros = Tensor::full([parameter.count() as i64], 9.0, (Kind::Float, Device::Cpu));
                    Some(GradientPlace::new(zeros))
                })
                .collect();
            let (found, found_gradient, placed) = run(&places, is_checkpointed);
            // Of each of two layers six matrices and their biases, and two normalisations; and the tables.
            assert_eq!(placed, 2 * (12 + 4) + 3);
            assert!(difference(&found, &logits).unwrap() < 2e-2);
            assert!(difference(&found_gradient, &gradient).unwrap() < 4e-2);
            assert!(largest_difference(model, &found_gradient, &gradient).unwrap() < 0.2);
        }
    }

    #[test]
    fn a_gradient_of_other_dropout_fails_its_check() {
        for checkpointed in [false, true] {
            let difference =
                |draws| slope_difference(&Shape::TINY, checkpointed, draws, Device::Cpu).unwrap();
            assert!(difference([1, 1]) < 1e-3 && difference([1, 2]) > 0.1);
        }
    }

    #[test]
    fn a_wrong_weight_on_the_device_fails_the_checks() {
        let mut pair = Pair::new(&Shape::TINY, classes(), Device::Cpu).unwrap();
        let id = pair.subject.parameters.find("bert.encoder.layer.1.output.dense.weight").unwrap();
        let wrong = pair.subject.parameters.leaf(id).f_mul_scalar(1.02).unwrap().detach();
        pair.subject.parameters.set(id, &wrong).unwrap();
        let mut failed = 0;
        let mut count = |check: &Check| failed += usize::from(check.outcome == Outcome::Failed);
        let mut checks = Checks::new(&mut count);
        check_passes(&mut checks, &mut pair, &[0, 1, 9, 10], str::to_owned).unwrap();
        check_predictions(&mut checks, &pair, &str::to_owned).unwrap();
        assert!(failed >= 8, "{failed}");
    }
}

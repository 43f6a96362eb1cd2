//! Masks, Fisher information and thresholds of a device against those of the CPU.

use std::sync::Arc;

use tch::{Device, Tensor};

use super::agreement::{Pair, SEED, change, classes, gradient, on_cpu, settings};
use super::{Checks, Shape, difference};
use crate::child::{
    BernoulliMask, ChildNetwork, Cut, Estimator, FisherBatch, FisherOptions, GradientMask, MaskScope,
    Threshold, fisher_information,
};
use crate::data::EncodedDataset;
use crate::error::Result;
use crate::method::{ClipOrder, DecayScope, Prepared};
use crate::model::{Classifier, Parameters, Precision};
use crate::random::{Key, fill_normal};
use crate::train::{Clip, Hyperparameters, MicroBatch, Optimizer, OptimizerRule};

const SHARE: f64 = 0.3;
const EXAMPLES: usize = 16;
const STEPS: usize = 3;

/// Makes the checks for one shape.
pub(super) fn check(checks: &mut Checks, shape: &Shape, device: Device) -> Result<()> {
    let mut pair = Pair::new(shape, classes(), device)?;
    let name = |about: &str| format!("{}: {about}", shape.name);
    check_thresholds(checks, &pair, &name)?;
    check_fixed(checks, &mut pair, &name)?;
    check_bernoulli(checks, &mut pair, &name)?;
    check_updates(checks, &mut pair, &name);
    check_fisher(checks, &mut pair, &name)
}

/// Random scores in the layout of the parameters, on the CPU; none below zero, some of them equal.
fn scores(parameters: &Parameters) -> Tensor {
    let mut scores = vec![0f32; parameters.buffer_len()];
    fill_normal(&mut scores, 1.0, Key([3, 4]), 0);
    scores.iter_mut().for_each(|score| *score = (score.abs() * 1e4).round());
    Tensor::from_slice(&scores)
}

fn cut(threshold: Threshold) -> Cut {
    Cut::highest(SHARE, MaskScope::EncoderLayers, threshold)
}

fn check_thresholds(checks: &mut Checks, pair: &Pair, name: &impl Fn(&str) -> String) -> Result<()> {
    let scores = scores(&pair.reference.parameters);
    let bits = |child: &ChildNetwork| -> Vec<bool> {
        child.tensors().iter().flat_map(|tensor| child.bits(tensor)).collect()
    };
    for (threshold, word) in [(Threshold::Global, "global"), (Threshold::Percentile, "percentile")] {
        let expected = ChildNetwork::from_scores(&pair.reference.parameters, &scores, &cut(threshold))?;
        checks.same("thresholds", name(&format!("{word} threshold, the same child network")), || {
            let parameters = &pair.subject.parameters;
            let scores = scores.f_to_device(parameters.device())?;
            let child = ChildNetwork::from_scores(parameters, &scores, &cut(threshold))?;
            let exact = (SHARE * child.maskable() as f64).round() as usize;
            Ok(bits(&child) == bits(&expected) && (threshold != Threshold::Global || child.kept() == exact))
        });
    }
    Ok(())
}

/// A fixed mask: the same bits as on the CPU, hooks that let exactly its members through, and weights outside the child
/// network that keep every bit in training.
fn check_fixed(checks: &mut Checks, pair: &mut Pair, name: &impl Fn(&str) -> String) -> Result<()> {
    let Pair { reference, subject, data } = pair;
    let scores = scores(&reference.parameters);
    let mask = |model: &Classifier| -> Result<Arc<GradientMask>> {
        let child = ChildNetwork::from_scores(&model.parameters, &scores, &cut(Threshold::Global))?;
        Ok(Arc::new(GradientMask::Fixed(Arc::new(child))))
    };
    let masked = |model: &Classifier, values: &Tensor| -> Result<Tensor> {
        model.parameters.gradients()?.shallow_clone().f_copy_(values)?;
        mask(model)?.apply_to_all(&model.parameters)?;
        let masked = on_cpu(model.parameters.gradients()?)?;
        // Between the parameters, too, where gradients are zero and stay so.
        let _ = model.parameters.gradients()?.shallow_clone().f_zero_()?;
        Ok(masked)
    };
    let members = masked(reference, &scores.f_ones_like()?)?;
    let noise = scores.f_sub_scalar(3e3)?;
    let expected = masked(reference, &noise)?;
    checks.same("masks", name("fixed mask, the same bits"), || Ok(masked(subject, &noise)? == expected));

    let numbers: Vec<usize> = (4..4 + EXAMPLES).collect();
    let whole = gradient(reference, data, &numbers, None)?;
    checks.at_most("masks", name("fixed mask in the backward pass"), 1e-3, || {
        let found = gradient(subject, data, &numbers, Some(&mask(subject)?))?;
        let outside = f64::try_from(found.f_mul(&members.f_neg()?.f_add_scalar(1.0)?)?.f_norm()?)?;
        // One element outside the mask fails the check, however small.
        if outside == 0.0 { difference(&found, &whole.f_mul(&members)?) } else { Ok(f64::INFINITY) }
    });
    checks.same("masks", name("weights outside the child network keep every bit"), || {
        let mask = Some(mask(subject)?);
        let prepared = Prepared { mask, decay: DecayScope::Child, ..Prepared::default() };
        let changed = change(subject, data, 3, &settings(EXAMPLES), prepared)?.f_ne(0.0)?;
        let outside = changed.f_logical_and(&members.f_eq(0.0)?)?;
        let inside = changed.f_logical_and(&members.f_ne(0.0)?)?;
        Ok(!bool::try_from(outside.f_any()?)? && bool::try_from(inside.f_any()?)?)
    });
    checks.at_most(
        "masks",
        name("fixed mask, 3 steps with gradients released against without"),
        1e-4,
        || {
            let mut train = |release_gradients| {
                let settings = Hyperparameters { release_gradients, ..settings(EXAMPLES) };
                let prepared = Prepared { mask: Some(mask(subject)?), ..Prepared::default() };
                change(subject, data, 3, &settings, prepared)
            };
            difference(&train(true)?, &train(false)?)
        },
    );
    Ok(())
}

/// F's masks: the same bits as on the CPU, wherever in a step they meet the gradient.
fn check_bernoulli(checks: &mut Checks, pair: &mut Pair, name: &impl Fn(&str) -> String) -> Result<()> {
    let Pair { reference, subject, data } = pair;
    let mask = |scope| Arc::new(GradientMask::Bernoulli(BernoulliMask::new(scope, SHARE, true, SEED)));
    let noise = scores(&reference.parameters).f_sub_scalar(3e3)?;
    let masked = |model: &Classifier, scope, step| -> Result<Tensor> {
        model.parameters.gradients()?.shallow_clone().f_copy_(&noise)?;
        let mask = mask(scope);
        mask.begin_step(step)?;
        mask.apply_to_all(&model.parameters)?;
        let masked = on_cpu(model.parameters.gradients()?)?;
        let _ = model.parameters.gradients()?.shallow_clone().f_zero_()?;
        Ok(masked)
    };
    for (scope, word) in [(MaskScope::All, "everywhere"), (MaskScope::EncoderLayers, "in the layers")] {
        let expected = masked(reference, scope, 3)?;
        checks.same("masks", name(&format!("F {word}, the same bits")), || {
            Ok(masked(subject, scope, 3)? == expected && masked(subject, scope, 4)? != expected)
        });
        let plain = Hyperparameters { max_gradient_norm: Some(1.0), ..settings(EXAMPLES) };
        for (way, settings, clip) in [
            ("", plain.clone(), ClipOrder::AfterMask),
            (", clipped before the mask", plain.clone(), ClipOrder::BeforeMask),
            (
                ", in micro-batches",
                Hyperparameters { micro_batch: MicroBatch::Examples(EXAMPLES / 2), ..plain.clone() },
                ClipOrder::AfterMask,
            ),
            (
                ", with gradients released",
                Hyperparameters { release_gradients: true, max_gradient_norm: None, ..plain.clone() },
                ClipOrder::AfterMask,
            ),
            (
                ", with SGD",
                Hyperparameters { optimizer: OptimizerRule::Sgd, ..plain.clone() },
                ClipOrder::AfterMask,
            ),
        ] {
            let prepared = || Prepared { mask: Some(mask(scope)), clip, ..Prepared::default() };
            let expected = change(reference, data, STEPS, &settings, prepared())?;
            let about = format!("F {word}{way}, change of all weights in {STEPS} steps");
            checks.at_most("masks", name(&about), 1e-2, || {
                difference(&change(subject, data, STEPS, &settings, prepared())?, &expected)
            });
        }
    }
    Ok(())
}

/// AdamW's steps with equal gradients: without a mask, through F's, and of the members of a fixed one.
fn check_updates(checks: &mut Checks, pair: &mut Pair, name: &impl Fn(&str) -> String) {
    let Pair { reference, subject, .. } = pair;
    for (word, masked) in
        [("", None), (" through F's mask", Some(true)), (" of a child network", Some(false))]
    {
        let about = format!("{STEPS} AdamW steps{word} with equal gradients, every bit");
        checks.same("steps", name(&about), || {
            let mask = |model: &Classifier| -> Result<Option<Arc<GradientMask>>> {
                Ok(match masked {
                    None => None,
                    Some(true) => {
                        let mask = BernoulliMask::new(MaskScope::EncoderLayers, SHARE, true, SEED);
                        Some(Arc::new(GradientMask::Bernoulli(mask)))
                    }
                    Some(false) => {
                        let scores = scores(&model.parameters);
                        let child =
                            ChildNetwork::from_scores(&model.parameters, &scores, &cut(Threshold::Global))?;
                        Some(Arc::new(GradientMask::Fixed(Arc::new(child))))
                    }
                })
            };
            let [expected, found] = [&mut *reference, &mut *subject].map(|model| {
                let mask = mask(model)?;
                updated(model, mask)
            });
            Ok(expected? == found?)
        });
    }
}

/// Takes steps with made-up gradients; returns the parameters, one after the other, on the CPU.
fn updated(model: &mut Classifier, mask: Option<Arc<GradientMask>>) -> Result<Tensor> {
    model.reset(SEED)?;
    let settings = settings(EXAMPLES);
    let trainable = model.parameters.trainable(|_| true);
    let parameters = &model.parameters;
    let mut optimizer = Optimizer::new(parameters, &trainable, &settings, mask.as_ref(), DecayScope::All)?;
    let noise = scores(parameters).f_sub_scalar(3e3)?;
    for step in 0..STEPS as u64 {
        parameters.gradients()?.shallow_clone().f_copy_(&noise.f_mul_scalar(1e-4 * (step as f64 + 1.0))?)?;
        if let Some(mask) = &mask {
            mask.begin_step(step)?;
            if !optimizer.masks() {
                mask.apply_to_all(parameters)?;
            }
        }
        optimizer.begin_step(settings.learning_rate, 1.0);
        optimizer.apply(
            &mut parameters.values_to_change(),
            parameters.gradients()?,
            0,
            &Clip::Factor(0.7),
        )?;
    }
    let values = on_cpu(parameters.values())?;
    let parts = parameters.iter().map(|(id, _)| parameters.part(&values, id));
    let parts = Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
    let _ = parameters.gradients()?.shallow_clone().f_zero_()?;
    model.reset(SEED)?;
    Ok(parts)
}

pub(super) fn check_fisher(
    checks: &mut Checks,
    pair: &mut Pair,
    name: &impl Fn(&str) -> String,
) -> Result<()> {
    let Pair { reference, subject, data } = pair;
    for (estimator, word) in [(Estimator::PerExample, "per example"), (Estimator::Batch, "of batches")] {
        let expected = fisher(reference, data, &FisherOptions::of(estimator))?;
        for (precision, kind, allowed) in
            [(Precision::Float32, "float32", 1e-3), (Precision::Bf16, "bf16", 1e-1)]
        {
            checks.at_most("Fisher", name(&format!("Fisher information {word} in {kind}")), allowed, || {
                let options = FisherOptions { precision, ..FisherOptions::of(estimator) };
                difference(&fisher(subject, data, &options)?, &expected)
            });
        }
        if estimator == Estimator::PerExample {
            checks.at_most("Fisher", name("one pass a batch against one pass an example"), 1e-3, || {
                let mut sum = expected.f_zeros_like()?;
                for number in 0..EXAMPLES {
                    sum = sum.f_add(&gradient(subject, data, &[number], None)?.f_square()?)?;
                }
                difference(&sum.f_div_scalar(EXAMPLES as f64)?, &expected)
            });
        }
    }
    Ok(())
}

/// Computes the Fisher information of all weights over the first examples, eight a batch, on the CPU.
fn fisher(model: &mut Classifier, data: &EncodedDataset, options: &FisherOptions) -> Result<Tensor> {
    let device = model.parameters.device();
    let numbers: Vec<usize> = (0..EXAMPLES).collect();
    let batches = numbers.chunks(8).map(|numbers| FisherBatch::plain(data, numbers, device));
    let information = fisher_information(model, batches, options, MaskScope::All, |_| Ok(()))?;
    on_cpu(&information.values)
}

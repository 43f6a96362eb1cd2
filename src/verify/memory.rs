//! What a device does when memory runs out, and that steps leave none behind.

use tch::{Device, Kind, Tensor};

use super::agreement::{Pair, SEED, change, classes, on_cpu, settings};
use super::random_model::{SHARE, measured_method};
use super::{Checks, Options, Shape, difference, random_data};
use crate::error::{Error, Result};
use crate::experiment::{peak_memory, reset_peak_memory};
use crate::libtorch::{device_memory, release_cached_memory};
use crate::method::Prepared;
use crate::model::{Classifier, Precision};
use crate::train::{Hyperparameters, Trainer};

/// Examples of the step that is to run out of memory, and their tokens.
const LARGE: [usize; 2] = [256, 128];
const STEPS: usize = 2000;

/// Makes the checks; only a GPU can run out of memory of its own.
pub(super) fn check(checks: &mut Checks, options: Options) -> Result<()> {
    let names = ["a step that memory is too small for, in halves against whole", "growth of the peak, bytes"];
    let Device::Cuda(index) = options.device else {
        names.iter().for_each(|name| checks.skip("memory", *name, "the device has no memory of its own"));
        return Ok(());
    };
    checks.at_most("memory", names[0], 1e-3, || halves(index));
    let steps = if options.quick { STEPS / 10 } else { STEPS };
    for replayed in [false, true] {
        let how = if replayed { "replayed " } else { "" };
        checks.at_most("memory", format!("{steps} {how}steps, {}", names[1]), 0.0, || {
            growth(options.device, steps, replayed)
        });
    }
    Ok(())
}

/// Returns the difference between steps with all memory and the same with so little that they must be taken in halves.
fn halves(index: usize) -> Result<f64> {
    let device = Device::Cuda(index);
    let [examples, tokens] = LARGE;
    let mut subject = Pair::new(&Shape::SMALL, classes(), device)?.subject;
    let vocabulary = Shape::SMALL.vocabulary;
    let data = random_data(&vec![tokens; examples], vocabulary, vocabulary, &classes());
    let settings = settings(examples);
    release_cached_memory(device)?;
    reset_peak_memory(device);
    let before = device_memory(index)?.0;
    let whole = change(&mut subject, &data, 1, &settings, Prepared::default())?;
    let needed = peak_memory(device).unwrap_or(0);
    release_cached_memory(device)?;
    // All but half of what a step has taken.
    let hoarded = before.saturating_sub(needed / 2);
    let hoard = Tensor::f_empty([hoarded as i64], (Kind::Uint8, device))?;
    let numbers: Vec<usize> = (0..examples).collect();
    let mut trainer = Trainer::new(&mut subject, &data, &settings, Prepared::default(), SEED)?;
    let _loss = trainer.step(&numbers)?;
    let micro_batch = trainer.micro_batch();
    drop((trainer, hoard));
    release_cached_memory(device)?;
    if micro_batch == examples {
        return Err(Error::Libtorch("memory did not run out".into()));
    }
    let after = on_cpu(subject.parameters.values())?;
    subject.reset(SEED)?;
    difference(&after.f_sub(&on_cpu(subject.parameters.values())?)?, &whole)
}

/// Returns by how many bytes the peak of the second half of many steps over batches of all lengths is above that of the first.
fn growth(device: Device, steps: usize, replayed: bool) -> Result<f64> {
    const BATCH: usize = 8;
    let lengths: Vec<usize> = (0..10 * BATCH).map(|example| 3 + example * 7 % 41).collect();
    let vocabulary = Shape::TINY.vocabulary;
    let data = random_data(&lengths, vocabulary, vocabulary, &classes());
    let mut model = Classifier::untrained(Shape::TINY.config(0.1, 0.02), classes(), device)?;
    model.reset(SEED)?;
    let prepared = measured_method("child_tuning_f", SHARE, &model)?;
    let settings = Hyperparameters {
        epochs: 1e6,
        precision: Precision::Bf16,
        cuda_graphs: replayed,
        max_gradient_norm: Some(1.0),
        ..settings(BATCH)
    };
    let mut trainer = Trainer::new(&mut model, &data, &settings, prepared, SEED)?;
    let numbers: Vec<usize> = (0..data.len()).collect();
    let mut batches = numbers.chunks(BATCH).cycle();
    let mut peaks = Vec::new();
    for _ in 0..2 {
        reset_peak_memory(device);
        for batch in batches.by_ref().take(steps / 2) {
            let _loss = trainer.step(batch)?;
        }
        peaks.push(peak_memory(device).unwrap_or(0) as f64);
    }
    Ok(peaks[1] - peaks[0])
}

//! Steps that are replayed from a record against the same steps as they come.

use tch::{Device, Tensor};

use super::agreement::{SEED, classes, on_cpu, settings};
use super::random_model::{SHARE, measured_method};
use super::{Checks, Shape, random_data};
use crate::error::Result;
use crate::libtorch::flash_attention_runs;
use crate::model::{Classifier, Precision};
use crate::train::{Hyperparameters, Trainer};

const BATCH: usize = 8;
const STEPS: usize = 24;

/// Makes the checks for one shape.
pub(super) fn check(checks: &mut Checks, shape: &Shape, device: Device) -> Result<()> {
    for method in ["vanilla", "child_tuning_f", "child_tuning_d"] {
        let name = format!("{}: {STEPS} steps of {method} replayed, dropout included, every bit", shape.name);
        if !flash_attention_runs(device) {
            checks.skip("CUDA graphs", name, "flash attention does not run on this device");
            continue;
        }
        checks.same("CUDA graphs", name, || {
            Ok(trained(shape, method, 1, device)?.f_equal(&trained(shape, method, usize::MAX, device)?)?)
        });
    }
    Ok(())
}

/// Returns the weights after training with passes that are recorded after `warm_up` passes of their shape.
fn trained(shape: &Shape, method: &str, warm_up: usize, device: Device) -> Result<Tensor> {
    let lengths: Vec<usize> = (0..10 * BATCH).map(|example| 3 + example * 7 % 41).collect();
    let data = random_data(&lengths, shape.vocabulary, &classes());
    let mut model = Classifier::untrained(shape.config(0.1, 0.02), classes(), device)?;
    model.reset(SEED)?;
    let prepared = measured_method(method, SHARE, &model)?;
    let settings = Hyperparameters {
        precision: Precision::Bf16,
        cuda_graphs: true,
        max_gradient_norm: Some(1.0),
        ..settings(BATCH)
    };
    let mut trainer = Trainer::with_warm_up(&mut model, &data, &settings, prepared, SEED, warm_up)?;
    let numbers: Vec<usize> = (0..data.len()).collect();
    for batch in numbers.chunks(BATCH).cycle().take(STEPS) {
        let _loss = trainer.step(batch)?;
    }
    drop(trainer);
    on_cpu(model.parameters.values())
}

//! Steps that are replayed from a record against the same steps as they come.

use tch::{Device, Tensor};

use super::agreement::{SEED, classes, on_cpu, settings};
use super::random_model::{SHARE, measured_method};
use super::{Checks, Shape, difference, random_data};
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
        let replayed = |warm_up| trained(shape, method, 0.1, Some(warm_up), device);
        checks.same("CUDA graphs", name, || {
            let ((replayed, recorded), (eager, none)) = (replayed(1)?, replayed(usize::MAX)?);
            // Without a record there would be nothing to compare.
            Ok(recorded > 0 && none == 0 && replayed.f_equal(&eager)?)
        });
        // The generator does not stand where it stands without graphs, so without dropout.
        let name = format!("{}: {STEPS} steps of {method} replayed, against batches as they are", shape.name);
        checks.at_most("CUDA graphs", name, 5e-2, || {
            let mut model = Classifier::untrained(shape.config(0.0, 0.02), classes(), device)?;
            model.reset(SEED)?;
            let start = on_cpu(model.parameters.values())?;
            let change = |graphs| -> Result<Tensor> {
                Ok(trained(shape, method, 0.0, graphs, device)?.0.f_sub(&start)?)
            };
            difference(&change(Some(1))?, &change(None)?)
        });
    }
    Ok(())
}

/// Returns the weights after training, with passes that are recorded after so many passes of their shape, or without graphs,
/// and the number of shapes that were recorded.
fn trained(
    shape: &Shape,
    method: &str,
    dropout: f64,
    warm_up: Option<usize>,
    device: Device,
) -> Result<(Tensor, usize)> {
    let lengths: Vec<usize> = (0..10 * BATCH).map(|example| 3 + example * 7 % 41).collect();
    let data = random_data(&lengths, shape.vocabulary, &classes());
    let mut model = Classifier::untrained(shape.config(dropout, 0.02), classes(), device)?;
    model.reset(SEED)?;
    let prepared = measured_method(method, SHARE, &model)?;
    let settings = Hyperparameters {
        precision: Precision::Bf16,
        cuda_graphs: warm_up.is_some(),
        max_gradient_norm: Some(1.0),
        ..settings(BATCH)
    };
    let warm_up = warm_up.unwrap_or(usize::MAX);
    let mut trainer = Trainer::with_warm_up(&mut model, &data, &settings, prepared, SEED, warm_up)?;
    let numbers: Vec<usize> = (0..data.len()).collect();
    for batch in numbers.chunks(BATCH).cycle().take(STEPS) {
        let _loss = trainer.step(batch)?;
    }
    let recorded = trainer.recorded_shapes();
    drop(trainer);
    Ok((on_cpu(model.parameters.values())?, recorded))
}

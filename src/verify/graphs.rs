//! Steps that are replayed from a record against the same steps as they come.

use tch::{Device, Tensor};

use super::agreement::{SEED, classes, on_cpu, settings};
use super::random_model::{SHARE, family_config, measured_method};
use super::{Checks, Shape, difference, random_data};
use crate::error::Result;
use crate::libtorch::flash_attention_runs;
use crate::model::{Classifier, ModelConfig, Precision};
use crate::train::{Hyperparameters, Trainer};

const BATCH: usize = 8;
const STEPS: usize = 24;

/// Makes the checks for BERT of one shape, with all methods whose masks differ.
pub(super) fn check(checks: &mut Checks, shape: &Shape, device: Device) -> Result<()> {
    let config = |dropout| shape.config(dropout, 0.02);
    check_replayed(
        checks,
        shape.name,
        &config,
        shape.vocabulary,
        device,
        &["vanilla", "child_tuning_f", "child_tuning_d"],
    )
}

/// Makes the checks for a small model of another family.
pub(super) fn check_family(checks: &mut Checks, family: &str, device: Device) -> Result<()> {
    let vocabulary = Shape::TINY.vocabulary;
    let config = |dropout| family_config(family, vocabulary, [dropout; 2]);
    check_replayed(checks, family, &config, vocabulary, device, &["vanilla"])
}

fn check_replayed(
    checks: &mut Checks,
    model: &str,
    config: &dyn Fn(f64) -> ModelConfig,
    vocabulary: u32,
    device: Device,
    methods: &[&str],
) -> Result<()> {
    let trained =
        |method: &str, dropout, warm_up| trained(&config(dropout), vocabulary, method, warm_up, device);
    for method in methods {
        let name = format!("{model}: {STEPS} steps of {method} replayed, dropout included, every bit");
        if !flash_attention_runs(device) {
            checks.skip("CUDA graphs", name, "flash attention does not run on this device");
            continue;
        }
        if !Classifier::untrained(config(0.0), classes(), device)?.own_shape()?.reads_packed_tokens {
            checks.skip("CUDA graphs", name, "the family has a shape for each batch, so nothing is recorded");
            continue;
        }
        let replayed = |warm_up| trained(method, 0.1, Some(warm_up));
        checks.same("CUDA graphs", name, || {
            let ((replayed, recorded), (eager, none)) = (replayed(1)?, replayed(usize::MAX)?);
            // Without a record there would be nothing to compare.
            Ok(recorded > 0 && none == 0 && replayed.f_equal(&eager)?)
        });
        // The generator does not stand where it stands without graphs, so without dropout.
        let name = format!("{model}: {STEPS} steps of {method} replayed, against batches as they are");
        checks.at_most("CUDA graphs", name, 5e-2, || {
            let mut model = Classifier::untrained(config(0.0), classes(), device)?;
            model.reset(SEED)?;
            let start = on_cpu(model.parameters.values())?;
            let change = |graphs| -> Result<Tensor> { Ok(trained(method, 0.0, graphs)?.0.f_sub(&start)?) };
            difference(&change(Some(1))?, &change(None)?)
        });
    }
    Ok(())
}

/// Returns the weights after training, with passes that are recorded after so many passes of their shape, or without graphs,
/// and the number of shapes that were recorded.
fn trained(
    config: &ModelConfig,
    vocabulary: u32,
    method: &str,
    warm_up: Option<usize>,
    device: Device,
) -> Result<(Tensor, usize)> {
    let lengths: Vec<usize> = (0..10 * BATCH).map(|example| 3 + example * 7 % 41).collect();
    let data = random_data(&lengths, vocabulary, vocabulary, &classes());
    let mut model = Classifier::untrained(config.clone(), classes(), device)?;
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

//! Ten AdamW steps against `torch.optim.AdamW` and the released (legacy transformers) form.

use child_tuning::data::Order;
use child_tuning::method::DecayScope;
use child_tuning::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};
use child_tuning::train::{AdamW, AdamWForm, Clip, Hyperparameters, MicroBatch, Warmup};
use tch::Device;

use crate::fixture::{assert_close, part, tensors};

pub fn hyperparameters() -> Hyperparameters {
    Hyperparameters {
        epochs: 1.0,
        batch_size: 4,
        micro_batch: MicroBatch::Examples(4),
        max_length: 40,
        learning_rate: 1e-3,
        warmup: Warmup(0.0),
        order: Order::Sequential,
        ..Hyperparameters::default()
    }
}

#[test]
fn ten_steps_agree_with_both_references() {
    let reference = tensors("optimizer.safetensors");
    let learning_rates = Vec::<f64>::try_from(&reference["learning_rates"]).unwrap();
    assert_eq!(learning_rates.len(), 10);
    for (form, prefix) in [(AdamWForm::Torch, "torch"), (AdamWForm::HfLegacy, "hf_legacy")] {
        let mut table = ParameterTable::default();
        let names = ["first", "second", "third"];
        for name in names {
            // Weight decay applies to the first two, as in the reference.
            let kind = if name == "third" { ParameterKind::Bias } else { ParameterKind::Weight };
            table.declare(name, &reference[&format!("initial/{name}")].size(), kind, ParameterPlace::Head);
        }
        let mut parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        for name in names {
            let id = parameters.find(name).unwrap();
            parameters.set(id, &reference[&format!("initial/{name}")]).unwrap();
        }
        let settings = Hyperparameters { adamw: form, ..hyperparameters() };
        let trainable = parameters.trainable(|_| true);
        let mut optimizer = AdamW::new(&parameters, &trainable, &settings, None, DecayScope::All).unwrap();
        for (step, &learning_rate) in learning_rates.iter().enumerate() {
            let gradients = parameters.gradients().unwrap();
            for name in names {
                part(&parameters, gradients, name).copy_(&reference[&format!("gradient/{step}/{name}")]);
            }
            optimizer.begin_step(learning_rate, 1.0);
            optimizer.apply(&mut parameters.values_to_change(), gradients, 0, &Clip::Factor(1.0)).unwrap();
            for name in names {
                let found = part(&parameters, parameters.values(), name);
                let expected = &reference[&format!("{prefix}/{step}/{name}")];
                assert_close(&format!("{prefix} step {step} {name}"), &found, expected, 1e-6, false);
            }
        }
    }
}

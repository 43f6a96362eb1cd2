//! What methods cost: weights, memory and passes, known before anything trains.

use super::run::Run;
use crate::error::Result;
use crate::method::WeightsInUse;
use crate::model::{Classifier, Labels, Parameter, ParameterPlace, Precision};
use crate::train::OptimizerRule;

/// What one run's method costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodCost {
    /// Weights that the optimizer may change.
    pub trainable: usize,
    /// Bytes of the optimizer's state.
    pub optimizer_bytes: usize,
    /// Bytes of what the method keeps besides weights, gradients and optimizer state.
    pub method_bytes: usize,
    /// Forward passes over each example of an optimizer step.
    pub passes: usize,
    /// Examples that it passes over before training.
    pub examples_prepared: usize,
    /// Whether it trains once before the training that counts.
    pub fine_tunes_first: bool,
}

/// Tells what the method of a run costs, from the config of its model.
///
/// # Errors
/// Fails if the family does not run here, the config is incomplete, or the method does not fit the model.
pub fn method_cost(run: &Run) -> Result<MethodCost> {
    let (config, labels) = (&run.model.folder.config, Labels::from(&run.task.card.objective));
    let shape = Classifier::shape(config, &labels)?;
    let trains = |parameter: &Parameter| run.method.trains(parameter, shape.layers);
    let table = run.declared()?;
    let declared = table.as_slice();
    let further = run.method.further_weights(declared);
    let count = |chosen: &dyn Fn(&Parameter) -> bool| -> usize {
        let all = declared.iter().chain(further.iter());
        all.filter(|parameter| chosen(parameter)).map(Parameter::count).sum()
    };
    // By its own numbers, or by weights that a method adds to it under its name.
    let changes = |own: &Parameter| {
        let module = own.name.strip_suffix(".weight").unwrap_or(&own.name);
        let is_of_it =
            |added: &&Parameter| added.name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'));
        trains(own) || further.iter().find(is_of_it).is_some_and(&trains)
    };
    let all = count(&trains);
    let trainable = match run.method.fixed_share(declared)? {
        _ if run.is_frozen() => count(&|own| own.place == ParameterPlace::Head),
        Some((share, scope)) => {
            let maskable = |parameter: &Parameter| trains(parameter) && scope.covers(parameter);
            all - ((1.0 - share) * count(&maskable) as f64).round() as usize
        }
        None => all,
    };
    let moments = match run.hyperparameters.optimizer {
        OptimizerRule::Adamw => 2,
        OptimizerRule::Sgd => 0,
    };
    let number = match run.hyperparameters.precision {
        Precision::Bf16 => size_of::<u16>(),
        Precision::Float32 | Precision::Tf32 => size_of::<f32>(),
    };
    Ok(MethodCost {
        trainable,
        optimizer_bytes: moments * size_of::<f32>() * trainable,
        method_bytes: run.method.state_bytes(WeightsInUse { declared, changes: &changes, number }),
        passes: run.method.parts().passes(labels == Labels::Score),
        examples_prepared: run.method.examples_passed(run.training_examples()),
        fine_tunes_first: run.method.fine_tunes_first(),
    })
}

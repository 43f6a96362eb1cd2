//! Stochastic gradient descent over the flat buffers of a model.

use std::sync::Arc;

use tch::Tensor;

use super::hyperparameters::Hyperparameters;
use super::optimizer::Clip;
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::method::DecayScope;
use crate::model::{Trainable, TrainableGroup, Treatment};

/// Plain SGD: w ← (1 − ηλ) w, then w ← w − η g. No momentum, no state.
///
/// Decay stands where `torch.optim.AdamW` has it. Without moments that is the same step as `torch.optim.SGD` takes with
/// its `weight_decay`.
pub struct Sgd {
    weight_decay: f64,
    learning_rate: f64,
    /// Factor on the update, without decay, of weights that have pretrained values.
    pretrained_factor: f64,
    groups: Vec<TrainableGroup>,
    /// The child network that decay is kept to, if it is.
    decayed: Option<Arc<ChildNetwork>>,
}

impl Sgd {
    /// Makes an optimizer for the parameters that train; the others are not touched.
    pub fn new(
        trainable: &Trainable,
        hyperparameters: &Hyperparameters,
        child: Option<&Arc<ChildNetwork>>,
        decay: DecayScope,
    ) -> Self {
        Self {
            weight_decay: hyperparameters.weight_decay,
            learning_rate: 0.0,
            pretrained_factor: 1.0,
            groups: trainable.groups.clone(),
            decayed: child.filter(|_| decay == DecayScope::Child).cloned(),
        }
    }

    /// Starts a step. `pretrained_factor` scales the update, but not the decay, of weights that have pretrained values.
    pub fn begin_step(&mut self, learning_rate: f64, pretrained_factor: f64) {
        (self.learning_rate, self.pretrained_factor) = (learning_rate, pretrained_factor);
    }

    /// Updates weights with their gradients, both the part of the flat buffer that begins at `start`.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn apply(&self, values: &mut Tensor, gradients: &Tensor, start: usize, clip: &Clip) -> Result<()> {
        let end = start + gradients.numel();
        let gradients = match clip {
            Clip::Factor(1.0) => gradients.shallow_clone(),
            Clip::Factor(factor) => gradients.f_mul_scalar(f64::from(*factor))?,
            Clip::OnDevice(factor) => gradients.f_mul(factor)?,
        };
        for group in &self.groups {
            let (first, last) = (group.range.start.max(start), group.range.end.min(end));
            if first >= last {
                continue;
            }
            let part = |flat: &Tensor| flat.f_narrow(0, (first - start) as i64, (last - first) as i64);
            let mut weights = part(values)?;
            let Treatment { rate, decays, pretrained } = group.treatment;
            let learning_rate = self.learning_rate * rate;
            if decays && self.weight_decay != 0.0 {
                let shrink = 1.0 - learning_rate * self.weight_decay;
                match &self.decayed {
                    Some(child) => child.scale_members(&mut weights, first, shrink)?,
                    None => weights.f_mul_scalar_(shrink).map(|_| ())?,
                }
            }
            let length = learning_rate * if pretrained { self.pretrained_factor } else { 1.0 };
            let _ = weights.f_sub_(&part(&gradients)?.f_mul_scalar(length)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::child::{Cut, MaskScope, Threshold, random_scores};
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};

    /// Weights 0, 1, 2, …; the bias does not decay.
    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("weight", &[8], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("bias", &[4], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        let mut parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        for (name, count) in [("weight", 8), ("bias", 4)] {
            let id = parameters.find(name).unwrap();
            parameters.set(id, &Tensor::arange(count, (Kind::Float, Device::Cpu))).unwrap();
        }
        parameters
    }

    fn sgd(parameters: &Parameters, child: Option<ChildNetwork>) -> Sgd {
        let groups = parameters.trainable(|_| true).groups;
        Sgd {
            weight_decay: 0.5,
            learning_rate: 0.1,
            pretrained_factor: 1.0,
            groups,
            decayed: child.map(Arc::new),
        }
    }

    fn values(parameters: &Parameters, name: &str) -> Vec<f32> {
        Vec::try_from(parameters.leaf(parameters.find(name).unwrap()).detach()).unwrap()
    }

    #[test]
    fn a_step_is_decay_and_descent() {
        let parameters = parameters();
        let gradients = 10.0 - parameters.values();
        let mut flat = parameters.values_to_change();
        sgd(&parameters, None).apply(&mut flat, &gradients, 0, &Clip::Factor(0.5)).unwrap();
        let expected = |index: usize, shrink: f64| index as f64 * shrink - 0.05 * (10.0 - index as f64);
        for (name, shrink) in [("weight", 0.95), ("bias", 1.0)] {
            for (index, value) in values(&parameters, name).into_iter().enumerate() {
                assert!((f64::from(value) - expected(index, shrink)).abs() < 1e-6, "{name} {index}: {value}");
            }
        }
    }

    #[test]
    fn decay_can_be_kept_to_a_child_network() {
        let parameters = parameters();
        let before = values(&parameters, "weight");
        let cut = Cut::highest(0.5, MaskScope::All, Threshold::PerTensor);
        let scores = random_scores(parameters.buffer_len(), 1);
        let child = ChildNetwork::from_scores(&parameters, &scores, &cut).unwrap();
        let bits: Vec<bool> = child.bits(&child.tensors()[0]).collect();
        let gradients = parameters.values().zeros_like();
        let mut flat = parameters.values_to_change();
        let sgd = sgd(&parameters, Some(child));
        sgd.apply(&mut flat, &gradients, 0, &Clip::Factor(1.0)).unwrap();
        let after = values(&parameters, "weight");
        for ((before, after), bit) in before.iter().zip(&after).zip(bits) {
            let expected = if bit { before * 0.95 } else { *before };
            assert_eq!(after.to_bits(), expected.to_bits());
        }
    }
}

//! Stochastic gradient descent over the flat buffers of a model.

use tch::{Kind, Tensor};

use super::hyperparameters::Hyperparameters;
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::model::{Parameters, Trainable, TrainableGroup};

/// Plain SGD: w ← (1 − ηλ) w, then w ← w − η g. No momentum, no state.
///
/// Decay stands where `torch.optim.AdamW` has it. Without moments that is the same step as `torch.optim.SGD` takes with
/// its `weight_decay`.
pub struct Sgd {
    weight_decay: f64,
    groups: Vec<TrainableGroup>,
}

impl Sgd {
    /// Makes an optimizer for the parameters that train; the others are not touched.
    pub fn new(trainable: &Trainable, hyperparameters: &Hyperparameters) -> Self {
        Self { weight_decay: hyperparameters.weight_decay, groups: trainable.groups.clone() }
    }

    /// Applies one step with the accumulated gradients. With `decayed`, weight decay touches only the members of that
    /// child network, and all other weights keep every bit (their gradients are zero).
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn step(
        &self,
        parameters: &Parameters,
        learning_rate: f64,
        decayed: Option<&ChildNetwork>,
    ) -> Result<()> {
        let step = Tensor::f_full([], -learning_rate, (Kind::Float, parameters.device()))?;
        // The whole network as child network decays as one, so that p = 1 is vanilla bit for bit.
        let decayed = decayed.filter(|child| !child.is_full());
        for group in &self.groups {
            let part = |flat: &Tensor| flat.f_narrow(0, group.range.start as i64, group.range.len() as i64);
            let mut weights = part(parameters.values())?;
            if group.decays && self.weight_decay != 0.0 {
                let shrink = 1.0 - learning_rate * self.weight_decay;
                match decayed {
                    Some(child) => child.scale_members(&mut weights, group.range.start, shrink)?,
                    None => weights.f_mul_scalar_(shrink).map(|_| ())?,
                }
            }
            let _ = weights.f_addcmul_(&part(parameters.gradients())?, &step)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::child::{Cut, MaskScope, Threshold};
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable};

    /// Weights 0, 1, 2, …; gradients 10, 9, 8, …; the bias does not decay.
    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("weight", &[8], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("bias", &[4], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        for (name, count) in [("weight", 8), ("bias", 4)] {
            let leaf = parameters.leaf(parameters.find(name).unwrap());
            let numbers = Tensor::arange(count, (Kind::Float, Device::Cpu));
            leaf.detach().copy_(&numbers);
            leaf.grad().copy_(&(10.0 - numbers));
        }
        parameters
    }

    fn sgd(parameters: &Parameters) -> Sgd {
        Sgd { weight_decay: 0.5, groups: parameters.trainable(|_| true).groups }
    }

    fn values(parameters: &Parameters, name: &str) -> Vec<f32> {
        Vec::try_from(parameters.leaf(parameters.find(name).unwrap()).detach()).unwrap()
    }

    #[test]
    fn a_step_is_decay_and_descent() {
        let parameters = parameters();
        sgd(&parameters).step(&parameters, 0.1, None).unwrap();
        let expected = |index: usize, shrink: f64| index as f64 * shrink - 0.1 * (10.0 - index as f64);
        for (name, shrink) in [("weight", 0.95), ("bias", 1.0)] {
            for (index, value) in values(&parameters, name).into_iter().enumerate() {
                assert!((f64::from(value) - expected(index, shrink)).abs() < 1e-6, "{name} {index}: {value}");
            }
        }
    }

    #[test]
    fn decay_can_be_kept_to_a_child_network() {
        let parameters = parameters();
        let _ = parameters.gradients().shallow_clone().zero_();
        let before = values(&parameters, "weight");
        let child =
            ChildNetwork::random(&parameters, &Cut::highest(0.5, MaskScope::All, Threshold::PerTensor), 1)
                .unwrap();
        sgd(&parameters).step(&parameters, 0.1, Some(&child)).unwrap();
        let after = values(&parameters, "weight");
        for ((before, after), bit) in before.iter().zip(&after).zip(child.bits(&child.tensors()[0])) {
            let expected = if bit { before * 0.95 } else { *before };
            assert_eq!(after.to_bits(), expected.to_bits());
        }
    }
}

//! AdamW over the flat buffers of a model.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::hyperparameters::{AdamWForm, Hyperparameters};
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::libtorch::{FusedAdamW, FusedGroup};
use crate::model::{Parameters, Trainable, TrainableGroup};

/// AdamW with bias correction (Loshchilov and Hutter, 2019), through libtorch's fused kernel.
///
/// The two forms differ in where epsilon stands and when decay happens:
///
/// - `torch`: w ← (1 − ηλ) w, then w ← w − η m̂ / (√v̂ + ε);
/// - `hf_legacy`: w ← w − η √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε), then w ← (1 − ηλ) w.
///
/// The second update is the first with ε / √(1 − β₂ᵗ) in place of ε, so one kernel serves both.
pub struct AdamW {
    form: AdamWForm,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    groups: Vec<Group>,
    steps: u64,
    step: Tensor,
}

/// The moments of one range of the parameters.
struct Group {
    range: Range<usize>,
    decays: bool,
    first_moments: Tensor,
    second_moments: Tensor,
}

impl AdamW {
    /// Makes an optimizer with zero moments for the parameters that train; the others are not touched.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(
        parameters: &Parameters,
        trainable: &Trainable,
        hyperparameters: &Hyperparameters,
    ) -> Result<Self> {
        let options = (Kind::Float, parameters.device());
        let group = |group: &TrainableGroup| -> Result<Group> {
            let zeros = || Tensor::f_zeros([group.range.len() as i64], options);
            Ok(Group {
                range: group.range.clone(),
                decays: group.decays,
                first_moments: zeros()?,
                second_moments: zeros()?,
            })
        };
        Ok(Self {
            form: hyperparameters.adamw,
            betas: hyperparameters.betas,
            epsilon: hyperparameters.epsilon,
            weight_decay: hyperparameters.weight_decay,
            groups: trainable.groups.iter().map(group).collect::<Result<_>>()?,
            steps: 0,
            step: Tensor::f_zeros([], options)?,
        })
    }

    /// Returns the bytes of the optimizer's state.
    pub fn state_bytes(&self) -> usize {
        self.groups.iter().map(|group| 2 * group.range.len() * size_of::<f32>()).sum()
    }

    /// Applies one step with the accumulated gradients. With `decayed`, weight decay touches only the members of that
    /// child network, and all other weights keep every bit (their gradients and moments are zero).
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        learning_rate: f64,
        decayed: Option<&ChildNetwork>,
    ) -> Result<()> {
        self.steps += 1;
        self.step = self.step.f_fill_(self.steps as f64)?;
        // The whole network as child network decays inside the kernel, so that p = 1 is vanilla bit for bit.
        let decayed = decayed.filter(|child| !child.is_full());
        let in_kernel = self.form == AdamWForm::Torch && decayed.is_none();
        let before = self.form == AdamWForm::Torch;
        let epsilon = match self.form {
            AdamWForm::Torch => self.epsilon,
            AdamWForm::HfLegacy => self.epsilon / (1.0 - self.betas.1.powi(self.steps as i32)).sqrt(),
        };
        for group in &self.groups {
            let decay = if group.decays { self.weight_decay } else { 0.0 };
            let mut weights = slice(parameters.values(), &group.range)?;
            let mut shrink = || match decayed {
                _ if in_kernel || decay == 0.0 => Ok(()),
                Some(child) => {
                    child.scale_members(&mut weights, group.range.start, 1.0 - learning_rate * decay)
                }
                None => Ok(weights.f_mul_scalar_(1.0 - learning_rate * decay).map(|_| ())?),
            };
            if before {
                shrink()?;
            }
            FusedAdamW {
                learning_rate,
                betas: self.betas,
                epsilon,
                weight_decay: if in_kernel { decay } else { 0.0 },
            }
            .apply(&FusedGroup {
                parameters: &slice(parameters.values(), &group.range)?,
                gradients: &slice(parameters.gradients(), &group.range)?,
                first_moments: &group.first_moments,
                second_moments: &group.second_moments,
                step: &self.step,
            })?;
            if !before {
                shrink()?;
            }
        }
        Ok(())
    }
}

fn slice(flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(flat.f_narrow(0, range.start as i64, range.len() as i64)?)
}

//! AdamW over the flat buffers of a model.

use tch::{Kind, Tensor};

use super::hyperparameters::{AdamWForm, Hyperparameters};
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::libtorch::{FusedAdamW, FusedGroup};
use crate::model::Parameters;

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
    first_moments: Tensor,
    second_moments: Tensor,
    steps: u64,
    step: Tensor,
}

impl AdamW {
    /// Makes an optimizer with zero moments for a model's parameters.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(parameters: &Parameters, hyperparameters: &Hyperparameters) -> Result<Self> {
        Ok(Self {
            form: hyperparameters.adamw,
            betas: hyperparameters.betas,
            epsilon: hyperparameters.epsilon,
            weight_decay: hyperparameters.weight_decay,
            first_moments: parameters.values().f_zeros_like()?,
            second_moments: parameters.values().f_zeros_like()?,
            steps: 0,
            step: Tensor::f_zeros([], (Kind::Float, parameters.device()))?,
        })
    }

    /// Returns the bytes of the optimizer's state.
    pub fn state_bytes(&self) -> usize {
        (self.first_moments.numel() + self.second_moments.numel()) * size_of::<f32>()
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
        let decay_range = parameters.decay_range();
        let shrink = 1.0 - learning_rate * self.weight_decay;
        let in_kernel = self.form == AdamWForm::Torch && decayed.is_none();
        let shrink_weights = || -> Result<()> {
            if in_kernel || self.weight_decay == 0.0 {
                return Ok(());
            }
            let mut weights = slice(parameters.values(), &decay_range)?;
            match decayed {
                Some(child) => child.scale_members(&mut weights, shrink),
                None => Ok(weights.f_mul_scalar_(shrink).map(|_| ())?),
            }
        };
        let before = self.form == AdamWForm::Torch;
        if before {
            shrink_weights()?;
        }
        let epsilon = match self.form {
            AdamWForm::Torch => self.epsilon,
            AdamWForm::HfLegacy => self.epsilon / (1.0 - self.betas.1.powi(self.steps as i32)).sqrt(),
        };
        let rest = decay_range.end..parameters.buffer_len();
        for (range, decays) in [(&decay_range, in_kernel), (&rest, false)] {
            FusedAdamW {
                learning_rate,
                betas: self.betas,
                epsilon,
                weight_decay: if decays { self.weight_decay } else { 0.0 },
            }
            .apply(&FusedGroup {
                parameters: &slice(parameters.values(), range)?,
                gradients: &slice(parameters.gradients(), range)?,
                first_moments: &slice(&self.first_moments, range)?,
                second_moments: &slice(&self.second_moments, range)?,
                step: &self.step,
            })?;
        }
        if before { Ok(()) } else { shrink_weights() }
    }
}

fn slice(flat: &Tensor, range: &std::ops::Range<usize>) -> Result<Tensor> {
    Ok(flat.f_narrow(0, range.start as i64, range.len() as i64)?)
}

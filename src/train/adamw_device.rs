//! AdamW on a GPU: libtorch's fused kernel, with moments for what trains only.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::adamw_host::StepConstants;
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::libtorch::{FusedAdamW, FusedGroup};
use crate::model::{TrainableGroup, Treatment, span};

/// The moments of the weights that train, on a device.
pub struct DeviceMoments {
    groups: Vec<Group>,
    /// Whether weights outside a fixed child network decay.
    decays_outside: bool,
    /// Number of the step, as the kernel wants it.
    step: Tensor,
}

struct Group {
    range: Range<usize>,
    treatment: Treatment,
    /// Places of the members in the range, int32; `None` where all are.
    members: Option<Tensor>,
    first_moments: Tensor,
    second_moments: Tensor,
}

impl Group {
    /// Returns what has moments of a group's part of a flat buffer: a copy of its members, or the part itself.
    fn own(&self, part: &Tensor) -> Result<Tensor> {
        Ok(match &self.members {
            Some(members) => part.f_index_select(0, members)?,
            None => part.shallow_clone(),
        })
    }
}

impl DeviceMoments {
    /// Makes zero moments for groups of weights; with a child network only for its members.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(
        groups: &[TrainableGroup],
        child: Option<&ChildNetwork>,
        decays_outside: bool,
        device: Device,
    ) -> Result<Self> {
        let group = |group: &TrainableGroup| -> Result<Group> {
            let range = group.range.clone();
            let members = child.map(|child| child.members_on_device(range.clone(), device)).transpose()?;
            let count = members.as_ref().map_or(range.len(), Tensor::numel) as i64;
            let zeros = || Tensor::f_zeros([count], (Kind::Float, device));
            Ok(Group {
                range,
                treatment: group.treatment,
                members,
                first_moments: zeros()?,
                second_moments: zeros()?,
            })
        };
        Ok(Self {
            groups: groups.iter().map(group).collect::<Result<_>>()?,
            decays_outside,
            step: Tensor::f_zeros([], (Kind::Float, device))?,
        })
    }

    /// Returns whether gradients and weights are read at the places of members.
    pub fn gathers(&self) -> bool {
        self.groups.iter().any(|group| group.members.is_some())
    }

    /// Returns the norm of each group's gradients, of its members where there are others, from the whole flat buffer.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn norms(&self, gradients: &Tensor) -> Result<Vec<Tensor>> {
        let norm = |group: &Group| {
            let own = span(gradients, &group.range)?;
            Ok(group.own(&own)?.f_norm()?)
        };
        self.groups.iter().map(norm).collect()
    }

    /// Returns the bytes of moments and members' places.
    pub fn bytes(&self) -> usize {
        let bytes = |group: &Group| {
            let places = group.members.as_ref().map_or(0, |members| members.numel() * size_of::<i32>());
            2 * group.first_moments.numel() * size_of::<f32>() + places
        };
        self.groups.iter().map(bytes).sum()
    }

    /// Updates whole groups of weights, from the one that begins at `start` of the flat buffer, where `values` and `gradients`
    /// begin, too. Gradients are divided by `divisor` and need not be masked. `constants` are those of a treatment.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn apply(
        &mut self,
        values: &Tensor,
        gradients: &Tensor,
        start: usize,
        divisor: Option<&Tensor>,
        step: u64,
        constants: impl Fn(Treatment) -> StepConstants,
    ) -> Result<()> {
        self.step = self.step.f_fill_(step as f64)?;
        let end = start + gradients.numel();
        for group in self.groups.iter().filter(|group| group.range.start >= start && group.range.end <= end) {
            let constants = constants(group.treatment);
            let part = |flat: &Tensor| {
                flat.f_narrow(0, (group.range.start - start) as i64, group.range.len() as i64)
            };
            let (mut values, gradients) = (part(values)?, part(gradients)?);
            let Some(members) = &group.members else {
                // The kernel decays before the update by itself, and spares a pass over the weights; it decays by the rate.
                let decay = if constants.learning_rate > 0.0 { 1.0 - constants.decay_before } else { 0.0 };
                self.update(&values, &gradients, group, divisor, &constants, decay)?;
                scale(&mut values, constants.decay_after)?;
                continue;
            };
            // What decays: all of the group, or the members alone.
            let of_all = |factor| if self.decays_outside { factor } else { 1.0 };
            let of_members = |factor| if self.decays_outside { 1.0 } else { factor };
            scale(&mut values, of_all(constants.decay_before))?;
            let mut own = group.own(&values)?;
            scale(&mut own, of_members(constants.decay_before))?;
            self.update(&own, &group.own(&gradients)?, group, divisor, &constants, 0.0)?;
            scale(&mut own, of_members(constants.decay_after))?;
            let _ = values.f_index_copy_(0, &members.f_to_kind(Kind::Int64)?, &own)?;
            scale(&mut values, of_all(constants.decay_after))?;
        }
        Ok(())
    }

    fn update(
        &self,
        values: &Tensor,
        gradients: &Tensor,
        group: &Group,
        divisor: Option<&Tensor>,
        constants: &StepConstants,
        decay: f64,
    ) -> Result<()> {
        FusedAdamW {
            learning_rate: constants.learning_rate,
            weight_decay: if decay > 0.0 { decay / constants.learning_rate } else { 0.0 },
            betas: constants.betas,
            epsilon: constants.epsilon,
        }
        .apply(&FusedGroup {
            parameters: values,
            gradients,
            first_moments: &group.first_moments,
            second_moments: &group.second_moments,
            step: &self.step,
            gradient_divisor: divisor,
        })
    }
}

fn scale(values: &mut Tensor, factor: f64) -> Result<()> {
    if factor != 1.0 {
        let _ = values.f_mul_scalar_(factor)?;
    }
    Ok(())
}

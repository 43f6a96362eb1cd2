//! DPS (Zhang et al., 2022): stages in which all weights train and the squares of their gradients are added up take turns with
//! stages in which only the weights with the highest sums train.
//!
//! In the form `mix`, passes use other values of some weights. In stages of the first kind a random part has the values that
//! training started from, as in Mixout; in those of the second kind all weights that do not train have the values from the
//! beginning of the stage.

use std::cell::RefCell;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::mixed_weights::{Factors, MixingMask, Sharing, StartOfMatrices, mixed};
use super::registry::MethodOptions;
use super::{
    ClipOrder, DecayScope, MaskKind, Method, Parts, Preparation, Prepared, Preset, TrainingPoint,
    WeightTransform, WeightsInUse, weights_of,
};
use crate::child::{AdaptiveMask, GradientMask, MaskScope, Uses};
use crate::error::{Error, Result};
use crate::model::Parameters;
use crate::values::{OneOrMany, Share, axis, yaml_name};

/// The weights among which are chosen; all others train always.
const SCOPE: MaskScope = MaskScope::AllLinear;

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    form: Option<Form>,
    p: Option<OneOrMany<Share>>,
    update_ratio: Option<OneOrMany<Share>>,
    dropout: Option<bool>,
}

/// The weights that passes use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Form {
    /// Those that train.
    #[default]
    Dense,
    /// Those that train, mixed with earlier ones.
    Mix,
}

/// DPS.
#[derive(Clone, Copy)]
struct Dps {
    form: Form,
    p: f64,
    /// The steps of a stage as a share of those of the run.
    update_ratio: f64,
    dropout: bool,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let (form, dropout) = (self.form.unwrap_or_default(), self.dropout.unwrap_or(false));
        let shares = axis(&self.p, Share(0.7));
        let ratios = axis(&self.update_ratio, Share(0.05));
        let method = |p: &Share, ratio: &Share| Dps { form, p: p.0, update_ratio: ratio.0, dropout };
        let grid = shares.iter().flat_map(|p| ratios.iter().map(move |ratio| method(p, ratio)));
        Ok(grid.map(|method| Arc::new(method) as Arc<dyn Method>).collect())
    }
}

impl Dps {
    /// Returns the share of inputs whose weights are not used by a pass of a first stage.
    fn unused(&self) -> f64 {
        1.0 - self.p
    }

    /// Returns whether passes use other weights than those that train.
    fn mixes(&self) -> bool {
        self.form == Form::Mix && self.p < 1.0
    }

    /// Returns how often the steps of a stage use the elements of a matrix.
    fn uses(&self, parameters: &Parameters, seed: u64) -> Uses {
        let (q, device) = (self.unused(), parameters.device());
        let matrices = parameters.iter().filter(|(_, parameter)| SCOPE.covers(parameter));
        let matrices: Vec<_> = matrices.map(|(id, parameter)| (id, parameter.clone())).collect();
        Box::new(move |index, mut steps| {
            let (id, parameter) = &matrices[index];
            let none = Tensor::f_zeros([1], (Kind::Float, device))?;
            steps.try_fold(none, |uses, step| {
                let used = Factors::new(q, Sharing::Inputs, parameter, *id, seed, step).draw(1.0, device)?;
                Ok(uses.f_add(&used)?)
            })
        })
    }
}

impl Method for Dps {
    fn name(&self) -> &str {
        "dps"
    }

    fn options(&self) -> String {
        let Self { form, p, update_ratio, dropout } = self;
        format!("form={} p={p} update_ratio={update_ratio} dropout={dropout}", yaml_name(form))
    }

    fn mask(&self) -> Option<MaskKind> {
        Some(MaskKind::Adaptive)
    }

    fn conflict(&self, other: &dyn Method) -> Option<&'static str> {
        match other.name() {
            "mixout" if self.mixes() => Some("both mix the weights that passes use; take `form: dense`"),
            _ if other.adds_weights() => {
                Some("it chooses among the model's own matrices, and the other trains weights that it adds")
            }
            _ => None,
        }
    }

    fn parts(&self) -> Parts {
        let mixing =
            || Box::new(Mixing { q: self.unused(), ..Mixing::default() }) as Box<dyn WeightTransform>;
        let weights = if self.mixes() { vec![mixing()] } else { Vec::new() };
        Parts { weights, dropout: self.dropout, ..Parts::default() }
    }

    fn state_bytes(&self, WeightsInUse { declared, changes, number }: WeightsInUse) -> usize {
        let (all, matrices) = (weights_of(declared, |_| true), weights_of(declared, |own| SCOPE.covers(own)));
        let changing = weights_of(declared, |own| SCOPE.covers(own) && changes(own));
        // A sum a matrix weight and a bit a weight; a mixed weight, its gradient, and on which side of the cut it is; and the
        // values to mix with.
        let mixed = if self.mixes() { changing * (2 * number + 1) + all * 4 } else { 0 };
        matrices * 4 + all.div_ceil(8) + mixed
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        // Cut off, as in the released code; short runs have stages of one step.
        let stage = ((preparation.steps as f64 * self.update_ratio) as u64).max(1);
        let parameters = &preparation.classifier.parameters;
        let uses = self.mixes().then(|| self.uses(parameters, preparation.seed));
        let mask = AdaptiveMask::new(parameters, SCOPE, self.p, stage, uses)?;
        Ok(Prepared {
            mask: Some(Arc::new(GradientMask::Adaptive(mask))),
            clip: ClipOrder::AfterMask,
            // No weight is outside the child network for longer than a stage.
            decay: DecayScope::All,
            ..Prepared::default()
        })
    }
}

/// The weights of the passes in one run in the form `mix`.
#[derive(Default)]
struct Mixing {
    q: f64,
    start: StartOfMatrices,
    /// All values when a child network was chosen, and in which step.
    chosen: RefCell<Option<(u64, Tensor)>>,
}

impl WeightTransform for Mixing {
    fn apply(&self, weights: &mut [Tensor], at: &TrainingPoint) -> Result<()> {
        self.start.keep(at)?;
        let mask = match at.mask {
            Some(GradientMask::Adaptive(mask)) => mask,
            _ => return Err(Error::configuration("dps: `form: mix` needs the mask of dps")),
        };
        let target = mask.chosen_in().map(|step| self.values_of(step, at.parameters)).transpose()?;
        for (id, parameter) in at.parameters.iter().filter(|(_, own)| SCOPE.covers(own)) {
            let weight = &mut weights[id.index()];
            if !weight.requires_grad() {
                continue;
            }
            let factor = 1.0 / (1.0 - self.q);
            let members = mask.members(parameter, weight.device())?;
            *weight = match (&target, members) {
                (Some(target), Some(members)) => {
                    let members = MixingMask::Members(members.f_view_as(weight)?);
                    mixed(weight, &at.parameters.part(target, id)?, factor, 1.0, members)?
                }
                _ => {
                    let factors = Factors::new(self.q, Sharing::Inputs, parameter, id, at.seed, at.step);
                    mixed(weight, &self.start.of(id, at)?, factor, 1.0, MixingMask::Drawn(factors))?
                }
            };
        }
        Ok(())
    }
}

impl Mixing {
    /// Returns the values that all parameters had in the first pass of a step's stage.
    fn values_of(&self, step: u64, parameters: &Parameters) -> Result<Tensor> {
        let mut chosen = self.chosen.borrow_mut();
        match &*chosen {
            Some((of, values)) if *of == step => Ok(values.shallow_clone()),
            _ => {
                let values = parameters.values_copy()?;
                *chosen = Some((step, values.shallow_clone()));
                Ok(values)
            }
        }
    }
}

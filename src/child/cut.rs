//! How a fixed child network is cut out of a model: which weights, how many, compared with which others.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::network::{ChildNetwork, MaskScope};
use super::select::{Extreme, HostScores, Scores, Selection, percentile};
use super::select_device::DeviceScores;
use crate::error::{Error, Result};
use crate::libtorch::elements;
use crate::model::{Parameter, Parameters};
use crate::random::{self, GROUP, Key, Purpose};

/// How a child network is cut out of the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Threshold {
    /// The highest round(p · N) scores of all tensors together; ties go to the earlier element.
    Global,
    /// The highest round(p · n) scores of each tensor.
    PerTensor,
    /// Scores at or above numpy's linear (1 − p)-percentile of all tensors together, ties included: the released rule.
    Percentile,
    /// As global, but round(p · N) counts the whole model, in which what the mask does not reach trains first: the rule of
    /// FISH Mask.
    Budget,
}

/// A child network still to be cut out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// Share of the weights in the scope that it keeps; with [`Threshold::Budget`], of the whole model.
    pub p: f64,
    /// The part of the model that it is cut out of.
    pub scope: MaskScope,
    /// Which weights compete for the share.
    pub threshold: Threshold,
    /// Which of them win.
    pub choose: Extreme,
}

impl Cut {
    /// Makes the cut that keeps the highest scores.
    pub fn highest(p: f64, scope: MaskScope, threshold: Threshold) -> Self {
        Self { p, scope, threshold, choose: Extreme::Highest }
    }

    /// Returns how many weights in the scope it keeps, in a model that declares the given parameters. (With a percentile, ties
    /// may keep more.)
    ///
    /// # Errors
    /// Fails, naming `p`, if it keeps none.
    pub fn count(&self, declared: &[Parameter]) -> Result<usize> {
        let counts = |covered: bool| {
            let parameters = declared.iter().filter(move |own| self.scope.covers(own) == covered);
            parameters.map(Parameter::count)
        };
        let (maskable, outside) = (counts(true).sum::<usize>(), counts(false).sum::<usize>());
        let kept = match self.threshold {
            Threshold::Global | Threshold::Percentile => share(self.p, maskable),
            Threshold::PerTensor => counts(true).map(|count| share(self.p, count)).sum(),
            Threshold::Budget => share(self.p, maskable + outside).saturating_sub(outside),
        };
        if kept > 0 {
            return Ok(kept);
        }
        Err(Error::configuration(match self.threshold {
            Threshold::Budget => format!(
                "`p: {}` of the model are {} weights, and the {outside} that `mask.scope` does not reach use them up; raise \
                 `p`",
                self.p,
                share(self.p, maskable + outside)
            ),
            _ => format!("`p: {}` of the {maskable} weights in `mask.scope` is none; raise `p`", self.p),
        }))
    }
}

fn share(p: f64, total: usize) -> usize {
    (p * total as f64).round() as usize
}

impl ChildNetwork {
    /// Cuts a child network out by scores, which have the layout of the flat parameter buffer.
    ///
    /// # Errors
    /// Fails if a score is not a number, the scope is empty, a budget leaves nothing to it, or a percentile is asked for the
    /// lowest scores.
    pub fn from_scores(parameters: &Parameters, scores: &Tensor, cut: &Cut) -> Result<Self> {
        let mut child = Self::full(parameters, cut.scope)?;
        let count = cut.count(parameters.declared())?;
        if scores.device() == Device::Cpu {
            let scores: &[f32] = elements(scores)?;
            let tensors = child.tensors().iter();
            let slices = tensors.map(|tensor| &scores[tensor.start..tensor.start + tensor.count]);
            child.cut(&HostScores(slices.collect()), cut, count)?;
        } else {
            let tensors = child.tensors().iter();
            let parts = tensors
                .map(|tensor| Ok(scores.f_narrow(0, tensor.start as i64, tensor.count as i64)?))
                .collect::<Result<_>>()?;
            child.cut(&DeviceScores::new(parts), cut, count)?;
        }
        Ok(child)
    }

    /// Sets the bits by the scores of each tensor; `count` of them, where all tensors have one threshold.
    fn cut(&mut self, scores: &dyn Scores, cut: &Cut, count: usize) -> Result<()> {
        let extreme = cut.choose;
        let counts = scores.counts();
        // One rule for all tensors together, or one anew for each.
        let mut common = match cut.threshold {
            Threshold::Global | Threshold::Budget => {
                Some(Selection::extreme(scores, 0..counts.len(), count, extreme)?)
            }
            Threshold::PerTensor => None,
            Threshold::Percentile if extreme == Extreme::Lowest => {
                return Err(Error::configuration("the percentile is a rule for the highest scores only"));
            }
            Threshold::Percentile => Some(Selection::at_least(percentile(scores, 1.0 - cut.p)?)),
        };
        for (index, &total) in counts.iter().enumerate() {
            self.set_words(index, |words| match &mut common {
                Some(selection) => scores.mark(index, selection, words),
                None => {
                    let own = share(cut.p, total);
                    let mut own = Selection::extreme(scores, index..index + 1, own, extreme)?;
                    scores.mark(index, &mut own, words)
                }
            })?;
        }
        Ok(())
    }

    /// Cuts the network anew by scores of each tensor, `[count]` in float32: the highest ⌈p · n⌉ of its n scores stay, and all
    /// that are equal to the last of them.
    ///
    /// # Errors
    /// Fails if a score is not a number.
    pub(super) fn cut_with_ties(&mut self, scores: &[Tensor], p: f64) -> Result<()> {
        let on_host = scores.iter().all(|scores| scores.device() == Device::Cpu);
        let scores: Box<dyn Scores> = match on_host {
            true => Box::new(HostScores(scores.iter().map(elements).collect::<Result<_>>()?)),
            false => Box::new(DeviceScores::new(scores.iter().map(Tensor::shallow_clone).collect())),
        };
        for (index, count) in scores.counts().into_iter().enumerate() {
            let share = (p * count as f64).ceil() as usize;
            let exact = Selection::extreme(scores.as_ref(), index..index + 1, share, Extreme::Highest)?;
            let mut selection = Selection { ties: usize::MAX, ..exact };
            self.set_words(index, |words| scores.mark(index, &mut selection, words))?;
        }
        Ok(())
    }
}

/// Draws scores from a seed, for each of so many weights: the same ones on every machine.
pub fn random_scores(weights: usize, seed: u64) -> Tensor {
    let key = Key::derive(seed, Purpose::RandomChild, 0);
    let mut scores = vec![0f32; weights];
    scores.par_chunks_mut(GROUP).enumerate().for_each(|(group, scores)| {
        for (score, number) in scores.iter_mut().zip(random::group(key, group as u32, [0; 3])) {
            // As many bits as float32 holds exactly; of the few equal ones the earlier counts as higher.
            *score = (number >> 8) as f32;
        }
    });
    Tensor::from_slice(&scores)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable};

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("first", &[10, 13], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("second", &[70], ParameterKind::Weight, ParameterPlace::Pooler);
        table.declare("head", &[5], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    fn child(threshold: Threshold, scores: &Tensor, p: f64) -> ChildNetwork {
        let cut = Cut::highest(p, MaskScope::Backbone, threshold);
        ChildNetwork::from_scores(&parameters(), scores, &cut).unwrap()
    }

    #[test]
    fn the_exact_share_is_kept_whatever_the_ties() {
        let scores = Tensor::zeros([parameters().buffer_len() as i64], (Kind::Float, Device::Cpu));
        // round(0.3 · 200), all of them equal: the first ones.
        let global = child(Threshold::Global, &scores, 0.3);
        assert_eq!((global.kept(), global.maskable()), (60, 200));
        assert!(global.bits(&global.tensors()[0]).enumerate().all(|(index, bit)| bit == (index < 60)));
        let per_tensor = child(Threshold::PerTensor, &scores, 0.3);
        assert_eq!(per_tensor.tensors().iter().map(|tensor| tensor.kept).collect::<Vec<_>>(), [39, 21]);
        // The released rule keeps all ties, and here all is a tie.
        assert!(child(Threshold::Percentile, &scores, 0.3).is_full());
    }

    /// Of 205 weights, 5 in the head.
    #[test]
    fn a_budget_counts_what_the_mask_does_not_reach() {
        let parameters = parameters();
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        for (p, kept) in [(0.03, 1), (0.5, 98), (1.0, 200)] {
            let cut = Cut::highest(p, MaskScope::Backbone, Threshold::Budget);
            assert_eq!(cut.count(parameters.declared()).unwrap(), kept, "{p}");
            let child = ChildNetwork::from_scores(&parameters, &scores, &cut).unwrap();
            assert_eq!(child.kept(), kept, "{p}");
            let global = Cut::highest(kept as f64 / 200.0, MaskScope::Backbone, Threshold::Global);
            let global = ChildNetwork::from_scores(&parameters, &scores, &global).unwrap();
            assert_eq!(child.sha256(), global.sha256(), "{p}");
        }
        let cut = Cut::highest(0.02, MaskScope::Backbone, Threshold::Budget);
        let message = cut.count(parameters.declared()).unwrap_err().to_string();
        assert!(message.contains("`p: 0.02` of the model are 4 weights, and the 5 that"), "{message}");
        assert!(ChildNetwork::from_scores(&parameters, &scores, &cut).is_err());
    }

    #[test]
    fn the_lowest_and_the_highest_half_are_the_whole() {
        let parameters = parameters();
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        let lowest = |threshold, scores: &Tensor, p| {
            let cut = Cut { choose: Extreme::Lowest, ..Cut::highest(p, MaskScope::Backbone, threshold) };
            ChildNetwork::from_scores(&parameters, scores, &cut)
        };
        for threshold in [Threshold::Global, Threshold::PerTensor] {
            let (highest, lowest) =
                (child(threshold, &scores, 0.5), lowest(threshold, &scores, 0.5).unwrap());
            assert_eq!((lowest.kept(), highest.kept()), (100, 100));
            for (low, high) in lowest.tensors().iter().zip(highest.tensors()) {
                assert!(lowest.bits(low).zip(highest.bits(high)).all(|(low, high)| low != high));
            }
        }
        let tied = lowest(Threshold::Global, &scores.zeros_like(), 0.3).unwrap();
        assert_eq!(tied.kept(), 60);
        assert!(tied.bits(&tied.tensors()[0]).enumerate().all(|(index, bit)| bit == (index < 60)));
        assert!(matches!(lowest(Threshold::Percentile, &scores, 0.3), Err(Error::Configuration(_))));
    }

    #[test]
    fn a_random_child_has_the_exact_share_everywhere_and_a_seed() {
        let mut table = ParameterTable::default();
        table.declare("weight", &[40_000], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        let cut = Cut::highest(0.3, MaskScope::Backbone, Threshold::Global);
        let random = |seed| {
            let scores = random_scores(parameters.buffer_len(), seed);
            ChildNetwork::from_scores(&parameters, &scores, &cut).unwrap()
        };
        let (first, second) = (random(1), random(2));
        assert_eq!((first.kept(), second.kept()), (12_000, 12_000));
        assert_eq!(first.sha256(), random(1).sha256());
        let bits = |child: &ChildNetwork| child.bits(&child.tensors()[0]).collect::<Vec<_>>();
        let (first, second) = (bits(&first), bits(&second));
        let within = |part: &[bool]| part.iter().filter(|bit| **bit).count() as f64;
        let both = first.iter().zip(&second).filter(|(first, second)| **first && **second).count() as f64;
        // Five standard deviations: a quarter of the places, and the places that two seeds share.
        for (found, places, share) in [(within(&first[..10_000]), 1e4, 0.3f64), (both, 4e4, 0.09)] {
            let deviation = (places * share * (1.0 - share)).sqrt();
            assert!((found - places * share).abs() < 5.0 * deviation, "{found} of {places}");
        }
    }

    #[test]
    fn scores_that_are_not_numbers_are_refused() {
        let scores = Tensor::full([parameters().buffer_len() as i64], f64::NAN, (Kind::Float, Device::Cpu));
        let cut = Cut::highest(0.3, MaskScope::All, Threshold::Global);
        let refused = ChildNetwork::from_scores(&parameters(), &scores, &cut);
        assert!(matches!(refused, Err(Error::Diverged(_))));
    }
}

//! Fixed child networks: one bit a weight.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use multiversion::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Tensor};

use super::select::{End, Selection, extreme, percentile};
use crate::error::{Error, Result};
use crate::libtorch::{elements, elements_mut};
use crate::model::{Parameter, ParameterKind, ParameterPlace, Parameters};
use crate::random::{self, GROUP, Key, Purpose};
use crate::values::hexadecimal;

const WORD: usize = 64;
/// Words that one thread works on at a time.
const CHUNK: usize = 256;

/// The part of a model that a mask may reach; the rest always trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskScope {
    /// The Transformer layers: names with `layer` in them, as in the released code's D.
    EncoderLayers,
    /// Everything that pretraining brings: embeddings, layers and pooler.
    Backbone,
    /// Every parameter, the new head included, as in the released code's F.
    All,
    /// The matrices of the backbone's linear layers.
    Linear,
}

impl MaskScope {
    /// All scopes; where two reach the same parameters of a model, the first is its name.
    pub const ALL: [MaskScope; 4] =
        [MaskScope::EncoderLayers, MaskScope::Backbone, MaskScope::All, MaskScope::Linear];

    /// Returns whether the mask reaches a parameter.
    pub fn covers(self, parameter: &Parameter) -> bool {
        let backbone = parameter.place != ParameterPlace::Head;
        match self {
            MaskScope::EncoderLayers => matches!(parameter.place, ParameterPlace::EncoderLayer(_)),
            MaskScope::Backbone => backbone,
            MaskScope::All => true,
            MaskScope::Linear => backbone && parameter.kind == ParameterKind::Weight,
        }
    }
}

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
}

/// Which weights of the scope make a fixed child network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// Those with the highest scores, as in the paper.
    #[default]
    Highest,
    /// Those with the lowest scores.
    Lowest,
    /// A draw from the run's seed, whatever the scores.
    Random,
}

/// The share of one tensor that is in the child network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMask {
    /// The parameter's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// The encoder layer it belongs to, if any.
    pub layer: Option<usize>,
    /// Its elements in the flat buffer.
    pub start: usize,
    /// Number of elements.
    pub count: usize,
    /// Number of elements in the child network.
    pub kept: usize,
}

/// A fixed child network C: the weights that train. Weights that the mask does not reach all belong to it.
#[derive(Debug)]
pub struct ChildNetwork {
    words: Vec<u64>,
    tensors: Vec<TensorMask>,
    scope: MaskScope,
    /// On CUDA: the bits of a range as booleans on the device, made when they are first needed.
    on_device: Mutex<HashMap<Range<usize>, Tensor>>,
}

impl ChildNetwork {
    /// Keeps the share `p` of the weights in `scope` with the highest scores (`scores` has the layout of the flat
    /// parameter buffer).
    ///
    /// # Errors
    /// Fails if a score is not a number or the scope is empty.
    pub fn from_scores(
        parameters: &Parameters,
        scores: &Tensor,
        p: f64,
        scope: MaskScope,
        threshold: Threshold,
    ) -> Result<Self> {
        Self::from_end(parameters, scores, p, scope, threshold, End::Largest)
    }

    /// Keeps the share `p` of the weights in `scope` with the lowest scores.
    ///
    /// # Errors
    /// Fails if a score is not a number, the scope is empty, or the threshold is a percentile.
    pub fn from_lowest_scores(
        parameters: &Parameters,
        scores: &Tensor,
        p: f64,
        scope: MaskScope,
        threshold: Threshold,
    ) -> Result<Self> {
        Self::from_end(parameters, scores, p, scope, threshold, End::Smallest)
    }

    /// Keeps a share `p` of the weights in `scope` that is drawn from the seed.
    ///
    /// # Errors
    /// Fails if the scope is empty.
    pub fn random(
        parameters: &Parameters,
        p: f64,
        scope: MaskScope,
        threshold: Threshold,
        seed: u64,
    ) -> Result<Self> {
        let key = Key::derive(seed, Purpose::RandomChild, 0);
        let mut scores = vec![0f32; parameters.buffer_len()];
        scores.par_chunks_mut(GROUP).enumerate().for_each(|(group, scores)| {
            for (score, number) in scores.iter_mut().zip(random::group(key, group as u32, [0; 3])) {
                // As many bits as float32 holds exactly; of the few equal ones the earlier counts as higher.
                *score = (number >> 8) as f32;
            }
        });
        Self::from_scores(parameters, &Tensor::from_slice(&scores), p, scope, threshold)
    }

    fn from_end(
        parameters: &Parameters,
        scores: &Tensor,
        p: f64,
        scope: MaskScope,
        threshold: Threshold,
        end: End,
    ) -> Result<Self> {
        let scores = scores.f_to_device(Device::Cpu)?;
        let scores: &[f32] = elements(&scores)?;
        let mut child = Self::full(parameters, scope)?;
        let ranges: Vec<_> =
            child.tensors.iter().map(|tensor| tensor.start..tensor.start + tensor.count).collect();
        if ranges
            .par_iter()
            .any(|range| scores[range.clone()].iter().any(|score| score.is_nan() || *score < 0.0))
        {
            return Err(Error::Diverged("the Fisher information has entries that are not numbers".into()));
        }
        let slices: Vec<&[f32]> = ranges.iter().map(|range| &scores[range.clone()]).collect();
        let count = |slices: &[&[f32]]| slices.iter().map(|slice| slice.len()).sum::<usize>();
        let share = |total: usize| (p * total as f64).round() as usize;
        match threshold {
            Threshold::Global => {
                child.select(scores, &mut extreme(&slices, share(count(&slices)), end), 0..slices.len())
            }
            Threshold::PerTensor => {
                for (index, slice) in slices.iter().enumerate() {
                    child.select(scores, &mut extreme(&[slice], share(slice.len()), end), index..index + 1);
                }
            }
            Threshold::Percentile if end == End::Smallest => {
                return Err(Error::configuration("the percentile is a rule for the highest scores only"));
            }
            Threshold::Percentile => {
                child.select(scores, &mut Selection::at_least(percentile(&slices, 1.0 - p)), 0..slices.len());
            }
        }
        Ok(child)
    }

    /// Makes the child network that is the whole network.
    ///
    /// # Errors
    /// Fails if the scope covers no parameter.
    pub fn full(parameters: &Parameters, scope: MaskScope) -> Result<Self> {
        let tensors: Vec<TensorMask> = parameters
            .iter()
            .filter(|(_, parameter)| scope.covers(parameter))
            .map(|(_, parameter)| TensorMask {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
                layer: match parameter.place {
                    ParameterPlace::EncoderLayer(layer) => Some(layer),
                    _ => None,
                },
                start: parameter.range.start,
                count: parameter.count(),
                kept: parameter.count(),
            })
            .collect();
        if tensors.is_empty() {
            return Err(Error::configuration("mask.scope covers no parameter of this model"));
        }
        Ok(Self {
            words: vec![u64::MAX; parameters.buffer_len() / WORD],
            tensors,
            scope,
            on_device: Mutex::default(),
        })
    }

    /// Sets the bits of one tensor.
    pub(super) fn set_bits(&mut self, index: usize, bits: impl IntoIterator<Item = bool>) {
        let TensorMask { start, count, .. } = self.tensors[index];
        let mut kept = 0;
        for (element, bit) in (start..start + count).zip(bits) {
            let word = &mut self.words[element / WORD];
            let flag = 1 << (element % WORD);
            *word = if bit { *word | flag } else { *word & !flag };
            kept += usize::from(bit);
        }
        self.tensors[index].kept = kept;
    }

    fn select(&mut self, scores: &[f32], selection: &mut Selection, tensors: Range<usize>) {
        for index in tensors {
            let TensorMask { start, count, .. } = self.tensors[index];
            self.set_bits(index, scores[start..start + count].iter().map(|&score| selection.takes(score)));
        }
    }

    /// Returns the tensors that the mask reaches.
    pub fn tensors(&self) -> &[TensorMask] {
        &self.tensors
    }

    /// Returns the part of the model that the mask reaches.
    pub fn scope(&self) -> MaskScope {
        self.scope
    }

    /// Returns the number of maskable weights.
    pub fn maskable(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.count).sum()
    }

    /// Returns the number of maskable weights in the child network.
    pub fn kept(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.kept).sum()
    }

    /// Returns whether nothing is masked out.
    pub fn is_full(&self) -> bool {
        self.kept() == self.maskable()
    }

    /// Iterates over the bits of a tensor.
    pub fn bits(&self, tensor: &TensorMask) -> impl Iterator<Item = bool> {
        (tensor.start..tensor.start + tensor.count)
            .map(|element| self.words[element / WORD] >> (element % WORD) & 1 == 1)
    }

    /// Returns a tensor's bits packed into bytes, element 0 in the lowest bit of byte 0; unused bits are zero.
    pub fn packed_bits(&self, tensor: &TensorMask) -> Vec<u8> {
        let first = tensor.start / WORD;
        let words = &self.words[first..first + tensor.count.div_ceil(WORD)];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(tensor.count.div_ceil(8));
        if let (Some(last), used @ 1..) = (bytes.last_mut(), tensor.count % 8) {
            *last &= (1 << used) - 1;
        }
        bytes
    }

    /// Returns the SHA-256 over names, shapes and bits, in hexadecimal: equal masks have equal hashes.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for tensor in &self.tensors {
            hash.update(format!("{}{:?}\n", tensor.name, tensor.shape));
            hash.update(self.packed_bits(tensor));
        }
        hexadecimal(&hash.finalize())
    }

    /// Multiplies a parameter's contiguous float32 gradient (or values) by the mask, in place.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn apply(&self, gradient: &mut Tensor, parameter: &Parameter) -> Result<()> {
        if gradient.device().is_cuda() {
            let mask = self.device_mask(parameter.range.clone(), gradient.device())?;
            let _ = gradient.f_mul_(&mask.f_view(gradient.size().as_slice())?)?;
            return Ok(());
        }
        multiply(elements_mut(gradient)?, self.words_from(parameter.range.start), 1.0, 0.0);
        Ok(())
    }

    /// Sets the weights outside the child network to zero.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn prune(&self, parameters: &Parameters) -> Result<()> {
        for (_, parameter) in parameters.iter().filter(|(_, parameter)| self.scope.covers(parameter)) {
            let range = &parameter.range;
            let mut values = parameters.values().f_narrow(0, range.start as i64, range.len() as i64)?;
            self.apply(&mut values, parameter)?;
        }
        Ok(())
    }

    /// Multiplies the weights of the child network in `values`, the elements of the flat buffer from `start` on, by
    /// `factor`; the others keep every bit.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn scale_members(&self, values: &mut Tensor, start: usize, factor: f64) -> Result<()> {
        if values.device().is_cuda() {
            let members = self.device_mask(start..start + values.numel(), values.device())?;
            let loss = values.f_mul(&members)?.f_mul_scalar(1.0 - factor)?;
            let _ = values.f_sub_(&loss)?;
            return Ok(());
        }
        multiply(elements_mut(values)?, self.words_from(start), factor as f32, 1.0);
        Ok(())
    }

    fn words_from(&self, start: usize) -> &[u64] {
        // Ranges of parameters start at multiples of a word.
        &self.words[start / WORD..]
    }

    /// Returns the bits of a range as booleans on a device, `[range]`.
    fn device_mask(&self, range: Range<usize>, device: Device) -> Result<Tensor> {
        let mut on_device = self.on_device.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(mask) = on_device.get(&range) {
            return Ok(mask.shallow_clone());
        }
        let words = &self.words[range.start / WORD..range.end.div_ceil(WORD)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let bytes = Tensor::from_slice(&bytes).f_to_device(device)?.f_unsqueeze(1)?;
        let weights = Tensor::from_slice(&[1u8, 2, 4, 8, 16, 32, 64, 128]).f_to_device(device)?;
        let bits = bytes.f_bitwise_and_tensor(&weights)?.f_ne(0)?.f_view([-1])?;
        let mask = bits.f_narrow(0, 0, range.len() as i64)?;
        on_device.insert(range, mask.shallow_clone());
        Ok(mask)
    }
}

/// Multiplies each value by `inside` where its bit is set, by `outside` elsewhere.
fn multiply(values: &mut [f32], words: &[u64], inside: f32, outside: f32) {
    values
        .par_chunks_mut(CHUNK * WORD)
        .zip(words.par_chunks(CHUNK))
        .for_each(|(values, words)| multiply_chunk(values, words, inside, outside));
}

#[multiversion(targets = "simd")]
fn multiply_chunk(values: &mut [f32], words: &[u64], inside: f32, outside: f32) {
    for (values, word) in values.chunks_mut(WORD).zip(words) {
        let halves = [*word as u32, (*word >> 32) as u32];
        for (values, half) in values.chunks_mut(32).zip(halves) {
            for (bit, value) in values.iter_mut().enumerate() {
                *value *= if half >> bit & 1 == 1 { inside } else { outside };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::model::ParameterTable;

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("first", &[10, 13], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("second", &[70], ParameterKind::Weight, ParameterPlace::Pooler);
        table.declare("head", &[5], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    fn child(threshold: Threshold, scores: &Tensor, p: f64) -> ChildNetwork {
        ChildNetwork::from_scores(&parameters(), scores, p, MaskScope::Backbone, threshold).unwrap()
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

    #[test]
    fn the_lowest_and_the_highest_half_are_the_whole() {
        let parameters = parameters();
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        for threshold in [Threshold::Global, Threshold::PerTensor] {
            let highest = child(threshold, &scores, 0.5);
            let scope = MaskScope::Backbone;
            let lowest =
                ChildNetwork::from_lowest_scores(&parameters, &scores, 0.5, scope, threshold).unwrap();
            assert_eq!((lowest.kept(), highest.kept()), (100, 100));
            for (low, high) in lowest.tensors().iter().zip(highest.tensors()) {
                assert!(lowest.bits(low).zip(highest.bits(high)).all(|(low, high)| low != high));
            }
        }
        let zeros = scores.zeros_like();
        let tied = ChildNetwork::from_lowest_scores(
            &parameters,
            &zeros,
            0.3,
            MaskScope::Backbone,
            Threshold::Global,
        )
        .unwrap();
        assert_eq!(tied.kept(), 60);
        assert!(tied.bits(&tied.tensors()[0]).enumerate().all(|(index, bit)| bit == (index < 60)));
    }

    #[test]
    fn a_random_child_has_the_exact_share_everywhere_and_a_seed() {
        let mut table = ParameterTable::default();
        table.declare("weight", &[40_000], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        let random = |seed| {
            ChildNetwork::random(&parameters, 0.3, MaskScope::Backbone, Threshold::Global, seed).unwrap()
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
    fn pruning_leaves_the_members_and_what_the_mask_does_not_reach() {
        let parameters = parameters();
        let _ = parameters.values().shallow_clone().fill_(-2.0);
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        let child = child(Threshold::Global, &scores, 0.3);
        child.prune(&parameters).unwrap();
        let values = |name: &str| {
            let leaf = parameters.leaf(parameters.find(name).unwrap()).detach();
            Vec::<f32>::try_from(leaf.reshape([-1])).unwrap()
        };
        for tensor in child.tensors() {
            let kept = child.bits(tensor).zip(values(&tensor.name));
            assert!(kept.into_iter().all(|(bit, value)| value == if bit { -2.0 } else { 0.0 }));
        }
        assert_eq!(values("head"), [-2.0; 5]);
    }

    #[test]
    fn scores_that_are_not_numbers_are_refused() {
        let scores = Tensor::full([parameters().buffer_len() as i64], f64::NAN, (Kind::Float, Device::Cpu));
        let refused =
            ChildNetwork::from_scores(&parameters(), &scores, 0.3, MaskScope::All, Threshold::Global);
        assert!(matches!(refused, Err(Error::Diverged(_))));
    }

    /// What a GPU uses, tried on the CPU's tensors.
    #[test]
    fn the_mask_of_a_device_has_the_same_bits() {
        let parameters = parameters();
        let scores = Tensor::rand([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        let child = child(Threshold::Global, &scores, 0.5);
        for tensor in child.tensors() {
            let mask = child.device_mask(tensor.start..tensor.start + tensor.count, Device::Cpu).unwrap();
            assert_eq!(Vec::<bool>::try_from(&mask).unwrap(), child.bits(tensor).collect::<Vec<_>>());
        }
    }
}

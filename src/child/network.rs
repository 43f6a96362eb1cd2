//! Fixed child networks: one bit a weight.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::masking::{StepMask, mask_in_place};
use crate::error::{Error, Result};
use crate::libtorch::elements_mut;
use crate::locking::locked;
use crate::model::{Parameter, ParameterKind, ParameterPlace, Parameters};
use crate::values::hexadecimal;

/// Bits of a word of a mask.
pub(super) const WORD: usize = u64::BITS as usize;

/// The part of a model that a mask may reach; the rest always trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskScope {
    /// The Transformer layers: the parameters that the released code's D finds by `layer` in their names.
    EncoderLayers,
    /// Everything that pretraining brings: embeddings, layers and pooler.
    Backbone,
    /// Every parameter, the new head included, as in the released code's F.
    All,
    /// The matrices of the backbone's linear layers.
    Linear,
    /// The matrices of all linear layers, the head's included, as in the released code of DPS.
    AllLinear,
}

impl MaskScope {
    /// All scopes; where two reach the same parameters of a model, the first is its name.
    pub const ALL: [MaskScope; 5] = [
        MaskScope::EncoderLayers,
        MaskScope::Backbone,
        MaskScope::All,
        MaskScope::Linear,
        MaskScope::AllLinear,
    ];

    /// Returns whether the mask reaches a parameter.
    pub fn covers(self, parameter: &Parameter) -> bool {
        let backbone = parameter.place != ParameterPlace::Head;
        match self {
            MaskScope::EncoderLayers => matches!(parameter.place, ParameterPlace::EncoderLayer(_)),
            MaskScope::Backbone => backbone,
            MaskScope::All => true,
            MaskScope::Linear => backbone && parameter.kind == ParameterKind::Weight,
            MaskScope::AllLinear => parameter.kind == ParameterKind::Weight,
        }
    }
}

/// The mask of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMask {
    /// The parameter's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Where in the model it stands.
    pub place: ParameterPlace,
    /// Place of its first element in the flat buffer.
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
    uploaded: Mutex<HashMap<Range<usize>, Tensor>>,
}

impl ChildNetwork {
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
                place: parameter.place,
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
            uploaded: Mutex::default(),
        })
    }

    /// Lets `set` write the bits of one tensor, element 0 in the lowest bit of the first word.
    ///
    /// # Errors
    /// Those of `set`.
    pub(super) fn set_words(
        &mut self,
        index: usize,
        set: impl FnOnce(&mut [u64]) -> Result<()>,
    ) -> Result<()> {
        let TensorMask { start, count, .. } = self.tensors[index];
        let words = &mut self.words[start / WORD..(start + count).div_ceil(WORD)];
        set(words)?;
        if let (Some(last), used @ 1..) = (words.last_mut(), count % WORD) {
            *last &= (1 << used) - 1;
        }
        self.tensors[index].kept = words.par_iter().map(|word| word.count_ones() as usize).sum();
        self.uploaded = Mutex::default();
        Ok(())
    }

    /// Returns the bits of a tensor.
    pub(super) fn words_of(&self, tensor: &TensorMask) -> &[u64] {
        &self.words[tensor.start / WORD..(tensor.start + tensor.count).div_ceil(WORD)]
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

    /// Returns the share of the maskable weights that is in the child network.
    pub fn share(&self) -> f64 {
        self.kept() as f64 / self.maskable() as f64
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
        let mut bytes: Vec<u8> = self.words_of(tensor).iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(tensor.count.div_ceil(8));
        if let (Some(last), used @ 1..) = (bytes.last_mut(), tensor.count % 8) {
            *last &= (1 << used) - 1;
        }
        bytes
    }

    /// Returns the SHA-256 over names, shapes and bits, in hexadecimal: equal masks have equal hashes.
    pub fn sha256(&self) -> String {
        sha256_of_mask(
            self.tensors
                .iter()
                .map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice(), self.packed_bits(tensor))),
        )
    }

    /// Returns the mask for the CPU.
    pub fn on_cpu(&self) -> StepMask<'_> {
        StepMask::Bits { words: &self.words, inside: 1.0, outside: 0.0 }
    }

    /// Returns a parameter's gradient with the mask, on a GPU.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn masked_on_device(&self, gradient: &Tensor, parameter: &Parameter) -> Result<Tensor> {
        let mask = self.device_mask(parameter.range.clone(), gradient.device())?;
        Ok(gradient.f_mul(&mask.f_view(gradient.size().as_slice())?)?)
    }

    /// Sets the weights outside the child network to zero.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn prune(&self, parameters: &Parameters) -> Result<()> {
        let values = parameters.values_to_change();
        for (id, parameter) in parameters.iter().filter(|(_, parameter)| self.scope.covers(parameter)) {
            let mut part = parameters.part(&values, id)?;
            let range = parameter.range.clone();
            // Once, so that a GPU does not keep the booleans.
            self.scale(&mut part, range.start, [1.0, 0.0], |device| self.upload(&range, device))?;
        }
        Ok(())
    }

    /// Multiplies the weights of the child network in `values`, the elements of the flat buffer from `start` on, by
    /// `factor`; the others keep every bit.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn scale_members(&self, values: &mut Tensor, start: usize, factor: f64) -> Result<()> {
        let range = start..start + values.numel();
        self.scale(values, start, [factor, 1.0], |device| self.device_mask(range, device))
    }

    /// Multiplies the elements of the flat buffer from `start` on by one factor inside the child network and another one
    /// outside; `members` are those inside as booleans, for a GPU.
    fn scale(
        &self,
        values: &mut Tensor,
        start: usize,
        [inside, outside]: [f64; 2],
        members: impl FnOnce(Device) -> Result<Tensor>,
    ) -> Result<()> {
        if values.device().is_cuda() {
            let members = members(values.device())?;
            let inside = Tensor::f_full([1], inside, (values.kind(), values.device()))?;
            let factors = inside.f_where_scalarother(&members, outside)?;
            let _ = values.f_mul_(&factors)?;
            return Ok(());
        }
        let mask = StepMask::Bits { words: &self.words, inside: inside as f32, outside: outside as f32 };
        mask_in_place(elements_mut(values)?, mask, start / WORD);
        Ok(())
    }

    /// Returns the bits of the flat buffer, 64 a word; those that the mask does not reach are set.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Returns the places of the members in a range of the flat buffer, counted from its start, on a device: `[members]`
    /// int32.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn members_on_device(&self, range: Range<usize>, device: Device) -> Result<Tensor> {
        Ok(self.upload(&range, device)?.f_nonzero()?.f_flatten(0, -1)?.f_to_kind(Kind::Int)?)
    }

    /// Returns the bits of a range as booleans on a device, `[range]`, and keeps them for the next time.
    pub(super) fn device_mask(&self, range: Range<usize>, device: Device) -> Result<Tensor> {
        let mut uploaded = locked(&self.uploaded);
        if let Some(mask) = uploaded.get(&range) {
            return Ok(mask.shallow_clone());
        }
        let mask = self.upload(&range, device)?;
        uploaded.insert(range, mask.shallow_clone());
        Ok(mask)
    }

    fn upload(&self, range: &Range<usize>, device: Device) -> Result<Tensor> {
        let words = &self.words[range.start / WORD..range.end.div_ceil(WORD)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let bytes = Tensor::from_slice(&bytes).f_to_device(device)?.f_unsqueeze(1)?;
        let weights = Tensor::from_slice(&[1u8, 2, 4, 8, 16, 32, 64, 128]).f_to_device(device)?;
        let bits = bytes.f_bitwise_and_tensor(&weights)?.f_ne(0)?.f_view([-1])?;
        Ok(bits.f_narrow(0, 0, range.len() as i64)?)
    }
}

/// Returns the SHA-256 over names, shapes and packed bits of the tensors of a mask, in the order of declaration.
pub(super) fn sha256_of_mask<'a>(
    tensors: impl Iterator<Item = (&'a str, &'a [i64], impl AsRef<[u8]>)>,
) -> String {
    let mut hash = Sha256::new();
    for (name, shape, bits) in tensors {
        hash.update(format!("{name}{shape:?}\n"));
        hash.update(bits);
    }
    hexadecimal(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::super::cut::{Cut, Threshold, random_scores};
    use super::*;
    use crate::model::ParameterTable;

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("first", &[10, 13], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("second", &[70], ParameterKind::Weight, ParameterPlace::Pooler);
        table.declare("head", &[5], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    fn random(p: f64) -> ChildNetwork {
        let cut = Cut::highest(p, MaskScope::Backbone, Threshold::Global);
        let scores = random_scores(parameters().buffer_len(), 1);
        ChildNetwork::from_scores(&parameters(), &scores, &cut).unwrap()
    }

    #[test]
    fn pruning_leaves_the_members_and_what_the_mask_does_not_reach() {
        let parameters = parameters();
        let _ = parameters.values().shallow_clone().fill_(-2.0);
        let child = random(0.3);
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

    /// What a GPU uses, tried on the CPU's tensors.
    #[test]
    fn the_mask_of_a_device_has_the_same_bits() {
        let child = random(0.5);
        for tensor in child.tensors() {
            let mask = child.device_mask(tensor.start..tensor.start + tensor.count, Device::Cpu).unwrap();
            assert_eq!(Vec::<bool>::try_from(&mask).unwrap(), child.bits(tensor).collect::<Vec<_>>());
        }
    }
}

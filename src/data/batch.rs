//! Batches of examples as tensors, without padding.
//!
//! The tokens of all examples of a batch stand one after the other, `[tokens]`; nothing is computed for positions that
//! do not exist. Where attention needs a rectangle, [`Padding`] says how to get there and back.

use tch::{Device, Kind, Tensor};

use super::encode::Encoded;
use super::label::Label;
use super::sheet::Example;
use crate::error::{Error, Result};

/// A batch of examples, packed.
pub struct PackedBatch {
    /// Token ids, `[tokens]`, int64.
    pub input_ids: Tensor,
    /// Segment of each token, `[tokens]`, int64.
    pub token_types: Tensor,
    /// Position of each token in its example, from 0, `[tokens]`, int64.
    pub positions: Tensor,
    /// Index of each example's first token, `[examples]`, int64.
    pub first_tokens: Tensor,
    /// Number of tokens of each example.
    pub lengths: Vec<usize>,
    /// Number of each example within its optimizer step; what dropout draws depends on it, not on the micro-batch.
    pub slots: Vec<u32>,
    /// How to lay the tokens out as a rectangle; `None` if all examples are of one length.
    pub padding: Option<Padding>,
    /// What a frozen encoder makes of the examples, `[examples, hidden]` in float32; the tokens are left out then.
    pub features: Option<Tensor>,
}

/// The way from packed tokens to the rectangle `[examples, longest]` and back.
pub struct Padding {
    /// Place of each token in the flattened rectangle, `[tokens]`, int64.
    pub places: Tensor,
    /// Zero for real tokens, minus infinity for padding, `[examples, 1, 1, longest]`, float32.
    pub bias: Tensor,
}

impl PackedBatch {
    /// Packs examples on a device. `first_slot` is the number of the first one within its optimizer step.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn pack(examples: &[&Encoded], first_slot: usize, device: Device) -> Result<Self> {
        let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        let tokens = lengths.iter().sum();
        let mut input_ids = Vec::with_capacity(tokens);
        let mut token_types = Vec::with_capacity(tokens);
        let mut positions = Vec::with_capacity(tokens);
        let mut first_tokens = Vec::with_capacity(examples.len());
        for example in examples {
            first_tokens.push(input_ids.len() as i64);
            input_ids.extend(example.ids.iter().map(|&id| i64::from(id)));
            token_types.extend(example.token_types.iter().map(|&kind| i64::from(kind)));
            positions.extend(0..example.ids.len() as i64);
        }
        let tensor =
            |values: &[i64]| -> Result<Tensor> { Ok(Tensor::from_slice(values).f_to_device(device)?) };
        Ok(Self {
            input_ids: tensor(&input_ids)?,
            token_types: tensor(&token_types)?,
            positions: tensor(&positions)?,
            first_tokens: tensor(&first_tokens)?,
            slots: (first_slot as u32..).take(examples.len()).collect(),
            padding: Padding::new(&lengths, device)?,
            lengths,
            features: None,
        })
    }

    /// Makes the batch of examples whose features are known.
    fn of_features(features: Tensor, first_slot: usize) -> Result<Self> {
        let examples = features.size()[0] as usize;
        let none = || Tensor::f_zeros([0], (Kind::Int64, features.device()));
        Ok(Self {
            input_ids: none()?,
            token_types: none()?,
            positions: none()?,
            first_tokens: none()?,
            slots: (first_slot as u32..).take(examples).collect(),
            padding: None,
            lengths: Vec::new(),
            features: Some(features),
        })
    }

    /// Makes the batch in which each example stands so many times, one copy after the other. All copies have the number of
    /// their example, so that dropout on the CPU draws the same for them.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn repeated(&self, copies: usize) -> Result<Self> {
        let (mut rows, mut first_tokens, mut start) = (Vec::new(), Vec::new(), 0);
        for &length in &self.lengths {
            for _ in 0..copies {
                first_tokens.push(rows.len() as i64);
                rows.extend(start..start + length as i64);
            }
            start += length as i64;
        }
        let device = self.input_ids.device();
        let rows = Tensor::from_slice(&rows).f_to_device(device)?;
        let repeated = |values: &Tensor| values.f_index_select(0, &rows);
        let lengths: Vec<usize> =
            self.lengths.iter().flat_map(|&length| std::iter::repeat_n(length, copies)).collect();
        let features = self.features.as_ref();
        Ok(Self {
            input_ids: repeated(&self.input_ids)?,
            token_types: repeated(&self.token_types)?,
            positions: repeated(&self.positions)?,
            first_tokens: Tensor::from_slice(&first_tokens).f_to_device(device)?,
            slots: self.slots.iter().flat_map(|&slot| std::iter::repeat_n(slot, copies)).collect(),
            padding: Padding::new(&lengths, device)?,
            lengths,
            features: features
                .map(|features| features.f_repeat_interleave_self_int(copies as i64, Some(0), None))
                .transpose()?,
        })
    }

    /// Returns the number of examples.
    pub fn examples(&self) -> usize {
        self.slots.len()
    }

    /// Returns the number of tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Returns the number of tokens of the longest example.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }
}

impl Padding {
    fn new(lengths: &[usize], device: Device) -> Result<Option<Self>> {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if lengths.iter().all(|&length| length == longest) {
            return Ok(None);
        }
        let mut places = Vec::with_capacity(lengths.iter().sum());
        let mut bias = vec![f32::NEG_INFINITY; lengths.len() * longest];
        for (example, &length) in lengths.iter().enumerate() {
            let start = example * longest;
            places.extend((start..start + length).map(|place| place as i64));
            bias[start..start + length].fill(0.0);
        }
        let shape = [lengths.len() as i64, 1, 1, longest as i64];
        Ok(Some(Self {
            places: Tensor::from_slice(&places).f_to_device(device)?,
            bias: Tensor::from_slice(&bias).f_view(shape)?.f_to_device(device)?,
        }))
    }

    /// Lays packed rows `[tokens, width]` out as `[examples · longest, width]`, zeros where nothing is.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn pad(&self, rows: &Tensor) -> Result<Tensor> {
        let shape = self.bias.size();
        let empty = Tensor::f_zeros([shape[0] * shape[3], rows.size()[1]], (rows.kind(), rows.device()))?;
        Ok(empty.f_index_copy(0, &self.places, rows)?)
    }

    /// Takes the real rows out of `[examples · longest, width]` again.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn unpad(&self, rows: &Tensor) -> Result<Tensor> {
        Ok(rows.f_index_select(0, &self.places)?)
    }
}

/// What the examples of a data set should be predicted as.
#[derive(Clone, Debug)]
pub enum Targets {
    /// Class ids.
    Classes(Vec<i64>),
    /// Scores.
    Scores(Vec<f32>),
}

impl Targets {
    /// Returns those of the examples with the given numbers.
    pub fn part(&self, numbers: &[usize]) -> Self {
        match self {
            Targets::Classes(ids) => Targets::Classes(numbers.iter().map(|&number| ids[number]).collect()),
            Targets::Scores(scores) => {
                Targets::Scores(numbers.iter().map(|&number| scores[number]).collect())
            }
        }
    }

    /// Returns them as a tensor, `[examples]`: int64 class ids or float32 scores.
    pub fn tensor(&self) -> Tensor {
        match self {
            Targets::Classes(ids) => Tensor::from_slice(ids),
            Targets::Scores(scores) => Tensor::from_slice(scores),
        }
    }
}

/// A data set as token ids, ready to be batched.
#[derive(Debug)]
pub struct EncodedDataset {
    /// The tokens of each example.
    pub inputs: Vec<Encoded>,
    /// What each should be predicted as.
    pub targets: Targets,
    /// What a frozen encoder makes of each example, `[examples, hidden]` in float32; batches then have these for tokens.
    pub features: Option<Tensor>,
}

impl Clone for EncodedDataset {
    fn clone(&self) -> Self {
        Self {
            inputs: self.inputs.clone(),
            targets: self.targets.clone(),
            features: self.features.as_ref().map(Tensor::shallow_clone),
        }
    }
}

impl EncodedDataset {
    /// Joins tokens and labels.
    ///
    /// # Errors
    /// Fails if an example has no label, or labels of both kinds are mixed.
    pub fn new(inputs: Vec<Encoded>, examples: &[Example]) -> Result<Self> {
        let class = |example: &Example| match example.label {
            Some(Label::Class(id)) => Some(id as i64),
            _ => None,
        };
        let score = |example: &Example| match example.label {
            Some(Label::Score(score)) => Some(score),
            _ => None,
        };
        let targets = match examples.first().and_then(|example| example.label) {
            Some(Label::Score(_)) => examples.iter().map(score).collect::<Option<_>>().map(Targets::Scores),
            _ => examples.iter().map(class).collect::<Option<_>>().map(Targets::Classes),
        };
        let targets =
            targets.ok_or_else(|| Error::configuration("an example of the data set has no label"))?;
        Ok(Self { inputs, targets, features: None })
    }

    /// Returns the data set of the examples with the given numbers.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn part(&self, numbers: &[usize]) -> Result<Self> {
        Ok(Self {
            inputs: numbers.iter().map(|&number| self.inputs[number].clone()).collect(),
            targets: self.targets.part(numbers),
            features: self.feature_rows(numbers)?,
        })
    }

    fn feature_rows(&self, numbers: &[usize]) -> Result<Option<Tensor>> {
        let Some(features) = &self.features else { return Ok(None) };
        let rows: Vec<i64> = numbers.iter().map(|&number| number as i64).collect();
        let rows = Tensor::from_slice(&rows).f_to_device(features.device())?;
        Ok(Some(features.f_index_select(0, &rows)?))
    }

    /// Returns the same examples with what a frozen encoder makes of them, `[examples, hidden]`.
    pub fn with_features(&self, features: Tensor) -> Self {
        Self { inputs: self.inputs.clone(), targets: self.targets.clone(), features: Some(features) }
    }

    /// Returns the number of examples.
    pub fn len(&self) -> usize {
        self.inputs.len()
    }

    /// Returns whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.inputs.is_empty()
    }

    /// Returns the number of tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.inputs.iter().map(|input| input.ids.len()).sum()
    }

    /// Packs the examples with the given numbers, and their targets: int64 class ids or float32 scores, `[examples]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn batch(
        &self,
        numbers: &[usize],
        first_slot: usize,
        device: Device,
    ) -> Result<(PackedBatch, Tensor)> {
        let targets = self.targets.part(numbers).tensor().f_to_device(device)?;
        if let Some(features) = self.feature_rows(numbers)? {
            return Ok((PackedBatch::of_features(features, first_slot)?, targets));
        }
        let inputs: Vec<&Encoded> = numbers.iter().map(|&number| &self.inputs[number]).collect();
        Ok((PackedBatch::pack(&inputs, first_slot, device)?, targets))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_stand_behind_their_example_and_have_its_number() {
        let example = |ids: &[u32]| Encoded { ids: ids.to_vec(), token_types: vec![0; ids.len()] };
        let (first, second) = (example(&[5, 6]), example(&[7, 8, 9]));
        let batch = PackedBatch::pack(&[&first, &second], 4, Device::Cpu).unwrap().repeated(2).unwrap();
        let plain = PackedBatch::pack(&[&first, &first, &second, &second], 0, Device::Cpu).unwrap();
        let tensors = |batch: &PackedBatch| {
            [&batch.input_ids, &batch.token_types, &batch.positions, &batch.first_tokens]
                .map(|values| Vec::<i64>::try_from(values).unwrap())
        };
        assert_eq!((tensors(&batch), &batch.lengths), (tensors(&plain), &plain.lengths));
        assert_eq!(batch.slots, [4, 4, 5, 5]);
        let places =
            |batch: &PackedBatch| Vec::<i64>::try_from(&batch.padding.as_ref().unwrap().places).unwrap();
        assert_eq!(places(&batch), places(&plain));
    }
}

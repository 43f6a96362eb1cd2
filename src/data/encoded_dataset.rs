//! Data sets as token ids, of which batches are made.

use tch::{Device, Tensor};

use super::batch::{BatchShape, PackedBatch};
use super::encode::Encoded;
use super::label::Label;
use super::sheet::Example;
use crate::error::{Error, Result};
use crate::libtorch::upload;

/// The tokens of a rounded batch are a multiple of the second number; of the first one where there are few, so that no batch grows by
/// more than an eighth and a few tokens.
const ROWS: [usize; 2] = [16, 64];

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

    /// Returns them as a tensor on a device, `[examples]`: int64 class ids or float32 scores.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn tensor(&self, device: Device) -> Result<Tensor> {
        match self {
            Targets::Classes(ids) => upload(ids, device),
            Targets::Scores(scores) => upload(scores, device),
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
        let rows = upload(&rows, features.device())?;
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

    /// Returns the number of tokens of each example.
    pub fn lengths(&self) -> Vec<usize> {
        self.inputs.iter().map(|input| input.ids.len()).collect()
    }

    /// Returns the ids of tokens that some example has, in order.
    pub fn vocabulary(&self) -> Vec<usize> {
        let mut occurs: Vec<bool> = Vec::new();
        for &id in self.inputs.iter().flat_map(|input| &input.ids) {
            if occurs.len() <= id as usize {
                occurs.resize(id as usize + 1, false);
            }
            occurs[id as usize] = true;
        }
        occurs.iter().enumerate().filter(|(_, occurs)| **occurs).map(|(id, _)| id).collect()
    }

    /// Returns the number of tokens of all examples.
    pub fn tokens(&self) -> usize {
        self.inputs.iter().map(|input| input.ids.len()).sum()
    }

    /// Returns the number of tokens that batches of the examples with the given numbers have; none where features stand in
    /// their place.
    pub fn tokens_of(&self, numbers: &[usize]) -> usize {
        match self.features {
            Some(_) => 0,
            None => numbers.iter().map(|&number| self.inputs[number].ids.len()).sum(),
        }
    }

    /// Packs the examples with the given numbers as [`EncodedDataset::batch`] does, and fills the batch up to a shape with
    /// tokens of examples that no output is asked of, so that batches of one shape differ in numbers only.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn filled_batch(
        &self,
        numbers: &[usize],
        shape: BatchShape,
        device: Device,
    ) -> Result<(PackedBatch, Tensor)> {
        self.packed_with_fillers(numbers, 0, (shape, shape.fillers()), device)
    }

    /// Packs the examples with the given numbers as [`EncodedDataset::batch`] does, and fills the batch up to a multiple of
    /// 64 tokens, or of 16 below 512 tokens, with examples that no output is asked of.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn rounded_batch(
        &self,
        numbers: &[usize],
        first_slot: usize,
        device: Device,
    ) -> Result<(PackedBatch, Tensor)> {
        let tokens = self.tokens_of(numbers);
        let [few, many] = ROWS;
        let missing = tokens.next_multiple_of(if tokens < 8 * many { few } else { many }) - tokens;
        if missing == 0 {
            return self.batch(numbers, first_slot, device);
        }
        // No longer than the others, so that the model has positions for them.
        let longest = numbers.iter().map(|&number| self.inputs[number].ids.len()).max().unwrap_or(1);
        let shape = BatchShape { examples: numbers.len(), tokens: tokens + missing, longest };
        self.packed_with_fillers(numbers, first_slot, (shape, missing.div_ceil(longest)), device)
    }

    fn packed_with_fillers(
        &self,
        numbers: &[usize],
        first_slot: usize,
        (shape, fillers): (BatchShape, usize),
        device: Device,
    ) -> Result<(PackedBatch, Tensor)> {
        let mut missing = shape.tokens - self.tokens_of(numbers);
        let fillers: Vec<Encoded> = (0..fillers)
            .map(|_| {
                let length = missing.min(shape.longest);
                missing -= length;
                Encoded { ids: vec![0; length], token_types: vec![0; length] }
            })
            .collect();
        let inputs: Vec<&Encoded> =
            numbers.iter().map(|&number| &self.inputs[number]).chain(&fillers).collect();
        let batch = PackedBatch::pack(&inputs, first_slot, device)?.filled(numbers.len(), shape)?;
        Ok((batch, self.targets.part(numbers).tensor(device)?))
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
        let targets = self.targets.part(numbers).tensor(device)?;
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

    fn values(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn rounded_batches_have_the_examples_first_and_no_longer_ones() {
        let inputs: Vec<Encoded> = [20, 3, 41, 10]
            .iter()
            .map(|&length| Encoded { ids: (1..=length).collect(), token_types: vec![1; length as usize] })
            .collect();
        let data = EncodedDataset { inputs, targets: Targets::Classes(vec![0, 1, 2, 3]), features: None };
        for (numbers, lengths) in [
            (&[0, 1, 2][..], vec![20, 3, 41]),
            (&[0, 1], vec![20, 3, 9]),
            (&[1, 1], vec![3, 3, 3, 3, 3, 1]),
            (&[2; 15], [vec![41; 15], vec![25]].concat()),
        ] {
            let (batch, targets) = data.rounded_batch(numbers, 5, Device::Cpu).unwrap();
            assert_eq!(batch.lengths, lengths);
            assert_eq!(
                (batch.first_tokens.size()[0], targets.size()[0]),
                (numbers.len() as i64, numbers.len() as i64)
            );
            assert_eq!(batch.slots[..2], [5, 6]);
        }
    }

    #[test]
    fn batches_of_one_shape_differ_in_numbers_only() {
        let lengths = [20, 3, 40, 33, 7];
        let inputs: Vec<Encoded> = lengths
            .iter()
            .map(|&length| Encoded { ids: (1..=length).collect(), token_types: vec![1; length as usize] })
            .collect();
        let targets = Targets::Classes(vec![0, 1, 2, 3, 4]);
        let data = EncodedDataset { inputs, targets, features: None };
        let shape = BatchShape::of(&[20, 40], 128);
        assert_eq!(shape, BatchShape { examples: 2, tokens: 256, longest: 64 });
        assert_eq!(shape, BatchShape::of(&[33, 7], 128));
        let (filled, targets) = data.filled_batch(&[0, 2], shape, Device::Cpu).unwrap();
        assert_eq!(filled.lengths, [20, 40, 64, 64, 64, 4]);
        assert_eq!((values(&filled.first_tokens), values(&targets)), (vec![0, 20], vec![0, 2]));
        assert_eq!((filled.tokens(), filled.longest()), (256, 64));
        let (other, _) = data.filled_batch(&[3, 4], shape, Device::Cpu).unwrap();
        filled.overwrite(&other).unwrap();
        assert_eq!(values(&filled.input_ids), values(&other.input_ids));
        assert_eq!(values(&filled.first_tokens), [0, 33]);
    }
}

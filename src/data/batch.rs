//! Batches of examples as tensors, without padding.
//!
//! The tokens of all examples of a batch stand one after the other, `[tokens]`; nothing is computed for positions that
//! do not exist. Where attention needs rectangles, [`AttentionLayout`] says how to get there and back.
//!
//! What a batch holds goes to a GPU in three copies that nobody waits for ([`upload`]): while the GPU computes one step,
//! the host packs the next.

use std::cell::RefCell;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::attention_layout::AttentionLayout;
use super::encode::Encoded;
use crate::error::{Error, Result};
use crate::libtorch::{PackedLengths, flash_attention_runs, upload};

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
    /// The slots on the device, `[examples]`, int64.
    pub slots_on_device: Tensor,
    /// That of each token's example, `[tokens]`, int64.
    pub token_slots: Tensor,
    /// Number of tokens before each example, and of all, `[examples + 1]`, int32; only where flash attention runs.
    cumulative_lengths: Option<Tensor>,
    /// Number of tokens of the longest example, or more.
    longest: usize,
    /// What [`PackedBatch::attention_layout`] has made, for a number of heads and a type.
    attention_layout: RefCell<Option<(i64, Kind, Rc<AttentionLayout>)>>,
    /// What a frozen encoder makes of the examples, `[examples, hidden]` in float32; the tokens are left out then.
    pub features: Option<Tensor>,
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
        let mut token_slots = Vec::with_capacity(tokens);
        for (slot, example) in (first_slot as i64..).zip(examples) {
            first_tokens.push(input_ids.len() as i64);
            input_ids.extend(example.ids.iter().map(|&id| i64::from(id)));
            token_types.extend(example.token_types.iter().map(|&kind| i64::from(kind)));
            positions.extend(0..example.ids.len() as i64);
            token_slots.extend(std::iter::repeat_n(slot, example.ids.len()));
        }
        let cumulative_lengths = cumulative(&lengths, device)?;
        let slots = (first_slot as i64..).take(examples.len()).collect();
        let [input_ids, token_types, positions, first_tokens, slots_on_device, token_slots] =
            upload_together([input_ids, token_types, positions, first_tokens, slots, token_slots], device)?;
        Ok(Self {
            input_ids,
            token_types,
            positions,
            first_tokens,
            slots: (first_slot as u32..).take(examples.len()).collect(),
            slots_on_device,
            token_slots,
            cumulative_lengths,
            longest: longest(&lengths),
            attention_layout: RefCell::default(),
            lengths,
            features: None,
        })
    }

    /// Returns the batch as one of a shape, of which outputs are asked of so many examples from the first on.
    ///
    /// # Errors
    /// Fails if there are fewer.
    pub(super) fn filled(self, examples: usize, shape: BatchShape) -> Result<Self> {
        let first_tokens = self.first_tokens.f_narrow(0, 0, examples as i64)?;
        Ok(Self { first_tokens, longest: shape.longest, ..self })
    }

    /// Makes the batch of examples whose features are known.
    pub(super) fn of_features(features: Tensor, first_slot: usize) -> Result<Self> {
        let examples = features.size()[0] as usize;
        let none = || Tensor::f_zeros([0], (Kind::Int64, features.device()));
        Ok(Self {
            input_ids: none()?,
            token_types: none()?,
            positions: none()?,
            first_tokens: none()?,
            slots: (first_slot as u32..).take(examples).collect(),
            slots_on_device: upload(
                &(first_slot as i64..).take(examples).collect::<Vec<_>>(),
                features.device(),
            )?,
            token_slots: none()?,
            cumulative_lengths: None,
            longest: 0,
            attention_layout: RefCell::default(),
            lengths: Vec::new(),
            features: Some(features),
        })
    }

    /// Makes the batch in which each example stands so many times, one copy after the other. All copies have the number of
    /// their example, so that dropout of rows draws the same for them.
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
        let lengths: Vec<usize> =
            self.lengths.iter().flat_map(|&length| std::iter::repeat_n(length, copies)).collect();
        let slots: Vec<u32> = self.slots.iter().flat_map(|&slot| std::iter::repeat_n(slot, copies)).collect();
        let slots_on_device = slots.iter().map(|&slot| i64::from(slot)).collect();
        let [rows, first_tokens, slots_on_device] =
            upload_together([rows, first_tokens, slots_on_device], device)?;
        let repeated = |values: &Tensor| values.f_index_select(0, &rows);
        let features = self.features.as_ref();
        Ok(Self {
            input_ids: repeated(&self.input_ids)?,
            token_types: repeated(&self.token_types)?,
            positions: repeated(&self.positions)?,
            first_tokens,
            slots,
            slots_on_device,
            token_slots: repeated(&self.token_slots)?,
            cumulative_lengths: cumulative(&lengths, device)?,
            longest: self.longest,
            attention_layout: RefCell::default(),
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

    /// Returns the number of tokens of the longest example, or a larger number that attention may count on.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Returns the rectangles that attention with so many heads, which read `width` numbers a token in sum, computes with.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attention_layout(&self, heads: i64, width: i64, kind: Kind) -> Result<Rc<AttentionLayout>> {
        let mut made = self.attention_layout.borrow_mut();
        if let Some((_, _, layout)) = made.as_ref().filter(|(of, own, _)| (*of, *own) == (heads, kind)) {
            return Ok(layout.clone());
        }
        let device = self.input_ids.device();
        let layout =
            Rc::new(AttentionLayout::new(&self.lengths, heads as usize, width as usize, kind, device)?);
        *made = Some((heads, kind, layout.clone()));
        Ok(layout)
    }

    /// Returns the lengths of the examples as flash attention takes them; `None` where it does not run.
    pub fn flash_lengths(&self) -> Option<PackedLengths<'_>> {
        let cumulative = self.cumulative_lengths.as_ref()?;
        Some(PackedLengths { cumulative, longest: self.longest() })
    }

    /// Writes another batch of the same shape into the memory of this one.
    ///
    /// # Errors
    /// Fails if the shapes differ.
    pub fn overwrite(&self, other: &Self) -> Result<()> {
        let tensors = |batch: &Self| {
            let PackedBatch { input_ids, token_types, positions, .. } = batch;
            let PackedBatch { first_tokens, slots_on_device, token_slots, .. } = batch;
            [input_ids, token_types, positions, first_tokens, slots_on_device, token_slots]
                .map(Tensor::shallow_clone)
        };
        for (mut own, new) in tensors(self).into_iter().zip(tensors(other)) {
            own.f_copy_(&new)?;
        }
        match (&self.cumulative_lengths, &other.cumulative_lengths) {
            (Some(own), Some(new)) => Ok(own.shallow_clone().f_copy_(new)?),
            _ => Ok(()),
        }
    }

    /// Returns the same batch for padded attention, on every device.
    pub fn without_flash(self) -> Self {
        Self { cumulative_lengths: None, ..self }
    }
}

fn longest(lengths: &[usize]) -> usize {
    lengths.iter().copied().max().unwrap_or(0)
}

/// Returns the number of tokens before each example, and of all, where flash attention runs.
fn cumulative(lengths: &[usize], device: Device) -> Result<Option<Tensor>> {
    if !flash_attention_runs(device) {
        return Ok(None);
    }
    let sums = lengths.iter().scan(0, |sum, &length| {
        *sum += length as i32;
        Some(*sum)
    });
    Ok(Some(upload(&std::iter::once(0).chain(sums).collect::<Vec<i32>>(), device)?))
}

/// Copies lists of numbers to a device in one piece.
fn upload_together<const N: usize>(lists: [Vec<i64>; N], device: Device) -> Result<[Tensor; N]> {
    let together = upload(&lists.concat(), device)?;
    let mut start = 0;
    let mut parts = Vec::with_capacity(N);
    for list in &lists {
        parts.push(together.f_narrow(0, start, list.len() as i64)?);
        start += list.len() as i64;
    }
    parts.try_into().map_err(|_| Error::Libtorch("a batch came apart wrongly".into()))
}

/// The shape of a batch that is filled up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BatchShape {
    /// Examples that outputs are asked of.
    pub examples: usize,
    /// Tokens, those that fill up included.
    pub tokens: usize,
    /// The most tokens of an example.
    pub longest: usize,
}

impl BatchShape {
    /// Tokens of a shape are a multiple of this.
    const TOKENS: usize = 256;
    /// The longest example of a shape is a multiple of this.
    const LONGEST: usize = 32;

    /// Returns the shape that examples of the given lengths, at most `max_length`, are filled up to: one of few.
    pub fn of(lengths: &[usize], max_length: usize) -> Self {
        let longest = longest(lengths);
        Self {
            examples: lengths.len(),
            tokens: lengths.iter().sum::<usize>().next_multiple_of(Self::TOKENS),
            // What fills up has positions, too, and a model may have none behind `max_length`.
            longest: longest.next_multiple_of(Self::LONGEST).min(max_length.max(longest)),
        }
    }

    /// Returns the number of examples that hold what fills up; some may have no tokens.
    pub(super) fn fillers(&self) -> usize {
        Self::TOKENS.div_ceil(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(lengths: &[usize]) -> PackedBatch {
        let mut next = 0..;
        let examples: Vec<Encoded> = lengths
            .iter()
            .map(|&length| Encoded {
                ids: next.by_ref().take(length).collect(),
                token_types: vec![1; length],
            })
            .collect();
        PackedBatch::pack(&examples.iter().collect::<Vec<_>>(), 0, Device::Cpu).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<i64> {
        Vec::try_from(tensor).unwrap()
    }

    #[test]
    fn tokens_stand_one_after_the_other() {
        let batch = batch(&[2, 1, 3]);
        assert_eq!(values(&batch.input_ids), [0, 1, 2, 3, 4, 5]);
        assert_eq!(values(&batch.token_types), [1; 6]);
        assert_eq!(values(&batch.positions), [0, 1, 0, 0, 1, 2]);
        assert_eq!(values(&batch.first_tokens), [0, 2, 3]);
        assert_eq!((batch.examples(), batch.tokens(), batch.longest()), (3, 6, 3));
        assert!(batch.flash_lengths().is_none(), "there is no flash attention on the CPU");
    }

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
    }
}

//! Dropout whose pattern is a pure function of seed, step, place in the network, example and token.
//!
//! So it does not depend on what else is in the batch, on how the batch is cut into micro-batches, on padding, or on the
//! number of threads: gradient accumulation equals the whole batch also with dropout. A GPU draws the same for rows; for attention
//! it has libtorch's own dropout, seeded by the same key.

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::pass::Rows;
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::{
    DropoutPattern, DropoutRows, Number, drop_rows, elements, elements_mut, seed_generators, upload,
    with_backward,
};
use crate::random::{self, Bernoulli, GROUP, Key, Purpose};

/// The dropout pattern of one optimizer step.
#[derive(Debug)]
pub struct Dropout {
    key: Key,
    /// The key on the device, `[2]`, int32.
    key_on_device: Tensor,
}

impl Clone for Dropout {
    fn clone(&self) -> Self {
        Self { key: self.key, key_on_device: self.key_on_device.shallow_clone() }
    }
}

impl Dropout {
    /// Makes the pattern of a step (or of a batch of the Fisher pass, by `purpose`), for a pass over the examples from
    /// `first_slot` on.
    ///
    /// # Errors
    /// As for [`Dropout::of_key`].
    pub fn new(seed: u64, purpose: Purpose, step: u64, first_slot: usize, device: Device) -> Result<Self> {
        Self::of_key(Key::derive(seed, purpose, step), first_slot, device)
    }

    /// Makes the pattern of a key, for a pass over the examples from `first_slot` on.
    ///
    /// # Errors
    /// Fails if libtorch does not seed its generator.
    pub fn of_key(key: Key, first_slot: usize, device: Device) -> Result<Self> {
        if device.is_cuda() {
            // For attention.
            seed_generators(key.of_part(first_slot as u64).to_seed())?;
        }
        let words = key.0.map(u32::cast_signed);
        Ok(Self { key, key_on_device: upload(&words, device)? })
    }

    /// Writes the key of another step, of the same device, over this one's: what was recorded with this one draws as the other then.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn overwrite(&mut self, other: &Self) -> Result<()> {
        self.key = other.key;
        Ok(self.key_on_device.f_copy_(&other.key_on_device)?)
    }

    /// Starts a segment that may be run again: on CUDA, libtorch's generator is set to what the segment draws both times.
    ///
    /// # Errors
    /// Fails if libtorch does not seed its generator.
    pub fn begin_segment(&self, site: u32, batch: &PackedBatch) -> Result<()> {
        if !batch.input_ids.device().is_cuda() {
            return Ok(());
        }
        let first_slot = u64::from(batch.slots.first().copied().unwrap_or(0));
        seed_generators(self.key.of_part(first_slot).of_part(u64::from(site)).to_seed())
    }

    /// Drops elements of rows `[rows, width]`, scaling the others by 1 / (1 − probability). Rows that examples share stand there in
    /// `copies`, of which each draws the same.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn rows(
        &self,
        input: &Tensor,
        probability: f64,
        site: u32,
        (rows, copies): (Rows, i64),
        batch: &PackedBatch,
    ) -> Result<Tensor> {
        let own = input.size()[0] / copies;
        if input.device().is_cuda() {
            return match self.on_device(probability, site, (rows, own), batch) {
                Some(pattern) => drop_rows(input, pattern),
                None => Ok(input.shallow_clone()),
            };
        }
        match self.patterned(probability, site, (rows, copies), own, batch) {
            Some(pattern) => dropped(input, pattern),
            None => Ok(input.shallow_clone()),
        }
    }

    /// Returns the pattern of rows on the CPU, of which `own` are those that examples share, if they are such; none for a probability
    /// of zero.
    pub(super) fn patterned(
        &self,
        probability: f64,
        site: u32,
        (rows, copies): (Rows, i64),
        own: i64,
        batch: &PackedBatch,
    ) -> Option<PatternedRows> {
        let pattern = self.pattern(probability)?;
        let counters = match rows {
            Rows::Tokens => token_counters(batch, site),
            Rows::Examples => batch.slots.iter().map(|&slot| [0, slot, site]).collect(),
            Rows::Shared => {
                (0..copies).flat_map(|_| (0..own as u32).map(|row| [row, u32::MAX, site])).collect()
            }
        };
        Some(PatternedRows { pattern, counters })
    }

    /// Returns the pattern of rows on a GPU, of which `own` are those that examples share, if they are such; none for a probability
    /// of zero.
    pub(super) fn on_device(
        &self,
        probability: f64,
        site: u32,
        (rows, own): (Rows, i64),
        batch: &PackedBatch,
    ) -> Option<DropoutPattern> {
        let Pattern { limit, scale, .. } = self.pattern(probability)?;
        let rows = match rows {
            Rows::Tokens => DropoutRows::Tokens {
                positions: batch.positions.shallow_clone(),
                slots: batch.token_slots.shallow_clone(),
            },
            Rows::Examples => DropoutRows::Examples { slots: batch.slots_on_device.shallow_clone() },
            Rows::Shared => DropoutRows::Shared(own),
        };
        Some(DropoutPattern { key: self.key_on_device.shallow_clone(), limit, scale, site, rows })
    }

    /// Returns which elements a probability keeps; none if it keeps all.
    fn pattern(&self, probability: f64) -> Option<Pattern> {
        (probability > 0.0).then(|| Pattern {
            key: self.key,
            limit: Bernoulli::new(1.0 - probability).limit,
            scale: (1.0 / (1.0 - probability)) as f32,
        })
    }

    /// Drops elements of the attention probabilities of some examples of a batch, `[examples · heads, length, length]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attention(
        &self,
        probabilities: &Tensor,
        probability: f64,
        site: u32,
        batch: &PackedBatch,
        examples: &[usize],
    ) -> Result<Tensor> {
        let [rows, length] = [0, 1].map(|dimension| probabilities.size()[dimension] as u32);
        let heads = rows / examples.len() as u32;
        let of_example = |&example: &usize| {
            let slot = batch.slots[example];
            (0..heads).flat_map(move |head| (0..length).map(move |query| [query | head << 16, slot, site]))
        };
        match self.pattern(probability) {
            Some(pattern) => {
                let counters = examples.iter().flat_map(of_example).collect();
                dropped(probabilities, PatternedRows { pattern, counters })
            }
            None => Ok(probabilities.shallow_clone()),
        }
    }
}

/// Drops elements of rows on the CPU. Backward multiplies by the same numbers, computed again: no pattern is kept.
fn dropped(input: &Tensor, rows: PatternedRows) -> Result<Tensor> {
    let dropped = rows.drop_elements(&input.f_detach()?)?;
    with_backward(dropped, &[input], move |gradient| Ok(vec![rows.drop_elements(gradient)?]))
}

/// Returns the counters of the packed tokens of a batch: position, example and place in the network.
pub(super) fn token_counters(batch: &PackedBatch, site: u32) -> Vec<[u32; 3]> {
    (batch.lengths.iter().zip(&batch.slots))
        .flat_map(|(&length, &slot)| (0..length as u32).map(move |position| [position, slot, site]))
        .collect()
}

/// Which elements of a row are kept, given its counter: those whose random number is at most `limit`.
#[derive(Clone, Copy)]
struct Pattern {
    key: Key,
    limit: u32,
    /// The factor on what is kept.
    scale: f32,
}

/// The pattern of the rows of one tensor.
pub(super) struct PatternedRows {
    pattern: Pattern,
    counters: Vec<[u32; 3]>,
}

impl PatternedRows {
    /// Writes a row with the pattern of the row with that number.
    pub fn drop_row<T: Number>(&self, row: usize, values: &[T], dropped: &mut [T]) {
        drop_row(values, dropped, self.pattern, self.counters[row]);
    }

    /// Returns values with the pattern, in float32 or bfloat16 as they are.
    fn drop_elements(&self, values: &Tensor) -> Result<Tensor> {
        let values = values.f_contiguous()?;
        match values.kind() {
            Kind::BFloat16 => self.drop_numbers::<bf16>(&values),
            _ => self.drop_numbers::<f32>(&values),
        }
    }

    fn drop_numbers<T: Number>(&self, values: &Tensor) -> Result<Tensor> {
        let mut dropped = values.f_empty_like()?;
        let width = values.size().last().copied().unwrap_or(1) as usize;
        let rows_per_task = (16_384 / width.max(1)).max(1);
        let part = width * rows_per_task;
        (elements_mut::<T>(&mut dropped)?.par_chunks_mut(part))
            .zip(elements::<T>(values)?.par_chunks(part))
            .zip(self.counters.par_chunks(rows_per_task))
            .for_each(|((dropped, values), counters)| {
                let rows = dropped.chunks_mut(width).zip(values.chunks(width)).zip(counters);
                rows.for_each(|((dropped, values), &counter)| {
                    drop_row(values, dropped, self.pattern, counter)
                });
            });
        Ok(dropped)
    }
}

/// Multiplies one row by the pattern.
#[multiversion(targets = "simd")]
fn drop_row<T: Number>(values: &[T], dropped: &mut [T], pattern: Pattern, counter: [u32; 3]) {
    for (index, (values, dropped)) in values.chunks(GROUP).zip(dropped.chunks_mut(GROUP)).enumerate() {
        let numbers = random::group(pattern.key, index as u32, counter);
        for ((dropped, value), number) in dropped.iter_mut().zip(values).zip(numbers) {
            let factor = if number <= pattern.limit { pattern.scale } else { 0.0 };
            *dropped = T::from_float(value.to_float() * factor);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::data::Encoded;

    pub fn batch(lengths: &[usize], first_slot: usize) -> PackedBatch {
        let examples: Vec<_> = lengths
            .iter()
            .map(|&length| Encoded { ids: vec![1; length], token_types: vec![0; length] })
            .collect();
        PackedBatch::pack(&examples.iter().collect::<Vec<_>>(), first_slot, Device::Cpu).unwrap()
    }

    fn tokens(
        dropout: &Dropout,
        rows: &Tensor,
        probability: f64,
        site: u32,
        batch: &PackedBatch,
    ) -> Result<Tensor> {
        dropout.rows(rows, probability, site, (Rows::Tokens, 1), batch)
    }

    #[test]
    fn the_pattern_of_an_example_does_not_depend_on_its_batch() {
        let dropout = Dropout::new(42, Purpose::Dropout, 7, 0, Device::Cpu).unwrap();
        let ones = |tokens: i64| Tensor::ones([tokens, 100], (Kind::Float, Device::Cpu));
        let whole = tokens(&dropout, &ones(9), 0.3, 2, &batch(&[4, 5], 0)).unwrap();
        let second = tokens(&dropout, &ones(5), 0.3, 2, &batch(&[5], 1)).unwrap();
        assert_eq!(whole.narrow(0, 4, 5), second);

        let square = |examples: i64, longest: i64| {
            Tensor::ones([examples * 3, longest, longest], (Kind::Float, Device::Cpu))
        };
        let whole = dropout.attention(&square(2, 5), 0.3, 2, &batch(&[4, 5], 0), &[1, 0]).unwrap();
        let first = dropout.attention(&square(1, 4), 0.3, 2, &batch(&[4], 0), &[0]).unwrap();
        assert_eq!(whole.narrow(0, 3, 3).narrow(1, 0, 4).narrow(2, 0, 4), first);
    }

    #[test]
    fn bfloat16_has_the_same_pattern_and_rounds_to_the_nearest() {
        let dropout = Dropout::new(42, Purpose::Dropout, 7, 0, Device::Cpu).unwrap();
        let rows = Tensor::randn([9, 100], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let batch = batch(&[4, 5], 0);
        let half = tokens(&dropout, &rows, 0.3, 2, &batch).unwrap();
        let float = tokens(&dropout, &rows.to_kind(Kind::Float), 0.3, 2, &batch).unwrap();
        assert_eq!(half.kind(), Kind::BFloat16);
        assert_eq!(half, float.to_kind(Kind::BFloat16));
        let nan = Tensor::full([1, 1], f64::from(f32::from_bits(0x7F80_0001)), (Kind::BFloat16, Device::Cpu));
        assert!(
            f64::try_from(dropout.rows(&nan, 0.3, 2, (Rows::Examples, 1), &batch).unwrap()).unwrap().is_nan()
        );
    }

    #[test]
    fn the_share_of_dropped_elements_is_the_probability_and_the_mean_is_kept() {
        let dropout = Dropout::new(1, Purpose::Dropout, 0, 0, Device::Cpu).unwrap();
        let rows = Tensor::ones([1000, 300], (Kind::Float, Device::Cpu));
        let dropped = tokens(&dropout, &rows, 0.1, 0, &batch(&[1000], 0)).unwrap();
        let zeros = f64::try_from(dropped.eq(0.0).to_kind(Kind::Double).mean(Kind::Double)).unwrap();
        // Five standard errors of a share over 300,000 draws.
        assert!((zeros - 0.1).abs() < 5.0 * (0.09f64 / 3e5).sqrt(), "{zeros}");
        assert_eq!(dropped.max(), Tensor::from((1.0f64 / 0.9) as f32));
        let other_site = tokens(&dropout, &rows, 0.1, 1, &batch(&[1000], 0)).unwrap();
        assert_ne!(dropped, other_site);
    }
}

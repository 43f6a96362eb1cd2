//! The passes of `select` by libtorch's operations, for scores on a GPU: counts and packed bits come back, scores do not.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::network::WORD;
use super::select::{Extreme, Half, LARGEST_KEY, LARGEST_SCORE, Scores, Selection, not_numbers};
use crate::error::Result;
use crate::libtorch::elements;

/// Scores that an operation works on at a time; a multiple of a word. Operations need up to 32 bytes for each.
const CHUNK: i64 = 1 << 24;

/// Scores on a device, one flat float32 tensor for each tensor of the model.
pub struct DeviceScores {
    scores: Vec<Tensor>,
    /// How many are worked on at a time.
    chunk: i64,
}

impl DeviceScores {
    /// Takes the scores of each tensor.
    pub fn new(scores: Vec<Tensor>) -> Self {
        Self { scores, chunk: CHUNK }
    }

    /// Takes the scores of each tensor, and works on so many at a time.
    #[cfg(test)]
    pub fn with_chunks_of(scores: Vec<Tensor>, chunk: i64) -> Self {
        Self { scores, chunk }
    }

    fn chunks(&self, tensors: Range<usize>) -> impl Iterator<Item = Result<Tensor>> {
        let size = self.chunk;
        self.scores[tensors].iter().flat_map(move |scores| {
            let count = scores.numel() as i64;
            (0..count)
                .step_by(size as usize)
                .map(move |start| Ok(scores.f_narrow(0, start, size.min(count - start))?))
        })
    }
}

/// Returns the bit patterns of scores, int32; minus zero counts as zero.
fn bits(scores: &Tensor) -> Result<Tensor> {
    Ok(scores.f_add_scalar(0.0)?.f_view_dtype(Kind::Int)?)
}

/// Returns the keys of bit patterns, int32.
fn keys(bits: &Tensor, extreme: Extreme) -> Result<Tensor> {
    Ok(match extreme {
        Extreme::Highest => bits.shallow_clone(),
        Extreme::Lowest => bits.f_bitwise_xor(i64::from(LARGEST_KEY))?,
    })
}

fn holds_any(condition: &Tensor) -> Result<bool> {
    Ok(condition.f_any()?.f_int64_value(&[])? != 0)
}

impl Scores for DeviceScores {
    fn counts(&self) -> Vec<usize> {
        self.scores.iter().map(Tensor::numel).collect()
    }

    fn histogram(&self, tensors: Range<usize>, extreme: Extreme, half: Half) -> Result<Vec<usize>> {
        let mut counts: Option<Tensor> = None;
        for chunk in self.chunks(tensors) {
            let bits = bits(&chunk?)?;
            if half == Half::Upper {
                let outside = bits.f_gt(i64::from(LARGEST_SCORE))?.f_logical_or(&bits.f_lt(0)?)?;
                if holds_any(&outside)? {
                    return Err(not_numbers());
                }
            }
            let keys = keys(&bits, extreme)?;
            let upper = keys.f_bitwise_right_shift_tensor_scalar(16)?;
            let buckets = match half {
                Half::Upper => upper,
                Half::LowerOf(bucket) => {
                    keys.f_masked_select(&upper.f_eq(i64::from(bucket))?)?.f_bitwise_and(0xFFFF)?
                }
            };
            let found = buckets.f_bincount(None::<Tensor>, half.buckets() as i64)?;
            counts = Some(counts.map_or(Ok(found.shallow_clone()), |counts| counts.f_add(&found))?);
        }
        let counts = counts.map(Vec::<i64>::try_from).transpose()?.unwrap_or_default();
        Ok(counts.into_iter().map(|count| count as usize).collect())
    }

    fn lowest_above(&self, limit: f32) -> Result<f32> {
        let mut lowest = f32::INFINITY;
        for chunk in self.chunks(0..self.scores.len()) {
            let chunk = chunk?;
            let above = chunk.f_masked_fill(&chunk.f_le(f64::from(limit))?, f64::INFINITY)?.f_min()?;
            lowest = lowest.min(f32::try_from(&above)?);
        }
        Ok(lowest)
    }

    fn mark(&self, tensor: usize, selection: &mut Selection, words: &mut [u64]) -> Result<()> {
        let limit = i64::from(selection.limit);
        let weights = [1u8, 2, 4, 8, 16, 32, 64, 128];
        let weights = Tensor::from_slice(&weights).f_to_device(self.scores[tensor].device())?;
        let words = words.chunks_mut(self.chunk as usize / WORD);
        for (chunk, words) in self.chunks(tensor..tensor + 1).zip(words) {
            let keys = keys(&bits(&chunk?)?, selection.extreme)?;
            let mut marks = keys.f_gt(limit)?;
            if selection.ties > 0 {
                let tied = keys.f_eq(limit)?;
                let count = tied.f_sum(Kind::Int64)?.f_int64_value(&[])? as usize;
                let tied = match count <= selection.ties {
                    true => tied,
                    false => {
                        tied.f_logical_and(&tied.f_cumsum(0, Kind::Int64)?.f_le(selection.ties as i64)?)?
                    }
                };
                marks = marks.f_logical_or(&tied)?;
                if selection.ties != usize::MAX {
                    selection.ties -= count.min(selection.ties);
                }
            }
            // Eight marks a byte.
            let missing = (words.len() * WORD) as i64 - marks.size()[0];
            let marks = marks.f_to_kind(Kind::Uint8)?.f_constant_pad_nd([0, missing])?.f_view([-1, 8])?;
            let bytes = marks.f_mul(&weights)?.f_sum_dim_intlist(1i64, false, Kind::Uint8)?;
            let bytes = bytes.f_to_device(tch::Device::Cpu)?;
            for (word, bytes) in words.iter_mut().zip(elements::<u8>(&bytes)?.chunks_exact(8)) {
                *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
            }
        }
        Ok(())
    }
}

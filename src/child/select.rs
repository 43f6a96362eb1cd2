//! Order statistics of hundreds of millions of scores without sorting them.
//!
//! The bit patterns of non-negative float32 numbers are in the order of the numbers, so the k-th largest is found by
//! counting upper halves (one pass) and then the lower halves of the one upper half that matters (a second pass). Two more
//! passes make the mask: one counts the scores that are equal to the limit, so that each chunk of the other knows how many
//! of its own belong to it. No result depends on the number of threads.

use std::ops::Range;

use multiversion::multiversion;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Keys are bit patterns without the sign.
pub(super) const LARGEST_KEY: u32 = u32::MAX >> 1;
/// Infinity: what lies above it is not a number, or has a sign.
pub(super) const LARGEST_SCORE: u32 = f32::INFINITY.to_bits();
const WORD: usize = 64;
/// Scores that one thread counts or marks at a time; a multiple of a word.
const CHUNK: usize = 1 << 16;

/// The end of the order that is selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The largest scores.
    Largest,
    /// The smallest scores.
    Smallest,
}

/// Which part of the keys is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The upper half of all keys, of which scores that are no such thing are refused.
    Upper,
    /// The lower half of the keys with this upper half.
    LowerOf(u32),
}

impl Half {
    /// Returns the number of values of the half.
    pub fn buckets(self) -> usize {
        if self == Half::Upper { (LARGEST_KEY >> 16) as usize + 1 } else { 1 << 16 }
    }
}

/// Scores of several tensors, wherever they are.
pub trait Scores {
    /// Returns the number of scores of each tensor.
    fn counts(&self) -> Vec<usize>;

    /// Counts the keys of some tensors by one half of their bits.
    ///
    /// # Errors
    /// Fails if a score is negative or not a number.
    fn histogram(&self, tensors: Range<usize>, end: End, half: Half) -> Result<Vec<usize>>;

    /// Returns the smallest score above a limit; infinity, if there is none.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn lowest_above(&self, limit: f32) -> Result<f32>;

    /// Writes which scores of a tensor are selected, one bit a score, into words that it fills but for the end of the last.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn mark(&self, tensor: usize, selection: &mut Selection, words: &mut [u64]) -> Result<()>;
}

/// What is selected, of scores that are looked at in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The end that it begins at.
    pub end: End,
    /// The key of the last score that belongs to it.
    pub limit: u32,
    /// How many scores at the limit still belong to it.
    pub ties: usize,
}

impl Selection {
    /// Selects every score of at least `limit`.
    pub fn at_least(limit: f32) -> Self {
        Self { end: End::Largest, limit: key(End::Largest, limit), ties: usize::MAX }
    }

    /// Selects exactly the `count` largest or smallest of all scores of some tensors; among equals the earlier ones.
    ///
    /// # Errors
    /// Fails if a score is negative or not a number.
    pub fn extreme(scores: &dyn Scores, tensors: Range<usize>, count: usize, end: End) -> Result<Self> {
        let (limit, beyond) = kth(scores, tensors, count.max(1), end)?;
        Ok(match count {
            0 => Selection { end, limit: u32::MAX, ties: 0 },
            count => Selection { end, limit, ties: count - beyond },
        })
    }
}

/// Returns the key of a score, in an order in which the selected end is the upper one; minus zero counts as zero.
#[inline(always)]
fn key(end: End, score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if end == End::Largest { bits } else { bits ^ LARGEST_KEY }
}

/// Returns numpy's `percentile` of all scores with linear interpolation, at a fraction in [0, 1].
///
/// # Errors
/// Fails if a score is negative or not a number.
pub fn percentile(scores: &dyn Scores, fraction: f64) -> Result<f32> {
    let counts = scores.counts();
    let total: usize = counts.iter().sum();
    let rank = fraction * (total - 1) as f64;
    let from_above = total - rank.floor() as usize;
    let (limit, beyond) = kth(scores, 0..counts.len(), from_above, End::Largest)?;
    let lower = f32::from_bits(limit);
    // The next one is equal to it, or the lowest of those beyond.
    let upper = match from_above - 1 > beyond || rank.fract() == 0.0 {
        true => lower,
        false => scores.lowest_above(lower)?,
    };
    Ok(lower + ((f64::from(upper) - f64::from(lower)) * rank.fract()) as f32)
}

/// Returns the key of the `count`-th score from an end and the number of scores beyond it.
fn kth(scores: &dyn Scores, tensors: Range<usize>, count: usize, end: End) -> Result<(u32, usize)> {
    let upper = scores.histogram(tensors.clone(), end, Half::Upper)?;
    let (bucket, above) = bucket_of(&upper, count);
    let lower = scores.histogram(tensors, end, Half::LowerOf(bucket as u32))?;
    let (rest, above_in_bucket) = bucket_of(&lower, count - above);
    Ok(((bucket as u32) << 16 | rest as u32, above + above_in_bucket))
}

/// Walks down from the highest bucket to the one that holds the `count`-th largest; also counts what lies above.
fn bucket_of(histogram: &[usize], count: usize) -> (usize, usize) {
    let mut above = 0;
    for (bucket, &members) in histogram.iter().enumerate().rev() {
        if above + members >= count {
            return (bucket, above);
        }
        above += members;
    }
    (0, above)
}

/// The error of scores that cannot be put in order.
pub(super) fn not_numbers() -> Error {
    Error::Diverged("the Fisher information has entries that are not numbers".into())
}

/// Scores in the memory of the host, one slice a tensor.
pub struct HostScores<'a>(pub Vec<&'a [f32]>);

impl Scores for HostScores<'_> {
    fn counts(&self) -> Vec<usize> {
        self.0.iter().map(|scores| scores.len()).collect()
    }

    fn histogram(&self, tensors: Range<usize>, end: End, half: Half) -> Result<Vec<usize>> {
        let chunks: Vec<&[f32]> = self.0[tensors].iter().flat_map(|scores| scores.chunks(CHUNK)).collect();
        // A histogram for each thread, and not for each chunk.
        let share = chunks.len().div_ceil(rayon::current_num_threads()).max(1);
        let counted = chunks.par_chunks(share).map(|chunks| {
            let mut counts = vec![0usize; half.buckets()];
            let mut largest = 0;
            for chunk in chunks {
                largest = largest.max(count_chunk(&mut counts, chunk, end, half));
            }
            (counts, largest)
        });
        let add = |(mut left, largest): (Vec<usize>, u32), (right, other): (Vec<usize>, u32)| {
            left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
            (left, largest.max(other))
        };
        let (counts, largest) = counted.reduce(|| (vec![0; half.buckets()], 0), add);
        if largest > LARGEST_SCORE { Err(not_numbers()) } else { Ok(counts) }
    }

    fn lowest_above(&self, limit: f32) -> Result<f32> {
        let chunks = self.0.par_iter().flat_map(|scores| scores.par_chunks(CHUNK));
        let lowest = |chunk: &[f32]| {
            let above = chunk.iter().filter(|&&score| score > limit);
            above.fold(f32::INFINITY, |lowest, &score| lowest.min(score))
        };
        Ok(chunks.map(lowest).reduce(|| f32::INFINITY, f32::min))
    }

    fn mark(&self, tensor: usize, selection: &mut Selection, words: &mut [u64]) -> Result<()> {
        let Selection { end, limit, .. } = *selection;
        let scores = self.0[tensor].par_chunks(CHUNK);
        let tied: Vec<usize> = match selection.ties {
            0 => vec![0; scores.len()],
            _ => scores.clone().map(|scores| count_ties(scores, end, limit)).collect(),
        };
        let quotas: Vec<usize> = (tied.iter())
            .map(|&tied| {
                let quota = tied.min(selection.ties);
                // Of all ties there is no end.
                selection.ties -= if selection.ties == usize::MAX { 0 } else { quota };
                quota
            })
            .collect();
        let parts = scores.zip(words.par_chunks_mut(CHUNK / WORD)).zip(tied.par_iter().zip(&quotas));
        parts.for_each(|((scores, words), (&tied, &quota))| {
            mark_chunk(scores, words, end, limit);
            if quota > 0 {
                add_ties(scores, words, *selection, if quota == tied { usize::MAX } else { quota });
            }
        });
        Ok(())
    }
}

/// Counts the keys of a chunk; returns the largest bit pattern.
fn count_chunk(counts: &mut [usize], chunk: &[f32], end: End, half: Half) -> u32 {
    let mut largest = 0;
    match half {
        Half::Upper => {
            for &score in chunk {
                largest = largest.max((score + 0.0).to_bits());
                // A sign is noticed in `largest`; here it must only not lead out of the counts.
                counts[(key(end, score) >> 16) as usize & (counts.len() - 1)] += 1;
            }
        }
        Half::LowerOf(bucket) => {
            for key in chunk.iter().map(|&score| key(end, score)).filter(|key| key >> 16 == bucket) {
                counts[(key & 0xFFFF) as usize] += 1;
            }
        }
    }
    largest
}

#[multiversion(targets = "simd")]
fn count_ties(scores: &[f32], end: End, limit: u32) -> usize {
    scores.iter().map(|&score| u32::from(key(end, score) == limit)).sum::<u32>() as usize
}

/// Writes the bits of the scores beyond the limit.
#[multiversion(targets = "simd")]
fn mark_chunk(scores: &[f32], words: &mut [u64], end: End, limit: u32) {
    for (scores, word) in scores.chunks(WORD).zip(words) {
        let mut marks = 0;
        for (bit, &score) in scores.iter().enumerate() {
            marks |= u64::from(key(end, score) > limit) << bit;
        }
        *word = marks;
    }
}

/// Sets the bits of the first `quota` scores at the limit.
fn add_ties(scores: &[f32], words: &mut [u64], selection: Selection, quota: usize) {
    let Selection { end, limit, .. } = selection;
    let places = scores.iter().enumerate().filter(|(_, score)| key(end, **score) == limit);
    for (place, _) in places.take(quota) {
        words[place / WORD] |= 1 << (place % WORD);
    }
}

//! Order statistics of hundreds of millions of scores without sorting them.
//!
//! The bit patterns of non-negative float32 numbers are in the order of the numbers, so the k-th largest is found by
//! counting upper halves (one pass) and then the lower halves of the one upper half that matters (a second pass). Two more
//! passes make the mask: one counts the scores that are equal to the limit, so that each chunk of the other knows how many
//! of its own belong to it. No result depends on the number of threads.

use std::ops::Range;

use multiversion::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::network::WORD;
use crate::error::{Error, Result};

/// Keys are bit patterns without the sign.
pub(super) const LARGEST_KEY: u32 = u32::MAX >> 1;
/// Infinity: what lies above it is not a number, or has a sign.
pub(super) const LARGEST_SCORE: u32 = f32::INFINITY.to_bits();
/// Scores that one thread counts or marks at a time; a multiple of a word.
const CHUNK: usize = 1 << 16;

/// Which weights of the scope make a fixed child network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extreme {
    /// Those with the highest scores, as in the paper.
    #[default]
    Highest,
    /// Those with the lowest scores.
    Lowest,
}

/// Which part of the keys is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The upper half of all keys; scores that are negative or no numbers are refused on the way.
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
    fn histogram(&self, tensors: Range<usize>, extreme: Extreme, half: Half) -> Result<Vec<usize>>;

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
    pub extreme: Extreme,
    /// The key of the last score that belongs to it.
    pub limit: u32,
    /// How many scores at the limit still belong to it.
    pub ties: usize,
}

impl Selection {
    /// Selects every score of at least `limit`.
    pub fn at_least(limit: f32) -> Self {
        Self { extreme: Extreme::Highest, limit: key(Extreme::Highest, limit), ties: usize::MAX }
    }

    /// Selects exactly the `count` largest or smallest of all scores of some tensors; among equals the earlier ones.
    ///
    /// # Errors
    /// Fails if a score is negative or not a number.
    pub fn extreme(
        scores: &dyn Scores,
        tensors: Range<usize>,
        count: usize,
        extreme: Extreme,
    ) -> Result<Self> {
        let (limit, beyond) = kth(scores, tensors, count.max(1), extreme)?;
        Ok(match count {
            0 => Selection { extreme, limit: LARGEST_KEY, ties: 0 },
            count => Selection { extreme, limit, ties: count - beyond },
        })
    }
}

/// Returns the key of a score, in an order in which the selected end is the upper one; minus zero counts as zero.
#[inline(always)]
fn key(extreme: Extreme, score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    if extreme == Extreme::Highest { bits } else { bits ^ LARGEST_KEY }
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
    let (limit, beyond) = kth(scores, 0..counts.len(), from_above, Extreme::Highest)?;
    let lower = f32::from_bits(limit);
    // The next one is equal to it, or the lowest of those beyond.
    let upper = match from_above - 1 > beyond || rank.fract() == 0.0 {
        true => lower,
        false => scores.lowest_above(lower)?,
    };
    Ok(lower + ((f64::from(upper) - f64::from(lower)) * rank.fract()) as f32)
}

/// Returns the key of the `count`-th score from an end and the number of scores beyond it.
fn kth(scores: &dyn Scores, tensors: Range<usize>, count: usize, extreme: Extreme) -> Result<(u32, usize)> {
    let upper = scores.histogram(tensors.clone(), extreme, Half::Upper)?;
    let (bucket, above) = bucket_of(&upper, count);
    let lower = scores.histogram(tensors, extreme, Half::LowerOf(bucket as u32))?;
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
    Error::Diverged("the scores that choose the child network have entries that are not numbers".into())
}

/// Scores in the memory of the host, one slice a tensor.
pub struct HostScores<'a>(pub Vec<&'a [f32]>);

impl Scores for HostScores<'_> {
    fn counts(&self) -> Vec<usize> {
        self.0.iter().map(|scores| scores.len()).collect()
    }

    fn histogram(&self, tensors: Range<usize>, extreme: Extreme, half: Half) -> Result<Vec<usize>> {
        let chunks: Vec<&[f32]> = self.0[tensors].iter().flat_map(|scores| scores.chunks(CHUNK)).collect();
        // A histogram for each thread, and not for each chunk.
        let share = chunks.len().div_ceil(rayon::current_num_threads()).max(1);
        let counted = chunks.par_chunks(share).map(|chunks| {
            let mut counts = vec![0usize; half.buckets()];
            let mut largest = 0;
            for chunk in chunks {
                largest = largest.max(count_chunk(&mut counts, chunk, extreme, half));
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
        let Selection { extreme, limit, .. } = *selection;
        let scores = self.0[tensor].par_chunks(CHUNK);
        let tied: Vec<usize> = match selection.ties {
            0 => vec![0; scores.len()],
            _ => scores.clone().map(|scores| count_ties(scores, extreme, limit)).collect(),
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
            mark_chunk(scores, words, extreme, limit);
            if quota > 0 {
                add_ties(scores, words, *selection, if quota == tied { usize::MAX } else { quota });
            }
        });
        Ok(())
    }
}

/// Counts the keys of a chunk; returns the largest bit pattern.
fn count_chunk(counts: &mut [usize], chunk: &[f32], extreme: Extreme, half: Half) -> u32 {
    let mut largest = 0;
    match half {
        Half::Upper => {
            for &score in chunk {
                largest = largest.max((score + 0.0).to_bits());
                // A sign is noticed in `largest`; here it must only not lead out of the counts.
                counts[(key(extreme, score) >> 16) as usize & (counts.len() - 1)] += 1;
            }
        }
        Half::LowerOf(bucket) => {
            for key in chunk.iter().map(|&score| key(extreme, score)).filter(|key| key >> 16 == bucket) {
                counts[(key & 0xFFFF) as usize] += 1;
            }
        }
    }
    largest
}

#[multiversion(targets = "simd")]
fn count_ties(scores: &[f32], extreme: Extreme, limit: u32) -> usize {
    scores.iter().map(|&score| u32::from(key(extreme, score) == limit)).sum::<u32>() as usize
}

/// Writes the bits of the scores beyond the limit.
#[multiversion(targets = "simd")]
fn mark_chunk(scores: &[f32], words: &mut [u64], extreme: Extreme, limit: u32) {
    for (scores, word) in scores.chunks(WORD).zip(words) {
        let mut marks = 0;
        for (bit, &score) in scores.iter().enumerate() {
            marks |= u64::from(key(extreme, score) > limit) << bit;
        }
        *word = marks;
    }
}

/// Sets the bits of the first `quota` scores at the limit.
fn add_ties(scores: &[f32], words: &mut [u64], selection: Selection, quota: usize) {
    let Selection { extreme, limit, .. } = selection;
    let places = scores.iter().enumerate().filter(|(_, score)| key(extreme, **score) == limit);
    for (place, _) in places.take(quota) {
        words[place / WORD] |= 1 << (place % WORD);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::Tensor;

    use super::super::select_device::DeviceScores;
    use super::*;

    /// The marks of all scores, tensor by tensor.
    fn marks(scores: &dyn Scores, selection: &Selection) -> Vec<bool> {
        let mut selection = *selection;
        let mut marks = Vec::new();
        for (tensor, count) in scores.counts().into_iter().enumerate() {
            let mut words = vec![u64::MAX; count.div_ceil(WORD)];
            scores.mark(tensor, &mut selection, &mut words).unwrap();
            marks.extend((0..count).map(|bit| words[bit / WORD] >> (bit % WORD) & 1 == 1));
        }
        marks
    }

    /// A stable sort, and the first so many of it.
    fn sorted(scores: &[f32], count: usize, extreme: Extreme) -> Vec<bool> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&left, &right| match extreme {
            Extreme::Highest => scores[right].total_cmp(&scores[left]),
            Extreme::Lowest => scores[left].total_cmp(&scores[right]),
        });
        let mut selected = vec![false; scores.len()];
        order[..count].iter().for_each(|&index| selected[index] = true);
        selected
    }

    fn on_device(slices: &[&[f32]]) -> DeviceScores {
        // Chunks that tensors do not fill, and such as they fill several of.
        DeviceScores::with_chunks_of(slices.iter().map(|slice| Tensor::from_slice(slice)).collect(), 64)
    }

    proptest! {
        /// Also what a GPU uses, tried on the CPU's tensors.
        #[test]
        fn selects_what_a_stable_sort_selects(
            scores in prop::collection::vec(prop_oneof![Just(0.0f32), Just(1e-30), Just(2.5), 0.0f32..3.0], 1..300),
            cut in 0.0f64..1.0,
            share in 0.0f64..=1.0,
        ) {
            let count = (share * scores.len() as f64).round() as usize;
            let (first, second) = scores.split_at((cut * scores.len() as f64) as usize);
            let (host, device) = (HostScores(vec![first, second]), on_device(&[first, second]));
            for extreme in [Extreme::Highest, Extreme::Lowest] {
                let selection = Selection::extreme(&host, 0..2, count, extreme).unwrap();
                prop_assert_eq!(Selection::extreme(&device, 0..2, count, extreme).unwrap(), selection);
                let expected = sorted(&scores, count, extreme);
                prop_assert_eq!(marks(&host, &selection), expected.clone());
                prop_assert_eq!(marks(&device, &selection), expected);
            }
        }
    }

    /// Ties that begin and end within chunks, over several of them.
    #[test]
    fn ties_over_many_chunks_go_to_the_earlier_whatever_the_threads() {
        let count = 5 * CHUNK + 77;
        let scores: Vec<f32> = (0..count).map(|index| [0.5, 1.0, 0.0, 0.5, -0.0][index % 5]).collect();
        let (first, second) = scores.split_at(2 * CHUNK + 64);
        let host = HostScores(vec![first, second]);
        let plain: Vec<f32> = scores.iter().map(|score| score + 0.0).collect();
        for (extreme, kept) in
            [(Extreme::Highest, count / 2), (Extreme::Highest, count / 5 + 3), (Extreme::Lowest, count / 4)]
        {
            let expected = sorted(&plain, kept, extreme);
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let selected =
                    pool.install(|| marks(&host, &Selection::extreme(&host, 0..2, kept, extreme).unwrap()));
                assert!(selected == expected, "{extreme:?} {kept} {threads}");
            }
        }
        let all_ties = marks(&host, &Selection::at_least(0.5));
        assert!(all_ties.iter().zip(&scores).all(|(mark, score)| *mark == (*score >= 0.5)));
    }

    #[test]
    fn what_is_no_score_is_refused() {
        for wrong in [f32::NAN, -f32::NAN, -1.0, f32::NEG_INFINITY] {
            let scores = [1.0, wrong, f32::INFINITY];
            for extreme in [Extreme::Highest, Extreme::Lowest] {
                assert!(Selection::extreme(&HostScores(vec![&scores]), 0..1, 1, extreme).is_err(), "{wrong}");
                assert!(Selection::extreme(&on_device(&[&scores]), 0..1, 1, extreme).is_err(), "{wrong}");
            }
        }
        assert!(
            Selection::extreme(&HostScores(vec![&[1.0, f32::INFINITY]]), 0..1, 1, Extreme::Highest).is_ok()
        );
    }

    /// Literal values from `numpy.percentile`.
    #[test]
    fn percentiles_interpolate_as_numpy_does() {
        let scores = [0.0f32, 4.0, 1.0, 3.0, 10.0];
        let (host, device) =
            (HostScores(vec![&scores[..2], &scores[2..]]), on_device(&[&scores[..2], &scores[2..]]));
        for (fraction, expected) in [(0.0, 0.0), (0.7, 3.8), (0.5, 3.0), (0.9, 7.6), (1.0, 10.0)] {
            for scores in [&host as &dyn Scores, &device] {
                let found = percentile(scores, fraction).unwrap();
                assert!((found - expected).abs() < 1e-6, "{fraction}: {found} is not {expected}");
            }
        }
        // Between equal ones there is nothing.
        assert_eq!(percentile(&HostScores(vec![&[1.0, 2.0, 2.0, 3.0]]), 0.5).unwrap(), 2.0);
    }
}

//! Order statistics of hundreds of millions of scores without sorting them.
//!
//! The bit patterns of non-negative float32 numbers are in the order of the numbers, so the k-th largest is found by
//! counting upper halves (one pass) and then the lower halves of the one upper half that matters (a second pass).

use rayon::prelude::*;

const BUCKETS: usize = 1 << 16;

/// The end of the order that is selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The largest scores.
    Largest,
    /// The smallest scores.
    Smallest,
}

impl End {
    /// The bit pattern of a score, in an order in which the selected end is the upper one; minus zero counts as zero.
    fn bits(self, score: f32) -> u32 {
        let bits = (score + 0.0).to_bits();
        if self == End::Largest { bits } else { !bits }
    }
}

/// Decides, element by element in order, what is selected.
pub struct Selection {
    end: End,
    limit: u32,
    ties: usize,
}

impl Selection {
    /// Selects every score of at least `limit`.
    pub fn at_least(limit: f32) -> Self {
        Self { end: End::Largest, limit: End::Largest.bits(limit), ties: usize::MAX }
    }

    /// Returns whether the next score is selected: if it is beyond the limit, or at it while ties are left.
    pub fn takes(&mut self, score: f32) -> bool {
        let score = self.end.bits(score);
        let tied = score == self.limit && self.ties > 0;
        if tied {
            self.ties -= 1;
        }
        score > self.limit || tied
    }
}

/// Selects exactly the `count` largest or smallest of all scores; among equals the earlier ones.
pub fn extreme(slices: &[&[f32]], count: usize, end: End) -> Selection {
    if count == 0 {
        return Selection { end, limit: u32::MAX, ties: 0 };
    }
    let (limit, beyond) = kth(slices, count, end);
    Selection { end, limit, ties: count - beyond }
}

/// Returns numpy's `percentile` with linear interpolation, at a fraction in [0, 1].
pub fn percentile(slices: &[&[f32]], fraction: f64) -> f32 {
    let total: usize = slices.iter().map(|slice| slice.len()).sum();
    let rank = fraction * (total - 1) as f64;
    let from_below = |rank: usize| f32::from_bits(kth(slices, total - rank, End::Largest).0);
    let (lower, upper) = (from_below(rank.floor() as usize), from_below(rank.ceil() as usize));
    lower + ((f64::from(upper) - f64::from(lower)) * rank.fract()) as f32
}

/// Returns the bit pattern of the `count`-th score from an end and the number of scores beyond it.
fn kth(slices: &[&[f32]], count: usize, end: End) -> (u32, usize) {
    let upper = histogram(slices, |score| Some(end.bits(score) >> 16));
    let (bucket, above) = bucket_of(&upper, count);
    let lower = histogram(slices, |score| {
        let bits = end.bits(score);
        (bits >> 16 == bucket as u32).then_some(bits & 0xFFFF)
    });
    let (rest, above_in_bucket) = bucket_of(&lower, count - above);
    ((bucket as u32) << 16 | rest as u32, above + above_in_bucket)
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

fn histogram(slices: &[&[f32]], bucket: impl Fn(f32) -> Option<u32> + Sync) -> Vec<usize> {
    let add = |mut left: Vec<usize>, right: Vec<usize>| {
        left.iter_mut().zip(right).for_each(|(left, right)| *left += right);
        left
    };
    slices
        .par_iter()
        .flat_map(|slice| slice.par_chunks(1 << 20))
        .fold(
            || vec![0; BUCKETS],
            |mut counts, chunk| {
                for bucket in chunk.iter().filter_map(|&score| bucket(score)) {
                    counts[bucket as usize] += 1;
                }
                counts
            },
        )
        .reduce(|| vec![0; BUCKETS], add)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn selects_what_a_stable_sort_selects(
            scores in prop::collection::vec(prop_oneof![Just(0.0f32), Just(1e-30), Just(2.5), 0.0f32..3.0], 1..300),
            cut in 0.0f64..1.0,
            share in 0.0f64..=1.0,
        ) {
            let count = (share * scores.len() as f64).round() as usize;
            for end in [End::Largest, End::Smallest] {
                let mut order: Vec<usize> = (0..scores.len()).collect();
                order.sort_by(|&left, &right| match end {
                    End::Largest => scores[right].total_cmp(&scores[left]),
                    End::Smallest => scores[left].total_cmp(&scores[right]),
                });
                let mut expected = vec![false; scores.len()];
                order[..count].iter().for_each(|&index| expected[index] = true);

                let (first, second) = scores.split_at((cut * scores.len() as f64) as usize);
                let mut selection = extreme(&[first, second], count, end);
                let selected: Vec<bool> = scores.iter().map(|&score| selection.takes(score)).collect();
                prop_assert_eq!(selected, expected);
            }
        }
    }

    /// Literal values from `numpy.percentile`.
    #[test]
    fn percentiles_interpolate_as_numpy_does() {
        let scores = [0.0f32, 4.0, 1.0, 3.0, 10.0];
        for (fraction, expected) in [(0.0, 0.0), (0.7, 3.8), (0.5, 3.0), (0.9, 7.6), (1.0, 10.0)] {
            let found = percentile(&[&scores[..2], &scores[2..]], fraction);
            assert!((found - expected).abs() < 1e-6, "{fraction}: {found} is not {expected}");
        }
    }
}

//! Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the generator of CUDA's and PyTorch's kernels.
//!
//! A number is a pure function of a key and a counter, so nothing here has a state: a mask or a dropout pattern can
//! be computed in any order, by any number of threads, and again later, and is the same.
//!
//! The vectorised entry point works on *groups* of [`GROUP`] numbers: sixteen Philox blocks side by side, where number
//! `j` of a group is word `j / 16` of block `16 · group + j % 16`.

use rayon::prelude::*;

/// How many numbers a group has.
pub const GROUP: usize = 64;
const LANES: usize = GROUP / 4;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The key of a stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(pub [u32; 2]);

/// What a stream of random numbers is for; streams of different purposes are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The order of the training examples; the index is the epoch.
    Order = 1,
    /// Dropout in training; the index is the optimizer step.
    Dropout = 2,
    /// Child-Tuning_F's masks; the index is the optimizer step.
    Mask = 3,
    /// The initial values of parameters that are new or drawn anew.
    Initialisation = 4,
    /// Dropout in the Fisher pass; the index is the batch.
    FisherDropout = 5,
    /// The order of the examples in the Fisher pass.
    FisherOrder = 6,
    /// The choice of a subset of the training data.
    Subset = 7,
    /// The choice of examples whose labels become wrong, and of their wrong labels.
    LabelNoise = 8,
    /// The choice of a random fixed child network.
    RandomChild = 9,
    /// The choice of the examples that the Fisher pass takes.
    FisherExamples = 10,
    /// Noise on activations; the index is the optimizer step.
    Noise = 11,
    /// The weights that Mixout, and DPS in its form `mix`, put back; the index is the optimizer step.
    Mixout = 12,
    /// Dropout in further passes of a step; the index is the optimizer step.
    SecondDropout = 13,
    /// Noise in further passes of a step; the index is the optimizer step.
    SecondNoise = 14,
    /// The choice of what trials hold out of the training data.
    HeldOut = 15,
}

impl Key {
    /// Derives the key of one stream from a run's seed, the stream's purpose and an index such as the step.
    pub fn derive(seed: u64, purpose: Purpose, index: u64) -> Self {
        let counter = [index as u32, (index >> 32) as u32, purpose as u32, 0];
        let block = philox(counter, Key([seed as u32, (seed >> 32) as u32]));
        Key([block[0], block[1]])
    }

    /// Derives the key of one part of what the stream is for, such as a micro-batch of a step.
    pub fn of_part(self, part: u64) -> Self {
        let block = philox([part as u32, (part >> 32) as u32, 0, 1], self);
        Key([block[0], block[1]])
    }

    /// Returns the key as a seed of another generator, such as libtorch's for what a GPU draws: 63 bits, since it takes
    /// positive numbers.
    pub fn to_seed(self) -> u64 {
        (u64::from(self.0[0]) | u64::from(self.0[1]) << 32) >> 1
    }
}

/// Computes one Philox4x32-10 block.
pub fn philox(mut counter: [u32; 4], Key(mut key): Key) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let products = [0, 1].map(|i| u64::from(MULTIPLIERS[i]) * u64::from(counter[2 * i]));
        counter = [
            (products[1] >> 32) as u32 ^ counter[1] ^ key[0],
            products[1] as u32,
            (products[0] >> 32) as u32 ^ counter[3] ^ key[1],
            products[0] as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Computes the numbers of one group; `row` holds the three upper counter words.
///
/// Written lane by lane so that it vectorises wherever it is inlined into a function with wide registers. A word has 64 bits, of
/// which the lower half counts: processors multiply the lower halves of 64-bit lanes, and nothing has to be moved between products.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one lane of four arrays at a time is what vectorises")]
pub fn group(key: Key, group: u32, row: [u32; 3]) -> [u32; GROUP] {
    let product = |multiplier: u32, word: u64| u64::from(multiplier) * (word & u64::from(u32::MAX));
    let mut words = [[0u64; LANES]; 4];
    for lane in 0..LANES {
        words[0][lane] = u64::from(group * LANES as u32 + lane as u32);
    }
    for (word, value) in words[1..].iter_mut().zip(row) {
        *word = [u64::from(value); LANES];
    }
    let mut key = key.0;
    for _ in 0..ROUNDS {
        for lane in 0..LANES {
            let [first, second, third, fourth] = words.each_ref().map(|word| word[lane]);
            let products = [product(MULTIPLIERS[0], first), product(MULTIPLIERS[1], third)];
            words[0][lane] = (products[1] >> 32) ^ second ^ u64::from(key[0]);
            words[1][lane] = products[1];
            words[2][lane] = (products[0] >> 32) ^ fourth ^ u64::from(key[1]);
            words[3][lane] = products[0];
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    let mut numbers = [0u32; GROUP];
    for (number, &word) in numbers.iter_mut().zip(words.as_flattened()) {
        *number = word as u32;
    }
    numbers
}

/// The event "a random number is at most `limit`", of a given probability to within 2⁻³².
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bernoulli {
    /// The largest random number that counts as success.
    pub limit: u32,
}

impl Bernoulli {
    /// Makes the event of a probability in (0, 1]; a probability of 1 always happens.
    pub fn new(probability: f64) -> Self {
        let successes = (probability * 2f64.powi(32)).round().clamp(1.0, 2f64.powi(32));
        Self { limit: (successes - 1.0) as u32 }
    }
}

/// Returns the numbers `0..count` in an order that is a pure function of the key (Fisher–Yates).
pub fn permutation(count: usize, key: Key) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let block = philox([last as u32, (last as u64 >> 32) as u32, 0, 0], key);
        let number = u64::from(block[0]) | u64::from(block[1]) << 32;
        // The upper half of a 64 × 64-bit product is uniform on 0..=last to within 2⁻⁶⁴ · last.
        let choice = (u128::from(number) * (last as u128 + 1)) >> 64;
        order.swap(last, choice as usize);
    }
    order
}

/// Fills `values` with uniform deviates in [0, 1).
pub fn fill_uniform(values: &mut [f64], key: Key, stream: u32) {
    for (index, pair) in values.chunks_mut(2).enumerate() {
        let block = philox([index as u32, stream, 0, 0], key);
        for (value, words) in pair.iter_mut().zip(block.chunks_exact(2)) {
            *value = uniform53(words[0], words[1]) / 2f64.powi(53);
        }
    }
}

/// Makes a whole number below 2⁵³ of the upper bits of two random numbers.
fn uniform53(high: u32, low: u32) -> f64 {
    ((u64::from(high) << 21) | (u64::from(low) >> 11)) as f64
}

/// Pairs of deviates that are worth a thread.
const FEWEST_PAIRS: usize = 4096;

/// Fills `values` with normal deviates of mean 0 and the given standard deviation (Box–Muller).
pub fn fill_normal(values: &mut [f32], standard_deviation: f64, key: Key, stream: u32) {
    values.par_chunks_mut(2).with_min_len(FEWEST_PAIRS).enumerate().for_each(|(index, pair)| {
        let block = philox([index as u32, stream, 0, 0], key);
        // The first in (0, 1] so that its logarithm is finite.
        let radius = (-2.0 * ((uniform53(block[0], block[1]) + 1.0) / 2f64.powi(53)).ln()).sqrt();
        let angle = std::f64::consts::TAU * uniform53(block[2], block[3]) / 2f64.powi(53);
        let deviates = [radius * angle.cos(), radius * angle.sin()];
        for (value, deviate) in pair.iter_mut().zip(deviates) {
            *value = (deviate * standard_deviation) as f32;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123 for philox4x32-10.
    #[test]
    fn agrees_with_the_published_known_answers() {
        let ones = u32::MAX;
        let cases = [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([ones; 4], [ones; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, Key(key)), expected);
        }
    }

    #[test]
    fn a_group_is_sixteen_blocks_side_by_side() {
        let (key, row) = (Key([7, 9]), [3, 1, 4]);
        let numbers = group(key, 5, row);
        for lane in 0..LANES {
            let block = philox([5 * LANES as u32 + lane as u32, row[0], row[1], row[2]], key);
            for word in 0..4 {
                assert_eq!(numbers[word * LANES + lane], block[word]);
            }
        }
    }

    #[test]
    fn a_permutation_holds_every_number_once_and_depends_on_the_key() {
        let order = permutation(1000, Key::derive(42, Purpose::Order, 0));
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_eq!(order, permutation(1000, Key::derive(42, Purpose::Order, 0)));
        assert_ne!(order, permutation(1000, Key::derive(42, Purpose::Order, 1)));
        assert_ne!(order, permutation(1000, Key::derive(43, Purpose::Order, 0)));
    }

    #[test]
    fn certain_and_nearly_impossible_events() {
        assert_eq!(Bernoulli::new(1.0).limit, u32::MAX);
        assert_eq!(Bernoulli::new(1e-30).limit, 0);
        assert_eq!(Bernoulli::new(0.5).limit, u32::MAX / 2);
    }

    #[test]
    fn normal_deviates_have_the_right_moments() {
        let mut values = vec![0f32; 100_001];
        fill_normal(&mut values, 0.02, Key::derive(1, Purpose::Initialisation, 0), 0);
        let count = values.len() as f64;
        let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        let variance = values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum::<f64>() / count;
        // Five standard errors of the mean and of the variance.
        assert!(mean.abs() < 5.0 * 0.02 / count.sqrt(), "{mean}");
        assert!((variance / 4e-4 - 1.0).abs() < 5.0 * (2.0 / count).sqrt(), "{variance}");
    }
}

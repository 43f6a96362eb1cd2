//! Masks at work on the CPU: gradients on their way to the flat buffer, in one pass over them.
//!
//! For each gradient that backward makes, one pass turns it into float32, multiplies it by the mask, adds it to what
//! earlier micro-batches of the step left and sums the squares for the global norm. Work is cut at fixed places, so that
//! no bit depends on the number of threads.

use std::ops::Range;

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::Tensor;

use crate::error::Result;
use crate::libtorch::{Number, Stretch, elements, sums_of_squares};
use crate::random::{self, GROUP, Key};

/// Elements that one thread works on at a time: small enough to stay in its cache.
pub const CHUNK: usize = 256 * GROUP;

/// The mask of one step; the elements of the flat buffer that share a group start at a multiple of [`GROUP`].
#[derive(Clone, Copy)]
pub enum StepMask<'a> {
    /// Nothing is masked.
    Everything,
    /// A bit for each element of the flat buffer decides between two factors.
    Bits {
        /// The bits, [`GROUP`] a word.
        words: &'a [u64],
        /// The factor where the bit is set.
        inside: f32,
        /// The factor elsewhere.
        outside: f32,
    },
    /// Where the random number of an element is at most `limit` the factor is `scale`, elsewhere zero.
    Random {
        /// The key of the step.
        key: Key,
        /// The largest random number that is kept.
        limit: u32,
        /// The factor on what is kept.
        scale: f32,
    },
}

impl StepMask<'_> {
    /// Multiplies a group's values. By zero, where the mask says so, and not overwritten: what is not a number stays
    /// visible.
    #[inline(always)]
    fn apply(self, values: &mut [f32; GROUP], group: usize) {
        match self {
            StepMask::Everything => {}
            StepMask::Bits { words, inside, outside } => {
                let halves = [words[group] as u32, (words[group] >> 32) as u32];
                for (values, half) in values.chunks_exact_mut(GROUP / 2).zip(halves) {
                    for (bit, value) in values.iter_mut().enumerate() {
                        *value *= if half >> bit & 1 == 1 { inside } else { outside };
                    }
                }
            }
            StepMask::Random { key, limit, scale } => {
                // Rows of the embedding table that no token of the batch uses: zero stays zero, and costs no numbers.
                if values.iter().all(|value| value.to_bits() << 1 == 0) {
                    return;
                }
                let numbers = random::group(key, group as u32, [0; 3]);
                for (value, number) in values.iter_mut().zip(numbers) {
                    *value *= if number <= limit { scale } else { 0.0 };
                }
            }
        }
    }
}

/// A gradient as backward made it.
#[derive(Clone, Copy)]
pub enum Gradient<'a> {
    /// In float32.
    Float(&'a [f32]),
    /// In bfloat16.
    Half(&'a [bf16]),
}

impl<'a> Gradient<'a> {
    fn count(self) -> usize {
        match self {
            Gradient::Float(values) => values.len(),
            Gradient::Half(values) => values.len(),
        }
    }

    fn part(self, start: usize, count: usize) -> Self {
        match self {
            Gradient::Float(values) => Gradient::Float(&values[start..start + count]),
            Gradient::Half(values) => Gradient::Half(&values[start..start + count]),
        }
    }

    /// Reads a group into the first of `values`.
    #[inline(always)]
    fn read(self, start: usize, values: &mut [f32]) {
        let own = start..start + values.len();
        match self {
            Gradient::Float(numbers) => values.copy_from_slice(&numbers[own]),
            Gradient::Half(numbers) => {
                for (value, &number) in values.iter_mut().zip(&numbers[own]) {
                    *value = number.to_float();
                }
            }
        }
    }
}

/// Writes the masked gradient of a table, of which a pass has used some rows, to its place in the flat buffer, or adds it
/// to what is there; returns the sum of squares of what is there then.
///
/// `rows` names the row of each piece of the gradient, which has as many numbers as a row of the table; pieces of the same
/// row are added in their order. `held` are the rows of the place that may hold something else than zeros, in order, if that is
/// known; it is afterwards.
pub fn deposit_rows(
    place: &mut [f32],
    rows: &[i64],
    gradient: Gradient,
    mask: StepMask,
    first_group: usize,
    adds: bool,
    held: &mut Option<Vec<usize>>,
) -> f64 {
    let width = gradient.count() / rows.len().max(1);
    if !adds {
        match held.take().filter(|_| width > 0) {
            Some(held) => held.iter().for_each(|row| place[row * width..][..width].fill(0.0)),
            None => place.par_chunks_mut(CHUNK).for_each(|part| part.fill(0.0)),
        }
        *held = Some(Vec::new());
    }
    let mut pieces: Vec<(usize, usize)> =
        rows.iter().enumerate().map(|(piece, &row)| (row as usize, piece)).collect();
    pieces.sort_unstable();
    let (mut rest, mut cut, mut tasks) = (&mut *place, 0, Vec::new());
    for pieces in pieces.chunk_by(|one, next| one.0 == next.0) {
        let start = pieces[0].0 * width;
        let (own, after) = rest.split_at_mut(start - cut).1.split_at_mut(width);
        (rest, cut) = (after, start + width);
        tasks.push((start, own, pieces));
    }
    let squares: Vec<f64> = tasks
        .into_par_iter()
        .map_init(Vec::new, |scratch, (start, row, pieces)| {
            // The row among the groups that it has a part in.
            let (group, offset) = (first_group + start / GROUP, start % GROUP);
            scratch.clear();
            scratch.resize(width + (offset + width).next_multiple_of(GROUP), 0f32);
            let (numbers, sums) = scratch.split_at_mut(width);
            for &(_, piece) in pieces {
                gradient.read(piece * width, numbers);
                sums[offset..].iter_mut().zip(&*numbers).for_each(|(sum, number)| *sum += number);
            }
            mask_groups(sums, mask, group);
            row.iter_mut().zip(&sums[offset..]).for_each(|(place, sum)| *place += sum);
            sum_of_squares(row)
        })
        .collect();
    if let Some(held) = held {
        held.extend(pieces.iter().map(|(row, _)| row));
        held.sort_unstable();
        held.dedup();
    }
    match (adds, held) {
        (false, _) => squares.iter().sum(),
        // Earlier micro-batches may have used other rows.
        (true, Some(held)) => {
            let squares = held.par_iter().map(|row| sum_of_squares(&place[row * width..][..width]));
            squares.collect::<Vec<_>>().iter().sum()
        }
        (true, None) => place.par_chunks(CHUNK).map(sum_of_squares).collect::<Vec<_>>().iter().sum(),
    }
}

/// Writes a masked gradient to its place in the flat buffer, or adds it to what is there; returns the sum of squares of
/// what is there then. `first_group` is the place's first element divided by [`GROUP`].
pub fn deposit(place: &mut [f32], gradient: Gradient, mask: StepMask, first_group: usize, adds: bool) -> f64 {
    let squares: Vec<f64> = place
        .par_chunks_mut(CHUNK)
        .enumerate()
        .map(|(chunk, place)| {
            let gradient = gradient.part(chunk * CHUNK, place.len());
            deposit_chunk(place, gradient, mask, first_group + chunk * CHUNK / GROUP, adds)
        })
        .collect();
    squares.iter().sum()
}

/// Returns the norm of the elements in some ranges of a flat buffer on the CPU, `[total]` in float32.
///
/// # Errors
/// Fails if the buffer is none.
pub fn norm_of_spans(buffer: &Tensor, spans: &[Range<usize>]) -> Result<f64> {
    let values: &[f32] = elements(buffer)?;
    let squares = |span: &Range<usize>| -> f64 {
        values[span.clone()].par_chunks(CHUNK).map(sum_of_squares).collect::<Vec<_>>().iter().sum()
    };
    Ok(spans.iter().map(squares).sum::<f64>().sqrt())
}

/// Returns sums on a GPU that add up to that of the squares of the elements in some ranges of a flat buffer, `[total]` in float32.
///
/// # Errors
/// Fails if libtorch refuses.
pub fn squares_of_spans(buffer: &Tensor, spans: &[Range<usize>]) -> Result<Vec<Tensor>> {
    let squares = |span: &Range<usize>| {
        let stretch = Stretch { first_group: span.start / GROUP, chosen: None, mask: None };
        sums_of_squares(stretch, &buffer.f_narrow(0, span.start as i64, span.len() as i64)?)
    };
    spans.iter().map(squares).collect()
}

/// Adds the squares of gradients to sums, or lets them take the place of what is there.
pub fn add_squares(sums: &mut [f32], gradients: &[f32], adds: bool) {
    let chunks = sums.par_chunks_mut(CHUNK).zip(gradients.par_chunks(CHUNK));
    chunks.for_each(|(sums, gradients)| add_squares_of_chunk(sums, gradients, adds));
}

#[multiversion(targets = "simd")]
fn add_squares_of_chunk(sums: &mut [f32], gradients: &[f32], adds: bool) {
    for (sum, gradient) in sums.iter_mut().zip(gradients) {
        *sum = if adds { *sum } else { 0.0 } + gradient * gradient;
    }
}

/// Multiplies a part of the flat buffer by the mask, in place.
pub fn mask_in_place(values: &mut [f32], mask: StepMask, first_group: usize) {
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        mask_groups(values, mask, first_group + chunk * CHUNK / GROUP);
    });
}

#[multiversion(targets = "simd")]
fn deposit_chunk(
    place: &mut [f32],
    gradient: Gradient,
    mask: StepMask,
    first_group: usize,
    adds: bool,
) -> f64 {
    const LANES: usize = 16;
    let mut squares = [0f32; LANES];
    for (index, place) in place.chunks_mut(GROUP).enumerate() {
        let mut values = [0f32; GROUP];
        gradient.read(index * GROUP, &mut values[..place.len()]);
        mask.apply(&mut values, first_group + index);
        if adds {
            values.iter_mut().zip(&*place).for_each(|(value, &earlier)| *value += earlier);
        }
        for lanes in values.chunks_exact(LANES) {
            squares.iter_mut().zip(lanes).for_each(|(sum, value)| *sum += value * value);
        }
        place.copy_from_slice(&values[..place.len()]);
    }
    squares.iter().map(|&sum| f64::from(sum)).sum()
}

#[multiversion(targets = "simd")]
fn sum_of_squares(values: &[f32]) -> f64 {
    const LANES: usize = 16;
    let mut squares = [0f32; LANES];
    for lanes in values.chunks(LANES) {
        squares.iter_mut().zip(lanes).for_each(|(sum, value)| *sum += value * value);
    }
    squares.iter().map(|&sum| f64::from(sum)).sum()
}

#[multiversion(targets = "simd")]
fn mask_groups(values: &mut [f32], mask: StepMask, first_group: usize) {
    for (index, part) in values.chunks_mut(GROUP).enumerate() {
        let mut group = [0f32; GROUP];
        group[..part.len()].copy_from_slice(part);
        mask.apply(&mut group, first_group + index);
        part.copy_from_slice(&group[..part.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Bernoulli, Purpose};

    const COUNT: usize = 3 * CHUNK + 37;
    const FIRST_GROUP: usize = 5;

    fn numbers(seed: u32) -> Vec<f32> {
        (0..COUNT).map(|index| (index as f32 * 0.37 + seed as f32).sin() * 3.0).collect()
    }

    fn words() -> Vec<u64> {
        let key = Key::derive(3, Purpose::Mask, 0);
        let word = |index: usize| {
            let block = random::philox([index as u32, 0, 0, 0], key);
            u64::from(block[0]) << 32 | u64::from(block[1])
        };
        (0..FIRST_GROUP + COUNT / GROUP + 1).map(word).collect()
    }

    fn random_mask() -> StepMask<'static> {
        StepMask::Random { key: Key([1, 2]), limit: Bernoulli::new(0.3).limit, scale: 2.0 }
    }

    /// The factors of a mask, by a product with ones.
    fn factors(mask: StepMask) -> Vec<f32> {
        let mut ones = vec![1f32; COUNT];
        mask_in_place(&mut ones, mask, FIRST_GROUP);
        ones
    }

    #[test]
    fn bits_choose_the_factor_of_their_element() {
        let words = words();
        let found = factors(StepMask::Bits { words: &words, inside: 0.5, outside: -1.0 });
        for (index, factor) in found.into_iter().enumerate() {
            let place = FIRST_GROUP * GROUP + index;
            let set = words[place / GROUP] >> (place % GROUP) & 1 == 1;
            assert_eq!(factor, if set { 0.5 } else { -1.0 }, "{index}");
        }
    }

    #[test]
    fn gradients_are_masked_added_and_squared() {
        let words = words();
        let (first, second) = (numbers(1), numbers(2));
        let half: Vec<bf16> =
            second.iter().map(|value| bf16::from_bits((value.to_bits() >> 16) as u16)).collect();
        let bits = StepMask::Bits { words: &words, inside: 1.0, outside: 0.0 };
        for mask in [StepMask::Everything, bits, random_mask()] {
            let factors = factors(mask);
            let mut place = vec![f32::NAN; COUNT];
            let squares = deposit(&mut place, Gradient::Float(&first), mask, FIRST_GROUP, false);
            let mut expected: Vec<f32> =
                first.iter().zip(&factors).map(|(value, factor)| value * factor).collect();
            assert_eq!(place, expected);
            let exact = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
            assert!((squares / exact(&expected) - 1.0).abs() < 1e-5);

            let squares = deposit(&mut place, Gradient::Half(&half), mask, FIRST_GROUP, true);
            for (index, value) in expected.iter_mut().enumerate() {
                *value += f32::from_bits(second[index].to_bits() & 0xFFFF_0000) * factors[index];
            }
            assert_eq!(place, expected);
            assert!((squares / exact(&expected) - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn rows_of_a_table_give_what_the_whole_table_would() {
        const WIDTH: usize = 100;
        let words = words();
        let of_steps = [[7i64, 0, 7, 3, 123, 7], [5, 0, 99, 98, 5, 0]];
        let gradient = &numbers(4)[..of_steps[0].len() * WIDTH];
        let half: Vec<bf16> =
            gradient.iter().map(|value| bf16::from_bits((value.to_bits() >> 16) as u16)).collect();
        let table = 124 * WIDTH;
        let whole = |rows: &[i64], gradient: &dyn Fn(usize) -> f32| {
            let mut whole = vec![0f32; table];
            for (piece, row) in rows.iter().enumerate() {
                for column in 0..WIDTH {
                    whole[*row as usize * WIDTH + column] += gradient(piece * WIDTH + column);
                }
            }
            whole
        };
        let bits = StepMask::Bits { words: &words, inside: 1.5, outside: 0.25 };
        for mask in [StepMask::Everything, bits, random_mask()] {
            let (mut expected, mut found) = (vec![f32::NAN; table], vec![f32::NAN; table]);
            let mut held = None;
            // Two steps of two micro-batches, one step of one, and an addition to what nobody knows of.
            let steps =
                [(false, 0, false), (true, 1, true), (false, 1, false), (true, 0, true), (false, 1, true)];
            for (adds, step, is_half) in steps.into_iter().chain([(true, 0, false)]) {
                let is_known = !adds || step != 0 || is_half;
                held = held.filter(|_| is_known);
                let rows = &of_steps[step];
                let (whole, pieces) = match is_half {
                    true => (whole(rows, &|index| half[index].to_float()), Gradient::Half(&half)),
                    false => (whole(rows, &|index| gradient[index]), Gradient::Float(gradient)),
                };
                let squares = deposit(&mut expected, Gradient::Float(&whole), mask, FIRST_GROUP, adds);
                let own = deposit_rows(&mut found, rows, pieces, mask, FIRST_GROUP, adds, &mut held);
                assert_eq!(found, expected);
                assert!((own / squares - 1.0).abs() < 1e-5, "{own} {squares}");
                let used: Vec<usize> = (0..124)
                    .filter(|row| found[row * WIDTH..][..WIDTH].iter().any(|&value| value != 0.0))
                    .collect();
                assert_eq!(held.is_some(), is_known);
                assert!(held.iter().all(|held| used.iter().all(|row| held.contains(row))));
            }
            let nothing = deposit_rows(&mut found, &[], Gradient::Float(&[]), mask, 0, false, &mut held);
            assert!(nothing == 0.0 && found.iter().all(|&value| value == 0.0));
            assert_eq!(held, Some(Vec::new()));
        }
    }

    #[test]
    fn no_bit_depends_on_the_number_of_threads() {
        let gradient = numbers(3);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut place = vec![0f32; COUNT];
            let squares = pool.install(|| {
                deposit(&mut place, Gradient::Float(&gradient), random_mask(), FIRST_GROUP, false)
            });
            (place, squares.to_bits())
        };
        assert_eq!(run(1), run(3));
    }

    #[test]
    fn what_is_not_a_number_stays_visible() {
        let words = vec![0; FIRST_GROUP + 2];
        for mask in [random_mask(), StepMask::Bits { words: &words, inside: 1.0, outside: 0.0 }] {
            let mut values = vec![f32::NAN; GROUP];
            mask_in_place(&mut values, mask, FIRST_GROUP);
            assert!(values.iter().all(|value| value.is_nan()));
        }
    }
}

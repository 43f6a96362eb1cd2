//! Squared gradients of single examples of a matrix, on the CPU.
//!
//! For one tile of the matrix, small enough for its entries to stay in registers, the kernel walks over the packed rows of
//! all examples, adds up dYᵀX as any matrix product does, and at the end of each example squares what it has: the
//! arithmetic of the plain weight gradient, and no gradient of an example in memory. Every tile is computed in the same
//! order whatever the number of threads, so the results are equal bit for bit.

use std::ops::Range;

use multiversion::multiversion;
use rayon::prelude::*;

use super::{Examples, MomentSlices};
use crate::libtorch::Number;

/// Rows and columns of a tile where vector registers are 32 of 512 bits: 24 of them hold it.
const WIDE: [usize; 2] = [12, 32];
/// Rows and columns of a tile where they are 16 of 256 bits: 12 of them hold it.
const NARROW: [usize; 2] = [6, 16];
/// Rows of the matrix for which one packed panel of the input is used while it is in the cache.
const BLOCK_ROWS: usize = 96;
/// Tokens of a panel of the input that stay in the first level of the cache for all of these rows.
const CACHED_TOKENS: usize = 128;

/// Adds Σ_b (dY_bᵀ X_b)² to sums of the shape `[out, in]`, from dY `[rows, out]` and X `[rows, in]`.
pub(super) fn add_squared_products<T: Number>(
    sums: MomentSlices,
    gradient: &[T],
    input: &[T],
    inputs: usize,
    examples: &Examples,
) {
    add_in(Registers::of_this_machine(), sums, gradient, input, inputs, examples);
}

/// Adds the squares with tiles that are held in registers of a kind, which the machine must have.
fn add_in<T: Number>(
    registers: Registers,
    sums: MomentSlices,
    gradient: &[T],
    input: &[T],
    inputs: usize,
    examples: &Examples,
) {
    let rows = examples.rows();
    match registers {
        Registers::Wide => {
            add_by_tiles(&Vectors { kernel: wide, rows }, sums, gradient, input, inputs, examples)
        }
        Registers::Narrow => {
            add_by_tiles(&Vectors { kernel: narrow, rows }, sums, gradient, input, inputs, examples);
        }
        Registers::Unknown => {
            add_by_tiles(&Vectors { kernel: portable, rows }, sums, gradient, input, inputs, examples);
        }
    }
}

/// What a tile may be held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Registers {
    Wide,
    Narrow,
    /// Without fused multiply-add.
    Unknown,
}

impl Registers {
    #[cfg(target_arch = "x86_64")]
    fn of_this_machine() -> Self {
        if std::arch::is_x86_feature_detected!("avx512f") {
            Registers::Wide
        } else if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            Registers::Narrow
        } else {
            Registers::Unknown
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn of_this_machine() -> Self {
        if cfg!(target_arch = "aarch64") { Registers::Narrow } else { Registers::Unknown }
    }
}

/// Sums over examples for one tile, whose lines do not cross those of the cache.
#[repr(C, align(64))]
pub(super) struct Tile<const M: usize, const N: usize> {
    squares: [[f32; N]; M],
    /// Squares of the examples' squares, where they are asked for.
    fourths: Option<[[f32; N]; M]>,
}

/// How products of panels are computed, of matrices whose numbers are `T`.
pub(super) trait Arithmetic<T, const M: usize, const N: usize>: Sync {
    /// A unit of a panel of dY, M columns wide: what one row or several have there.
    type Left: Clone + Send + Sync;
    /// The same of X, N columns wide.
    type Right: Clone + Send + Sync;
    /// What a thread computes with.
    type Means;
    /// Units without numbers.
    const EMPTY: (Self::Left, Self::Right);

    /// Returns the units of a panel.
    fn units(&self) -> usize;

    /// Copies columns of a matrix of a width into panels, each of as many units as one has; `matrix` begins at the first of them.
    fn pack_left(&self, panels: &mut [Self::Left], matrix: &[T], width: usize, columns: usize);

    /// The same for X.
    fn pack_right(&self, panels: &mut [Self::Right], matrix: &[T], width: usize, columns: usize);

    /// Makes this thread ready.
    fn means(&self) -> Self::Means;

    /// Computes a tile from panels of dY and X, for neighbours among the examples; adds each example's sum of squares to its total
    /// where fourth powers are asked for.
    fn add(
        &self,
        means: &mut Self::Means,
        tile: &mut Tile<M, N>,
        totals: &mut [f64],
        panels: (&[Self::Left], &[Self::Right]),
        some: SomeExamples,
    );
}

/// Neighbours among the examples, from the first to before the last.
pub(super) type SomeExamples<'a> = (&'a Examples, usize, usize);

/// Products in vector registers, in float32 whatever the numbers are. A unit is a row.
struct Vectors<const M: usize, const N: usize> {
    kernel: Kernel<M, N>,
    rows: usize,
}

type Kernel<const M: usize, const N: usize> =
    fn(&mut Tile<M, N>, &mut [f64], &[[f32; M]], &[[f32; N]], SomeExamples);

impl<T: Number, const M: usize, const N: usize> Arithmetic<T, M, N> for Vectors<M, N> {
    type Left = [f32; M];
    type Right = [f32; N];
    type Means = ();
    const EMPTY: ([f32; M], [f32; N]) = ([0.0; M], [0.0; N]);

    fn units(&self) -> usize {
        self.rows
    }

    fn pack_left(&self, panels: &mut [[f32; M]], matrix: &[T], width: usize, columns: usize) {
        pack(panels, self.rows, matrix, width, columns);
    }

    fn pack_right(&self, panels: &mut [[f32; N]], matrix: &[T], width: usize, columns: usize) {
        pack(panels, self.rows, matrix, width, columns);
    }

    fn means(&self) {}

    fn add(
        &self,
        (): &mut (),
        tile: &mut Tile<M, N>,
        totals: &mut [f64],
        (left, right): (&[[f32; M]], &[[f32; N]]),
        some: SomeExamples,
    ) {
        (self.kernel)(tile, totals, left, right, some);
    }
}

#[multiversion(targets("x86_64+avx512f"))]
fn wide(
    tile: &mut Tile<{ WIDE[0] }, { WIDE[1] }>,
    totals: &mut [f64],
    gradient: &[[f32; WIDE[0]]],
    input: &[[f32; WIDE[1]]],
    some: SomeExamples,
) {
    add_products::<{ WIDE[0] }, { WIDE[1] }, true>(tile, totals, some, |rows, product| {
        *product = product_of::<{ WIDE[0] }, { WIDE[1] }, true>(&gradient[rows.clone()], &input[rows]);
    });
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn narrow(
    tile: &mut Tile<{ NARROW[0] }, { NARROW[1] }>,
    totals: &mut [f64],
    gradient: &[[f32; NARROW[0]]],
    input: &[[f32; NARROW[1]]],
    some: SomeExamples,
) {
    add_products::<{ NARROW[0] }, { NARROW[1] }, true>(tile, totals, some, |rows, product| {
        *product = product_of::<{ NARROW[0] }, { NARROW[1] }, true>(&gradient[rows.clone()], &input[rows]);
    });
}

fn portable(
    tile: &mut Tile<{ NARROW[0] }, { NARROW[1] }>,
    totals: &mut [f64],
    gradient: &[[f32; NARROW[0]]],
    input: &[[f32; NARROW[1]]],
    some: SomeExamples,
) {
    add_products::<{ NARROW[0] }, { NARROW[1] }, false>(tile, totals, some, |rows, product| {
        *product = product_of::<{ NARROW[0] }, { NARROW[1] }, false>(&gradient[rows.clone()], &input[rows]);
    });
}

/// A product whose lines do not cross those of the cache.
#[repr(C, align(64))]
struct Aligned<const M: usize, const N: usize>([[f32; N]; M]);

/// Adds the squares of the products of each example; `multiply` writes that of the rows of a part.
///
/// Written so that it vectorises, and keeps the products in registers, wherever it is inlined into a function with wide
/// registers.
#[inline(always)]
pub(super) fn add_products<const M: usize, const N: usize, const FUSED: bool>(
    tile: &mut Tile<M, N>,
    totals: &mut [f64],
    (examples, first, last): SomeExamples,
    mut multiply: impl FnMut(Range<usize>, &mut [[f32; N]; M]),
) {
    let mut own = Aligned([[0f32; N]; M]);
    let product = &mut own.0;
    match &mut tile.fourths {
        None => {
            // The sum of squares does not ask which of the parts belong to one example.
            for rows in (first..last).flat_map(|example| examples.parts_of(example)) {
                multiply(rows, product);
                add_squares::<M, N, FUSED>(&mut tile.squares, product);
            }
        }
        Some(fourths) => {
            for (example, total) in (first..last).zip(&mut totals[first..]) {
                let mut squares = [[0f32; N]; M];
                for rows in examples.parts_of(example) {
                    multiply(rows, product);
                    add_squares::<M, N, FUSED>(&mut squares, product);
                }
                add_squares::<M, N, FUSED>(fourths, &squares);
                let mut columns = [0f32; N];
                for (sums, squares) in tile.squares.iter_mut().zip(&squares) {
                    for column in 0..N {
                        sums[column] += squares[column];
                        columns[column] += squares[column];
                    }
                }
                *total += columns.iter().map(|&sum| f64::from(sum)).sum::<f64>();
            }
        }
    }
}

#[inline(always)]
fn product_of<const M: usize, const N: usize, const FUSED: bool>(
    gradient: &[[f32; M]],
    input: &[[f32; N]],
) -> [[f32; N]; M] {
    let mut sums = [[0f32; N]; M];
    for (gradient, input) in gradient.iter().zip(input) {
        for row in 0..M {
            for column in 0..N {
                sums[row][column] = fused::<FUSED>(gradient[row], input[column], sums[row][column]);
            }
        }
    }
    sums
}

#[inline(always)]
fn add_squares<const M: usize, const N: usize, const FUSED: bool>(
    sums: &mut [[f32; N]; M],
    values: &[[f32; N]; M],
) {
    if M * N > WIDE[0] * WIDE[1] {
        // No registers hold it: number by number, as they lie in memory.
        let values = values.as_flattened();
        for (sum, &value) in sums.as_flattened_mut().iter_mut().zip(values) {
            *sum = fused::<FUSED>(value, value, *sum);
        }
        return;
    }
    for row in 0..M {
        for column in 0..N {
            sums[row][column] = fused::<FUSED>(values[row][column], values[row][column], sums[row][column]);
        }
    }
}

/// a b + c; the fused instruction only where the machine has it, since elsewhere it is a slow function.
#[inline(always)]
fn fused<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Adds the squares, tile by tile.
pub(super) fn add_by_tiles<const M: usize, const N: usize, T: Sync, A: Arithmetic<T, M, N>>(
    arithmetic: &A,
    sums: MomentSlices,
    gradient: &[T],
    input: &[T],
    inputs: usize,
    examples: &Examples,
) {
    let units = arithmetic.units();
    let outputs = sums.squares.len() / inputs;
    let mut panels = vec![A::EMPTY.1; units * inputs.div_ceil(N)];
    let together = inputs.div_ceil(N).div_ceil(2 * rayon::current_num_threads());
    panels.par_chunks_mut(units * together).enumerate().for_each(|(number, panels)| {
        let first = number * together * N;
        arithmetic.pack_right(panels, &input[first..], inputs, (together * N).min(inputs - first));
    });

    let groups = examples.groups_of(CACHED_TOKENS);
    // As many blocks as threads can share evenly.
    let block_rows = outputs.div_ceil(4 * rayon::current_num_threads()).min(BLOCK_ROWS).next_multiple_of(M);
    let blocks = sums.squares.par_chunks_mut(block_rows * inputs);
    let (fourths, totals) = sums.further.unzip();
    let fourths: Vec<Option<&mut [f32]>> = match fourths {
        Some(fourths) => fourths.chunks_mut(block_rows * inputs).map(Some).collect(),
        None => std::iter::repeat_with(|| None).take(blocks.len()).collect(),
    };
    // Totals are kept apart by panel, so that they are added up in one order whatever the blocks.
    let counted = if totals.is_some() { examples.count() } else { 0 };
    let parts: Vec<Vec<f64>> = blocks
        .zip(fourths)
        .enumerate()
        .map(|(block, (squares, mut fourths))| {
            let first = block * block_rows;
            let height = squares.len() / inputs;
            let count = height.div_ceil(M);
            let mut packed = vec![A::EMPTY.0; units * count];
            arithmetic.pack_left(&mut packed, &gradient[first..], outputs, height);
            let mut totals = vec![0f64; count * counted];
            let mut means = arithmetic.means();
            for (column, right) in panels.chunks(units).enumerate() {
                let nothing =
                    || Tile { squares: [[0f32; N]; M], fourths: fourths.is_some().then_some([[0f32; N]; M]) };
                let mut tiles: Vec<Tile<M, N>> = std::iter::repeat_with(nothing).take(count).collect();
                for &(first, last) in &groups {
                    let some = (examples, first, last);
                    for (panel, (left, tile)) in packed.chunks(units).zip(&mut tiles).enumerate() {
                        let totals = &mut totals[panel * counted..][..counted];
                        arithmetic.add(&mut means, tile, totals, (left, right), some);
                    }
                }
                for (panel, tile) in tiles.iter().enumerate() {
                    let place = |values: &mut [f32], tile: &[[f32; N]; M]| {
                        let lines = values.chunks_mut(inputs).skip(panel * M);
                        for (line, sums) in lines.zip(tile) {
                            line[column * N..].iter_mut().zip(sums).for_each(|(value, sum)| *value += sum);
                        }
                    };
                    place(squares, &tile.squares);
                    if let (Some(fourths), Some(sums)) = (&mut fourths, &tile.fourths) {
                        place(fourths, sums);
                    }
                }
            }
            totals
        })
        .collect();
    if let Some(totals) = totals {
        for panel in parts.iter().flat_map(|part| part.chunks(counted)) {
            totals.iter_mut().zip(panel).for_each(|(total, part)| *total += part);
        }
    }
}

/// Copies columns of a matrix of a width into panels, each `[rows, W]`; `matrix` begins at the first of them. Panels are
/// filled side by side, as the rows lie in memory.
#[multiversion(targets = "simd")]
fn pack<const W: usize, T: Number>(
    panels: &mut [[f32; W]],
    rows: usize,
    matrix: &[T],
    width: usize,
    columns: usize,
) {
    for row in 0..rows {
        let values = &matrix[row * width..][..columns];
        for (panel, values) in values.chunks(W).enumerate() {
            let packed = &mut panels[panel * rows + row];
            match values.first_chunk::<W>() {
                Some(values) => {
                    packed.iter_mut().zip(values).for_each(|(packed, value)| *packed = value.to_float())
                }
                None => packed.iter_mut().zip(values).for_each(|(packed, value)| *packed = value.to_float()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Case, assert_close};
    use super::*;

    /// Every kind of register that the machine has, by matrices that tiles do not fill, and by more than one block of them.
    #[test]
    fn tiles_add_up_what_a_loop_does() {
        let of_this_machine = Registers::of_this_machine();
        let kinds = match of_this_machine {
            Registers::Wide => vec![Registers::Wide, Registers::Narrow, Registers::Unknown],
            Registers::Narrow => vec![Registers::Narrow, Registers::Unknown],
            Registers::Unknown => vec![Registers::Unknown],
        };
        for [outputs, inputs] in [[1, 5], [12, 32], [13, 37], [250, 70]] {
            for copies in [1, 2] {
                for further in [false, true] {
                    let case = Case::new(outputs, inputs, copies, further);
                    let expected = case.products();
                    for &registers in &kinds {
                        let mut found = case.nothing(outputs * inputs);
                        let sums = found.slices().unwrap();
                        add_in(registers, sums, &case.gradient, &case.input, inputs, &case.examples);
                        assert_close(&format!("{registers:?} {outputs} {inputs}"), &found, &expected);
                    }
                }
            }
        }
    }

    #[test]
    fn no_bit_depends_on_the_number_of_threads() {
        let case = Case::new(250, 70, 2, true);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut found = case.nothing(250 * 70);
            let sums = found.slices().unwrap();
            pool.install(|| add_squared_products(sums, &case.gradient, &case.input, 70, &case.examples));
            found
        };
        let [one, other] = [1, 5].map(with);
        let [first, second] = [one.further.unwrap(), other.further.unwrap()];
        assert!(one.squares.equal(&other.squares) && first.fourths.equal(&second.fourths));
        assert!(first.totals.equal(&second.totals));
    }
}

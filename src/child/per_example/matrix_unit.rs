//! Squared gradients of single examples of a matrix, from numbers in bfloat16 on the CPU, where it has a unit for their products.
//!
//! The rows of each part of an example are filled up to whole steps of the unit, which sums in float32.

use std::ops::Range;

use half::bf16;
use multiversion::multiversion;

use super::tiles::{Arithmetic, SomeExamples, Tile, add_by_tiles, add_products};
use super::{Examples, MomentSlices};
use crate::libtorch::{MatrixUnit, SIDE, Step, right_place};

/// Adds Σ_b (dY_bᵀ X_b)² to sums of the shape `[out, in]`, from dY `[rows, out]` and X `[rows, in]`, where
/// [`has_matrix_unit`](crate::libtorch::has_matrix_unit).
pub(super) fn add_squared_products(
    sums: MomentSlices,
    gradient: &[bf16],
    input: &[bf16],
    inputs: usize,
    examples: &Examples,
) {
    add_by_tiles::<SIDE, SIDE, _, _>(&Steps::new(examples), sums, gradient, input, inputs, examples);
}

/// The steps of all parts.
struct Steps {
    /// The rows of each step.
    rows: Vec<Range<usize>>,
    /// The steps before those of the part that begins at a row; of all rows that begin none, nothing of use.
    first: Vec<usize>,
}

impl Steps {
    fn new(examples: &Examples) -> Self {
        let (mut rows, mut first) = (Vec::new(), vec![0; examples.rows()]);
        for part in examples.parts().filter(|part| !part.is_empty()) {
            first[part.start] = rows.len();
            rows.extend(part.clone().step_by(SIDE).map(|start| start..part.end.min(start + SIDE)));
        }
        Self { rows, first }
    }

    /// Returns the steps of a part.
    fn of(&self, part: &Range<usize>) -> Range<usize> {
        if part.is_empty() {
            return 0..0;
        }
        let first = self.first[part.start];
        first..first + part.len().div_ceil(SIDE)
    }
}

impl Arithmetic<bf16, SIDE, SIDE> for Steps {
    type Left = Step;
    type Right = Step;
    type Means = MatrixUnit;
    const EMPTY: (Step, Step) = (Step::ZERO, Step::ZERO);

    fn units(&self) -> usize {
        self.rows.len()
    }

    fn pack_left(&self, panels: &mut [Step], matrix: &[bf16], width: usize, columns: usize) {
        pack(panels, &self.rows, matrix, width, columns, |term, column| column * SIDE + term);
    }

    fn pack_right(&self, panels: &mut [Step], matrix: &[bf16], width: usize, columns: usize) {
        pack(panels, &self.rows, matrix, width, columns, right_place);
    }

    fn means(&self) -> MatrixUnit {
        MatrixUnit::enter()
    }

    fn add(
        &self,
        unit: &mut MatrixUnit,
        tile: &mut Tile<SIDE, SIDE>,
        totals: &mut [f64],
        (left, right): (&[Step], &[Step]),
        some: SomeExamples,
    ) {
        add(tile, totals, some, |part, product| {
            let steps = self.of(&part);
            unit.multiply(&left[steps.clone()], &right[steps], product);
        });
    }
}

#[multiversion(targets("x86_64+avx512f"))]
fn add(
    tile: &mut Tile<SIDE, SIDE>,
    totals: &mut [f64],
    some: SomeExamples,
    multiply: impl FnMut(Range<usize>, &mut [[f32; SIDE]; SIDE]),
) {
    add_products::<SIDE, SIDE, true>(tile, totals, some, multiply);
}

/// Copies columns of a matrix of a width into panels of steps; `place` says where in a step a term of a column is.
#[inline(always)]
fn pack(
    panels: &mut [Step],
    steps: &[Range<usize>],
    matrix: &[bf16],
    width: usize,
    columns: usize,
    place: impl Fn(usize, usize) -> usize,
) {
    for (number, rows) in steps.iter().enumerate() {
        for (panel, first) in (0..columns).step_by(SIDE).enumerate() {
            let step = &mut panels[panel * steps.len() + number].0;
            for (term, row) in rows.clone().enumerate() {
                let values = &matrix[row * width + first..][..SIDE.min(columns - first)];
                for (column, &value) in values.iter().enumerate() {
                    step[place(term, column)] = value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Case, assert_close};
    use super::*;
    use crate::libtorch::has_matrix_unit;

    /// Numbers that bfloat16 has, so that a loop in float64 has them, too.
    fn case(outputs: usize, inputs: usize, copies: usize, further: bool) -> (Case, [Vec<bf16>; 2]) {
        let mut case = Case::new(outputs, inputs, copies, further);
        let halves = [&mut case.gradient, &mut case.input].map(|values| {
            let halves: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            values.iter_mut().zip(&halves).for_each(|(value, half)| *value = half.to_f32());
            halves
        });
        (case, halves)
    }

    /// Matrices that tiles do not fill, examples longer and shorter than a step, and more than one block.
    #[test]
    fn steps_add_up_what_a_loop_does() {
        if !has_matrix_unit() {
            println!("skipped: this machine has no matrix unit");
            return;
        }
        for [outputs, inputs] in [[1, 5], [32, 32], [13, 37], [250, 70]] {
            for (copies, further) in [(1, false), (1, true), (2, false), (2, true)] {
                let (case, [gradient, input]) = case(outputs, inputs, copies, further);
                let mut found = case.nothing(outputs * inputs);
                let sums = found.slices().unwrap();
                add_squared_products(sums, &gradient, &input, inputs, &case.examples);
                assert_close(&format!("{outputs} {inputs}"), &found, &case.products());
            }
        }
    }

    #[test]
    fn no_bit_depends_on_the_number_of_threads() {
        if !has_matrix_unit() {
            println!("skipped: this machine has no matrix unit");
            return;
        }
        let (case, [gradient, input]) = case(250, 70, 2, true);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut found = case.nothing(250 * 70);
            let sums = found.slices().unwrap();
            pool.install(|| add_squared_products(sums, &gradient, &input, 70, &case.examples));
            found
        };
        let [one, other] = [1, 5].map(with);
        let [first, second] = [one.further.unwrap(), other.further.unwrap()];
        assert!(one.squares.equal(&other.squares) && first.fourths.equal(&second.fourths));
        assert!(first.totals.equal(&second.totals));
    }
}

//! Squared gradients of single examples of vectors and tables, on the CPU: sums of rows, squared.

use multiversion::multiversion;
use rayon::prelude::*;

use super::{Examples, MomentSlices};
use crate::libtorch::Number;

/// Rows of an example whose sum is the gradient of one line of the parameter.
struct Line {
    /// The line of the parameter: 0 of a vector, the entry of a table.
    line: usize,
    example: usize,
    /// Its rows, in `order`; of each copy of the example apart.
    parts: Vec<std::ops::Range<usize>>,
}

/// Adds Σ_b (Σ_t dY_t)² over the rows t of each example to sums of the shape `[width]`; with `factor`, of dY ⊙ factor.
/// Both are `[rows, width]`.
pub(super) fn add_squared_vector<T: Number>(
    sums: MomentSlices,
    gradient: &[T],
    factor: Option<&[f32]>,
    examples: &Examples,
) {
    let lines: Vec<Line> = (0..examples.count())
        .map(|example| Line { line: 0, example, parts: examples.parts_of(example).collect() })
        .collect();
    let width = sums.squares.len();
    add_lines(sums, width, &lines, |row, sums| {
        let row = row * width..(row + 1) * width;
        match factor {
            None => add_row(sums, &gradient[row]),
            Some(factor) => add_product(sums, &gradient[row.clone()], &factor[row]),
        }
    });
}

/// Adds the squared gradients of a table's entries to sums of the shape `[entries, width]`, from dY `[rows, width]` and the
/// entry of each row: an entry used twice in one example has one gradient, the sum of both rows, before it is squared.
pub(super) fn add_squared_entries(
    sums: MomentSlices,
    gradient: &[f32],
    entries: &[i64],
    examples: &Examples,
) {
    let width = gradient.len() / entries.len().max(1);
    let mut order: Vec<usize> = Vec::with_capacity(entries.len());
    let mut lines: Vec<Line> = Vec::new();
    for example in 0..examples.count() {
        // Each copy's rows by entry, and in their order within one.
        let mut uses: Vec<(i64, usize, usize)> = (examples.parts_of(example).enumerate())
            .flat_map(|(copy, rows)| rows.map(move |row| (entries[row], copy, row)))
            .collect();
        uses.sort_unstable();
        for uses in uses.chunk_by(|left, right| left.0 == right.0) {
            let mut line = Line { line: uses[0].0 as usize, example, parts: Vec::new() };
            for copy in uses.chunk_by(|left, right| left.1 == right.1) {
                line.parts.push(order.len()..order.len() + copy.len());
                order.extend(copy.iter().map(|(.., row)| row));
            }
            lines.push(line);
        }
    }
    add_lines(sums, width, &lines, |place, sums| {
        add_row(sums, &gradient[order[place] * width..][..width]);
    });
}

#[multiversion(targets = "simd")]
fn add_row<T: Number>(sums: &mut [f32], row: &[T]) {
    sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value.to_float());
}

#[multiversion(targets = "simd")]
fn add_product<T: Number>(sums: &mut [f32], row: &[T], factor: &[f32]) {
    let products = row.iter().zip(factor);
    sums.iter_mut().zip(products).for_each(|(sum, (value, factor))| *sum += value.to_float() * factor);
}

/// Squares the sums of the rows of each line, in parallel, and adds them one after the other: several examples may use the
/// same line. `add_row` adds the row at a place to a sum.
fn add_lines(
    mut sums: MomentSlices,
    width: usize,
    lines: &[Line],
    add_row: impl Fn(usize, &mut [f32]) + Sync,
) {
    let mut squares = vec![0f32; lines.len() * width];
    squares.par_chunks_mut(width).zip(lines).for_each_init(
        || vec![0f32; width],
        |sum, (squares, line)| {
            for rows in &line.parts {
                sum.fill(0.0);
                rows.clone().for_each(|place| add_row(place, sum));
                squares.iter_mut().zip(&*sum).for_each(|(square, sum)| *square += sum * sum);
            }
        },
    );
    for (squares, line) in squares.chunks(width).zip(lines) {
        let elements = line.line * width..(line.line + 1) * width;
        sums.squares[elements.clone()].iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
        if let Some((fourths, totals)) = &mut sums.further {
            let fourths = fourths[elements].iter_mut().zip(squares);
            fourths.for_each(|(sum, square)| *sum += square * square);
            totals[line.example] += squares.iter().map(|&square| f64::from(square)).sum::<f64>();
        }
    }
}

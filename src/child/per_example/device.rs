//! Squared gradients of single examples by libtorch's products and kernels of our own: what a GPU uses.

use tch::{Device, Kind, Tensor};

use super::{Examples, Moments};
use crate::error::Result;
use crate::libtorch::{
    add_squares_of_parts, add_to_entries, lay_out, sums_of_entries, sums_of_parts, upload,
};

/// Entries of all examples' gradients of one matrix that exist at a time: 256 MiB in float32.
const PRODUCTS: i64 = 1 << 26;

/// Adds Σ_b (dY_bᵀ X_b)² to sums of the shape `[out, in]`, from dY `[rows, out]` and X `[rows, in]`, of one type: of bfloat16 the
/// products are summed in float32.
///
/// Works on blocks of output rows: no more than one block of the examples' gradients exists.
pub(super) fn add_squared_products(
    sums: &Moments,
    gradient: &Tensor,
    input: &Tensor,
    examples: &Examples,
) -> Result<()> {
    let rectangle = examples.rectangle(gradient.device())?;
    let gradient = rectangle.lay_out(gradient)?.f_transpose(1, 2)?;
    let input = rectangle.lay_out(input)?;
    let (outputs, inputs) = (gradient.size()[1], input.size()[2]);
    let rows = (PRODUCTS / (rectangle.parts * inputs)).clamp(1, outputs);
    for start in (0..outputs).step_by(rows as usize) {
        let count = rows.min(outputs - start);
        let gradient = gradient.f_narrow(1, start, count)?;
        let products = match gradient.kind() {
            Kind::Float => gradient.f_bmm(&input)?,
            _ => gradient.f_bmm_dtype(&input, Kind::Float)?,
        };
        add_squares(&sums.lines(start, count)?, products, examples)?;
    }
    Ok(())
}

/// Adds Σ_b (Σ_t dY_t)² over the rows t of each example to sums of the shape `[width]`; with `factor`, of dY ⊙ factor in float32.
/// Both are `[rows, width]`.
pub(super) fn add_squared_vector(
    sums: &Moments,
    gradient: &Tensor,
    factor: Option<&Tensor>,
    examples: &Examples,
) -> Result<()> {
    let ends = examples.rectangle(gradient.device())?.ends;
    add_squares(sums, sums_of_parts(gradient, factor, &ends)?, examples)
}

/// Adds the squared gradients of a table's entries to sums of the shape `[entries, width]`, from dY `[rows, width]` and the
/// entry of each row.
pub(super) fn add_squared_entries(
    sums: &Moments,
    gradient: &Tensor,
    entries: &Tensor,
    examples: &Examples,
) -> Result<()> {
    // An entry used twice in one example has one gradient, the sum of both rows, before it is squared.
    let ends = examples.rectangle(gradient.device())?.ends;
    let squares = sums_of_entries(gradient, entries, &ends)?.f_square_()?;
    let Some(further) = &sums.further else { return add_to_entries(&squares, entries, &sums.squares) };
    // The copies of an example come together before the square is squared.
    let copies = examples.copies() as i64;
    let ends = ends.f_slice(0, copies - 1, None, copies)?.f_contiguous()?;
    let mut squares = sums_of_entries(&squares, entries, &ends)?;
    add_to_entries(&squares, entries, &sums.squares)?;
    let totals = sums_of_parts(&squares, None, &ends)?.f_sum_dim_intlist(1i64, false, Kind::Double)?;
    let _ = further.totals.shallow_clone().f_add_(&totals)?;
    add_to_entries(&squares.f_square_()?, entries, &further.fourths)
}

/// Adds the squares of numbers of the parts, `[parts, ...]`, which it takes over, to sums of the shape `[...]`.
fn add_squares(sums: &Moments, mut numbers: Tensor, examples: &Examples) -> Result<()> {
    if sums.further.is_none() {
        return add_squares_of_parts(&numbers, &sums.squares);
    }
    let squares = numbers.f_square_()?;
    let mut shape = squares.size();
    shape[0] /= examples.copies() as i64;
    shape.insert(1, examples.copies() as i64);
    let squares = match examples.copies() {
        1 => squares.shallow_clone(),
        _ => squares.f_view(shape.as_slice())?.f_sum_dim_intlist(1i64, false, Kind::Float)?,
    };
    let total = |values: &Tensor| values.f_sum_dim_intlist(0i64, false, Kind::Float);
    let _ = sums.squares.shallow_clone().f_add_(&total(&squares)?)?;
    if let Some(further) = &sums.further {
        let of_example = squares.f_flatten(1, -1)?.f_sum_dim_intlist(1i64, false, Kind::Double)?;
        let _ = further.totals.shallow_clone().f_add_(&of_example)?;
        let _ = further.fourths.shallow_clone().f_add_(&total(&squares.f_square()?)?)?;
    }
    Ok(())
}

/// How to lay packed rows out as `[parts, longest, width]`, zeros where nothing is.
#[derive(Debug)]
pub(super) struct Rectangle {
    parts: i64,
    longest: i64,
    /// The row of each place, below zero where there is none, `[parts · longest]`; `None` where all parts are of one length.
    row_of_place: Option<Tensor>,
    /// Where the rows of each part end, `[parts]`.
    ends: Tensor,
}

impl Rectangle {
    pub fn new(examples: &Examples, device: Device) -> Result<Self> {
        let longest = examples.parts().map(|rows| rows.len()).max().unwrap_or(0);
        let rows: Vec<i64> = (examples.parts())
            .flat_map(|rows| {
                let missing = longest - rows.len();
                rows.map(|row| row as i64).chain(std::iter::repeat_n(-1, missing))
            })
            .collect();
        let parts = examples.parts().count();
        let row_of_place = match rows.len() == examples.rows() {
            true => None,
            false => Some(upload(&rows, device)?),
        };
        let ends: Vec<i64> = examples.parts().map(|rows| rows.end as i64).collect();
        let ends = upload(&ends, device)?;
        Ok(Self { parts: parts as i64, longest: longest as i64, row_of_place, ends })
    }

    /// Returns another handle to it.
    pub fn shallow_clone(&self) -> Self {
        let row_of_place = self.row_of_place.as_ref().map(Tensor::shallow_clone);
        Self { row_of_place, ends: self.ends.shallow_clone(), ..*self }
    }

    fn lay_out(&self, rows: &Tensor) -> Result<Tensor> {
        let shape = [self.parts, self.longest, rows.size()[1]];
        match &self.row_of_place {
            Some(row_of_place) => Ok(lay_out(rows, row_of_place)?.f_view(shape)?),
            None => Ok(rows.f_reshape(shape)?),
        }
    }
}

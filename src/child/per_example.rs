//! Squared gradients of single examples in one backward pass over a batch.
//!
//! A linear layer's weight gradient for example b is dY_bᵀ X_b, over the rows of that example: the same products that
//! backward would compute for the whole batch, kept apart by example, squared and summed at once. On the CPU they never
//! leave the registers (`tiles`); on a GPU a block of one layer's rows exists for the examples of a batch at a time
//! (`device`).

mod device;
mod matrix_unit;
mod rows;
#[cfg(test)]
mod tests;
mod tiles;
mod uses;

use std::cell::RefCell;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use half::bf16;
use tch::{Device, Kind, Tensor};

use self::device::Rectangle;
use self::uses::{Use, Uses};
use super::network::MaskScope;
use crate::data::PackedBatch;
use crate::error::{Error, Result};
use crate::libtorch::{GradientHook, elements, elements_mut, has_matrix_unit};
use crate::locking::locked;
use crate::model::{
    Convolution, Embedding, LayerNorm, LayerObserver, Linear, ParameterId, Parameters, Rows, Vector, span,
};

/// Sums over examples of f_b = (∂ loss_b / ∂w)², element by element.
#[derive(Debug)]
pub struct Moments {
    /// Σ_b f_b, float32.
    pub squares: Tensor,
    /// What the standard error of an estimate from few examples needs besides.
    pub further: Option<FurtherMoments>,
}

/// How much examples differ.
#[derive(Debug)]
pub struct FurtherMoments {
    /// Σ_b f_b², float32.
    pub fourths: Tensor,
    /// Σ_w f_b of each example of the batch, `[examples]`, float64.
    pub totals: Tensor,
}

impl Moments {
    fn try_map(&self, function: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let further = self.further.as_ref().map(|further| {
            let totals = further.totals.shallow_clone();
            Ok::<_, Error>(FurtherMoments { fourths: function(&further.fourths)?, totals })
        });
        Ok(Self { squares: function(&self.squares)?, further: further.transpose()? })
    }

    /// Returns those of some lines of a matrix.
    fn lines(&self, start: i64, count: i64) -> Result<Self> {
        self.try_map(|sums| Ok(sums.f_narrow(0, start, count)?))
    }

    /// Borrows the sums of a parameter on the CPU.
    fn slices(&mut self) -> Result<MomentSlices<'_>> {
        let further = match &mut self.further {
            Some(further) => Some((elements_mut(&mut further.fourths)?, elements_mut(&mut further.totals)?)),
            None => None,
        };
        Ok(MomentSlices { squares: elements_mut(&mut self.squares)?, further })
    }
}

/// [`Moments`] on the CPU: squares, and fourth powers with the totals of the examples.
struct MomentSlices<'a> {
    squares: &'a mut [f32],
    further: Option<(&'a mut [f32], &'a mut [f64])>,
}

/// Which rows of an activation belong to which example of a batch.
#[derive(Debug)]
struct Examples {
    /// Where the rows of each copy of each example end.
    ends: Vec<usize>,
    copies: usize,
    /// The rows of each copy as a rectangle, on the device that first asked for it.
    rectangle: Mutex<Option<Rectangle>>,
}

impl Examples {
    /// Makes examples that stand in a batch so many times, one copy after the other.
    fn new(rows_of_copies: impl Iterator<Item = usize>, copies: usize) -> Self {
        let mut end = 0;
        let ends = rows_of_copies.map(|rows| {
            end += rows;
            end
        });
        Self { ends: ends.collect(), copies, rectangle: Mutex::default() }
    }

    /// Returns how packed rows are laid out on the device of a pass.
    fn rectangle(&self, device: Device) -> Result<Rectangle> {
        let mut kept = locked(&self.rectangle);
        if kept.is_none() {
            *kept = Some(Rectangle::new(self, device)?);
        }
        kept.as_ref().map(Rectangle::shallow_clone).ok_or_else(|| Error::Libtorch("there are no rows".into()))
    }

    fn copies(&self) -> usize {
        self.copies
    }

    /// Returns the number of examples.
    fn count(&self) -> usize {
        self.ends.len() / self.copies
    }

    /// Returns the number of rows of all examples.
    fn rows(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    fn part(&self, number: usize) -> Range<usize> {
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        start..self.ends[number]
    }

    /// Iterates over the rows of all copies of all examples.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.ends.len()).map(|number| self.part(number))
    }

    /// Iterates over the rows of the copies of one example.
    fn parts_of(&self, example: usize) -> impl Iterator<Item = Range<usize>> {
        (example * self.copies..(example + 1) * self.copies).map(|number| self.part(number))
    }

    /// Cuts the examples into groups of neighbours, each from the first to before the last, with no more than so many rows
    /// unless one example alone has more.
    fn groups_of(&self, rows: usize) -> Vec<(usize, usize)> {
        let start_of =
            |example: usize| (example * self.copies).checked_sub(1).map_or(0, |before| self.ends[before]);
        let mut groups: Vec<(usize, usize)> = Vec::new();
        for example in 0..self.count() {
            match groups.last_mut() {
                Some((first, last)) if start_of(example + 1) - start_of(*first) <= rows => {
                    *last = example + 1
                }
                _ => groups.push((example, example + 1)),
            }
        }
        groups
    }
}

/// Adds the squared gradients of one batch's examples to sums while backward runs.
pub struct SquaredGradients<'a> {
    parameters: &'a Parameters,
    /// Sums in the layout of the flat buffers, which are added to.
    sums: &'a Moments,
    scope: MaskScope,
    by_token: Arc<Examples>,
    by_example: Arc<Examples>,
    uses: Uses,
    hooks: RefCell<Vec<GradientHook>>,
}

impl<'a> SquaredGradients<'a> {
    /// Observes one pass over `batch`; parameters outside `scope` are skipped. Each example stands in the batch `copies`
    /// times, and what counts is the sum over its copies of their squared gradients.
    pub fn new(
        parameters: &'a Parameters,
        sums: &'a Moments,
        scope: MaskScope,
        batch: &PackedBatch,
        copies: usize,
    ) -> Self {
        Self {
            parameters,
            sums,
            scope,
            by_token: Arc::new(Examples::new(batch.lengths.iter().copied(), copies)),
            by_example: Arc::new(Examples::new((0..batch.examples()).map(|_| 1), copies)),
            uses: Uses::default(),
            hooks: RefCell::default(),
        }
    }

    /// Returns the part of the sums that belongs to a parameter, in its shape; `None` outside the scope.
    fn sums_of(&self, id: ParameterId) -> Result<Option<Moments>> {
        let parameter = self.parameters.get(id);
        if !self.scope.covers(parameter) {
            return Ok(None);
        }
        let part = |flat: &Tensor| Ok(span(flat, &parameter.range)?.f_view(parameter.shape.as_slice())?);
        self.sums.try_map(part).map(Some)
    }

    /// Returns which rows of an activation belong to which example.
    fn examples(&self, rows: Rows, activation: &Tensor) -> Arc<Examples> {
        match rows {
            Rows::Tokens => self.by_token.clone(),
            Rows::Examples => self.by_example.clone(),
            Rows::Shared => {
                let parts = self.by_example.ends.len();
                let own = activation.size()[0] as usize / parts;
                Arc::new(Examples::new(std::iter::repeat_n(own, parts), self.by_example.copies))
            }
        }
    }

    /// Returns the parts of the sums that belong to a weight and a bias; `None` if both are outside the scope.
    fn sums_of_both(&self, weight: ParameterId, bias: Option<ParameterId>) -> Result<Option<SumsOfBoth>> {
        let weight = self.sums_of(weight)?;
        let bias = bias.map(|bias| self.sums_of(bias)).transpose()?.flatten();
        Ok((weight.is_some() || bias.is_some()).then_some((weight, bias)))
    }

    /// Calls `function` once with the gradient of `output`.
    fn hook(
        &self,
        output: &Tensor,
        function: impl FnOnce(Tensor) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        // What it holds is freed as soon as it has run, as autograd frees what it saved.
        let mut function = Some(function);
        let hook = GradientHook::register(output, move |gradient| match function.take() {
            Some(function) => function(gradient.f_contiguous()?),
            None => Ok(()),
        })?;
        self.hooks.borrow_mut().push(hook);
        Ok(())
    }
}

/// What is added to for a weight, and for a bias.
type SumsOfBoth = (Option<Moments>, Option<Moments>);

impl LayerObserver for SquaredGradients<'_> {
    fn linear(&self, layer: &Linear, input: &Tensor, output: &Tensor) -> Result<()> {
        let Some((weight, bias)) = self.sums_of_both(layer.weight, layer.bias)? else { return Ok(()) };
        let (examples, input) = (self.examples(layer.rows, output), input.f_detach()?);
        let input_first = layer.input_first;
        let uses = self.uses.begin(layer.weight);
        self.hook(output, move |gradient| {
            let Some(Use { input, gradient, examples }) = uses.end(Use { input, gradient, examples })? else {
                return Ok(());
            };
            if let Some(sums) = weight {
                let sums = sums.try_map(|sums| Ok(sums.f_flatten(1, -1)?))?;
                // dYᵀX where a line of the matrix belongs to an output, XᵀdY where it belongs to an input.
                let [lines, columns] = if input_first { [&input, &gradient] } else { [&gradient, &input] };
                add_squared_products(sums, lines, columns, &examples)?;
            }
            bias.map_or(Ok(()), |sums| add_squared_vector(sums, &gradient, None, &examples))
        })
    }

    fn layer_norm(&self, layer: &LayerNorm, input: &Tensor, output: &Tensor) -> Result<()> {
        let Some((weight, bias)) = self.sums_of_both(layer.weight, layer.bias)? else { return Ok(()) };
        let (examples, epsilon) = (self.examples(layer.rows, output), layer.epsilon);
        let input = input.f_detach()?;
        self.hook(output, move |gradient| {
            if let Some(sums) = weight {
                let (input, width) = (input.f_to_kind(Kind::Float)?, [input.size()[1]]);
                let normalised = input.f_layer_norm(width, None::<Tensor>, None::<Tensor>, epsilon, true)?;
                add_squared_vector(sums, &gradient, Some(&normalised), &examples)?;
            }
            bias.map_or(Ok(()), |sums| add_squared_vector(sums, &gradient, None, &examples))
        })
    }

    fn convolution(&self, layer: &Convolution, windows: &Tensor, output: &Tensor) -> Result<()> {
        let Some((weight, bias)) = self.sums_of_both(layer.weight, Some(layer.bias))? else { return Ok(()) };
        let (examples, windows, groups) = (self.by_token.clone(), windows.f_detach()?, layer.groups);
        self.hook(output, move |gradient| {
            if let Some(sums) = weight {
                let [inputs, outputs] = [&windows, &gradient].map(|rows| rows.size()[1] / groups);
                for group in 0..groups {
                    // A matrix of its own, whose columns are numbers of tokens.
                    let sums = sums.lines(group * outputs, outputs)?;
                    let sums = sums.try_map(|sums| Ok(sums.f_view([outputs, inputs])?))?;
                    let gradient = gradient.f_narrow(1, group * outputs, outputs)?.f_contiguous()?;
                    let windows = windows.f_narrow(1, group * inputs, inputs)?;
                    add_squared_products(sums, &gradient, &windows, &examples)?;
                }
            }
            bias.map_or(Ok(()), |sums| add_squared_vector(sums, &gradient, None, &examples))
        })
    }

    fn embedding(&self, layer: &Embedding, indices: &Tensor, output: &Tensor) -> Result<()> {
        let Some(sums) = self.sums_of(layer.table)? else { return Ok(()) };
        let (examples, indices) = (self.examples(layer.rows, output), indices.shallow_clone());
        self.hook(output, move |gradient| add_squared_entries(sums, &gradient, &indices, &examples))
    }

    fn vector(&self, vector: &Vector, factor: Option<&Tensor>, output: &Tensor) -> Result<()> {
        let Some(sums) = self.sums_of(vector.parameter)? else { return Ok(()) };
        let own = |sums: &Tensor| Ok(sums.f_view([-1, vector.width])?.f_select(0, vector.number)?);
        let (sums, examples) = (sums.try_map(own)?, self.examples(vector.rows, output));
        let in_float = |factor: &Tensor| factor.f_detach()?.f_to_kind(Kind::Float)?.f_contiguous();
        let factor = factor.map(in_float).transpose()?;
        self.hook(output, move |gradient| add_squared_vector(sums, &gradient, factor.as_ref(), &examples))
    }
}

/// Adds Σ_b (dY_bᵀ X_b)² to sums of the shape `[out, in]`, from dY `[rows, out]` and X `[rows, in]`, of one type.
fn add_squared_products(
    mut sums: Moments,
    gradient: &Tensor,
    input: &Tensor,
    examples: &Examples,
) -> Result<()> {
    if gradient.device() != Device::Cpu {
        return device::add_squared_products(&sums, gradient, input, examples);
    }
    let inputs = input.size()[1] as usize;
    let input = input.f_contiguous()?;
    match gradient.kind() {
        Kind::BFloat16 => {
            let (gradient, input) = (elements::<bf16>(gradient)?, elements(&input)?);
            match has_matrix_unit() {
                true => matrix_unit::add_squared_products(sums.slices()?, gradient, input, inputs, examples),
                false => tiles::add_squared_products(sums.slices()?, gradient, input, inputs, examples),
            }
        }
        _ => {
            let (gradient, input) = (elements::<f32>(gradient)?, elements(&input)?);
            tiles::add_squared_products(sums.slices()?, gradient, input, inputs, examples);
        }
    }
    Ok(())
}

/// Adds Σ_b (Σ_t dY_t)² over the rows t of each example to sums of the shape `[width]`; with `factor`, in float32, of
/// dY ⊙ factor. Both are `[rows, width]`.
fn add_squared_vector(
    mut sums: Moments,
    gradient: &Tensor,
    factor: Option<&Tensor>,
    examples: &Examples,
) -> Result<()> {
    if gradient.device() != Device::Cpu {
        return device::add_squared_vector(&sums, gradient, factor, examples);
    }
    let factor = factor.map(elements).transpose()?;
    match gradient.kind() {
        Kind::BFloat16 => {
            rows::add_squared_vector(sums.slices()?, elements::<bf16>(gradient)?, factor, examples)
        }
        _ => rows::add_squared_vector(sums.slices()?, elements::<f32>(gradient)?, factor, examples),
    }
    Ok(())
}

/// Adds the squared gradients of a table's entries to sums of the shape `[entries, width]`, from dY `[rows, width]` and the
/// entry of each row, `[rows]`.
fn add_squared_entries(
    mut sums: Moments,
    gradient: &Tensor,
    entries: &Tensor,
    examples: &Examples,
) -> Result<()> {
    // Tables are in float32 always.
    if gradient.device() != Device::Cpu {
        return device::add_squared_entries(&sums, gradient, entries, examples);
    }
    rows::add_squared_entries(sums.slices()?, elements::<f32>(gradient)?, elements(entries)?, examples);
    Ok(())
}

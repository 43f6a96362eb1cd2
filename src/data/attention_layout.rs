//! How packed tokens become the rectangles that attention computes with where it cannot work on packed tokens.
//!
//! Examples of similar length share a rectangle: in one for all, the products of a batch of sentence pairs are mostly
//! about positions that do not exist.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::packed_rows::PackedRows;
use crate::error::Result;
use crate::libtorch::upload;

/// What one more rectangle costs on the CPU, for about a dozen operators forward and backward: as much as this many
/// multiply-adds of queries by keys.
const RECTANGLE_COST: usize = 2_500_000;

/// On the CPU the length of a rectangle is a multiple of this: libtorch's softmax is vectorised by so many numbers, and adds
/// what is left over in another order on each number of threads.
const LENGTH_MULTIPLE: usize = 16;

/// The rectangles of a batch, for one number of heads.
pub struct AttentionLayout {
    /// The rectangles, one after the other.
    pub rectangles: Vec<Rectangle>,
    /// Row of each head of each token among the rows of all rectangles: `[tokens · heads]`, int64.
    pub places: Tensor,
    /// The examples in the order of the rectangles, and the place of each example in that order: both `[examples]`, int64;
    /// `None` where they stand as in the batch.
    order: Option<[Tensor; 2]>,
    /// What copies rows on the CPU.
    packed: Arc<PackedRows>,
}

/// Examples that are filled up to one length.
pub struct Rectangle {
    /// The examples, by their place in the batch.
    pub examples: Vec<usize>,
    /// Positions of each example, real or filled up.
    pub length: usize,
    /// What attention adds to its scores, `[examples · heads, 1, length]`: zero for real tokens, minus infinity for others;
    /// `None` if all are real.
    pub bias: Option<Tensor>,
    /// What [`Rectangle::bias_within`] has made, for a window.
    within: RefCell<Option<(i64, Tensor)>>,
}

impl AttentionLayout {
    /// Lays examples of the given lengths out, for heads that read `width` numbers a token in sum; the biases are of `kind`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(lengths: &[usize], heads: usize, width: usize, kind: Kind, device: Device) -> Result<Self> {
        let groups = groups_on(lengths, width, device);
        let (order, packed) = (order(&groups, device)?, Arc::new(PackedRows::new(lengths, &groups)));
        let mut first_rows = vec![(0, 0); lengths.len()];
        let (mut rows, mut rectangles) = (0, Vec::with_capacity(groups.len()));
        for (examples, length) in groups {
            for &example in &examples {
                first_rows[example] = (rows, length);
                rows += heads * length;
            }
            let bias = bias(&examples, lengths, length, heads, kind, device)?;
            rectangles.push(Rectangle { examples, length, bias, within: RefCell::default() });
        }
        let mut places = Vec::with_capacity(lengths.iter().sum::<usize>() * heads);
        for (&own, &(first, length)) in lengths.iter().zip(&first_rows) {
            for position in 0..own {
                places.extend((0..heads).map(|head| (first + head * length + position) as i64));
            }
        }
        Ok(Self { rectangles, places: upload(&places, device)?, order, packed })
    }

    /// Returns how many positions the rectangles of examples have, and how many pairs of positions of one example: the memory of
    /// attention is proportional to them.
    pub fn area(lengths: &[usize], width: usize, device: Device) -> (usize, usize) {
        let add = |(positions, pairs): (usize, usize), (examples, length): (Vec<usize>, usize)| {
            let own = examples.len() * length;
            (positions + own, pairs + own * length)
        };
        groups_on(lengths, width, device).into_iter().fold((0, 0), add)
    }

    /// Lays packed rows `[tokens, heads · head_size]` out; returns each rectangle as `[examples · heads, length, head_size]`.
    /// Rows of positions that do not exist are zero.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn split(&self, rows: &Tensor, heads: i64) -> Result<Vec<Tensor>> {
        self.split_scaled(rows, heads, 1.0)
    }

    /// Lays packed rows out as [`AttentionLayout::split`] does, times a factor.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn split_scaled(&self, rows: &Tensor, heads: i64, factor: f64) -> Result<Vec<Tensor>> {
        if PackedRows::take(rows) {
            return self.packed.split(rows, heads, factor as f32);
        }
        let rows = if factor == 1.0 { rows.shallow_clone() } else { rows.f_mul_scalar(factor)? };
        let head_size = rows.size()[1] / heads;
        let counts = self.rectangles.iter().map(|rectangle| rectangle.rows(heads)).collect::<Vec<_>>();
        let shape = [counts.iter().sum(), head_size];
        let mut laid_out = Tensor::f_zeros(shape, (rows.kind(), rows.device()))?;
        let _ = laid_out.f_index_copy_(0, &self.places, &rows.f_reshape([-1, head_size])?)?;
        let parts = match counts.len() {
            1 => vec![laid_out],
            _ => laid_out.f_split_with_sizes(&counts[..], 0)?,
        };
        let shaped = |(part, rectangle): (&Tensor, &Rectangle)| {
            Ok(part.f_view([-1, rectangle.length as i64, head_size])?)
        };
        parts.iter().zip(&self.rectangles).map(shaped).collect()
    }

    /// Lays one row an example out, `[examples, heads · head_size]`; returns those of each rectangle as
    /// `[examples · heads, 1, head_size]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn split_examples(&self, rows: &Tensor, heads: i64) -> Result<Vec<Tensor>> {
        let head_size = rows.size()[1] / heads;
        let laid_out = match &self.order {
            Some([examples, _]) => rows.f_index_select(0, examples)?,
            None => rows.shallow_clone(),
        };
        let counts: Vec<i64> = self.rectangles.iter().map(|own| own.examples.len() as i64 * heads).collect();
        Ok(laid_out.f_reshape([-1, 1, head_size])?.f_split_with_sizes(&counts[..], 0)?)
    }

    /// Collects the rows of the examples from the rectangles: the way back of [`AttentionLayout::split_examples`].
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn join_examples(&self, rectangles: &[Tensor], heads: i64) -> Result<Tensor> {
        let rows = Tensor::f_cat(rectangles, 0)?;
        let rows = rows.f_reshape([-1, heads * rows.size()[2]])?;
        match &self.order {
            Some([_, places]) => Ok(rows.f_index_select(0, places)?),
            None => Ok(rows),
        }
    }

    /// Collects the rows of real tokens from the rectangles: the way back of [`AttentionLayout::split`].
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn join(&self, rectangles: &[Tensor], heads: i64) -> Result<Tensor> {
        if rectangles.iter().all(PackedRows::take) {
            return self.packed.join(rectangles, heads);
        }
        let flat = |rectangle: &Tensor| {
            Ok(rectangle.f_reshape([-1, rectangle.size().last().copied().unwrap_or(0)])?)
        };
        let parts = rectangles.iter().map(flat).collect::<Result<Vec<_>>>()?;
        let all = if let [only] = &parts[..] { only.shallow_clone() } else { Tensor::f_cat(&parts, 0)? };
        let head_size = all.size()[1];
        Ok(all.f_index_select(0, &self.places)?.f_view([-1, heads * head_size])?)
    }
}

impl Rectangle {
    /// Returns what attention adds to its scores if a token attends to those at most `window` before or behind it only,
    /// `[examples, 1, length, length]`, or one for all examples if all positions are real: zero, or minus infinity. `like`
    /// tells device and type.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn bias_within(&self, window: i64, like: &Tensor) -> Result<Tensor> {
        let mut made = self.within.borrow_mut();
        if let Some((_, bias)) = made.as_ref().filter(|(own, _)| *own == window) {
            return Ok(bias.shallow_clone());
        }
        let (examples, length) = (self.examples.len() as i64, self.length as i64);
        let places = Tensor::f_arange(length, (Kind::Int64, like.device()))?;
        let distances = places.f_view([1, 1, 1, length])?.f_sub(&places.f_view([1, 1, length, 1])?)?;
        let mut hidden = distances.f_abs()?.f_gt(window)?;
        if let Some(bias) = &self.bias {
            let padded = bias.f_view([examples, -1, length])?.f_select(1, 0)?.f_isinf()?;
            // Nobody asks what padding attends to, but if that were nothing, its softmax would be none.
            let real = padded.f_logical_not()?.f_view([examples, 1, length, 1])?;
            hidden = hidden.f_logical_and(&real)?.f_logical_or(&padded.f_view([examples, 1, 1, length])?)?;
        }
        let bias = Tensor::f_zeros(hidden.size(), (like.kind(), like.device()))?;
        let bias = bias.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
        *made = Some((window, bias.shallow_clone()));
        Ok(bias)
    }

    fn rows(&self, heads: i64) -> i64 {
        (self.examples.len() * self.length) as i64 * heads
    }
}

/// Returns the order of the examples in the rectangles, and the place of each in it, if it is not that of the batch.
fn order(groups: &[(Vec<usize>, usize)], device: Device) -> Result<Option<[Tensor; 2]>> {
    let examples: Vec<usize> = groups.iter().flat_map(|(examples, _)| examples.iter().copied()).collect();
    if examples.is_sorted() {
        return Ok(None);
    }
    let mut places = vec![0; examples.len()];
    examples.iter().enumerate().for_each(|(place, &example)| places[example] = place as i64);
    let examples: Vec<i64> = examples.into_iter().map(|example| example as i64).collect();
    Ok(Some([upload(&examples, device)?, upload(&places, device)?]))
}

fn bias(
    examples: &[usize],
    lengths: &[usize],
    length: usize,
    heads: usize,
    kind: Kind,
    device: Device,
) -> Result<Option<Tensor>> {
    if examples.iter().all(|&example| lengths[example] == length) {
        return Ok(None);
    }
    let mut numbers = vec![0f32; examples.len() * heads * length];
    for (rows, &example) in numbers.chunks_mut(heads * length).zip(examples) {
        for row in rows.chunks_mut(length) {
            row[lengths[example]..].fill(f32::NEG_INFINITY);
        }
    }
    let bias = upload(&numbers, device)?.f_to_kind(kind)?;
    Ok(Some(bias.f_view([-1, 1, length as i64])?))
}

/// Returns the examples of each rectangle, and its length: on a GPU there is one, whose shape changes less from batch to
/// batch.
fn groups_on(lengths: &[usize], width: usize, device: Device) -> Vec<(Vec<usize>, usize)> {
    if device.is_cuda() {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        return vec![((0..lengths.len()).collect(), longest)];
    }
    groups(lengths, RECTANGLE_COST / width.max(1))
}

/// Cuts the examples, longest first, into groups whose squares cost least together, where each group costs
/// `group_cost` more. Returns the examples of each and its length.
fn groups(lengths: &[usize], group_cost: usize) -> Vec<(Vec<usize>, usize)> {
    let rounded = |example: usize| lengths[example].next_multiple_of(LENGTH_MULTIPLE);
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&example| std::cmp::Reverse(rounded(example)));
    // A group begins where the length changes; others cost more.
    let mut starts: Vec<usize> =
        (0..order.len()).filter(|&at| at == 0 || rounded(order[at]) != rounded(order[at - 1])).collect();
    starts.push(order.len());
    // Least cost of the examples before each start, and where the last of their groups begins.
    let mut best = vec![(0, 0)];
    for end in 1..starts.len() {
        let cost_from = |start: usize| {
            let length = rounded(order[starts[start]]);
            best[start].0 + (starts[end] - starts[start]) * length * length + group_cost
        };
        best.push((0..end).map(|start| (cost_from(start), start)).min().unwrap_or_default());
    }
    let mut cuts: Vec<Range<usize>> = Vec::new();
    let mut end = starts.len() - 1;
    while end > 0 {
        let start = best[end].1;
        cuts.push(starts[start]..starts[end]);
        end = start;
    }
    let group = |cut: Range<usize>| (order[cut.clone()].to_vec(), rounded(order[cut.start]));
    cuts.into_iter().rev().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<T: TryFrom<Tensor>>(tensor: &Tensor) -> T {
        T::try_from(tensor.shallow_clone()).unwrap_or_else(|_| panic!("{tensor:?}"))
    }

    #[test]
    fn examples_of_similar_length_share_a_rectangle() {
        assert_eq!(groups(&[100, 20, 97, 16], 500), [(vec![0, 2], 112), (vec![1], 32), (vec![3], 16)]);
        // A group more is worth it only if it saves more than it costs.
        assert_eq!(groups(&[100, 20, 97, 16], 20_000), [(vec![0, 2], 112), (vec![1, 3], 32)]);
        assert_eq!(groups(&[100, 20, 97, 16], usize::MAX / 8), [(vec![0, 2, 1, 3], 112)]);
        assert_eq!(groups(&[7], 10), [(vec![0], 16)]);
        assert_eq!(groups(&[], 10), []);
        let area = AttentionLayout::area(&[100, 20, 97, 16], RECTANGLE_COST / 500, Device::Cpu);
        assert_eq!(area, (2 * 112 + 32 + 16, 2 * 112 * 112 + 32 * 32 + 16 * 16));
    }

    #[test]
    fn every_example_is_in_one_group_and_none_is_cut() {
        let lengths: Vec<usize> = (0..200).map(|number| 1 + number * 37 % 128).collect();
        for cost in [0, 100, 10_000] {
            let groups = groups(&lengths, cost);
            let mut seen: Vec<usize> = groups.iter().flat_map(|(examples, _)| examples.clone()).collect();
            assert!(
                groups.iter().all(|(own, length)| own.iter().all(|&example| lengths[example] <= *length))
            );
            seen.sort_unstable();
            assert_eq!(seen, (0..200).collect::<Vec<_>>());
        }
    }

    /// Rows of float64 go by the operations of libtorch, which a GPU has, too.
    #[test]
    fn the_copies_of_the_cpu_are_those_of_libtorch_with_their_gradients() {
        let layout = AttentionLayout::new(&[3, 40, 2], 2, 100_000, Kind::Float, Device::Cpu).unwrap();
        let results = |kind: Kind| {
            let rows = (Tensor::arange(45 * 4, (Kind::Float, Device::Cpu)) * 0.3).sin().view([45, 4]);
            let rows = rows.to_kind(kind).set_requires_grad(true);
            let parts = layout.split_scaled(&rows, 2, 0.5).unwrap();
            let joined = layout.join(&parts.iter().map(Tensor::square).collect::<Vec<_>>(), 2).unwrap();
            (&joined * &rows).sum(kind).backward();
            let mut all = parts;
            all.extend([joined, rows.grad()]);
            all.iter().map(|tensor| tensor.detach().to_kind(Kind::Double)).collect::<Vec<_>>()
        };
        for (own, libtorch) in results(Kind::Float).iter().zip(results(Kind::Double)) {
            assert!(
                own.size() == libtorch.size() && own.allclose(&libtorch, 1e-5, 1e-6, false),
                "{:?}",
                own.size()
            );
        }
    }

    #[test]
    fn tokens_go_to_their_rectangle_and_come_back() {
        let (lengths, heads) = ([3, 40, 2], 2);
        let layout = AttentionLayout::new(&lengths, heads, 4, Kind::Float, Device::Cpu).unwrap();
        let rows = Tensor::arange(45 * 4, (Kind::Float, Device::Cpu)).view([45, 4]);
        let parts = layout.split(&rows, heads as i64).unwrap();
        assert_eq!(parts.len(), 1, "the products of so small a width are cheaper than a rectangle more");
        assert_eq!(parts[0].size(), [6, 48, 2]);
        // The second head of the second token of the first example, which is the second in the rectangle.
        let found: Vec<f32> = numbers(&parts[0].get(3).get(1));
        assert_eq!(found, [6.0, 7.0]);
        let bias: Vec<f32> = numbers(&layout.rectangles[0].bias.as_ref().unwrap().get(3).view([-1]));
        assert_eq!(bias.iter().filter(|value| **value == 0.0).count(), 3);
        assert_eq!(layout.join(&parts, heads as i64).unwrap(), rows);

        let layout = AttentionLayout::new(&lengths, heads, 100_000, Kind::Float, Device::Cpu).unwrap();
        let parts = layout.split(&rows, heads as i64).unwrap();
        assert_eq!(parts.iter().map(Tensor::size).collect::<Vec<_>>(), [[2, 48, 2], [4, 16, 2]]);
        assert_eq!(layout.join(&parts, heads as i64).unwrap(), rows);

        // The longest example comes first.
        let rows = Tensor::arange(3 * 4, (Kind::Float, Device::Cpu)).view([3, 4]);
        let parts = layout.split_examples(&rows, heads as i64).unwrap();
        assert_eq!(parts.iter().map(Tensor::size).collect::<Vec<_>>(), [[2, 1, 2], [4, 1, 2]]);
        assert_eq!(numbers::<Vec<f32>>(&parts[0].view([-1])), [4.0, 5.0, 6.0, 7.0]);
        assert_eq!(layout.join_examples(&parts, heads as i64).unwrap(), rows);
        let full = AttentionLayout::new(&[16, 16], heads, 4, Kind::Float, Device::Cpu).unwrap();
        assert!(full.rectangles[0].bias.is_none() && full.order.is_none());
    }
}

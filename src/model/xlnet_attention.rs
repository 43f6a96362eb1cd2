//! XLNet's attention: scores of contents, of distances between tokens, and of whether both are in the same segment.
//!
//! For the query of a token i, the key of a token j and their distance i − j, all of one head, a score is
//!
//! (q_i + r_w) · k_j + (q_i + r_r) · W_r p_{i−j} + (q_i + r_s) · s_{ij}
//!
//! divided by √d, where p are sinusoids and s_{ij} is one of two vectors: for the same segment, and for different ones. The
//! reference is transformers' `XLNetRelativeAttention`.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::attention::Attention;
use super::layers::{Linear, Vector};
use super::parameter::{ParameterKind, ParameterPlace};
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use crate::data::{AttentionLayout, Rectangle};
use crate::error::Result;
use crate::libtorch::upload;

/// What is added to the score of a pair that must not attend, as in the reference: finite, since a row that pads may have no
/// other pairs.
const FORBIDDEN: f64 = -1e30;

/// What a config says of the attention of all layers.
#[derive(Clone, Copy)]
pub(super) struct AttentionSettings {
    pub hidden: i64,
    pub heads: i64,
    pub dropout: f64,
    pub visible: Visible,
    /// What the head reads: the last token of each example, or any.
    pub asked: Asked,
    /// The largest distance, if there is one; larger ones count as this.
    pub largest_distance: Option<i64>,
}

/// Which tokens a token attends to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Visible {
    All,
    /// Itself and those before it.
    Earlier,
    /// Itself alone: what "the same length for all" comes to without memories.
    Own,
}

/// Which tokens the last layer computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    All,
    /// The last one of each example, which attends to all others.
    Last,
}

impl AttentionSettings {
    /// Returns what the rows of the last layer stand for.
    pub fn rows_of_last_layer(&self) -> Rows {
        match self.asked {
            Asked::All => Rows::Tokens,
            Asked::Last => Rows::Examples,
        }
    }
}

/// What a pass knows of pairs of tokens, for all layers.
pub(super) struct Pairs {
    layout: Rc<AttentionLayout>,
    /// Sinusoids of the distances 0, 1, … and of −1, −2, …: one row a token, by its position, or `Rows::Shared`.
    sinusoids: [Tensor; 2],
    rows: Rows,
    positions: Tensor,
    /// Where each head of each row of both kinds stands among the distances of all rectangles.
    places: Tensor,
    /// One where two tokens are in the same segment, zero elsewhere, in each rectangle `[examples, 1, length, length]`.
    same_segment: Vec<Tensor>,
    /// What keeps tokens from each other in each rectangle, `[length, length]`.
    forbidden: Vec<Option<Tensor>>,
    last: Option<LastTokens>,
}

/// What a pass knows of pairs of the last token of each example with all others.
struct LastTokens {
    /// Which they are, `[examples]`, int64.
    tokens: Tensor,
    /// The token that is as far from the end of its example as each token from the start, `[tokens]`, int64.
    mirror: Tensor,
    /// As in [`Pairs`]: `[examples, 1, 1, length]`.
    same_segment: Vec<Tensor>,
}

impl Pairs {
    /// Prepares what the layers need, to compute in `kind`.
    ///
    /// Dropout of the sinusoids is an example's own, as in the reference, which repeats them for each example before. So are
    /// their projections then; otherwise all examples share them.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(pass: &Pass, settings: &AttentionSettings, kind: Kind) -> Result<Self> {
        let AttentionSettings { hidden, heads, dropout, .. } = *settings;
        let batch = pass.batch;
        let layout = batch.attention_layout(heads, hidden, kind)?;
        let own_dropout = pass.dropout.is_some() && dropout > 0.0;
        let rows = if own_dropout || pass.is_observed() { Rows::Tokens } else { Rows::Shared };
        let device = batch.input_ids.device();
        let distances = Tensor::f_arange(batch.longest() as i64, (Kind::Float, device))?;
        let both = [distances.shallow_clone(), distances.f_neg()?.f_sub_scalar(1.0)?];
        let [ahead, behind] = both.map(|distances| -> Result<Tensor> {
            let all = sinusoids(&distances, settings)?;
            match rows {
                Rows::Tokens => pass.dropout(&all.f_index_select(0, &batch.positions)?, dropout, rows),
                _ => Ok(all),
            }
        });
        let segments = layout.split(&batch.token_types.f_unsqueeze(1)?.f_repeat([1, heads])?, heads)?;
        let same_segment = (segments.iter())
            .map(|segments| same_segment(segments, segments, heads, kind))
            .collect::<Result<_>>()?;
        let last = match settings.asked {
            Asked::All => None,
            Asked::Last => Some(LastTokens::new(pass, &layout, &segments, (heads, kind))?),
        };
        let forbidden = (layout.rectangles.iter())
            .map(|rectangle| settings.visible.forbidden(rectangle.length as i64, (kind, device)))
            .collect::<Result<_>>()?;
        Ok(Self {
            places: places(&layout, &batch.positions, heads)?,
            layout,
            sinusoids: [ahead?, behind?],
            rows,
            positions: batch.positions.shallow_clone(),
            same_segment,
            forbidden,
            last,
        })
    }

    /// Takes the states of the tokens that a layer is asked for: `[tokens, hidden]` to `[rows, hidden]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn states_of(&self, rows: Rows, states: &Tensor) -> Result<Tensor> {
        match &self.last {
            Some(last) if rows == Rows::Examples => Ok(states.f_index_select(0, &last.tokens)?),
            _ => Ok(states.shallow_clone()),
        }
    }

    /// Projects the sinusoids of one sign of the distance: one row a token, by its position.
    fn project(&self, pass: &Pass, projection: &Linear, sinusoids: &Tensor) -> Result<Tensor> {
        let keys = projection.forward_rows(pass, sinusoids, self.rows)?;
        match self.rows {
            Rows::Tokens => Ok(keys),
            // A gather whose backward adds up in one order, also on a GPU.
            _ => Ok(Tensor::f_embedding(&keys, &self.positions, -1, false, false)?),
        }
    }

    /// Projects the sinusoids and lays them out, for each rectangle as `[examples · heads, 2 · length, head_size]`, from the
    /// distance length − 1 down to −length.
    fn distance_keys(&self, pass: &Pass, projection: &Linear, heads: i64) -> Result<Vec<Tensor>> {
        let [ahead, behind] = &self.sinusoids;
        let [ahead, behind] =
            [self.project(pass, projection, ahead)?, self.project(pass, projection, behind)?];
        let head_size = ahead.size()[1] / heads;
        let keys = Tensor::f_cat(&[ahead, behind], 0)?.f_reshape([-1, head_size])?;
        let lengths = self.layout.rectangles.iter().map(|own| (own.examples.len() as i64, own.length as i64));
        let counts: Vec<i64> = lengths.map(|(examples, length)| 2 * examples * heads * length).collect();
        let shape = [counts.iter().sum(), head_size];
        let laid_out = Tensor::f_zeros(shape, (keys.kind(), keys.device()))?;
        let laid_out = laid_out.f_index_copy(0, &self.places, &keys)?;
        let parts = laid_out.f_split_with_sizes(&counts[..], 0)?;
        let shaped = |(part, rectangle): (&Tensor, &Rectangle)| {
            Ok(part.f_view([-1, 2 * rectangle.length as i64, head_size])?)
        };
        parts.iter().zip(&self.layout.rectangles).map(shaped).collect()
    }
}

impl LastTokens {
    /// Projects the sinusoids and lays those of the distances from the last token out, for each rectangle as
    /// `[examples · heads, length, head_size]`.
    fn distance_keys(
        &self,
        pass: &Pass,
        pairs: &Pairs,
        projection: &Linear,
        heads: i64,
    ) -> Result<Vec<Tensor>> {
        let keys = pairs.project(pass, projection, &pairs.sinusoids[0])?;
        pairs.layout.split(&keys.f_index_select(0, &self.mirror)?, heads)
    }

    fn new(
        pass: &Pass,
        layout: &AttentionLayout,
        segments: &[Tensor],
        (heads, kind): (i64, Kind),
    ) -> Result<Self> {
        let batch = pass.batch;
        let (mut tokens, mut mirror) = (Vec::new(), Vec::with_capacity(batch.tokens()));
        for &length in &batch.lengths {
            let first = mirror.len() as i64;
            let end = first + length as i64;
            tokens.push(end - 1);
            mirror.extend((first..end).rev());
        }
        let device = batch.input_ids.device();
        let [tokens, mirror] = [upload(&tokens, device)?, upload(&mirror, device)?];
        let own = batch.token_types.f_index_select(0, &tokens)?.f_unsqueeze(1)?.f_repeat([1, heads])?;
        let same_segment = (layout.split_examples(&own, heads)?.iter().zip(segments))
            .map(|(own, all)| same_segment(own, all, heads, kind))
            .collect::<Result<_>>()?;
        Ok(Self { tokens, mirror, same_segment })
    }
}

/// Returns one where the token of a row and that of a column are in the same segment, zero elsewhere,
/// `[examples, 1, rows, columns]`, given the segments of both, `[examples · heads, _, 1]`.
fn same_segment(rows: &Tensor, columns: &Tensor, heads: i64, kind: Kind) -> Result<Tensor> {
    let of_one_head = |all: &Tensor| all.f_view([-1, heads, all.size()[1], 1])?.f_narrow(1, 0, 1);
    Ok(of_one_head(rows)?.f_eq_tensor(&of_one_head(columns)?.f_transpose(2, 3)?)?.f_to_kind(kind)?)
}

impl Visible {
    /// Returns what is added to scores `[length, length]`, if anything.
    fn forbidden(self, length: i64, options: (Kind, Device)) -> Result<Option<Tensor>> {
        let all = Tensor::f_full([length, length], FORBIDDEN, options)?;
        Ok(match self {
            Visible::All => None,
            Visible::Earlier => Some(all.f_triu(1)?),
            Visible::Own => Some(all.f_triu(1)?.f_add(&all.f_tril(-1)?)?),
        })
    }
}

/// Returns the sinusoids of distances, `[rows, hidden]`: sines of all frequencies, then cosines.
fn sinusoids(distances: &Tensor, settings: &AttentionSettings) -> Result<Tensor> {
    let largest = settings.largest_distance.map(|largest| distances.f_clamp(-largest, largest));
    let options = (Kind::Float, distances.device());
    let exponents = Tensor::f_arange_start_step(0, settings.hidden, 2, options)?;
    let exponents = exponents.f_div_scalar(settings.hidden as f64)?;
    let frequencies = Tensor::f_pow_scalar(10_000.0, &exponents)?.f_reciprocal()?;
    let angles = largest.transpose()?.as_ref().unwrap_or(distances).f_outer(&frequencies)?;
    Ok(Tensor::f_cat(&[angles.f_sin()?, angles.f_cos()?], -1)?)
}

/// Returns where the heads of the tokens' distances stand, `[2 · tokens · heads]`: first all from 0 on, then the negative
/// ones. A head of an example whose rows in the rectangles are first .. first + n has its distances at the rows 2 · first ..
/// 2 · first + 2n; a token at position p has the distances p and −p − 1.
fn places(layout: &AttentionLayout, positions: &Tensor, heads: i64) -> Result<Tensor> {
    let own = layout.places.f_view([-1, heads])?;
    let positions = positions.f_unsqueeze(1)?;
    let mut end = 0;
    let (ends, lengths): (Vec<i64>, Vec<i64>) = (layout.rectangles.iter())
        .map(|rectangle| {
            end += heads * (rectangle.examples.len() * rectangle.length) as i64;
            (end, rectangle.length as i64)
        })
        .unzip();
    let (ends, lengths) = (upload(&ends, own.device())?, upload(&lengths, own.device())?);
    let lengths = lengths.f_take(&own.f_bucketize(&ends, false, true)?)?;
    // That of the distance −1.
    let middle = own.f_sub(&positions)?.f_mul_scalar(2)?.f_add(&lengths)?;
    let ahead = middle.f_sub(&positions)?.f_sub_scalar(1)?;
    Ok(Tensor::f_cat(&[ahead, middle.f_add(&positions)?], 0)?.f_view([-1])?)
}

/// The attention of one layer, up to the sum with its input.
pub(super) struct RelativeAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// W_r.
    distance: Linear,
    /// r_w, r_r and r_s.
    biases: [Vector; 3],
    /// s for the same segment, and for different ones.
    segments: [Vector; 2],
    settings: AttentionSettings,
    /// What it returns.
    rows: Rows,
}

impl RelativeAttention {
    /// Declares the parameters below `{prefix}`, as in transformers `[hidden, heads, head_size]` and without `weight` in
    /// their names.
    pub fn declare(
        table: &mut ParameterTable,
        prefix: &str,
        place: ParameterPlace,
        rows: Rows,
        settings: AttentionSettings,
    ) -> Self {
        let AttentionSettings { hidden, heads, .. } = settings;
        let head_size = hidden / heads;
        let name = |part: &str| format!("{prefix}.{part}");
        let shape = [hidden, heads, head_size];
        let mut linear = |part: &str, input_first: bool, rows: Rows| {
            Linear::declare_heads(table, &name(part), shape, input_first, place, rows)
        };
        let query = linear("q", true, rows);
        let [key, value, distance] = ["k", "v", "r"].map(|part| linear(part, true, Rows::Tokens));
        let output = linear("o", false, rows);
        let vector = |parameter, number| Vector { parameter, number, width: hidden, rows };
        let biases = ["r_w_bias", "r_r_bias", "r_s_bias"].map(|part| {
            vector(table.declare(name(part), &[heads, head_size], ParameterKind::Bias, place), 0)
        });
        let segments =
            table.declare(name("seg_embed"), &[2, heads, head_size], ParameterKind::Embedding, place);
        let segments = [0, 1].map(|number| vector(segments, number));
        Self { query, key, value, output, distance, biases, segments, settings, rows }
    }

    /// Returns the type that its matrices are in.
    pub fn kind(&self, pass: &Pass) -> Kind {
        pass.weight(self.query.weight).kind()
    }

    /// Runs the attention on the states of all tokens, `[tokens, hidden]`, for those that the layer is asked for,
    /// `[rows, hidden]`; returns as many.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn forward(&self, pass: &Pass, pairs: &Pairs, asked: &Tensor, states: &Tensor) -> Result<Tensor> {
        let AttentionSettings { hidden, heads, dropout, .. } = self.settings;
        let (queries, scale) = (self.rows, 1.0 / ((hidden / heads) as f64).sqrt());
        let query = self.query.forward(pass, asked)?;
        let [key, value] = [&self.key, &self.value].map(|linear| linear.forward(pass, states));
        let [content, distance, segment] = self.biases.each_ref().map(|bias| bias.add(pass, &query));
        let last = pairs.last.as_ref().filter(|_| queries == Rows::Examples);
        let split = |rows: &Tensor| match last {
            Some(_) => pairs.layout.split_examples(rows, heads),
            None => pairs.layout.split(rows, heads),
        };
        let distances = split(&distance?.f_mul_scalar(scale)?)?;
        let segments = split(&self.segment_scores(pass, &segment?)?.f_mul_scalar(scale)?)?;
        let (distance_keys, same_segment) = match last {
            Some(last) => (last.distance_keys(pass, pairs, &self.distance, heads)?, &last.same_segment),
            None => (pairs.distance_keys(pass, &self.distance, heads)?, &pairs.same_segment),
        };
        let terms = |number: usize, rectangle: &Rectangle, _: &Tensor, _: &Tensor| {
            let length = rectangle.length as i64;
            let scores = distances[number].f_bmm(&distance_keys[number].f_transpose(1, 2)?)?;
            let scores = match last {
                Some(_) => scores.f_view([-1, heads, 1, length])?,
                None => of_pairs(&scores, heads, length)?,
            };
            let segments = segments[number].f_view([-1, heads, scores.size()[2], 1])?;
            let scores = scores.f_addcmul(&segments, &same_segment[number])?.f_flatten(0, 1)?;
            match &pairs.forbidden[number] {
                // The last token comes behind all others.
                Some(forbidden) if last.is_none() => Ok(scores.f_add(forbidden)?),
                _ => Ok(scores),
            }
        };
        let (query, key, value) = (&content?, &key?, &value?);
        let attention = Attention { query, queries, key, value, heads, scale, dropout };
        self.output.forward(pass, &pass.attention_with_terms(&attention, &terms)?)
    }

    /// Returns how much more a key of the same segment scores than one of another, `[rows, heads]`, from q + r_s,
    /// `[rows, hidden]`: a score that all keys of a query have in common does not change its softmax.
    fn segment_scores(&self, pass: &Pass, query: &Tensor) -> Result<Tensor> {
        let heads = self.settings.heads;
        let score = |vector: &Vector| -> Result<Tensor> {
            let products = vector.multiply(pass, query)?.f_view([-1, heads, self.settings.hidden / heads])?;
            Ok(products.f_sum_dim_intlist(-1i64, false, query.kind())?)
        };
        let [same, different] = [score(&self.segments[0])?, score(&self.segments[1])?];
        Ok(same.f_sub(&different)?)
    }
}

/// Returns the scores of pairs of tokens, `[examples, heads, length, length]`, out of those of distances,
/// `[examples · heads, length, 2 · length]`, from length − 1 down: a view in which each row begins one number further left
/// than the one before.
fn of_pairs(scores: &Tensor, heads: i64, length: i64) -> Result<Tensor> {
    let (size, row) = ([scores.size()[0] / heads, heads, length, length], 2 * length);
    Ok(scores.f_as_strided(size, [heads * row * length, row * length, row - 1, 1], length - 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys that are their own distances, in rectangles of two lengths: the score of each pair is its distance.
    #[test]
    fn every_pair_reads_its_own_distance() {
        let (lengths, heads) = ([3i64, 40, 2], 2);
        let sizes = lengths.map(|length| length as usize);
        let layout = AttentionLayout::new(&sizes, 2, 100_000, Kind::Float, Device::Cpu).unwrap();
        assert_eq!(layout.rectangles.len(), 2);
        let positions: Vec<i64> = lengths.iter().flat_map(|&length| 0..length).collect();
        let positions = Tensor::from_slice(&positions);
        let places = places(&layout, &positions, heads).unwrap();
        let ahead = positions.repeat_interleave_self_int(heads, 0, None);
        let distances = Tensor::cat(&[&ahead, &(-&ahead - 1)], 0).to_kind(Kind::Float);
        let all: i64 = layout.rectangles.iter().map(|own| (own.examples.len() * own.length) as i64).sum();
        let laid_out = Tensor::full([2 * heads * all], f64::NAN, (Kind::Float, Device::Cpu));
        let laid_out = laid_out.index_copy(0, &places, &distances);
        let mut start = 0;
        for rectangle in &layout.rectangles {
            let length = rectangle.length as i64;
            let rows = heads * rectangle.examples.len() as i64;
            let keys = laid_out.narrow(0, start, 2 * rows * length).view([rows, 1, 2 * length]);
            start += 2 * rows * length;
            let scores = of_pairs(&keys.repeat([1, length, 1]), heads, length).unwrap().flatten(0, 1);
            for row in 0..rows {
                let own = lengths[rectangle.examples[(row / heads) as usize]];
                for (query, key) in (0..own).flat_map(|query| (0..own).map(move |key| (query, key))) {
                    let found = scores.double_value(&[row, query, key]);
                    assert_eq!(found, (query - key) as f64, "{own} tokens, {query} to {key}");
                }
            }
        }
    }
}

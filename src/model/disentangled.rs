//! Disentangled attention (He et al., 2021): to the scores of contents it adds those of contents with relative positions.
//!
//! With δ the distance from key to query, q and k their contents, and K and Q the projected embeddings of relative
//! positions, a score is (q·k + q·K(δ) + k·Q(δ)) / √(3d); fewer parts have a smaller root. Only the relative positions of
//! the batch's rectangles are embedded.

use std::collections::HashMap;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::attention::Attention;
use super::config::ModelConfig;
use super::layer_norm::LayerNorm;
use super::layers::{Embedding, Linear};
use super::parameter::ParameterPlace;
use super::params::ParameterTable;
use super::pass::{Pass, Rows};
use super::post_norm::{Layer, Layers};
use crate::data::{AttentionLayout, Rectangle};
use crate::error::{Error, Result};
use crate::libtorch::upload;

/// Which contents a term of the scores compares with relative positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Term {
    /// q·K(δ), `c2p` in configs.
    ContentToPosition,
    /// k·Q(δ), `p2c` in configs.
    PositionToContent,
}

/// The terms of a config, of which there is at least one, each with something of its own.
#[derive(Clone, Copy, Debug)]
struct Terms<T>(T, Option<T>);

impl<T> Terms<T> {
    fn try_map<U>(&self, mut function: impl FnMut(&T) -> Result<U>) -> Result<Terms<U>> {
        Ok(Terms(function(&self.0)?, self.1.as_ref().map(function).transpose()?))
    }
}

/// Which entry of the table a distance has.
#[derive(Clone, Copy, Debug)]
pub(super) struct RelativePositions {
    /// The table has twice as many entries; distances beyond its ends have the last one.
    span: i64,
    /// Number of buckets in each direction, and the distance that the last of them is for.
    buckets: Option<[i64; 2]>,
}

impl RelativePositions {
    /// Reads `position_buckets` and `max_relative_positions`.
    ///
    /// # Errors
    /// Fails if one of them is no integer, or if the buckets cannot be computed.
    pub fn read(config: &ModelConfig) -> Result<Self> {
        let most = match config.count_if_any("max_relative_positions")? {
            Some(most) => most,
            None => config.integer("max_position_embeddings")?,
        };
        let Some(buckets) = config.count_if_any("position_buckets")? else {
            return Ok(Self { span: most, buckets: None });
        };
        if buckets == 1 || buckets / 2 == most - 1 {
            return Err(config.error(format!(
                "`position_buckets` {buckets} and `max_relative_positions` {most} leave nothing for logarithmic buckets"
            )));
        }
        Ok(Self { span: buckets, buckets: Some([buckets, most]) })
    }

    /// Returns the number of entries of the table.
    pub fn table_entries(self) -> i64 {
        2 * self.span
    }

    /// Returns the entries for the distances δ and −δ, for all δ from 0 to before `length`.
    ///
    /// The reference is transformers' `make_log_bucket_position`, with its operations in their order, since rounding
    /// decides which bucket a distance has.
    fn entries(&self, length: i64) -> Result<Vec<[i64; 2]>> {
        let distances = Tensor::f_arange(length, (Kind::Int64, Device::Cpu))?;
        let buckets = match self.buckets {
            None => distances,
            Some([buckets, most]) => {
                let middle = buckets / 2;
                let near = Tensor::from(middle - 1);
                let far = near.f_where_self(&distances.f_lt(middle)?, &distances)?;
                let scale = Tensor::from(((most - 1) as f64 / middle as f64) as f32).f_log()?;
                let logarithms = far.f_div_scalar(middle)?.f_log()?.f_div(&scale)?;
                let buckets = logarithms.f_mul_scalar(middle - 1)?.f_ceil()?.f_add_scalar(middle)?;
                let exact = distances.f_to_kind(Kind::Float)?;
                exact.f_where_self(&far.f_le(middle)?, &buckets)?.f_to_kind(Kind::Int64)?
            }
        };
        let buckets = Vec::<i64>::try_from(&buckets)?;
        let entry = |bucket: i64| (bucket + self.span).clamp(0, 2 * self.span - 1);
        Ok(buckets.into_iter().map(|bucket| [entry(bucket), entry(-bucket)]).collect())
    }
}

/// Disentangled attention in all layers.
pub(super) struct Disentangled {
    positions: RelativePositions,
    table: Embedding,
    norm: Option<LayerNorm>,
    /// For each layer, each term's projection of the relative positions.
    layers: Vec<Terms<(Term, Linear)>>,
    heads: i64,
    scale: f64,
    /// Of the embeddings of relative positions, anew in each layer.
    dropout: f64,
    attention_dropout: f64,
}

/// The relative positions of a batch.
pub(super) struct Relative {
    /// Their embeddings, `[rows, hidden]`, for every example again where gradients of single examples are asked for.
    embeddings: Tensor,
    /// For each rectangle and each term, the row of each column of the scores, see [`compare`].
    columns: Vec<[Tensor; 2]>,
}

impl Disentangled {
    /// Declares the projections of each layer beside the layers' own, or takes those of keys and queries where they are
    /// shared. `table` and `norm` are declared already; `scale` is the factor on all terms.
    pub fn declare(
        parameters: &mut ParameterTable,
        prefix: &str,
        layers: &Layers,
        (positions, table, norm): (RelativePositions, Embedding, Option<LayerNorm>),
        (first, second): (Term, Option<Term>),
        shares_projections: bool,
        scale: f64,
    ) -> Self {
        let settings = layers.settings();
        let hidden = settings.sizes.hidden;
        let mut project = |number: usize, layer: &Layer, term: Term| {
            let (own, name) = match term {
                Term::ContentToPosition => (layer.key, "pos_key_proj"),
                Term::PositionToContent => (layer.query, "pos_query_proj"),
            };
            if shares_projections {
                return (term, own);
            }
            let name = format!("{prefix}.{number}.attention.self.{name}");
            let place = ParameterPlace::EncoderLayer(number);
            (term, Linear::declare(parameters, &name, [hidden, hidden], place, Rows::Shared))
        };
        let mut project_all = |(number, layer): (usize, &Layer)| {
            Terms(project(number, layer, first), second.map(|term| project(number, layer, term)))
        };
        Self {
            positions,
            table,
            norm,
            layers: layers.iter().enumerate().map(&mut project_all).collect(),
            heads: settings.sizes.heads,
            scale,
            dropout: settings.hidden_dropout,
            attention_dropout: settings.attention_dropout,
        }
    }

    /// Embeds the relative positions of a batch, whose states are `[tokens, hidden]`.
    ///
    /// The embeddings are a segment of the pass, so that the layers' segments add to their gradient.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn relative(&self, pass: &Pass, states: &Tensor) -> Result<Rc<Relative>> {
        let layout = pass.attention_layout(states, self.heads)?;
        let longest = layout.rectangles.iter().map(|rectangle| rectangle.length).max().unwrap_or(0);
        // Numbered as distances grow: what dropout drops of a row must not depend on the longest example.
        let (mut rows, mut entries) = (HashMap::new(), Vec::new());
        let mut row_of = |entry: i64| {
            *rows.entry(entry).or_insert_with(|| {
                entries.push(entry);
                entries.len() - 1
            })
        };
        let row_of_distance: Vec<[usize; 2]> =
            self.positions.entries(longest as i64)?.into_iter().map(|pair| pair.map(&mut row_of)).collect();
        let columns =
            columns(&layout, &row_of_distance, entries.len(), pass.shared_copies(), states.device())?;
        let found = self.table.forward(pass, &pass.shared(&upload(&entries, states.device())?)?)?;
        let norm = self.norm;
        let embeddings = pass.segment(&found, move |pass, found| match norm {
            Some(norm) => norm.forward(pass, found),
            None => Ok(found.shallow_clone()),
        })?;
        Ok(Rc::new(Relative { embeddings, columns }))
    }

    /// Computes the attention of a layer, given its number, what its queries stand for, and its queries, keys and values:
    /// `[rows, hidden]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attend(
        &self,
        pass: &Pass,
        number: usize,
        (queries, [query, key, value]): (Rows, [&Tensor; 3]),
        relative: &Relative,
    ) -> Result<Tensor> {
        let embeddings = pass.dropout(&relative.embeddings, self.dropout, Rows::Shared)?;
        let projected = self.layers[number].try_map(|(term, linear)| {
            let rows = linear.forward_rows(pass, &embeddings, Rows::Shared)?;
            Ok((*term, rows.f_mul_scalar(self.scale)?))
        })?;
        let terms = |number: usize, _: &Rectangle, query: &Tensor, key: &Tensor| {
            let [for_queries, for_keys] = &relative.columns[number];
            let scores = projected.try_map(|(term, rows)| match (term, queries) {
                (Term::ContentToPosition, Rows::Examples) => {
                    compare_first(query, rows, for_queries, self.heads)
                }
                (Term::PositionToContent, Rows::Examples) => {
                    compare_with_first(key, rows, for_keys, self.heads)
                }
                (Term::ContentToPosition, _) => compare(query, rows, for_queries, self.heads),
                (Term::PositionToContent, _) => {
                    Ok(compare(key, rows, for_keys, self.heads)?.f_transpose(1, 2)?)
                }
            })?;
            match scores {
                Terms(first, None) => Ok(first),
                Terms(first, Some(second)) => Ok(first.f_add(&second)?),
            }
        };
        let attention = Attention {
            query,
            queries,
            key,
            value,
            heads: self.heads,
            scale: self.scale,
            dropout: self.attention_dropout,
        };
        pass.attention_with_terms(&attention, &terms)
    }
}

/// Returns, for each rectangle, the rows of relative positions that [`compare`] compares queries and keys with: of queries
/// with the distances from `length − 1` down, of keys from `1 − length` up.
fn columns(
    layout: &AttentionLayout,
    row_of_distance: &[[usize; 2]],
    rows: usize,
    copies: i64,
    device: Device,
) -> Result<Vec<[Tensor; 2]>> {
    let of_rectangle = |rectangle: &Rectangle| {
        let length = rectangle.length;
        let parts = if copies == 1 { &[0][..] } else { &rectangle.examples };
        let upload_columns = |[ahead, behind]: [usize; 2]| {
            let column = |place: usize| match place < length {
                true => row_of_distance[length - 1 - place][ahead],
                // The last one is not used.
                false => row_of_distance[(place + 1 - length).min(length - 1)][behind],
            };
            let all = parts.iter().flat_map(|part| (0..2 * length).map(move |place| (part * rows, place)));
            let all: Vec<_> = all.map(|(first, place)| (first + column(place)) as i64).collect();
            Ok::<_, Error>(upload(&all, device)?.f_view([-1, 2 * length as i64])?)
        };
        Ok([upload_columns([0, 1])?, upload_columns([1, 0])?])
    };
    layout.rectangles.iter().map(of_rectangle).collect()
}

/// Returns, for the contents `[examples · heads, length, head_size]` at i, their products with the relative position of
/// column `length − 1 + j − i`, at all j: `[examples · heads, length, length]`.
///
/// `columns` names the row of `rows`, `[rows, heads · head_size]`, of each of 2 · length columns, `[parts, 2 · length]`, for
/// all examples at once or for each. Every line of the result begins one column before the last one's, so that it is a view of
/// the products with all columns, where no index is looked up.
fn compare(contents: &Tensor, rows: &Tensor, columns: &Tensor, heads: i64) -> Result<Tensor> {
    let (all, length, _) = contents.size3()?;
    let count = 2 * length;
    let products = contents.f_bmm(&of_columns(rows, columns, all, heads)?)?;
    Ok(products.f_as_strided([all, length, length], [length * count, count - 1, 1], length - 1)?)
}

/// Returns the first line of what [`compare`] would return, `[examples · heads, 1, length]`, given the first contents,
/// `[examples · heads, 1, head_size]`.
fn compare_first(contents: &Tensor, rows: &Tensor, columns: &Tensor, heads: i64) -> Result<Tensor> {
    let length = columns.size()[1] / 2;
    let columns = columns.f_narrow(1, length - 1, length)?;
    Ok(contents.f_bmm(&of_columns(rows, &columns, contents.size()[0], heads)?)?)
}

/// Returns the first column of what [`compare`] would return, as a line: `[examples · heads, 1, length]`.
fn compare_with_first(contents: &Tensor, rows: &Tensor, columns: &Tensor, heads: i64) -> Result<Tensor> {
    let (all, length, _) = contents.size3()?;
    let columns = columns.f_narrow(1, 0, length)?.f_flip([1])?;
    // In bfloat16 products are rounded before they are added up, unlike those of matrices.
    let rows = of_columns(rows, &columns, all, heads)?.f_to_kind(Kind::Float)?;
    let products = contents.f_transpose(1, 2)?.f_mul(&rows)?;
    Ok(products.f_sum_dim_intlist(1i64, true, Kind::Float)?.f_to_kind(contents.kind())?)
}

/// Looks the rows of relative positions up that stand in some columns, `[parts, columns]`, where `parts` is one for all
/// examples or that of each: `[examples · heads, head_size, columns]`.
fn of_columns(rows: &Tensor, columns: &Tensor, all: i64, heads: i64) -> Result<Tensor> {
    let (parts, count) = columns.size2()?;
    let head_size = rows.size()[1] / heads;
    // An embedding, since its backward adds rows up in one order on every device.
    Ok(Tensor::f_embedding(rows, columns, -1, false, false)?
        .f_view([parts, count, heads, head_size])?
        .f_permute([0, 2, 3, 1])?
        .f_expand([all / heads, heads, head_size, count], false)?
        .f_reshape([all, head_size, count])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of transformers' `make_log_bucket_position`.
    #[test]
    fn distances_have_the_buckets_of_the_reference() {
        let cases = [
            ([256, 512], [(128, 128), (129, 129), (140, 137), (200, 169), (300, 207), (511, 255)]),
            ([32, 128], [(16, 16), (18, 17), (140, 32), (200, 35), (300, 38), (511, 42)]),
            ([10, 4], [(5, 5), (6, 4), (7, 3), (140, -21), (256, -25), (511, -31)]),
        ];
        for ([buckets, most], expected) in cases {
            let positions = RelativePositions { span: buckets, buckets: Some([buckets, most]) };
            let entries = positions.entries(512).unwrap();
            for (distance, bucket) in expected {
                let entry = |bucket: i64| (bucket + buckets).clamp(0, 2 * buckets - 1);
                assert_eq!(entries[distance], [entry(bucket), entry(-bucket)], "{buckets} {most} {distance}");
            }
        }
        let positions = RelativePositions { span: 3, buckets: None };
        assert_eq!(positions.entries(5).unwrap(), [[3, 3], [4, 2], [5, 1], [5, 0], [5, 0]]);
    }

    #[test]
    fn contents_meet_the_relative_position_of_each_pair() {
        let (examples, heads, length, head_size) = (2i64, 2i64, 3i64, 2i64);
        let numbers = |count: i64| Tensor::arange(count, (Kind::Float, Device::Cpu));
        let contents = numbers(examples * heads * length * head_size).view([-1, length, head_size]);
        let rows = numbers(6 * heads * head_size).view([6, -1]).square();
        let columns = [4i64, 0, 2, 5, 1, 3];
        let uploaded = Tensor::from_slice(&columns).view([1, -1]);
        let found = compare(&contents, &rows, &uploaded, heads).unwrap();
        let first = compare_first(&contents.narrow(1, 0, 1), &rows, &uploaded, heads).unwrap();
        assert_eq!(first, found.narrow(1, 0, 1));
        let with_first = compare_with_first(&contents, &rows, &uploaded, heads).unwrap();
        assert_eq!(with_first, found.narrow(2, 0, 1).transpose(1, 2));
        for part in 0..examples * heads {
            for (i, j) in (0..length).flat_map(|i| (0..length).map(move |j| (i, j))) {
                let row =
                    rows.get(columns[(length - 1 + j - i) as usize]).view([heads, -1]).get(part % heads);
                let expected = contents.get(part).get(i).dot(&row);
                assert_eq!(found.get(part).get(i).get(j), expected, "{part} {i} {j}");
            }
        }
    }
}

//! Attention within each example: over packed tokens where libtorch can, in rectangles elsewhere.

use std::ops::RangeInclusive;
use std::rc::Rc;

use tch::{Kind, Tensor};

use super::pass::{Pass, Rows};
use crate::data::{AttentionLayout, Rectangle};
use crate::error::Result;
use crate::libtorch::{FlashQueries, flash_attention};

/// Head sizes that libtorch's flash attention takes with a gradient and dropout on every GPU that it runs on, if they
/// are multiples of 8.
const FLASH_HEAD_SIZES: RangeInclusive<i64> = 8..=192;

/// Returns whether flash attention takes heads of a size.
pub(super) fn takes_head_size(head_size: i64) -> bool {
    FLASH_HEAD_SIZES.contains(&head_size) && head_size % 8 == 0
}

/// What attention computes with, and how.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    /// `[tokens, heads · head_size]`; where `queries` are examples, of one token of each that an output is asked of: with a
    /// window, of the first.
    pub query: &'a Tensor,
    /// What the rows of `query` stand for.
    pub queries: Rows,
    /// `[tokens, heads · head_size]`.
    pub key: &'a Tensor,
    /// `[tokens, heads · head_size]`.
    pub value: &'a Tensor,
    /// Number of heads.
    pub heads: i64,
    /// The factor on q kᵀ.
    pub scale: f64,
    /// Probability of dropping an attention probability.
    pub dropout: f64,
}

/// Returns what a family adds to the scaled scores of a rectangle, given its number and its queries and keys, all
/// `[examples · heads, length, head_size]`: a tensor that broadcasts to `[examples · heads, length, length]`. Where one token
/// of each example attends, queries and terms have one row in place of `length`.
pub type ScoreTerms<'a> = &'a dyn Fn(usize, &Rectangle, &Tensor, &Tensor) -> Result<Tensor>;

/// What happens to the scaled scores of a rectangle.
#[derive(Clone, Copy)]
enum Scores<'a> {
    /// Padding is hidden.
    Plain,
    /// And so are tokens further away than this.
    Within(i64),
    /// Padding is hidden, and a family adds what it has.
    WithTerms(ScoreTerms<'a>),
}

impl Pass<'_> {
    /// Computes softmax(q kᵀ / √d) v within each example; all `[tokens, heads · d]`, or queries and what is returned
    /// `[examples, heads · d]`.
    ///
    /// On GPUs in bfloat16 tokens stay packed. Elsewhere attention is the one place that needs rectangles: tokens are laid
    /// out for it and collected after it ([`AttentionLayout`]).
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attention(
        &self,
        [query, key, value]: [&Tensor; 3],
        queries: Rows,
        heads: i64,
        dropout: f64,
    ) -> Result<Tensor> {
        let head_size = query.size()[1] / heads;
        let scale = 1.0 / (head_size as f64).sqrt();
        self.attention_within(&Attention { query, queries, key, value, heads, scale, dropout }, None)
    }

    /// Computes softmax(q kᵀ · scale) v within each example, in the shape of the queries; with a window, each token attends
    /// to no token further away.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attention_within(&self, attention: &Attention, window: Option<i64>) -> Result<Tensor> {
        let Attention { query, queries, key, value, heads, scale, dropout } = *attention;
        let head_size = query.size()[1] / heads;
        let queries = match (queries, window) {
            (Rows::Examples, None) => Some(FlashQueries::OnePerExample),
            // Its windows lie around the last token where there is one query.
            (Rows::Examples, Some(_)) => None,
            _ => Some(FlashQueries::All { window }),
        };
        if let (Some(lengths), Some(queries)) = (self.batch.flash_lengths(), queries)
            && query.kind() == Kind::BFloat16
            && takes_head_size(head_size)
        {
            let asked = query.size()[0];
            let query = match queries {
                FlashQueries::OnePerExample => self.of_all_examples(query)?,
                FlashQueries::All { .. } => query.shallow_clone(),
            };
            let [query, key, value] = [&query, key, value].map(|rows| rows.f_view([-1, heads, head_size]));
            // Has a place as in rectangles, so that those that come after draw the same.
            self.next_site();
            let dropout = self.dropout.as_ref().map_or(0.0, |_| dropout);
            let context = flash_attention([&query?, &key?, &value?], &lengths, queries, dropout, scale)?;
            let context = context.f_reshape([-1, heads * head_size])?;
            // Backward of a part would fill the whole with zeros first.
            return if context.size()[0] == asked { Ok(context) } else { Ok(context.f_narrow(0, 0, asked)?) };
        }
        self.rectangles(attention, window.map_or(Scores::Plain, Scores::Within))
    }

    /// Adds rows of zeros for the examples that fill a batch up, behind those that an output is asked of: `[examples, width]`.
    fn of_all_examples(&self, rows: &Tensor) -> Result<Tensor> {
        match self.batch.lengths.len() as i64 - rows.size()[0] {
            0 => Ok(rows.shallow_clone()),
            fillers => Ok(rows.f_constant_pad_nd([0, 0, 0, fillers])?),
        }
    }

    /// Computes softmax(q kᵀ · scale + terms) v within each example, in the shape of the queries, always in rectangles.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate; whatever `terms` returns.
    pub fn attention_with_terms(&self, attention: &Attention, terms: ScoreTerms) -> Result<Tensor> {
        self.rectangles(attention, Scores::WithTerms(terms))
    }

    /// Returns how the batch is laid out in rectangles for so many heads over rows like these.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attention_layout(&self, rows: &Tensor, heads: i64) -> Result<Rc<AttentionLayout>> {
        self.batch.attention_layout(heads, rows.size()[1], rows.kind())
    }

    fn rectangles(&self, attention: &Attention, scores: Scores) -> Result<Tensor> {
        let heads = attention.heads;
        let layout = self.attention_layout(attention.key, heads)?;
        let site = self.next_site();
        // Libtorch's attention has dropout patterns of its own.
        let dropout = attention.dropout;
        let pattern = self.dropout.as_ref().filter(|_| dropout > 0.0 && !attention.key.device().is_cuda());
        let (factor, scale) = match scores {
            Scores::Plain | Scores::Within(_) if pattern.is_some() => (attention.scale, 1.0),
            _ => (1.0, attention.scale),
        };
        let one_each = attention.queries == Rows::Examples;
        let queries = match one_each {
            true => {
                let queries = self.of_all_examples(attention.query)?.f_mul_scalar(factor)?;
                layout.split_examples(&queries, heads)?
            }
            false => layout.split_scaled(attention.query, heads, factor)?,
        };
        let [keys, values] = [attention.key, attention.value].map(|rows| layout.split(rows, heads));
        let parts = queries.into_iter().zip(keys?).zip(values?);
        let contexts = (parts.zip(&layout.rectangles).enumerate())
            .map(|(number, (((query, key), value), rectangle))| {
                let own = rectangle.bias.as_ref();
                let bias = match scores {
                    // Where the rectangle is longer than the window reaches.
                    Scores::Within(window) if rectangle.length as i64 > window + 1 => {
                        let bias = rectangle.bias_within(window, &query)?;
                        Some(if one_each { bias.f_narrow(2, 0, 1)? } else { bias })
                    }
                    Scores::Plain | Scores::Within(_) => own.map(|own| own.f_unsqueeze(1)).transpose()?,
                    Scores::WithTerms(terms) => {
                        let terms = terms(number, rectangle, &query, &key)?;
                        let sum = own.map_or(Ok(terms.shallow_clone()), |own| terms.f_add(own));
                        Some(sum?.f_unsqueeze(1)?)
                    }
                };
                let inputs = [&query, &key, &value];
                match pattern {
                    None => self.by_libtorch(inputs, bias, scale, dropout),
                    Some(pattern) => {
                        let probabilities = probabilities(&query, &key, bias, scale)?;
                        let examples = &rectangle.examples;
                        let kept = pattern.attention(&probabilities, dropout, site, self.batch, examples)?;
                        Ok(kept.f_bmm(&value)?)
                    }
                }
            })
            .collect::<Result<Vec<_>>>()?;
        match one_each {
            true => Ok(layout.join_examples(&contexts, heads)?.f_narrow(0, 0, attention.query.size()[0])?),
            false => layout.join(&contexts, heads),
        }
    }

    /// Computes attention within each example of a rectangle by libtorch, with its dropout: all
    /// `[examples · heads, length, head_size]`, or queries and what is returned with one row in place of `length`. What is added
    /// to the scores has four dimensions, of which the first two divide examples and heads among them.
    fn by_libtorch(
        &self,
        [query, key, value]: [&Tensor; 3],
        bias: Option<Tensor>,
        scale: f64,
        dropout: f64,
    ) -> Result<Tensor> {
        let (rows, queries, head_size) = query.size3()?;
        let first = bias.as_ref().map_or(rows, |bias| bias.size()[0]);
        let dropout = self.dropout.as_ref().map_or(0.0, |_| dropout);
        let [query, key, value] =
            [query, key, value].map(|part| part.f_view([first, rows / first, part.size()[1], head_size]));
        let context = Tensor::f_scaled_dot_product_attention(
            &query?,
            &key?,
            &value?,
            bias,
            dropout,
            false,
            Some(scale),
            false,
        )?;
        Ok(context.f_reshape([rows, queries, head_size])?)
    }
}

/// Computes the attention probabilities within each example of a rectangle, `[examples · heads, queries, length]`, of queries
/// and keys as [`Pass::by_libtorch`] takes them.
fn probabilities(query: &Tensor, key: &Tensor, bias: Option<Tensor>, scale: f64) -> Result<Tensor> {
    let query = if scale == 1.0 { query.shallow_clone() } else { query.f_mul_scalar(scale)? };
    let scores = query.f_bmm(&key.f_transpose(1, 2)?)?;
    let scores = match bias {
        Some(bias) => {
            let (rows, queries, length) = scores.size3()?;
            let divided = scores.f_view([bias.size()[0], -1, queries, length])?;
            divided.f_add(&bias)?.f_view([rows, queries, length])?
        }
        None => scores,
    };
    Ok(scores.f_softmax(-1, query.kind())?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::data::{Encoded, PackedBatch};
    use crate::model::Dropout;
    use crate::random::{Key, Purpose};

    const LENGTHS: [usize; 5] = [3, 40, 2, 40, 16];

    fn batch() -> PackedBatch {
        let example = |&length: &usize| Encoded { ids: vec![1; length], token_types: vec![0; length] };
        let examples: Vec<Encoded> = LENGTHS.iter().map(example).collect();
        PackedBatch::pack(&examples.iter().collect::<Vec<_>>(), 0, Device::Cpu).unwrap()
    }

    /// Query, key and value of the batch.
    fn inputs(width: i64) -> [Tensor; 3] {
        let tokens = LENGTHS.iter().sum::<usize>() as i64;
        [0.0, 1.0, 2.0].map(|start| {
            let values = (Tensor::arange(tokens * width, (Kind::Float, Device::Cpu)) * 0.7 + start).sin();
            values.view([tokens, width]).set_requires_grad(true)
        })
    }

    /// Also with dropout, and with rectangles in another order than the examples.
    #[test]
    fn first_tokens_alone_attend_as_they_do_among_all() {
        let (heads, scale, batch) = (4, 0.06, batch());
        let [query, key, value] = inputs(heads * 250);
        let first = query.index_select(0, &batch.first_tokens);
        let terms = |_: usize, _: &Rectangle, query: &Tensor, key: &Tensor| {
            Ok(query.bmm(&key.transpose(1, 2)) * 0.01)
        };
        for (dropout, window) in [0.0, 0.3]
            .into_iter()
            .flat_map(|dropout| [None, Some(None), Some(Some(5))].map(|window| (dropout, window)))
        {
            let pattern = Dropout::of_key(Key::derive(1, Purpose::Dropout, 0), 0, Device::Cpu).unwrap();
            // What the first tokens become, and the gradients of query, key and value.
            let results = |query: &Tensor, queries: Rows| {
                let pass = Pass::new(&[], &batch, (dropout > 0.0).then(|| pattern.clone()));
                let attention = Attention { query, queries, key: &key, value: &value, heads, scale, dropout };
                let context = match window {
                    Some(window) => pass.attention_within(&attention, window).unwrap(),
                    None => pass.attention_with_terms(&attention, &terms).unwrap(),
                };
                let context = match queries {
                    Rows::Examples => context,
                    _ => context.index_select(0, &batch.first_tokens),
                };
                let loss = context.square().sum(Kind::Float);
                let gradients = Tensor::run_backward(&[loss], &[query, &key, &value], false, false);
                [context].into_iter().chain(gradients).collect::<Vec<_>>()
            };
            let mut expected = results(&query, Rows::Tokens);
            expected[1] = expected[1].index_select(0, &batch.first_tokens);
            for (found, expected) in results(&first, Rows::Examples).iter().zip(&expected) {
                let (size, largest) = (expected.size(), expected.abs().max().double_value(&[]));
                assert!(largest > 0.01 && found.size() == size, "{size:?} {largest}");
                let difference = (found - expected).abs().max().double_value(&[]);
                assert!(
                    difference < 1e-4 * largest,
                    "{dropout} {window:?} {size:?}: {difference} of {largest}"
                );
            }
        }
    }

    /// softmax(q kᵀ · scale) v of one example and head, where distance is at most the window.
    fn alone([query, key, value]: [&Tensor; 3], scale: f64, window: i64) -> Tensor {
        let places = Tensor::arange(query.size()[0], (Kind::Int64, Device::Cpu));
        let far = (places.unsqueeze(0) - places.unsqueeze(1)).abs().gt(window);
        let scores = (query.matmul(&key.transpose(0, 1)) * scale).masked_fill(&far, f64::NEG_INFINITY);
        scores.softmax(-1, Kind::Float).matmul(value)
    }

    /// Padding in a rectangle may be further than the window from all real tokens.
    #[test]
    fn a_window_hides_what_is_further_away_in_every_rectangle() {
        let (heads, head_size, batch) = (4, 250, batch());
        let [query, key, value] = inputs(heads * head_size);
        let pass = Pass::new(&[], &batch, None);
        let layout = pass.attention_layout(&query, heads).unwrap();
        let sizes: Vec<_> = layout.rectangles.iter().map(|own| (own.length, own.examples.len())).collect();
        assert_eq!(sizes, [(48, 2), (16, 3)]);
        for window in [0, 1, 4, 14, 15, 30, 100] {
            let attention = Attention {
                query: &query,
                queries: Rows::Tokens,
                key: &key,
                value: &value,
                heads,
                scale: 0.06,
                dropout: 0.0,
            };
            let found = pass.attention_within(&attention, Some(window)).unwrap();
            let mut first = 0;
            for &length in &LENGTHS {
                for head in 0..heads {
                    let own = |rows: &Tensor| {
                        rows.narrow(0, first, length as i64).narrow(1, head * head_size, head_size)
                    };
                    let expected = alone([&own(&query), &own(&key), &own(&value)], 0.06, window);
                    let difference = f64::try_from((own(&found) - expected).abs().max()).unwrap();
                    assert!(difference < 1e-5, "window {window}, {length} tokens: {difference}");
                }
                first += length as i64;
            }
            let gradient = Tensor::run_backward(&[found.square().sum(Kind::Float)], &[&query], false, false);
            assert!(gradient[0].isfinite().all().int64_value(&[]) == 1, "window {window}");
        }
    }
}

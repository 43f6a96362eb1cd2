//! The layers that encoder families are made of, and the pass that runs them.

use std::cell::{Cell, RefCell};
use std::ops::RangeInclusive;

use tch::{Kind, Tensor};

use super::checkpointing::Segment;
use super::dropout::Dropout;
use super::layer_norm::LayerNorm;
use super::params::{ParameterId, ParameterKind, ParameterPlace, ParameterTable};
use crate::data::{PackedBatch, Rectangle};
use crate::error::{Error, Result};
use crate::libtorch::flash_attention;

/// Head sizes that libtorch's flash attention takes with a gradient and dropout on every GPU that it runs on, if they
/// are multiples of 8.
const FLASH_HEAD_SIZES: RangeInclusive<i64> = 8..=192;

/// What the rows of an activation stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One row a token, packed: `[tokens, width]`.
    Tokens,
    /// One row an example: `[examples, width]`.
    Examples,
}

/// Sees every layer with parameters as a forward pass runs it; for gradients of single examples.
///
/// The activations it is shown are part of the autograd graph, so a hook on `output` sees the layer's output gradient.
pub trait LayerObserver {
    /// Called after a linear layer: `[rows, in]` to `[rows, out]`.
    ///
    /// # Errors
    /// Whatever the observer finds wrong ends the pass.
    fn linear(&self, layer: &Linear, input: &Tensor, output: &Tensor) -> Result<()>;

    /// Called after a layer normalisation, with its input, `[rows, width]`.
    ///
    /// # Errors
    /// Whatever the observer finds wrong ends the pass.
    fn layer_norm(&self, layer: &LayerNorm, input: &Tensor, output: &Tensor) -> Result<()>;

    /// Called after an embedding: `[tokens]` indices to `[tokens, width]`.
    ///
    /// # Errors
    /// Whatever the observer finds wrong ends the pass.
    fn embedding(&self, layer: &Embedding, indices: &Tensor, output: &Tensor) -> Result<()>;
}

/// One forward pass over a batch: the weights it uses and what happens along the way.
pub struct Pass<'a> {
    weights: &'a [Tensor],
    /// The batch that runs through the model.
    pub batch: &'a PackedBatch,
    dropout: Option<Dropout>,
    observer: Option<&'a dyn LayerObserver>,
    sites: Cell<u32>,
    /// What has been run of a checkpointed pass, first to last.
    segments: Option<RefCell<Vec<Segment<'a>>>>,
}

impl<'a> Pass<'a> {
    /// Starts a pass for evaluation, or with `dropout` for training.
    pub fn new(weights: &'a [Tensor], batch: &'a PackedBatch, dropout: Option<Dropout>) -> Self {
        Self { weights, batch, dropout, observer: None, sites: Cell::new(0), segments: None }
    }

    /// Keeps of each segment of the network its input only; [`Pass::backward`] computes the rest again.
    pub fn checkpointed(self) -> Self {
        Self { segments: Some(RefCell::default()), ..self }
    }

    /// Lets an observer see the layers. The weights must not require gradients: the graph then starts at the
    /// embeddings, and backward computes activation gradients only.
    pub fn observed(self, observer: &'a dyn LayerObserver) -> Self {
        Self { observer: Some(observer), ..self }
    }

    /// Returns a parameter's value in the type that this pass computes in.
    pub fn weight(&self, id: ParameterId) -> &Tensor {
        &self.weights[id.index()]
    }

    /// Applies dropout to activations, if this pass trains.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn dropout(&self, input: &Tensor, probability: f64, rows: Rows) -> Result<Tensor> {
        match (&self.dropout, rows) {
            (None, _) => Ok(input.shallow_clone()),
            (Some(dropout), Rows::Tokens) => dropout.tokens(input, probability, self.next_site(), self.batch),
            (Some(dropout), Rows::Examples) => {
                dropout.examples(input, probability, self.next_site(), self.batch)
            }
        }
    }

    /// Computes softmax(q kᵀ / √d) v within each example; all `[tokens, heads · d]`.
    ///
    /// On GPUs in bfloat16 tokens stay packed. Elsewhere attention is the one place that needs rectangles: tokens are laid
    /// out for it and collected after it ([`AttentionLayout`](crate::data::AttentionLayout)).
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn attention(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        heads: i64,
        dropout: f64,
    ) -> Result<Tensor> {
        let head_size = query.size()[1] / heads;
        if let Some(lengths) = self.batch.flash_lengths()
            && query.kind() == Kind::BFloat16
            && FLASH_HEAD_SIZES.contains(&head_size)
            && head_size % 8 == 0
        {
            let split = |rows: &Tensor| rows.f_view([-1, heads, head_size]);
            let (query, key, value) = (split(query)?, split(key)?, split(value)?);
            let dropout = self.dropout.map_or(0.0, |_| dropout);
            let scale = 1.0 / (head_size as f64).sqrt();
            let context = flash_attention(&query, &key, &value, &lengths, dropout, scale)?;
            return Ok(context.f_reshape([-1, heads * head_size])?);
        }
        let layout = self.batch.attention_layout(heads, heads * head_size, query.kind())?;
        let site = self.next_site();
        let split = |rows: &Tensor| layout.split(rows, heads);
        let parts = split(query)?.into_iter().zip(split(key)?).zip(split(value)?).zip(&layout.rectangles);
        let contexts = parts
            .map(|(((query, key), value), rectangle)| {
                self.rectangle_attention(&query, &key, &value, rectangle, (dropout, site))
            })
            .collect::<Result<Vec<_>>>()?;
        layout.join(&contexts, heads)
    }

    /// Computes attention within each example of a rectangle; all `[examples · heads, length, head_size]`.
    fn rectangle_attention(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        rectangle: &Rectangle,
        (dropout, site): (f64, u32),
    ) -> Result<Tensor> {
        let scale = 1.0 / (query.size()[2] as f64).sqrt();
        match &self.dropout {
            Some(pattern) if dropout > 0.0 && !query.device().is_cuda() => {
                let scores = query.f_mul_scalar(scale)?.f_bmm(&key.f_transpose(1, 2)?)?;
                let scores = match &rectangle.bias {
                    Some(bias) => scores.f_add(bias)?,
                    None => scores,
                };
                let probabilities = scores.f_softmax(-1, query.kind())?;
                let examples = &rectangle.examples;
                let kept = pattern.attention(&probabilities, dropout, site, self.batch, examples)?;
                Ok(kept.f_bmm(value)?)
            }
            pattern => {
                let dropout = pattern.map_or(0.0, |_| dropout);
                // With examples and heads as one dimension; the second, of one, is what the function asks for.
                let [query, key, value] = [query, key, value].map(|part| part.f_unsqueeze(1));
                let bias = rectangle.bias.as_ref().map(|bias| bias.f_unsqueeze(1)).transpose()?;
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
                Ok(context.f_squeeze_dim(1)?)
            }
        }
    }

    /// The segments of a checkpointed pass.
    pub(super) fn segments(&self) -> Option<&RefCell<Vec<Segment<'a>>>> {
        self.segments.as_ref()
    }

    /// Starts a segment: forward, or again from its first place of dropout, which is returned.
    pub(super) fn begin_segment(&self, again: Option<u32>) -> u32 {
        let site = again.unwrap_or(self.sites.get());
        self.sites.set(site);
        if let Some(dropout) = &self.dropout {
            dropout.begin_segment(site, self.batch);
        }
        site
    }

    /// Numbers the places where dropout happens, in the order of the forward pass.
    fn next_site(&self) -> u32 {
        self.sites.replace(self.sites.get() + 1)
    }

    /// Shows a layer to the observer, if there is one.
    pub(super) fn observe(&self, call: impl FnOnce(&dyn LayerObserver) -> Result<()>) -> Result<()> {
        self.observer.map_or(Ok(()), call)
    }
}

/// y = x Wᵀ + b.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: ParameterId,
    /// `[out]`.
    pub bias: ParameterId,
    /// What the rows of its input stand for.
    pub rows: Rows,
}

impl Linear {
    /// Declares the layer as `{name}.weight` and `{name}.bias`.
    pub fn declare(
        table: &mut ParameterTable,
        name: &str,
        [input, output]: [i64; 2],
        place: ParameterPlace,
        rows: Rows,
    ) -> Self {
        Self {
            weight: table.declare(format!("{name}.weight"), &[output, input], ParameterKind::Weight, place),
            bias: table.declare(format!("{name}.bias"), &[output], ParameterKind::Bias, place),
            rows,
        }
    }

    /// Applies the layer to `[rows, in]`, in the type of its weights.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn forward(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        let weight = pass.weight(self.weight);
        let input = input.f_to_kind(weight.kind())?;
        let output = input.f_linear(weight, Some(pass.weight(self.bias)))?;
        pass.observe(|observer| observer.linear(self, &input, &output))?;
        Ok(output)
    }
}

/// A table of embeddings.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    /// `[entries, width]`.
    pub table: ParameterId,
}

impl Embedding {
    /// Declares the table as `{name}.weight`.
    pub fn declare(table: &mut ParameterTable, name: &str, entries: i64, width: i64) -> Self {
        let kind = ParameterKind::Embedding;
        let place = ParameterPlace::Embeddings;
        Self { table: table.declare(format!("{name}.weight"), &[entries, width], kind, place) }
    }

    /// Looks `[tokens]` indices up.
    ///
    /// # Errors
    /// Fails if an index is out of range.
    pub fn forward(&self, pass: &Pass, indices: &Tensor) -> Result<Tensor> {
        let table = pass.weight(self.table);
        // On the CPU a gradient of the rows that are used, not of the table: filling that with zeros takes longer than all
        // else. On a GPU rows would be added up in any order.
        let sparse = !table.device().is_cuda();
        let mut output = Tensor::f_embedding(table, indices, -1, false, sparse)?;
        if pass.observer.is_some() {
            output = output.f_set_requires_grad(true)?;
        }
        pass.observe(|observer| observer.embedding(self, indices, &output))?;
        Ok(output)
    }
}

/// The activation functions that published configs name (`hidden_act`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x Φ(x).
    Gelu,
    /// The tanh approximation of it.
    GeluTanh,
    /// max(0, x).
    Relu,
    /// x σ(x).
    Silu,
    /// tanh(x).
    Tanh,
}

impl Activation {
    /// Looks an activation up by its name in transformers.
    ///
    /// # Errors
    /// Fails if the name is not known, listing those that are.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            "tanh" => Activation::Tanh,
            _ => {
                return Err(Error::configuration(format!(
                    "activation `{name}` is not supported; known are gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, \
                     relu, silu, swish and tanh"
                )));
            }
        })
    }

    /// Applies the function.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn forward(self, input: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Gelu => input.f_gelu("none")?,
            Activation::GeluTanh => input.f_gelu("tanh")?,
            Activation::Relu => input.f_relu()?,
            Activation::Silu => input.f_silu()?,
            Activation::Tanh => input.f_tanh()?,
        })
    }
}

/// The mean loss of a batch, as a float32 scalar: cross-entropy for class ids, squared error for scores.
///
/// `examples` divides the sum, so that the micro-batches of a step add up to the mean over the whole batch.
///
/// # Errors
/// Fails if shapes do not match.
pub fn loss(logits: &Tensor, targets: &Tensor, examples: usize) -> Result<Tensor> {
    let sum = match targets.kind() {
        Kind::Int64 => {
            logits.f_cross_entropy_loss::<Tensor>(targets, None, tch::Reduction::Sum, -100, 0.0)?
        }
        _ => logits.f_squeeze_dim(-1)?.f_mse_loss(targets, tch::Reduction::Sum)?,
    };
    Ok(sum.f_div_scalar(examples as f64)?)
}

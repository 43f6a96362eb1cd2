//! The layers that encoder families are made of, and the pass that runs them.

use std::cell::{Cell, RefCell};
use std::ops::RangeInclusive;

use tch::{Kind, Tensor};

use super::checkpointing::Segment;
use super::dropout::Dropout;
use super::params::{ParameterId, ParameterKind, ParameterPlace, ParameterTable};
use crate::data::PackedBatch;
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
    /// On GPUs in bfloat16 tokens stay packed. Elsewhere attention is the one place that needs a rectangle, one for each
    /// head: tokens are laid out for it and collected after it.
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
        let (examples, longest) = (self.batch.examples() as i64, self.batch.longest() as i64);
        let head_size = query.size()[1] / heads;
        let scale = 1.0 / (head_size as f64).sqrt();
        if let Some(lengths) = self.batch.flash_lengths()
            && query.kind() == Kind::BFloat16
            && FLASH_HEAD_SIZES.contains(&head_size)
            && head_size % 8 == 0
        {
            let split = |rows: &Tensor| rows.f_view([-1, heads, head_size]);
            let (query, key, value) = (split(query)?, split(key)?, split(value)?);
            let dropout = self.dropout.map_or(0.0, |_| dropout);
            let context = flash_attention(&query, &key, &value, &lengths, dropout, scale)?;
            return Ok(context.f_reshape([-1, heads * head_size])?);
        }
        let places = self.batch.head_places(heads)?;
        let split = |rows: &Tensor| -> Result<Tensor> {
            let shape = [examples * heads * longest, head_size];
            let empty = Tensor::f_zeros(shape, (rows.kind(), rows.device()))?;
            let laid_out = empty.f_index_copy(0, &places, &rows.f_reshape([-1, head_size])?)?;
            Ok(laid_out.f_view([examples, heads, longest, head_size])?)
        };
        let (query, key, value) = (split(query)?, split(key)?, split(value)?);
        let bias = self.batch.padding.as_ref().map(|padding| padding.bias(query.kind())).transpose()?;
        let context = match &self.dropout {
            Some(pattern) if dropout > 0.0 && !query.device().is_cuda() => {
                let scores = query.f_mul_scalar(scale)?.f_matmul(&key.f_transpose(2, 3)?)?;
                let scores = bias.map_or(Ok(scores.shallow_clone()), |bias| scores.f_add(&bias))?;
                let probabilities = scores.f_softmax(-1, query.kind())?;
                pattern.attention(&probabilities, dropout, self.next_site(), self.batch)?.f_matmul(&value)?
            }
            pattern => {
                let dropout = pattern.map_or(0.0, |_| dropout);
                Tensor::f_scaled_dot_product_attention(
                    &query,
                    &key,
                    &value,
                    bias,
                    dropout,
                    false,
                    Some(scale),
                    false,
                )?
            }
        };
        let rows = context.f_reshape([-1, head_size])?.f_index_select(0, &places)?;
        Ok(rows.f_view([-1, heads * head_size])?)
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

    fn observe(&self, call: impl FnOnce(&dyn LayerObserver) -> Result<()>) -> Result<()> {
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

/// Layer normalisation over the last dimension, with scale and shift.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm {
    /// Scale, `[width]`.
    pub weight: ParameterId,
    /// Shift, `[width]`.
    pub bias: ParameterId,
    /// Added to the variance.
    pub epsilon: f64,
    width: i64,
}

impl LayerNorm {
    /// Declares the layer as `{name}.weight` and `{name}.bias`.
    pub fn declare(
        table: &mut ParameterTable,
        name: &str,
        width: i64,
        epsilon: f64,
        place: ParameterPlace,
    ) -> Self {
        Self {
            weight: table.declare(format!("{name}.weight"), &[width], ParameterKind::LayerNormWeight, place),
            bias: table.declare(format!("{name}.bias"), &[width], ParameterKind::LayerNormBias, place),
            epsilon,
            width,
        }
    }

    /// Applies the layer to `[tokens, width]`, in the type of its weights.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn forward(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (pass.weight(self.weight), pass.weight(self.bias));
        let input = input.f_to_kind(weight.kind())?;
        let output = input.f_layer_norm([self.width], Some(weight), Some(bias), self.epsilon, true)?;
        pass.observe(|observer| observer.layer_norm(self, &input, &output))?;
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
        let mut output = Tensor::f_embedding(pass.weight(self.table), indices, -1, false, false)?;
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

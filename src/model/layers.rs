//! The layers that encoder families are made of.

use tch::{Device, Kind, Tensor};

use super::parameter::{ParameterKind, ParameterPlace};
use super::params::{ParameterId, ParameterTable};
use super::pass::{Pass, Rows};
use crate::error::{Error, Result};
use crate::libtorch::{LinearOperands, Operand, activates, embedding, gelu_after_bias, linear, linears};

/// y = x Wᵀ + b, or y = x Wᵀ.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// `[out, in]`, or `[in, out]` where `input_first`; the second may be cut into heads, `[_, heads, head_size]`.
    pub weight: ParameterId,
    /// `[out]`.
    pub bias: Option<ParameterId>,
    /// What the rows of its input stand for.
    pub rows: Rows,
    /// Whether the weight is stored with its inputs first.
    pub input_first: bool,
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
            bias: Some(table.declare(format!("{name}.bias"), &[output], ParameterKind::Bias, place)),
            rows,
            input_first: false,
        }
    }

    /// Declares the layer as `{name}.weight`, without a bias.
    pub fn declare_without_bias(
        table: &mut ParameterTable,
        name: &str,
        [input, output]: [i64; 2],
        place: ParameterPlace,
        rows: Rows,
    ) -> Self {
        let weight = table.declare(format!("{name}.weight"), &[output, input], ParameterKind::Weight, place);
        Self { weight, bias: None, rows, input_first: false }
    }

    /// Declares the layer as `{name}` alone, `[width, heads, head_size]`, without a bias: from `width` to the heads where
    /// `input_first`, else from the heads to `width`.
    pub fn declare_heads(
        table: &mut ParameterTable,
        name: &str,
        shape: [i64; 3],
        input_first: bool,
        place: ParameterPlace,
        rows: Rows,
    ) -> Self {
        let weight = table.declare(name, &shape, ParameterKind::Weight, place);
        if input_first {
            table.store_input_first(weight);
        }
        Self { weight, bias: None, rows, input_first }
    }

    /// Applies the layer to `[rows, in]`, in the type of its weights.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn forward(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        self.forward_rows(pass, input, self.rows)
    }

    /// Applies the layer to rows of another sort than its own: `[rows, in]`, in the type of its weights.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn forward_rows(&self, pass: &Pass, input: &Tensor, rows: Rows) -> Result<Tensor> {
        let weight = self.matrix(pass)?;
        let input = input.f_to_kind(weight.kind())?;
        let bias = self.bias.map(|bias| pass.operand(bias));
        let output = linear(&input, self.weight_operand(pass, &weight), bias)?;
        Self { rows, ..*self }.shown(pass, &input, output)
    }

    /// Shows the layer to the pass's observer, if there is one.
    fn shown(&self, pass: &Pass, input: &Tensor, mut output: Tensor) -> Result<Tensor> {
        if pass.is_observed() && !output.requires_grad() {
            // No parameter that trains is part of it so far, and the observer hooks its gradient.
            output = output.f_set_requires_grad(true)?;
        }
        pass.observe(|observer| observer.linear(self, input, &output))?;
        Ok(output)
    }

    /// Applies the layer, which joins the operation that comes next ([`Linear::joins`]): that one gives the bias, which is returned, its
    /// gradient.
    ///
    /// # Errors
    /// Fails if shapes do not match, or if there is no bias.
    pub(super) fn with_open_bias<'b>(&self, pass: &'b Pass, input: &Tensor) -> Result<(Tensor, Operand<'b>)> {
        let weight = self.matrix(pass)?;
        let (bias, held) = self.open_bias(pass)?;
        let input = input.f_to_kind(weight.kind())?;
        let output = linear(&input, self.weight_operand(pass, &weight), Some(Operand::plain(&held)))?;
        Ok((self.shown(pass, &input, output)?, bias))
    }

    /// Returns the bias for the operation that gives it its gradient, and its values for the one that adds it.
    fn open_bias<'b>(&self, pass: &'b Pass) -> Result<(Operand<'b>, Tensor)> {
        let bias =
            self.bias.ok_or_else(|| Error::Libtorch("a layer without a bias joins no other".into()))?;
        Ok((pass.operand(bias), pass.weight(bias).f_detach()?))
    }

    /// Applies the layer to `[rows, in]`, and an activation to what comes out; returns that, and the rows for a residual.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn activated(&self, pass: &Pass, input: &Tensor, activation: Activation) -> Result<[Tensor; 2]> {
        let weight = self.matrix(pass)?;
        if activation == Activation::Gelu && self.joins(pass) && activates(weight.size()[0]) {
            let (bias, held) = self.open_bias(pass)?;
            let layer = (self.weight_operand(pass, &weight), Some(Operand::plain(&held)));
            let input = input.f_to_kind(weight.kind())?;
            let [output, residual] = pieces(linears(&input, &[layer])?)?;
            let output = self.shown(pass, &input, output)?;
            return Ok([gelu_after_bias(&output, bias)?, residual]);
        }
        let ([output], residual) = branches(pass, [self], input)?;
        Ok([activation.forward(&output)?, residual])
    }

    /// Returns whether the layer and what stands beside it run as operations that have kernels in common: in bfloat16 on a GPU, or
    /// where gradients have places.
    pub(super) fn joins(&self, pass: &Pass) -> bool {
        let weight = pass.weight(self.weight);
        let has_kernels = weight.device().is_cuda() || pass.has_places();
        has_kernels && weight.kind() == Kind::BFloat16 && self.bias.is_some()
    }

    /// Returns whether layers over one input run as one operation: on the CPU, too, that adds up what comes back to the input with fewer
    /// passes.
    fn shares_input(&self, pass: &Pass) -> bool {
        self.joins(pass) || pass.weight(self.weight).device() == Device::Cpu
    }

    /// Returns the weight as a matrix, `[out, in]`.
    fn matrix(&self, pass: &Pass) -> Result<Tensor> {
        let weight = pass.weight(self.weight).f_flatten(1, -1)?;
        Ok(if self.input_first { weight.f_transpose(0, 1)? } else { weight })
    }

    fn weight_operand<'b>(&self, pass: &'b Pass, matrix: &'b Tensor) -> Operand<'b> {
        Operand { values: matrix, ..pass.operand(self.weight) }
    }
}

/// Applies layers to the same `[rows, in]`; returns what comes out of each, and the rows for a residual.
///
/// # Errors
/// Fails if shapes do not match.
pub fn branches<const N: usize>(
    pass: &Pass,
    layers: [&Linear; N],
    input: &Tensor,
) -> Result<([Tensor; N], Tensor)> {
    if !layers.iter().all(|layer| layer.shares_input(pass)) {
        let outputs = layers.iter().map(|layer| layer.forward(pass, input)).collect::<Result<Vec<_>>>()?;
        return Ok((pieces(outputs)?, input.shallow_clone()));
    }
    let matrices = layers.iter().map(|layer| layer.matrix(pass)).collect::<Result<Vec<_>>>()?;
    let operands: Vec<LinearOperands> = (layers.iter().zip(&matrices))
        .map(|(layer, matrix)| {
            (layer.weight_operand(pass, matrix), layer.bias.map(|bias| pass.operand(bias)))
        })
        .collect();
    let input = input.f_to_kind(matrices[0].kind())?;
    let mut outputs = linears(&input, &operands)?;
    let residual = outputs.pop().ok_or_else(|| Error::Libtorch("a residual is missing".into()))?;
    let outputs = (layers.iter().zip(outputs)).map(|(layer, output)| layer.shown(pass, &input, output));
    Ok((pieces(outputs.collect::<Result<_>>()?)?, residual))
}

fn pieces<const N: usize>(tensors: Vec<Tensor>) -> Result<[Tensor; N]> {
    tensors.try_into().map_err(|_| Error::Libtorch("an operation returned another number of tensors".into()))
}

/// A table of embeddings.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    /// `[entries, width]`.
    pub table: ParameterId,
    /// What the indices stand for.
    pub rows: Rows,
}

impl Embedding {
    /// Declares the table as `{name}.weight`, for tokens.
    pub fn declare(table: &mut ParameterTable, name: &str, entries: i64, width: i64) -> Self {
        let (kind, place) = (ParameterKind::Embedding, ParameterPlace::Embeddings);
        let table = table.declare(format!("{name}.weight"), &[entries, width], kind, place);
        Self { table, rows: Rows::Tokens }
    }

    /// Looks `[rows]` indices up: `[rows, width]`.
    ///
    /// # Errors
    /// Fails if an index is out of range.
    pub fn forward(&self, pass: &Pass, indices: &Tensor) -> Result<Tensor> {
        let mut output = embedding(pass.operand(self.table), indices)?;
        if pass.is_observed() {
            output = output.f_set_requires_grad(true)?;
        }
        pass.observe(|observer| observer.embedding(self, indices, &output))?;
        Ok(output)
    }
}

/// One of the vectors that a parameter holds side by side, which rows are added to or multiplied by, number by number.
#[derive(Clone, Copy, Debug)]
pub struct Vector {
    /// `[vectors, width]`, both in any number of dimensions.
    pub parameter: ParameterId,
    /// Which of the vectors it is.
    pub number: i64,
    /// Its length.
    pub width: i64,
    /// What the rows stand for.
    pub rows: Rows,
}

impl Vector {
    /// Adds the vector to each row: `[rows, width]` to the same.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn add(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        let output = input.f_add(&self.values(pass, input.kind())?)?;
        pass.observe(|observer| observer.vector(self, None, &output))?;
        Ok(output)
    }

    /// Multiplies each row by the vector: `[rows, width]` to the same.
    ///
    /// # Errors
    /// Fails if shapes do not match.
    pub fn multiply(&self, pass: &Pass, input: &Tensor) -> Result<Tensor> {
        let output = input.f_mul(&self.values(pass, input.kind())?)?;
        pass.observe(|observer| observer.vector(self, Some(input), &output))?;
        Ok(output)
    }

    fn values(&self, pass: &Pass, kind: Kind) -> Result<Tensor> {
        let vectors = pass.weight(self.parameter).f_view([-1, self.width])?;
        Ok(vectors.f_select(0, self.number)?.f_to_kind(kind)?)
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

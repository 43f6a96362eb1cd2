//! The pass that runs an encoder: the weights it uses, the batch, and what happens along the way.

use std::cell::{Cell, RefCell};

use tch::Tensor;

use super::checkpointing::Segment;
use super::convolution::Convolution;
use super::dropout::{Dropout, PatternedRows};
use super::layer_norm::LayerNorm;
use super::layers::{Embedding, Linear, Vector};
use super::noise::Noise;
use super::params::ParameterId;
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::{DropoutPattern, GradientPlace, Operand};
use crate::random::Key;

/// The place of noise that enters the first layer; those before are for noise on embeddings.
const FIRST_LAYER_SITE: u32 = 16;

/// What the rows of an activation stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One row a token, packed: `[tokens, width]`.
    Tokens,
    /// One row an example: `[examples, width]`.
    Examples,
    /// Rows that are the same for all examples, such as those of relative positions: `[rows, width]`. Where gradients of
    /// single examples are asked for they stand there once an example, `[examples · rows, width]`; see [`Pass::shared`].
    Shared,
}

/// What is added to the embeddings of words.
pub struct Shift {
    /// `[tokens, width]`.
    pub by: Tensor,
    /// Whether the table of words gets no gradient from this pass.
    pub of_constants: bool,
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

    /// Called after a convolution over tokens, with what each output is made of, `[tokens, width · kernel]`.
    ///
    /// # Errors
    /// Whatever the observer finds wrong ends the pass.
    fn convolution(&self, layer: &Convolution, windows: &Tensor, output: &Tensor) -> Result<()>;

    /// Called after an embedding: `[rows]` indices to `[rows, width]`.
    ///
    /// # Errors
    /// Whatever the observer finds wrong ends the pass.
    fn embedding(&self, layer: &Embedding, indices: &Tensor, output: &Tensor) -> Result<()>;

    /// Called after a vector has been added to each row of `output`, or has multiplied each row of `factor` to give it; both
    /// are `[rows, width]`.
    ///
    /// # Errors
    /// Whatever the observer finds wrong ends the pass.
    fn vector(&self, vector: &Vector, factor: Option<&Tensor>, output: &Tensor) -> Result<()>;
}

/// One forward pass over a batch: the weights it uses and what happens along the way.
pub struct Pass<'a> {
    weights: &'a [Tensor],
    /// Where the gradients of weights are wanted, by parameter; none if it is empty.
    places: &'a [Option<GradientPlace>],
    /// The batch that runs through the model.
    pub batch: &'a PackedBatch,
    pub(super) dropout: Option<Dropout>,
    /// Noise on what enters each layer.
    noise: Option<(Noise, Key)>,
    shift: Option<Shift>,
    observer: Option<&'a dyn LayerObserver>,
    sites: Cell<u32>,
    /// Layers that have been entered.
    layers: Cell<u32>,
    /// What has been run of a checkpointed pass, first to last.
    segments: Option<RefCell<Vec<Segment<'a>>>>,
}

impl<'a> Pass<'a> {
    /// Starts a pass for evaluation, or with `dropout` for training.
    pub fn new(weights: &'a [Tensor], batch: &'a PackedBatch, dropout: Option<Dropout>) -> Self {
        Self {
            weights,
            places: &[],
            batch,
            dropout,
            noise: None,
            shift: None,
            observer: None,
            sites: Cell::new(0),
            layers: Cell::new(0),
            segments: None,
        }
    }

    /// Lets backward bring gradients to their places, of which there is one for each parameter, or none; the weights are the leaves.
    pub fn collecting(self, places: &'a [Option<GradientPlace>]) -> Self {
        Self { places, ..self }
    }

    /// Keeps of each segment of the network its input only; [`Pass::backward`] computes the rest again.
    pub fn checkpointed(self) -> Self {
        Self { segments: Some(RefCell::default()), ..self }
    }

    /// Adds noise to the hidden states that enter each layer of the encoder.
    pub fn with_noise(self, noise: Noise, key: Key) -> Self {
        Self { noise: Some((noise, key)), ..self }
    }

    /// Shifts the embeddings of words.
    pub fn shifted(self, shift: Shift) -> Self {
        Self { shift: Some(shift), ..self }
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

    /// Returns whether gradients are wanted at places.
    pub(super) fn has_places(&self) -> bool {
        !self.places.is_empty()
    }

    /// Returns a parameter as an operation takes it that may bring its gradient to its place.
    pub(super) fn operand(&self, id: ParameterId) -> Operand<'_> {
        let place = self.places.get(id.index()).and_then(Option::as_ref);
        Operand { values: self.weight(id), place }
    }

    /// Looks up the embeddings of the batch's tokens in the table of words: `[tokens, width]`.
    ///
    /// # Errors
    /// Fails if an id is out of range.
    pub fn words(&self, table: &Embedding) -> Result<Tensor> {
        let words = table.forward(self, &self.batch.input_ids)?;
        let Some(Shift { by, of_constants }) = &self.shift else { return Ok(words) };
        let words = if *of_constants { words.f_detach()? } else { words };
        Ok(words.f_add(&by.f_to_kind(words.kind())?)?)
    }

    /// Takes the states of the tokens that rows stand for, of all tokens or of the first one of each example that an output is
    /// asked of: `[tokens, width]` to `[rows, width]`.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn states_of(&self, rows: Rows, states: &Tensor) -> Result<Tensor> {
        match rows {
            Rows::Examples => Ok(states.f_index_select(0, &self.batch.first_tokens)?),
            Rows::Tokens | Rows::Shared => Ok(states.shallow_clone()),
        }
    }

    /// Adds noise to what enters a layer, if this pass has noise.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub(super) fn noisy(&self, states: &Tensor, layer: u32) -> Result<Tensor> {
        let Some((noise, key)) = self.noise else { return Ok(states.shallow_clone()) };
        let drawn = noise.tokens(key, FIRST_LAYER_SITE + layer, states.size()[1], self.batch)?;
        Ok(states.f_add(&drawn.f_to_kind(states.kind())?)?)
    }

    /// Numbers the layers in the order of the forward pass.
    pub(super) fn next_layer(&self) -> u32 {
        self.layers.replace(self.layers.get() + 1)
    }

    /// Applies dropout to activations, if this pass trains.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn dropout(&self, input: &Tensor, probability: f64, rows: Rows) -> Result<Tensor> {
        match &self.dropout {
            None => Ok(input.shallow_clone()),
            Some(dropout) => {
                dropout.rows(input, probability, self.next_site(), (rows, self.shared_copies()), self.batch)
            }
        }
    }

    /// Returns the pattern of the next dropout of rows on a GPU, so many with those that examples share, for an operation that
    /// drops elements itself; none if the pass does not train.
    pub(super) fn dropout_pattern(&self, probability: f64, rows: Rows, count: i64) -> Option<DropoutPattern> {
        let dropout = self.dropout.as_ref()?;
        let site = self.next_site();
        dropout.on_device(probability, site, (rows, count / self.shared_copies()), self.batch)
    }

    /// Returns the pattern of the next dropout of rows on the CPU, for an operation that drops elements itself; none if the pass does
    /// not train.
    pub(super) fn patterned_rows(&self, probability: f64, rows: Rows, count: i64) -> Option<PatternedRows> {
        let dropout = self.dropout.as_ref()?;
        let (site, copies) = (self.next_site(), self.shared_copies());
        dropout.patterned(probability, site, (rows, copies), count / copies, self.batch)
    }

    /// Returns how often [`Rows::Shared`] stand in an activation of this pass: once, or once an example if an observer
    /// wants gradients of single examples.
    pub fn shared_copies(&self) -> i64 {
        self.observer.map_or(1, |_| self.batch.examples() as i64)
    }

    /// Repeats what all examples share, `[rows, ...]`, as often as [`Pass::shared_copies`] says.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn shared(&self, rows: &Tensor) -> Result<Tensor> {
        let mut repeats = vec![1; rows.dim()];
        repeats[0] = self.shared_copies();
        Ok(rows.f_repeat(repeats)?)
    }

    /// The segments of a checkpointed pass.
    pub(super) fn segments(&self) -> Option<&RefCell<Vec<Segment<'a>>>> {
        self.segments.as_ref()
    }

    /// Starts a segment: forward, or again from its first place of dropout, which is returned.
    ///
    /// # Errors
    /// As for [`Dropout::begin_segment`].
    pub(super) fn begin_segment(&self, again: Option<u32>) -> Result<u32> {
        let site = again.unwrap_or(self.sites.get());
        self.sites.set(site);
        if let Some(dropout) = &self.dropout {
            dropout.begin_segment(site, self.batch)?;
        }
        Ok(site)
    }

    /// Numbers the places where dropout happens, in the order of the forward pass.
    pub(super) fn next_site(&self) -> u32 {
        self.sites.replace(self.sites.get() + 1)
    }

    /// Returns whether an observer sees the layers.
    pub(super) fn is_observed(&self) -> bool {
        self.observer.is_some()
    }

    /// Shows a layer to the observer, if there is one.
    pub(super) fn observe(&self, call: impl FnOnce(&dyn LayerObserver) -> Result<()>) -> Result<()> {
        self.observer.map_or(Ok(()), call)
    }
}

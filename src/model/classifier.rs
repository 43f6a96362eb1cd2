//! A pretrained encoder with a head for one task: what training changes and prediction uses.

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::attention::takes_head_size;
use super::checkpoint::{self, LoadReport, ModelFolder};
use super::config::ModelConfig;
use super::layers::Linear;
use super::parameter::{Parameter, ParameterKind, layers_of};
use super::params::{ParameterId, ParameterTable, Parameters, resized};
use super::pass::Pass;
use crate::data::{LabelMap, Objective, TaskCard, TokenEncoder};
use crate::error::{Error, Result};

/// The arithmetic of a family; the parameters live in [`Parameters`].
pub trait Network: Send {
    /// Computes the features of the examples, as the encoder leaves them, `[examples, hidden]`; its layers as segments of the
    /// pass.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor>;

    /// Applies pooler and head to features: `[examples, outputs]`.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn head(&self, pass: &Pass, features: &Tensor) -> Result<Tensor>;

    /// Returns the last layer of the head, which has one output a label.
    fn output(&self) -> Linear;

    /// Returns the sizes that the config gives.
    fn sizes(&self) -> Sizes;

    /// Returns the name of the class in transformers.
    fn architecture(&self) -> &'static str;

    /// Returns the prefix of the body's tensors in a checkpoint with a head, such as `bert.`.
    fn body_prefix(&self) -> &'static str;

    /// Returns whether attention reads packed tokens where flash attention runs, so that a pass asks nothing of the lengths
    /// of the examples: what is recorded of one then holds for others of its shape.
    fn reads_packed_tokens(&self) -> bool {
        true
    }

    /// Returns whether the last layer computes the token of each example that the head reads, and of all others keys and
    /// values only.
    fn narrows_last_layer(&self) -> bool {
        true
    }
}

/// The sizes that a family's config gives, under names of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Width of the hidden states.
    pub hidden: i64,
    /// Width of the feed-forward layers.
    pub intermediate: i64,
    /// Attention heads of a layer.
    pub heads: i64,
    /// Entries of the table of words.
    pub vocabulary: i64,
    /// The most tokens of an example; `None` if there is no limit.
    pub positions: Option<i64>,
    /// Entries of the table of token types; `None` if there is none.
    pub token_types: Option<i64>,
}

/// What the outputs of a head mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Labels {
    /// Classes, named in id order.
    Classes(Vec<String>),
    /// One number.
    Score,
}

impl Labels {
    /// Returns the number of outputs.
    pub fn outputs(&self) -> i64 {
        match self {
            Labels::Classes(names) => names.len() as i64,
            Labels::Score => 1,
        }
    }
}

impl From<&Objective> for Labels {
    fn from(objective: &Objective) -> Self {
        match objective {
            Objective::Classification { labels } => Labels::Classes(labels.clone()),
            Objective::Regression => Labels::Score,
        }
    }
}

/// What to do with a head that the model folder brings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadStart {
    /// Keep it if its labels are the task's.
    #[default]
    Keep,
    /// Always start from a new one.
    Fresh,
}

/// The sizes of a model, for what its arithmetic and memory come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// All weights.
    pub weights: usize,
    /// Weights of the embedding tables.
    pub embedding_weights: usize,
    /// Entries of the table of words.
    pub vocabulary: usize,
    /// Weights in encoder layers.
    pub layer_weights: usize,
    /// Weights of the matrices in encoder layers that multiply every token.
    pub matrix_weights: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Those that compute every token ([`Network::narrows_last_layer`]).
    pub whole_layers: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Width of the feed-forward layers.
    pub intermediate: usize,
    /// Attention heads of a layer.
    pub heads: usize,
    /// Whether attention reads packed tokens where flash attention runs ([`Network::reads_packed_tokens`]), with heads of a
    /// size that it takes.
    pub reads_packed_tokens: bool,
}

/// A model for one task.
pub struct Classifier {
    /// The parameters, which training changes.
    pub parameters: Parameters,
    /// What happened to the tensors of the checkpoint.
    pub report: LoadReport,
    network: Box<dyn Network>,
    config: ModelConfig,
    labels: Labels,
    /// The values to go back to, copied before they first change: a model that only predicts is in memory once.
    start: Option<Tensor>,
    fresh: Vec<ParameterId>,
    /// Those that were drawn anew since the last reset, although the checkpoint has them.
    redrawn: Vec<ParameterId>,
    initializer_range: f64,
}

impl Classifier {
    /// Loads a model folder for a task with the given labels.
    ///
    /// # Errors
    /// Fails if the family does not run here or the checkpoint does not fit its config.
    pub fn load(folder: &ModelFolder, labels: Labels, head: HeadStart, device: Device) -> Result<Self> {
        let config = folder.config.clone();
        let (network, table, new_pooler) = folder.declare(&labels)?;
        let mut parameters = Parameters::allocate(table, device)?;
        let head = match head {
            HeadStart::Keep => folder.head_for(&labels)?,
            HeadStart::Fresh => None,
        };
        let loaded = folder.load(&mut parameters, network.as_ref(), head.as_deref())?;
        let assumed_labels = match (&labels, &head) {
            (Labels::Classes(names), Some(_)) if folder.named_labels()?.is_none() => Some(names.clone()),
            _ => None,
        };
        let report = LoadReport { new_pooler, assumed_labels, ..loaded };
        parameters.mark_unchanged();
        let fresh = report.fresh.iter().filter_map(|name| parameters.find(name)).collect();
        let initializer_range = config.magnitude_or("initializer_range", 0.02)?;
        let (start, redrawn) = (None, Vec::new());
        Ok(Self { parameters, report, network, config, labels, start, fresh, redrawn, initializer_range })
    }

    /// Loads a fine-tuned model folder to be scored on a task, or to predict its examples, with the labels of
    /// [`Classifier::labels_to_score`].
    ///
    /// # Errors
    /// As for [`Classifier::labels_to_score`] and [`Classifier::load`].
    pub fn load_fine_tuned(
        folder: &ModelFolder,
        card: &TaskCard,
        device: Device,
    ) -> Result<(Self, LabelMap)> {
        let (labels, map) = Self::labels_to_score(folder, card)?;
        Ok((Self::load(folder, labels, HeadStart::Keep, device)?, map))
    }

    /// Returns the labels that the head of a fine-tuned model folder is scored on a task with: the task's in the task's order if the
    /// head has them, else its own. The map tells how its classes compare with the task's.
    ///
    /// # Errors
    /// Fails if there is no head, or one for labels that cannot be compared with the task's.
    pub fn labels_to_score(folder: &ModelFolder, card: &TaskCard) -> Result<(Labels, LabelMap)> {
        let task = Labels::from(&card.objective);
        let headless = |own: String| {
            Error::model(
                &folder.path,
                format!(
                    "has no head for the labels of task {}{own}; fine-tune it on the task first",
                    card.name
                ),
            )
        };
        if folder.head_for(&task)?.is_some() {
            return Ok((task, LabelMap::between(card, card)?));
        }
        let names = folder.config.labels()?.filter(|names| names.len() > 1);
        let names = names.ok_or_else(|| headless(String::new()))?;
        let map = LabelMap::to_labels_of(&names, card)
            .map_err(|_| headless(format!(" (its own are {})", names.join(", "))))?;
        let own = Labels::Classes(names);
        if folder.head_for(&own)?.is_none() {
            return Err(headless(String::new()));
        }
        Ok((own, map))
    }

    /// Makes a model of a config's shape with all weights still to be drawn by [`Classifier::reset`], to measure with.
    ///
    /// # Errors
    /// Fails if the family does not run here or the config is incomplete.
    pub fn untrained(config: ModelConfig, labels: Labels, device: Device) -> Result<Self> {
        let (network, table) = config.declare(labels.outputs())?;
        let parameters = Parameters::allocate(table, device)?;
        let fresh = parameters.iter().map(|(id, _)| id).collect();
        let initializer_range = config.magnitude_or("initializer_range", 0.02)?;
        let report = LoadReport::default();
        let (start, redrawn) = (None, Vec::new());
        Ok(Self { parameters, report, network, config, labels, start, fresh, redrawn, initializer_range })
    }

    /// Returns the sizes of a model for a task, from its config alone.
    ///
    /// # Errors
    /// Fails if the family does not run here or the config is incomplete.
    pub fn shape(config: &ModelConfig, labels: &Labels) -> Result<ModelShape> {
        let (network, table) = config.declare(labels.outputs())?;
        let sizes = network.sizes();
        let count = |chosen: &dyn Fn(&Parameter) -> bool| -> usize {
            table.iter().filter(|parameter| chosen(parameter)).map(Parameter::count).sum()
        };
        let layers = layers_of(table.as_slice());
        let (whole_layers, keys_and_values) = match network.narrows_last_layer() {
            true => (layers.saturating_sub(1), 2 * (sizes.hidden * sizes.hidden) as usize),
            false => (layers, 0),
        };
        let is_matrix = |own: &Parameter| own.layer() > 0 && own.kind == ParameterKind::Weight;
        Ok(ModelShape {
            weights: count(&|_| true),
            embedding_weights: count(&|parameter| parameter.kind == ParameterKind::Embedding),
            vocabulary: sizes.vocabulary as usize,
            layer_weights: count(&|parameter| parameter.layer() > 0),
            matrix_weights: count(&|own| is_matrix(own) && own.layer() <= whole_layers) + keys_and_values,
            layers,
            whole_layers,
            hidden: sizes.hidden as usize,
            intermediate: sizes.intermediate as usize,
            heads: sizes.heads as usize,
            reads_packed_tokens: network.reads_packed_tokens() && takes_head_size(sizes.hidden / sizes.heads),
        })
    }

    /// Returns the sizes of the model.
    ///
    /// # Errors
    /// As for [`Classifier::shape`].
    pub fn own_shape(&self) -> Result<ModelShape> {
        Self::shape(&self.config, &self.labels)
    }

    /// Copies the checkpoint's weights, for [`Classifier::reset`] to go back to, unless that was done before.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate, or the weights were changed already.
    pub fn keep_start(&mut self) -> Result<()> {
        if self.start.is_some() {
            return Ok(());
        }
        if self.parameters.is_changed() {
            return Err(Error::configuration("the weights were changed before they were kept to go back to"));
        }
        self.start = Some(self.parameters.values_copy()?);
        Ok(())
    }

    /// Appends zeroed parameters to the model's own, until [`Classifier::shrink`] or the next reset. The network does
    /// not read them; what added them does.
    ///
    /// # Errors
    /// As for [`Classifier::keep_start`].
    pub fn extend(&mut self, further: ParameterTable) -> Result<()> {
        self.keep_start()?;
        self.parameters.extend(further)?;
        self.resize_start()
    }

    /// Removes the parameters that [`Classifier::extend`] has appended.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn shrink(&mut self) -> Result<()> {
        self.parameters.shrink()?;
        self.resize_start()
    }

    fn resize_start(&mut self) -> Result<()> {
        let length = self.parameters.buffer_len();
        if let Some(start) = self.start.as_mut().filter(|start| start.numel() != length) {
            *start = resized(start, length)?;
        }
        Ok(())
    }

    /// Puts all weights back to the checkpoint's, with new values for the parameters that the checkpoint lacks.
    ///
    /// # Errors
    /// Fails if libtorch refuses, or the weights were changed without a call of [`Classifier::keep_start`] or of this
    /// function before.
    pub fn reset(&mut self, seed: u64) -> Result<()> {
        self.shrink()?;
        match &self.start {
            Some(start) => self.parameters.restore(start)?,
            None => self.keep_start()?,
        }
        for &id in &self.fresh {
            self.parameters.initialise(id, seed, self.initializer_range)?;
        }
        self.redrawn.clear();
        Ok(())
    }

    /// Draws the chosen parameters anew until the next reset, as if the checkpoint lacked them.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn reinitialise(&mut self, seed: u64, chosen: impl Fn(&Parameter) -> bool) -> Result<()> {
        let own = self.parameters.iter().filter(|(id, _)| self.parameters.declares(*id));
        let ids = own.filter(|(_, parameter)| chosen(parameter)).map(|(id, _)| id);
        for id in ids.collect::<Vec<_>>() {
            self.parameters.initialise(id, seed, self.initializer_range)?;
            self.redrawn.push(id);
        }
        Ok(())
    }

    /// Returns whether a parameter's values were drawn and not taken from the checkpoint.
    pub fn is_new(&self, id: ParameterId) -> bool {
        self.fresh.contains(&id) || self.redrawn.contains(&id) || !self.parameters.declares(id)
    }

    /// Returns the values that the checkpoint brought, `[total]` in float32; nothing before [`Classifier::keep_start`].
    pub fn start(&self) -> Option<&Tensor> {
        self.start.as_ref()
    }

    /// Returns the matrix of the head's last layer, `[outputs, width]`.
    pub fn output_weight(&self) -> ParameterId {
        self.network.output().weight
    }

    /// Returns the table of the embeddings of words, `[vocabulary, width]`.
    pub fn words(&self) -> Option<&Parameter> {
        let entries = self.network.sizes().vocabulary as usize;
        words_among(self.parameters.iter().map(|(_, parameter)| parameter), entries)
    }

    /// Returns the width of the embeddings of words.
    pub fn embedding_width(&self) -> i64 {
        self.words().map_or(0, |words| words.shape[1])
    }

    /// Computes the logits of a pass in float32, `[examples, outputs]`.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn logits<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        let features = match &pass.batch.features {
            Some(features) => features.shallow_clone(),
            None => self.network.features(pass)?,
        };
        Ok(self.network.head(pass, &features)?.f_to_kind(Kind::Float)?)
    }

    /// Computes the features that pooler and head see, `[examples, hidden]` in float32.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn features<'a>(&'a self, pass: &Pass<'a>) -> Result<Tensor> {
        Ok(self.network.features(pass)?.f_to_kind(Kind::Float)?)
    }

    /// Checks that a tokenizer makes only tokens, and token types of texts or of pairs of them, that a model of a config has
    /// embeddings for, and inputs that it has positions for.
    ///
    /// # Errors
    /// Fails, naming the two sizes, if not, and as for [`Classifier::shape`] and [`TokenEncoder::encode`].
    pub fn check_inputs(
        config: &ModelConfig,
        encoder: &TokenEncoder,
        is_pair: bool,
        max_length: usize,
    ) -> Result<()> {
        let sizes = config.declare(1)?.0.sizes();
        let entries = sizes.vocabulary as usize;
        if encoder.vocabulary_size() > entries {
            return Err(config.error(format!(
                "`vocab_size` is {entries}, but the folder's tokenizer makes ids up to {}; tokenizer and weights do not \
                 belong together",
                encoder.vocabulary_size() - 1
            )));
        }
        if let Some(positions) = sizes.positions
            && max_length > positions as usize
        {
            return Err(Error::configuration(format!(
                "max_length is {max_length}, but the model has positions for {positions} tokens only; lower \
                 `train.max_length` of the experiment, or --max-length"
            )));
        }
        let example = encoder.encode("a", is_pair.then_some("b"), max_length)?;
        let most = example.token_types.iter().max();
        if let (Some(types), Some(&most)) = (sizes.token_types, most)
            && i64::from(most) >= types
        {
            return Err(config.error(format!(
                "`type_vocab_size` is {types}, but the folder's tokenizer makes token types up to {most}"
            )));
        }
        Ok(())
    }

    /// Returns what the outputs mean.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Writes the model as a Hugging Face folder that transformers loads.
    ///
    /// # Errors
    /// Fails if the folder cannot be written.
    pub fn save(&self, folder: &Path, encoder: &TokenEncoder) -> Result<()> {
        checkpoint::write(folder, &self.config, self.network.as_ref(), &self.labels, &self.parameters)?;
        encoder.save(folder)
    }
}

/// Finds the table of words, of so many entries, among parameters in the order of declaration: every family declares it first of
/// all tables.
pub fn words_among<'a>(
    mut parameters: impl Iterator<Item = &'a Parameter>,
    entries: usize,
) -> Option<&'a Parameter> {
    parameters.find(|own| own.kind == ParameterKind::Embedding && own.shape[0] == entries as i64)
}

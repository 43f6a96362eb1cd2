//! Hugging Face model folders: what of the weights becomes which parameter, and writing a folder that transformers loads.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};
use tch::Tensor;

use super::classifier::{Labels, Network};
use super::config::ModelConfig;
use super::parameter::{Parameter, ParameterPlace};
use super::params::{ParameterId, ParameterTable, Parameters};
use super::weights::Weights;
use crate::data::same_label;
use crate::error::{Error, Result};
use crate::files::{write_bytes, write_whole};
use crate::libtorch::elements;

/// The file that is written.
const WEIGHTS: &str = "model.safetensors";

/// Returns whether a folder has weights in the file that this program saves them in, behind the config.
pub fn is_saved(folder: &Path) -> bool {
    folder.join(WEIGHTS).is_file()
}

/// How the names of the parts begin that only pretraining uses, in the models of transformers for it: masked and permuted
/// language models, ELECTRA's generator and discriminator, DistilBERT, ModernBERT, DeBERTa.
const PRETRAINING: [&str; 12] = [
    "cls.",
    "lm_head.",
    "lm_loss.",
    "generator_predictions.",
    "generator_lm_head.",
    "discriminator_predictions.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "lm_predictions.",
    "mask_predictions.",
    "decoder.",
];

/// A model folder, opened and checked but not yet read.
pub struct ModelFolder {
    /// The folder.
    pub path: PathBuf,
    /// Its config, with the experiment's overrides.
    pub config: ModelConfig,
    weights: Weights,
}

/// What happened to the tensors of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Parameters of the model that the folder lacks and that start from fresh values.
    pub fresh: Vec<String>,
    /// Whether the pooler is among them, and so a part of the head ([`ModelFolder::declare`]).
    pub new_pooler: bool,
    /// The labels whose order the folder's head is taken to have, if the folder names none.
    pub assumed_labels: Option<Vec<String>>,
    /// Tensors that the model has no use for. The buffers `position_ids`, which hold no weights, are not among them.
    pub unexpected: Vec<String>,
    /// Tensors of pretraining heads, tied ones included, left out as usual.
    pub ignored: Vec<String>,
}

impl LoadReport {
    /// Says in a few words what was left out, what is new besides the head, and what was assumed, if anything was.
    pub fn summary(&self) -> Option<String> {
        let some = |names: &[String], what: &str| {
            let first = names.first()?;
            Some(format!("{} {what} (such as {first})", names.len()))
        };
        let left_out = [
            some(&self.ignored, "tensors of pretraining"),
            some(&self.unexpected, "tensors that the model does not use"),
        ];
        let left_out: Vec<String> = left_out.into_iter().flatten().collect();
        let left_out = (!left_out.is_empty()).then(|| format!("left out {}", left_out.join(", and ")));
        let new = self.new_pooler.then(|| "has no pooler, so a new one trains with the head".to_owned());
        let parts: Vec<String> = left_out.into_iter().chain(new).chain(self.assumption()).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Says what the outputs of a head without names are taken to predict, if it has none.
    pub fn assumption(&self) -> Option<String> {
        self.assumed_labels.as_ref().map(|names| {
            format!("has a head without names, which is taken to predict {}, in this order", names.join(", "))
        })
    }
}

impl ModelFolder {
    /// Opens a folder with `config.json` and weights in any of the formats that [`Weights::open`] knows.
    ///
    /// # Errors
    /// Fails, naming what is missing, if the folder or a file is not there; and as [`Weights::open`].
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::model(
                path,
                "no such model folder; name a Hugging Face folder with config.json, weights and a tokenizer",
            ));
        }
        let config = ModelConfig::read(path)?;
        Ok(Self { path: path.to_path_buf(), config, weights: Weights::open(path)? })
    }

    /// Returns the SHA-256 of the weights, as [`Weights::sha256`] defines it.
    ///
    /// # Errors
    /// Fails if a file cannot be read.
    pub fn sha256(&self) -> Result<String> {
        self.weights.sha256()
    }

    /// Declares the parameters of the model for a task; returns them with its arithmetic, and whether the folder lacks the pooler.
    /// That then counts as a part of the head: it is as new, and has to train where the encoder does not.
    ///
    /// # Errors
    /// Fails if the family does not run here or the config is incomplete.
    pub fn declare(&self, labels: &Labels) -> Result<(Box<dyn Network>, ParameterTable, bool)> {
        let (network, mut table) = self.config.declare(labels.outputs())?;
        let stored = |name: &String| self.weights.get(name).is_some();
        let lacks_pooler = table.count_as_head(|own| {
            own.place == ParameterPlace::Pooler
                && !spellings(&own.name, network.body_prefix()).iter().any(stored)
        });
        Ok((network, table, lacks_pooler))
    }

    /// Copies the folder's tensors into the parameters of a model, a few megabytes at a time.
    ///
    /// Names may stand with or without the family's prefix. `head` says in which order the file's head has the labels
    /// ([`ModelFolder::head_for`]); without it the head is not loaded. Parameters of pooler and head that the file lacks
    /// are listed as fresh and left untouched.
    ///
    /// # Errors
    /// Fails, naming the tensors, if the encoder's are missing, have another shape or type, or hold non-finite numbers.
    pub fn load(
        &self,
        parameters: &mut Parameters,
        network: &dyn Network,
        head: Option<&[i64]>,
    ) -> Result<LoadReport> {
        let (prefix, output) = (network.body_prefix(), network.output());
        let mut names: BTreeSet<&str> = self.weights.names().collect();
        let mut report = LoadReport::default();
        let (mut missing, mut mismatched) = (Vec::new(), Vec::new());
        let wanted: Vec<(ParameterId, String, ParameterPlace)> =
            parameters.iter().map(|(id, parameter)| (id, parameter.name.clone(), parameter.place)).collect();
        for (id, name, place) in wanted {
            let optional = matches!(place, ParameterPlace::Pooler | ParameterPlace::Head);
            let found = (spellings(&name, prefix).iter())
                .find_map(|spelling| names.take(spelling.as_str()))
                .filter(|_| head.is_some() || place != ParameterPlace::Head);
            match found {
                Some(stored) => {
                    let expected = &parameters.get(id).shape;
                    let shape =
                        self.weights.get(stored).map(|tensor| tensor.shape.clone()).unwrap_or_default();
                    if shape != *expected {
                        mismatched.push(format!("{name} is {shape:?}, config.json makes it {expected:?}"));
                    } else if let Some(order) =
                        head.filter(|_| id == output.weight || Some(id) == output.bias)
                    {
                        let values = self.weights.tensor(stored)?;
                        parameters.set(id, &values.f_index_select(0, &Tensor::from_slice(order))?)?;
                    } else {
                        let values = parameters.part(&parameters.values_to_change(), id)?;
                        self.weights.copy(stored, &values)?;
                    }
                }
                None if optional => report.fresh.push(name),
                None => missing.push(name),
            }
        }
        for name in names.into_iter().filter(|name| !name.ends_with("position_ids")) {
            let known = PRETRAINING.iter().any(|part| name.starts_with(part));
            if known { &mut report.ignored } else { &mut report.unexpected }.push(name.to_owned());
        }
        if missing.is_empty() && mismatched.is_empty() {
            return Ok(report);
        }
        let mut problems = Vec::new();
        for (what, list) in
            [("missing", &missing), ("of another shape", &mismatched), ("unexpected", &report.unexpected)]
        {
            if !list.is_empty() {
                problems.push(format!("{} {what}: {}", list.len(), shortened(list)));
            }
        }
        Err(Error::model(self.weights.path(), format!("does not fit config.json: {}", problems.join("; "))))
    }

    /// Returns the names of the labels in the config, unless there are none or transformers' placeholders `LABEL_0` and so on.
    ///
    /// # Errors
    /// As for [`ModelConfig::labels`].
    pub fn named_labels(&self) -> Result<Option<Vec<String>>> {
        let is_placeholder = |(id, name): (usize, &String)| *name == format!("LABEL_{id}");
        Ok(self.config.labels()?.filter(|names| !names.iter().enumerate().all(is_placeholder)))
    }

    /// Returns, for each label of a task, which output of the file's head it is; nothing if the file has no head for
    /// these labels.
    ///
    /// Names must be the task's, in any order and any case; a head without names, or with transformers' `LABEL_0` and so
    /// on, counts as the task's if it has as many outputs.
    ///
    /// # Errors
    /// Fails if the family does not run here.
    pub fn head_for(&self, task: &Labels) -> Result<Option<Vec<i64>>> {
        let (network, table) = self.config.declare(task.outputs())?;
        let stored = |parameter: &Parameter| self.weights.get(&parameter.name);
        let mut head = table.iter().filter(|parameter| parameter.place == ParameterPlace::Head);
        let outputs = table.iter().nth(network.output().weight.index()).and_then(stored);
        let fits = outputs.is_some_and(|tensor| tensor.shape.first() == Some(&task.outputs()));
        if !fits || !head.all(|parameter| stored(parameter).is_some()) {
            return Ok(None);
        }
        let own = || Some((0..task.outputs()).collect());
        let (Labels::Classes(names), Some(found)) = (task, self.named_labels()?) else { return Ok(own()) };
        let place = |name: &String| found.iter().position(|other| same_label(other, name));
        let places: Option<Vec<i64>> = names.iter().map(|name| place(name).map(|id| id as i64)).collect();
        Ok(places.filter(|_| found.len() == names.len()))
    }
}

/// Writes config and weights of a model as a Hugging Face folder; the tokenizer's files are the caller's.
///
/// # Errors
/// Fails if the folder cannot be written.
pub fn write(
    folder: &Path,
    config: &ModelConfig,
    network: &dyn Network,
    labels: &Labels,
    parameters: &Parameters,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let values = exported_config(config, network, labels);
    let text =
        serde_json::to_string_pretty(&values).map_err(|error| Error::configuration(error.to_string()))?;
    let path = folder.join("config.json");
    write_bytes(&path, (text + "\n").as_bytes())?;

    let flat = parameters.values().f_to_device(tch::Device::Cpu)?;
    let flat: &[f32] = elements(&flat)?;
    let path = folder.join(WEIGHTS);
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    write_whole(&path, |temporary| {
        let tensors = parameters.iter().map(|(_, parameter)| (&parameter.name, Values::of(parameter, flat)));
        safetensors::serialize_to_file(tensors, Some(metadata), temporary)
            .map_err(|error| Error::Environment(format!("cannot write {}: {error}", path.display())))
    })
}

/// The values of a parameter, which become bytes when their turn to be written comes.
struct Values<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl<'a> Values<'a> {
    fn of(parameter: &Parameter, flat: &'a [f32]) -> Self {
        let shape = parameter.shape.iter().map(|&size| size as usize).collect();
        Self { shape, values: &flat[parameter.range.clone()] }
    }
}

impl View for Values<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

fn exported_config(config: &ModelConfig, network: &dyn Network, labels: &Labels) -> Map<String, Value> {
    let mut values = config.values().clone();
    for key in ["num_labels", "_name_or_path", "_num_labels"] {
        values.remove(key);
    }
    values.insert("architectures".into(), json!([network.architecture()]));
    values.entry("model_type").or_insert(json!("bert"));
    let (names, problem) = match labels {
        Labels::Classes(names) => (names.clone(), "single_label_classification"),
        Labels::Score => (vec!["LABEL_0".to_owned()], "regression"),
    };
    let by_id: Map<_, _> = names.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let by_name: Map<_, _> = names.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
    values.insert("id2label".into(), Value::Object(by_id));
    values.insert("label2id".into(), Value::Object(by_name));
    values.insert("problem_type".into(), json!(problem));
    values
}

/// The names that a parameter may have in a checkpoint: with and without the family's prefix, and with the names that
/// layer normalisations had in TensorFlow (`gamma`, `beta`), which the oldest checkpoints keep.
fn spellings(name: &str, prefix: &str) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    names.extend(name.strip_prefix(prefix).map(str::to_owned));
    let old = |name: &String| {
        let (layer, part) = name.rsplit_once("LayerNorm.")?;
        let part = if part == "weight" { "gamma" } else { "beta" };
        Some(format!("{layer}LayerNorm.{part}"))
    };
    let old: Vec<String> = names.iter().filter_map(old).collect();
    names.extend(old);
    names
}

fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

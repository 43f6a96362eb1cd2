//! What stays in memory from one run to the next: a model with the weights that runs start from, and data as tokens.

use std::borrow::Cow;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use tch::{Device, Tensor};

use super::entries::{ModelEntry, TaskEntry};
use super::run::Run;
use super::training_set::subset;
use crate::data::{Dataset, EncodedDataset, noisy_labels};
use crate::error::Result;
use crate::model::{Classifier, HeadStart, Labels, ModelFolder, ParameterPlace};
use crate::train::{Control, Event, Precision, Progress, frozen_features};

/// A model with the weights that runs start from.
pub struct ResidentModel {
    start: String,
    task: Arc<TaskEntry>,
    head: HeadStart,
    /// The model.
    pub classifier: Classifier,
    /// What the frozen encoder makes of data sets.
    features: Vec<(Rc<EncodedDataset>, FeatureKey, Tensor)>,
}

/// What features depend on, besides the weights and the data: the arithmetic, and the seed of parts of the encoder that
/// the checkpoint lacks.
#[derive(PartialEq)]
struct FeatureKey {
    precision: Precision,
    seed: Option<u64>,
}

impl ResidentModel {
    /// Loads the weights of a folder for the task of a run.
    ///
    /// # Errors
    /// Fails if the family does not run here or the checkpoint does not fit its config.
    pub fn load(run: &Run, folder: &ModelFolder, device: Device) -> Result<Self> {
        let labels = Labels::from(&run.task.card.objective);
        Ok(Self {
            start: run.start_id().to_owned(),
            task: run.task.clone(),
            head: run.head,
            classifier: Classifier::load(folder, labels, run.head, device)?,
            features: Vec::new(),
        })
    }

    /// Returns whether a run starts from what is here.
    pub fn serves(&self, run: &Run) -> bool {
        self.start == run.start_id() && Arc::ptr_eq(&self.task, &run.task) && self.head == run.head
    }

    /// Returns a data set as a run takes it: as tokens, or with a frozen encoder as its features, computed once.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation or the user asks to stop.
    pub fn seen_by<'d>(
        &mut self,
        run: &Run,
        data: &'d Rc<EncodedDataset>,
        control: &mut Control,
    ) -> Result<Cow<'d, EncodedDataset>> {
        if !run.is_frozen() {
            return Ok(Cow::Borrowed(data));
        }
        let parameters = &self.classifier.parameters;
        let fresh = |name: &String| {
            parameters.find(name).is_some_and(|id| parameters.get(id).place != ParameterPlace::Head)
        };
        let key = FeatureKey {
            precision: run.hyperparameters.precision,
            seed: self.classifier.report.fresh.iter().any(fresh).then_some(run.seed),
        };
        let known = self.features.iter().position(|(of, other, _)| Rc::ptr_eq(of, data) && *other == key);
        let place = match known {
            Some(place) => place,
            None => {
                let (mut done, total) = (0, data.len());
                let each = |examples| {
                    done += examples;
                    (control.report)(Event::Encoded(Progress::new(done, total)));
                    control.check()
                };
                let features = frozen_features(&self.classifier, &data.inputs, key.precision, each)?;
                self.features.push((data.clone(), key, features));
                self.features.len() - 1
            }
        };
        Ok(Cow::Owned(data.with_features(&self.features[place].2)))
    }
}

/// Data sets as tokens, each made once for a tokenizer and a length.
#[derive(Default)]
pub struct Tokens {
    known: Vec<(String, usize, Arc<Dataset>, Rc<EncodedDataset>)>,
}

impl Tokens {
    /// Returns a data set as tokens.
    ///
    /// # Errors
    /// Fails if the tokenizer does, or an example has no label.
    pub fn of(
        &mut self,
        model: &ModelEntry,
        dataset: &Arc<Dataset>,
        max_length: usize,
    ) -> Result<Rc<EncodedDataset>> {
        let known = self.known.iter().find(|(tokenizer, length, of, _)| {
            *tokenizer == model.tokenizer_sha256 && *length == max_length && Arc::ptr_eq(of, dataset)
        });
        if let Some((.., encoded)) = known {
            return Ok(encoded.clone());
        }
        let inputs = model.encoder.encode_dataset(&dataset.examples, max_length)?;
        let encoded = Rc::new(EncodedDataset::new(inputs, &dataset.examples)?);
        self.known.push((model.tokenizer_sha256.clone(), max_length, dataset.clone(), encoded.clone()));
        Ok(encoded)
    }
}

/// Returns the examples that a run trains on, with the labels it trains on.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub fn training_set<'d>(all: Cow<'d, EncodedDataset>, run: &Run) -> Result<Cow<'d, EncodedDataset>> {
    let chosen = match run.examples {
        None => all,
        Some(count) => Cow::Owned(all.part(&subset(&run.task.train.dataset.examples, count, run.seed))?),
    };
    if run.label_noise == 0.0 {
        return Ok(chosen);
    }
    let mut noisy = chosen.into_owned();
    noisy.targets = noisy_labels(&noisy.targets, run.task.card.label_count(), run.label_noise, run.seed)?;
    Ok(Cow::Owned(noisy))
}

/// Returns whether a folder has a whole model; [`Classifier::save`] writes the weights last but the tokenizer.
pub fn has_model(folder: &Path) -> bool {
    folder.join("model.safetensors").is_file()
}

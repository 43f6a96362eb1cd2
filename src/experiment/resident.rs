//! What stays in memory from one run to the next: a model with the weights that runs start from, and data as tokens.

use std::rc::Rc;
use std::sync::Arc;

use tch::Device;

use super::entries::{ModelEntry, TaskEntry};
use super::run::Run;
use crate::data::{Dataset, EncodedDataset};
use crate::error::Result;
use crate::model::{Classifier, HeadStart, Labels, ModelFolder, Precision};
use crate::train::{Control, Event, Progress, frozen_features};

/// A model with the weights that runs start from.
pub struct ResidentModel {
    /// Beside its weights: folders of equal weights may have other configs.
    model: Arc<ModelEntry>,
    start: String,
    task: Arc<TaskEntry>,
    head: HeadStart,
    /// The model.
    pub classifier: Classifier,
    /// What the frozen encoder makes of data sets, in a precision.
    features: Vec<(Rc<EncodedDataset>, Precision, Rc<EncodedDataset>)>,
}

impl ResidentModel {
    /// Loads the weights of a folder for the task of a run.
    ///
    /// # Errors
    /// Fails if the family does not run here or the checkpoint does not fit its config.
    pub fn load(run: &Run, folder: &ModelFolder, device: Device) -> Result<Self> {
        let labels = Labels::from(&run.task.card.objective);
        Ok(Self {
            model: run.model.clone(),
            start: run.start_id().to_owned(),
            task: run.task.clone(),
            head: run.head,
            classifier: Classifier::load(folder, labels, run.head, device)?,
            features: Vec::new(),
        })
    }

    /// Returns whether a run starts from what is here.
    pub fn serves(&self, run: &Run) -> bool {
        Arc::ptr_eq(&self.model, &run.model)
            && self.start == run.start_id()
            && Arc::ptr_eq(&self.task, &run.task)
            && self.head == run.head
    }

    /// Returns a data set as a run takes it: as tokens, or with a frozen encoder as its features, computed once.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation or the user asks to stop.
    pub fn seen_by(
        &mut self,
        run: &Run,
        data: &Rc<EncodedDataset>,
        control: &mut Control,
    ) -> Result<Rc<EncodedDataset>> {
        if !run.is_frozen() {
            return Ok(data.clone());
        }
        let precision = run.hyperparameters.precision;
        let known = self.features.iter().find(|(of, with, _)| Rc::ptr_eq(of, data) && *with == precision);
        if let Some((.., seen)) = known {
            return Ok(seen.clone());
        }
        let (mut done, total) = (0, data.len());
        let features = frozen_features(&self.classifier, &data.inputs, precision, |examples| {
            done += examples;
            (control.report)(Event::Encoded(Progress::new(done, total)));
            control.check()
        })?;
        let seen = Rc::new(data.with_features(features));
        self.features.push((data.clone(), precision, seen.clone()));
        Ok(seen)
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

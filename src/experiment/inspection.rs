//! What an experiment's runs start from, looked at without training: masks, and the steps that Theorem 1 is about.

use std::path::{Path, PathBuf};

use super::kept::keep_mask;
use super::queue::Turn;
use super::run::{Run, RunPurpose};
use super::runner::{RunEvent, Runner};
use super::training_set::training_set;
use crate::child::Uncertainty;
use crate::data::EncodedDataset;
use crate::error::{Error, Result};
use crate::method::MaskKind;
use crate::model::Classifier;
use crate::train::{Control, OptimizerRule, StepVariance, prepare, step_variance};

impl Runner<'_> {
    /// Computes the masks of all runs that may be reported and whose method has a fixed one, and writes each as `folder/<run>.safetensors`. Returns
    /// where, and how uncertain a mask is if a part of the training data chose it. Trains nothing.
    ///
    /// # Errors
    /// Fails if a model cannot be loaded, a mask cannot be computed, or the folder cannot be written.
    pub fn compute_masks(mut self, folder: &Path) -> Result<Vec<(PathBuf, Option<Uncertainty>)>> {
        let mut written = Vec::new();
        let plan = self.plan;
        self.with_each(
            |run| run.method.mask() == Some(MaskKind::Fixed) && run.purpose != RunPurpose::Selection,
            |run, classifier, data, control| {
                let (method, settings) = (run.method.as_ref(), &run.hyperparameters);
                let prepared = prepare(classifier, data, method, settings, run.seed, control)?;
                let path = keep_mask(plan, run, prepared.mask.as_deref(), folder)?;
                written.extend(path.map(|path| (path, prepared.fisher)));
                Ok(())
            },
        )?;
        Ok(written)
    }

    /// Measures the steps of SGD at the start of all runs that Theorem 1 of the paper is about: vanilla and Child-Tuning_F
    /// with `optimizer: sgd`. Trains nothing.
    ///
    /// # Errors
    /// Fails if there is no such run, a model cannot be loaded, or libtorch refuses an operation.
    pub fn step_variances(mut self, draws: u64) -> Result<Vec<(Run, StepVariance)>> {
        let mut measured = Vec::new();
        let concerned = |run: &Run| {
            run.hyperparameters.optimizer == OptimizerRule::Sgd
                && ["vanilla", "child_tuning_f"].contains(&run.method.name())
        };
        if !self.plan.all_runs().any(|run| concerned(run)) {
            return Err(Error::configuration(format!(
                "{}: no run is vanilla or child_tuning_f with `train.optimizer: sgd`, which Theorem 1 is about",
                self.plan.name
            )));
        }
        self.with_each(concerned, |run, classifier, data, control| {
            let (method, settings) = (run.method.as_ref(), &run.hyperparameters);
            let variance = step_variance(classifier, data, method, settings, run.seed, draws, control)?;
            measured.push((run.clone(), variance));
            Ok(())
        })?;
        Ok(measured)
    }

    /// Loads what each chosen run starts from, resets it for the run's seed, and lets `act` work on it.
    fn with_each(
        &mut self,
        chosen: impl Fn(&Run) -> bool,
        mut act: impl FnMut(&Run, &mut Classifier, &EncodedDataset, &mut Control) -> Result<()>,
    ) -> Result<()> {
        // What starts from another run has no weights to look at before that one is trained.
        let runs: Vec<_> = self.plan.all_runs().filter(|run| run.source_run().is_none()).cloned().collect();
        for (number, run) in runs.iter().enumerate().filter(|(_, run)| chosen(run)) {
            let turn = Turn { number: number + 1, total: runs.len(), run: run.clone() };
            (self.report)(RunEvent::Started { worker: 0, turn: &turn });
            let mut model = self.take_model(run)?;
            let all = self.tokens.of(&run.model, &run.task.train.dataset, run.hyperparameters.max_length)?;
            let (report, interrupted) = (&mut *self.report, self.interrupted);
            let mut forward = |event| report(RunEvent::Progress { worker: 0, event });
            let mut control = Control { interrupted, report: &mut forward };
            let data = training_set(&all, run)?;
            model.classifier.reset(run.seed)?;
            act(run, &mut model.classifier, &data, &mut control)?;
            self.resident = Some(model);
        }
        Ok(())
    }
}

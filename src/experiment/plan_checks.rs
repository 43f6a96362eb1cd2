//! What of a plan is refused before anything trains, and what its user should know.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use super::plan::Plan;
use super::run::Run;
use super::start::Start;
use crate::error::{Error, Result};
use crate::files::is_pipe;
use crate::model::Classifier;

impl Plan {
    /// Refuses places that cannot be what they are named as, before anything is read from there.
    pub(super) fn refuse_odd_places(&self) -> Result<()> {
        let places =
            [("results", Some(&self.results)), ("save", self.save.as_ref()), ("masks", self.masks.as_ref())];
        for (key, place) in places.into_iter().filter_map(|(key, place)| Some((key, place?))) {
            let refused = |why: &str| Err(Error::configuration(format!("{key}: {} {why}", place.display())));
            if place.as_os_str().is_empty() {
                return Err(Error::configuration(format!(
                    "{key}: is empty; name a place, or leave the key out"
                )));
            }
            if is_pipe(place) {
                return refused("is neither a file nor a folder; name one");
            }
            match key {
                "results" if place.is_dir() => return refused("is a folder; name a file"),
                "save" | "masks" if place.is_file() => return refused("is a file; name a folder"),
                "save" | "masks" if *place == self.results => {
                    return refused("is the `results` file; name a folder");
                }
                _ => {}
            }
            if place.starts_with("~") && !Path::new("~").exists() {
                return refused("begins with `~`, which only a shell replaces; write the folder out");
            }
        }
        Ok(())
    }

    /// Checks that methods and lengths fit the models, once for each of their kinds.
    pub(super) fn check_fits(&self) -> Result<()> {
        let mut checked: HashSet<(&str, &str, &str, String, usize)> = HashSet::new();
        for run in self.all_runs() {
            let (model, card, method) = (&run.model, &run.task.card, &run.method);
            let max_length = run.hyperparameters.max_length;
            if !checked.insert((&model.name, &card.name, method.name(), method.options(), max_length)) {
                continue;
            }
            let config = &model.folder.config;
            method.check(run.declared()?.as_slice())?;
            if method.needs_dropout() {
                check_dropout(run)?;
            }
            Classifier::check_inputs(config, &model.encoder, card.is_pair(), max_length)?;
        }
        Ok(())
    }

    /// Says which runs never reach their learning rate. The first step of a warm-up has rate 0, so one of a single step trains
    /// nothing.
    pub(super) fn warmup_note(&self) -> Option<String> {
        let warmup = |run: &Run| run.hyperparameters.warmup.steps(run.total_steps());
        let short: Vec<_> = self.all_runs().filter(|run| warmup(run) >= run.total_steps()).collect();
        let first = short.first()?;
        let (steps, warmup) = (first.total_steps(), warmup(first));
        Some(format!(
            "{} of {} runs end before their warm-up does and never reach `learning_rate`; {} has {steps} step{} and a warm-up of \
             {warmup}",
            short.len(),
            self.all_runs().count(),
            first.label(),
            if steps == 1 { "" } else { "s" }
        ))
    }

    /// Says which folders that runs start from have other dropout than the model that the experiment names.
    pub(super) fn dropout_notes(&self) -> Result<BTreeSet<String>> {
        let (mut notes, mut looked_at) = (BTreeSet::new(), HashSet::new());
        for run in self.all_runs() {
            let Start::Folder(start) = &run.start else { continue };
            if !looked_at.insert((Arc::as_ptr(start), Arc::as_ptr(&run.model))) {
                continue;
            }
            let (own, named) = (run.config().dropout()?, run.model.folder.config.dropout()?);
            let differing = own.iter().filter(|(key, value)| named.get(*key) != Some(value));
            let differing: Vec<String> = differing.map(|(key, value)| format!("{key}: {value}")).collect();
            if !differing.is_empty() {
                notes.insert(format!(
                    "init_from: {} has other dropout than {}, and runs train with it: {}",
                    start.folder.path.display(),
                    run.model.name,
                    differing.join(", ")
                ));
            }
        }
        Ok(notes)
    }
}

/// Refuses a model without dropout for a method whose passes differ by nothing else.
fn check_dropout(run: &Run) -> Result<()> {
    let dropout = run.config().dropout()?;
    if dropout.values().any(|&probability| probability > 0.0) {
        return Ok(());
    }
    let keys: Vec<&str> = dropout.keys().map(String::as_str).collect();
    Err(Error::configuration(format!(
        "method: the passes of {} differ by dropout alone, and {} has none; give it some, such as `model_config: {{{}: 0.1}}`{}",
        run.method.name(),
        run.model.name,
        keys.first().unwrap_or(&"dropout"),
        match keys.len() {
            0 | 1 => String::new(),
            _ => format!(" (its keys are {})", keys.join(", ")),
        }
    )))
}

//! The plan: every run of an experiment with no options left, checked before anything trains.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::axes::{Axes, listed};
use super::entries::Catalogue;
use super::run::{Run, RunPurpose};
use super::selection::{self, Selection};
use super::spec::ExperimentSpec;
use crate::data::{TaskCard, data_roots};
use crate::error::{Error, Result};
use crate::files::is_pipe;
use crate::method::Preset;
use crate::spelling::suggestion;

/// What the command line adds to an experiment file.
#[derive(Clone, Debug, Default)]
pub struct PlanOptions {
    /// Folders with data sets, searched first.
    pub data: Vec<PathBuf>,
    /// Keep only runs whose column has the value: `task=rte`.
    pub only: Vec<(String, String)>,
}

/// All runs of an experiment.
pub struct Plan {
    /// The experiment's name.
    pub name: String,
    /// The runs, those that a comparison needs together next to each other, sources before what starts from them. Empty
    /// with `select`: these are known only when the trials are done.
    pub runs: Vec<Arc<Run>>,
    /// What the user should know about models and data, in sentences.
    pub notes: Vec<String>,
    /// Trials, and the runs that they choose between; empty without `select`.
    pub selection: Selection,
    /// The description of Child-Tuning that filled in what was left out.
    pub preset: Preset,
    /// The CSV that results are appended to.
    pub results: PathBuf,
    /// Folder that keeps each finished run's model.
    pub save: Option<PathBuf>,
    /// Folder that keeps each finished run's mask.
    pub masks: Option<PathBuf>,
}

impl Plan {
    /// Resolves an experiment: fills in defaults, opens models, reads data, and multiplies the axes out.
    ///
    /// # Errors
    /// Fails, naming file and place, if a model, a task or a data set cannot be used or options contradict each other.
    pub fn resolve(spec: &ExperimentSpec, file: &Path, options: &PlanOptions) -> Result<Self> {
        let name = name_of(spec)?;
        // Beside a pipe there is nothing.
        let base = file.parent().filter(|_| !is_pipe(file)).unwrap_or(Path::new(""));
        let mut catalogue = Catalogue::new(base, data_roots(&options.data, listed(&spec.data))?);
        let axes = Axes::open(spec, &mut catalogue)?;
        selection::check(spec, &axes.seeds)?;
        let (runs, selection) = match &spec.select {
            Some(select) => (Vec::new(), axes.selection(select)?),
            None => (axes.runs()?, Selection::default()),
        };
        let mut plan = Self {
            results: spec.results.clone().unwrap_or_else(|| PathBuf::from(format!("results/{name}.csv"))),
            save: spec.save.clone(),
            masks: spec.masks.clone(),
            selection,
            name,
            notes: axes.models.iter().filter_map(|model| model.note()).chain(catalogue.notes()).collect(),
            runs,
            preset: axes.preset,
        };
        plan.refuse_odd_places()?;
        plan.keep_only(&options.only)?;
        plan.check_fits()?;
        plan.tell_runs_apart();
        plan.notes.extend(plan.warmup_note());
        plan.notes.extend(axes.examples_note()?);
        plan.notes.extend(plan.dropout_notes()?);
        plan.notes.extend(axes.notes_on_depth());
        Ok(plan)
    }

    /// Gives runs that are called the same the settings in which they differ.
    fn tell_runs_apart(&self) {
        let mut alike: HashMap<String, Vec<&Arc<Run>>> = HashMap::new();
        for run in self.all_runs() {
            alike.entry(run.label()).or_default().push(run);
        }
        for runs in alike.values().filter(|runs| runs.len() > 1) {
            let settings: Vec<_> = runs.iter().map(|run| run.further_settings()).collect();
            let keys: HashSet<&String> = settings.iter().flat_map(|own| own.keys()).collect();
            let differs = |key: &&String| settings.iter().any(|own| own.get(*key) != settings[0].get(*key));
            let differing: HashSet<&String> = keys.into_iter().filter(differs).collect();
            for (run, own) in runs.iter().zip(&settings) {
                let telling = own.iter().filter(|(key, _)| differing.contains(key));
                let telling: Vec<_> = telling
                    .map(|(key, value)| format!("{key}={}", value.to_string().trim_matches('"')))
                    .collect();
                let _ = run.distinction.set(telling.join(" "));
            }
        }
    }

    /// Returns every run that may come to be trained.
    pub fn all_runs(&self) -> impl Iterator<Item = &Arc<Run>> {
        let candidates = self.selection.choices.iter().flat_map(|choice| &choice.candidates);
        let reports = candidates.flat_map(|candidate| &candidate.reports);
        self.runs.iter().chain(&self.selection.trials).chain(reports)
    }

    fn keep_only(&mut self, only: &[(String, String)]) -> Result<()> {
        const COLUMNS: [&str; 4] = ["model", "task", "method", "seed"];
        for (column, value) in only {
            let named = TaskCard::builtin(value).filter(|_| column == "task").map(|card| card.name);
            let value = named.as_ref().unwrap_or(value);
            let get: fn(&Run) -> String = match column.as_str() {
                "model" => |run| run.model.name.clone(),
                "task" => |run| run.task.card.name.clone(),
                // Of a chain, the method that its first stage compares.
                "method" => |run| run.first_stage().method.name().to_owned(),
                "seed" => |run| run.seed.to_string(),
                _ => {
                    let hint = suggestion(column, COLUMNS);
                    return Err(Error::configuration(format!(
                        "--only knows {}, not `{column}`{hint}",
                        COLUMNS.join(", ")
                    )));
                }
            };
            // A seed chooses among the runs that are reported; all trials are needed to choose their settings.
            let wanted =
                |run: &Run| get(run) == *value || (column == "seed" && run.purpose == RunPurpose::Selection);
            let choosable: BTreeSet<String> = (self.all_runs())
                .filter(|run| column != "seed" || run.purpose != RunPurpose::Selection)
                .map(|run| get(run))
                .collect();
            if !choosable.contains(value) {
                let there: Vec<&str> = choosable.iter().map(String::as_str).collect();
                return Err(Error::configuration(format!(
                    "--only {column}={value} leaves no run{}; there are {}",
                    suggestion(value, there.iter().copied()),
                    if there.is_empty() { "none left".into() } else { there.join(", ") }
                )));
            }
            // A run that starts from another stands behind it.
            let (mut kept, mut sources) = (Vec::new(), HashSet::new());
            for run in self.runs.iter().rev() {
                if wanted(run) || sources.contains(&run.id) {
                    sources.extend(run.source_run().map(|source| source.id.clone()));
                    kept.push(run.clone());
                }
            }
            kept.reverse();
            self.runs = kept;
            self.selection.retain(wanted);
        }
        Ok(())
    }
}

/// Returns the name of an experiment, which becomes that of its results file.
fn name_of(spec: &ExperimentSpec) -> Result<String> {
    let name = spec.name.clone().unwrap_or_else(|| "experiment".into());
    let is_odd = name.contains(['/', '\\']) || name.contains(char::is_control);
    if name.trim().is_empty() || is_odd || name.starts_with('.') {
        return Err(Error::configuration(format!(
            "name: `{name}` cannot name a file; take a word without `/` that does not begin with a dot"
        )));
    }
    Ok(name)
}

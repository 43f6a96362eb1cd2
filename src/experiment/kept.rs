//! What runs leave in files: their models, for the user or for runs that start from them, and their masks.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::plan::Plan;
use super::run::Run;
use crate::child::{GradientMask, write_mask};
use crate::error::{Error, Result};
use crate::files::{beside, write_bytes};
use crate::model::{Classifier, ModelFolder, is_saved};
use crate::values::hexadecimal;

/// The file beside a kept model that says which run left it.
const ORIGIN: &str = "child_tuning.json";

/// Which run left a model, and what it left.
#[derive(Serialize, Deserialize)]
struct Origin {
    experiment: String,
    run: String,
    task: String,
    method: String,
    seed: u64,
    /// Over config and weights.
    sha256: String,
}

/// What is where the model of a run is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeptModel {
    /// No weights.
    Missing,
    /// What the run left.
    Whole,
    /// Weights of which nothing says what run left them: one may be at it.
    Nameless,
    /// Other weights, or another config.
    Changed,
}

/// Returns where the model of a run, named by its id, is kept: in `save:`, or beside the results where others start from it.
pub(super) fn kept_folder(plan: &Plan, run: &str) -> PathBuf {
    let folder = plan.save.clone().unwrap_or_else(|| beside(&plan.results, ".sources"));
    folder.join(run)
}

/// Writes the model of a run to a folder, and last which run it is of.
///
/// # Errors
/// Fails if a file cannot be written.
pub(super) fn keep_model(plan: &Plan, run: &Run, classifier: &Classifier, folder: &Path) -> Result<()> {
    classifier.save(folder, &run.model.encoder)?;
    let origin = Origin {
        experiment: plan.name.clone(),
        run: run.id.clone(),
        task: run.task.card.name.clone(),
        method: method_of(run),
        seed: run.seed,
        sha256: contents(folder)?,
    };
    let path = folder.join(ORIGIN);
    let text =
        serde_json::to_string_pretty(&origin).map_err(|error| Error::io("write", &path)(error.into()))?;
    write_bytes(&path, (text + "\n").as_bytes())
}

/// Looks at what is where the model of a run, named by its id, is kept: somebody may have put other weights there.
pub(super) fn look_at(folder: &Path, run: &str) -> KeptModel {
    if !is_saved(folder) {
        return KeptModel::Missing;
    }
    let origin = std::fs::read(folder.join(ORIGIN)).ok();
    let Some(origin) = origin.and_then(|text| serde_json::from_slice::<Origin>(&text).ok()) else {
        return KeptModel::Nameless;
    };
    match origin.run == run && contents(folder).is_ok_and(|found| found == origin.sha256) {
        true => KeptModel::Whole,
        false => KeptModel::Changed,
    }
}

/// Returns the SHA-256 over what a run that starts from a folder takes of it.
fn contents(folder: &Path) -> Result<String> {
    let folder = ModelFolder::open(folder)?;
    let mut hash = Sha256::new();
    hash.update(folder.config.to_json());
    hash.update(folder.sha256()?);
    Ok(hexadecimal(&hash.finalize()))
}

fn method_of(run: &Run) -> String {
    format!("{} {}", run.method.name(), run.method.options()).trim_end().to_owned()
}

/// Returns the file of the mask of a run.
pub(super) fn mask_file(folder: &Path, run: &str) -> PathBuf {
    folder.join(format!("{run}.safetensors"))
}

/// Writes the mask of a run, if it has a fixed one, and returns where.
///
/// # Errors
/// Fails if the file cannot be written.
pub(super) fn keep_mask(
    plan: &Plan,
    run: &Run,
    mask: Option<&GradientMask>,
    folder: &Path,
) -> Result<Option<PathBuf>> {
    let Some(child) = mask.and_then(GradientMask::child) else { return Ok(None) };
    let about = [
        ("experiment", plan.name.clone()),
        ("run", run.id.clone()),
        ("model_sha256", run.model.sha256.clone()),
        ("task", run.task.card.name.clone()),
        ("method", method_of(run)),
        ("seed", run.seed.to_string()),
    ];
    let path = mask_file(folder, &run.id);
    write_mask(&path, child, &about)?;
    Ok(Some(path))
}

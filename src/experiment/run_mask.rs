//! The mask of a run as a file.

use std::path::{Path, PathBuf};

use super::plan::Plan;
use super::run::Run;
use crate::child::{GradientMask, write_mask};
use crate::error::Result;

/// Returns the file of the mask of a run.
pub(super) fn mask_file(folder: &Path, run: &str) -> PathBuf {
    folder.join(format!("{run}.safetensors"))
}

/// Writes the mask of a run, if it has a fixed one, and returns where.
pub(super) fn write_mask_of(
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
        ("method", format!("{} {}", run.method.name(), run.method.options())),
        ("seed", run.seed.to_string()),
    ];
    let path = mask_file(folder, &run.id);
    write_mask(&path, child, &about)?;
    Ok(Some(path))
}

//! `doctor`: what is here, and what to do about what is not.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::data::{Split, TaskCard, TokenEncoder, read_split, roots_of_training};
use child_tuning::error::Error;
use child_tuning::experiment::graphics_cards;
use child_tuning::hub::Hub;
use child_tuning::libtorch;
use child_tuning::model::{Classifier, Labels, ModelFolder};
use clap::Args;
use indicatif::BinaryBytes;
use tch::Cuda;

use super::model::state;
use super::{DataArguments, show};

#[derive(Args)]
pub struct DoctorArguments {
    #[command(flatten)]
    data: DataArguments,
    /// Folder with model folders
    #[arg(long, default_value = "models", value_name = "FOLDER")]
    models: PathBuf,
}

/// Prints what was found.
pub fn doctor(arguments: DoctorArguments) -> Result<ExitCode> {
    show(format_args!(
        "child-tuning   {} (commit {})",
        env!("CARGO_PKG_VERSION"),
        env!("CHILD_TUNING_COMMIT")
    ))?;
    show(format_args!("libtorch       {}, {} threads", libtorch::version(), tch::get_num_threads()))?;
    show_cuda()?;
    show_data(&arguments.data.roots()?)?;
    show_models(&arguments.models)?;
    show_hub()?;
    Ok(ExitCode::SUCCESS)
}

fn show_cuda() -> Result<()> {
    let cards = graphics_cards();
    let built = Cuda::is_available() || tch::utils::has_cuda();
    match (cards.is_empty(), Cuda::device_count()) {
        (_, devices @ 1..) => {
            show(format_args!("CUDA           {devices} devices: {}", cards.join(", ")))?;
        }
        (false, _) => show(format_args!(
            "CUDA           {} found, but libtorch cannot use it: {}",
            cards.join(", "),
            if built {
                "the driver may be older than CUDA 13 needs (580); update it"
            } else {
                "this libtorch is built without CUDA; set LIBTORCH to one that has it"
            }
        ))?,
        (true, _) => show(format_args!(
            "CUDA           no device and no driver; experiments run on the CPU (make experiment)"
        ))?,
    }
    Ok(())
}

fn show_data(roots: &[PathBuf]) -> Result<()> {
    let places: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
    show(format_args!("data           in {}", places.join(", ")))?;
    for name in TaskCard::builtin_names() {
        let Some(card) = TaskCard::builtin(name) else { continue };
        let splits = Split::ALL.into_iter().filter(|split| card.splits.contains_key(split));
        // The test file matters only where there is nothing else, as in the diagnostic set.
        let splits = splits.filter(|split| *split != Split::Test || card.splits.len() == 1);
        let found = roots_of_training(&card, roots).and_then(|roots| {
            splits
                .map(|split| Ok((split, read_split(&card, &roots, split)?)))
                .collect::<Result<Vec<_>, Error>>()
        });
        match found {
            Ok(found) => {
                let sizes = found.iter().map(|(split, data)| format!("{} {split}", data.examples.len()));
                let folder = found.first().and_then(|(_, data)| data.path.parent());
                show(format_args!(
                    "  {name:12} {}, in {}",
                    sizes.collect::<Vec<_>>().join(", "),
                    folder.unwrap_or(Path::new("")).display()
                ))?;
            }
            Err(error) => show(format_args!("  {name:12} not usable: {error}"))?,
        }
    }
    Ok(())
}

fn show_models(folder: &Path) -> Result<()> {
    show(format_args!("models         in {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect(),
        Err(_) => Vec::new(),
    };
    paths.sort();
    for path in &paths {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let shape_of = |folder: ModelFolder| {
            TokenEncoder::from_folder(path)?;
            Classifier::shape(&folder.config, &Labels::Score).map(|shape| (folder, shape))
        };
        match ModelFolder::open(path).and_then(shape_of) {
            Ok((folder, shape)) => {
                let family = folder.config.text_or("model_type", "bert")?;
                show(format_args!("  {name:12} {family}, {} layers, hidden {}", shape.layers, shape.hidden))?;
            }
            Err(error) => show(format_args!("  {name:12} not usable: {error}"))?,
        }
    }
    if paths.is_empty() {
        show(format_args!(
            "  none; `make setup` puts a small one there, and any Hugging Face folder of a supported family can be named in YAML"
        ))?;
    }
    Ok(())
}

fn show_hub() -> Result<()> {
    let hub = match Hub::from_environment() {
        Ok(hub) => hub,
        Err(error) => return show(format_args!("Hub            not usable: {error}")),
    };
    let network = if hub.offline { "not used: HF_HUB_OFFLINE" } else { &hub.endpoint };
    let token = hub.token_place().map_or("no token".to_owned(), |place| format!("token in {place}"));
    show(format_args!("Hub            cache in {}, network {network}, {token}", hub.cache.display()))?;
    let models = hub.cached_models();
    for model in &models {
        let revisions: String = model.revisions.iter().map(|revision| format!("{revision} = ")).collect();
        show(format_args!(
            "  {:12} {revisions}{}, {}, {}",
            model.repository,
            model.commit,
            BinaryBytes(model.bytes),
            state(model)
        ))?;
    }
    if models.is_empty() {
        show(format_args!("  none; `child-tuning model fetch bert-large-cased` gets one"))?;
    }
    Ok(())
}

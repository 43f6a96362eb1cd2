//! `model`: models of the Hugging Face Hub, and what is in a model folder.

use std::process::ExitCode;

use anyhow::Result;
use child_tuning::error::Error;
use child_tuning::hub::{CachedModel, Hub, HubEvent, ModelId, ModelPlace, Snapshot, place_of};
use child_tuning::model::ModelConfig;
use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use indicatif::BinaryBytes;

use super::model_inspect::{InspectArguments, inspect};
use super::progress::TransferDisplay;
use super::signals::end_at_once;
use super::{show, tell};

#[derive(Args)]
pub struct ModelArguments {
    #[command(subcommand)]
    command: ModelCommand,
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Download models of the Hugging Face Hub into its cache; resumes an interrupted download.
    ///
    /// Config, tokenizer and weights in one format are loaded, and compared with the hashes that the Hub names. What the
    /// cache has already, of Python as well, is compared and kept. A branch or tag is looked up anew: this is how a model
    /// comes to its newest commit, while `run` takes what is in the cache.
    #[command(after_help = "\
Environment variables, those of Python's huggingface_hub:
  HF_HOME, HF_HUB_CACHE    where the cache is [default: ~/.cache/huggingface, and hub in it]
  HF_TOKEN                 token for gated and private models [default: what `hf auth login` wrote]
  HF_ENDPOINT              mirror [default: https://huggingface.co]
  HF_HUB_OFFLINE           1 forbids downloads
  HTTPS_PROXY, NO_PROXY    as everywhere

Examples:
  child-tuning model fetch bert-large-cased
  child-tuning model fetch google/electra-large-discriminator roberta-large@main")]
    Fetch {
        /// Models: bert-large-cased or owner/name, with @ and a branch, tag or commit where it is not to be the newest
        #[arg(required = true, value_name = "MODEL")]
        models: Vec<ModelId>,
    },
    /// Show the models in the Hugging Face cache, and whether they are complete.
    List,
    /// Show a model: its sizes and parts, what of its files is used, and how many weights a mask can reach.
    Inspect(InspectArguments),
}

/// Calls the subcommand.
pub fn model(arguments: ModelArguments) -> Result<ExitCode> {
    match arguments.command {
        ModelCommand::Fetch { models } => fetch(&models),
        ModelCommand::List => list(),
        ModelCommand::Inspect(arguments) => inspect(arguments),
    }
}

fn fetch(models: &[ModelId]) -> Result<ExitCode> {
    end_at_once()?;
    for id in models {
        let Snapshot { commit, folder, .. } = fetch_model(id)?;
        show(format_args!("{id}: commit {commit}, in {}", folder.display()))?;
        if let ModelPlace::Folder(nearer) = place_of(&id.to_string()) {
            tell(format_args!("note: experiments started here find the folder {} first", nearer.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Brings a model into the cache, and shows how that goes on.
pub fn fetch_model(id: &ModelId) -> Result<Snapshot, Error> {
    let mut display = TransferDisplay::new();
    let mut report = |event: HubEvent| match event {
        HubEvent::Transfer(event) => display.show(event),
        HubEvent::Locked(lock) => {
            let lock = lock.display();
            display.line(&format!("another process is loading a file of {id}, and is waited for ({lock})"));
        }
    };
    // A family that does not run here shows before its weights are loaded.
    let accept = |folder: &std::path::Path| ModelConfig::read(folder)?.family().map(drop);
    let snapshot = Hub::from_environment()?.fetch(id, &accept, &mut report);
    display.finish();
    snapshot
}

fn list() -> Result<ExitCode> {
    let hub = Hub::from_environment()?;
    let models = hub.cached_models();
    if models.is_empty() {
        show(format_args!("no models in {}; `child-tuning model fetch NAME` gets one", hub.cache.display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["model", "revision", "commit", "size", "state"]);
    for model in models {
        let state = state(&model);
        let CachedModel { repository, revisions, commit, bytes, .. } = model;
        table.add_row([repository, revisions.join(", "), commit, BinaryBytes(bytes).to_string(), state]);
    }
    show(table)?;
    Ok(ExitCode::SUCCESS)
}

/// Says whether a model in the cache can be loaded.
pub fn state(model: &CachedModel) -> String {
    model.missing.map_or("complete".to_owned(), |missing| format!("lacks {missing}"))
}

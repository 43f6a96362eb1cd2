//! Models from the Hugging Face Hub: their names, the cache that Python's huggingface_hub keeps, and how they get there.

mod cache;
mod contents;
mod fetch;
mod id;
mod locate;
mod remote;
mod settings;

pub use cache::{CachedModel, Snapshot};
pub use fetch::HubEvent;
pub use id::ModelId;
pub use locate::{ModelPlace, missing_models, model_folder, place_of};
pub use settings::Hub;

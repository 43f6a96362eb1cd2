//! Plain fine-tuning: every weight trains.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{ClipOrder, DecayScope, Method, Preparation, Prepared, Preset};
use crate::error::Result;

/// There are no options.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        Ok(vec![Arc::new(Vanilla)])
    }
}

/// Plain fine-tuning.
struct Vanilla;

impl Method for Vanilla {
    fn name(&self) -> &'static str {
        "vanilla"
    }

    fn options(&self) -> String {
        String::new()
    }

    fn is_child_tuning(&self) -> bool {
        false
    }

    fn passes_over_data(&self) -> bool {
        false
    }

    fn prepare(&self, _: &mut Preparation) -> Result<Prepared> {
        Ok(Prepared { mask: None, clip: ClipOrder::AfterMask, decay: DecayScope::All })
    }
}

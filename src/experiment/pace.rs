//! How fast finished runs were, which tells how long those like them will take.

use std::collections::HashMap;

use tch::Device;

use super::machine;
use super::resident::Tokens;
use super::results::{Row, Status};
use super::run::Run;
use crate::error::Result;
use crate::statistics::median;
use crate::values::yaml_name;

/// Speeds of the finished runs of a results file on one device.
pub struct Pace {
    kinds: HashMap<Kind, Speeds>,
}

/// What runs of one speed have in common.
#[derive(PartialEq, Eq, Hash)]
struct Kind {
    model: String,
    precision: String,
    method: String,
    freeze: String,
}

/// What was measured of the runs of a kind, row by row.
#[derive(Default)]
struct Speeds {
    tokens_per_second: Vec<f64>,
    /// Seconds of preparation for each training example.
    prepare: Vec<f64>,
    /// Seconds of scoring for each example, by task and split.
    evaluate: HashMap<(String, String), Vec<f64>>,
}

impl Pace {
    /// Takes the speeds of those rows that are of this device, or of one like it: of the same processor and number of
    /// threads, or of the same graphics card.
    pub fn of(rows: &[Row], device: Device) -> Self {
        let here = machine::device_name(device);
        let mut kinds: HashMap<Kind, Speeds> = HashMap::new();
        for row in rows.iter().filter(|row| {
            row.status == Status::Ok && machine::device_kind(&row.device) == machine::device_kind(&here)
        }) {
            let kind = Kind {
                model: row.model_sha256.clone(),
                precision: row.precision.clone(),
                method: row.method.clone(),
                freeze: row.freeze.clone(),
            };
            let speeds = kinds.entry(kind).or_default();
            speeds
                .tokens_per_second
                .extend(row.tokens_per_second.filter(|speed| speed.is_finite() && *speed > 0.0));
            speeds
                .prepare
                .extend(row.prepare_seconds.map(|seconds| seconds / row.examples_train.max(1) as f64));
            let scored = (row.evaluated_on.clone(), row.split.clone());
            let each = row.evaluate_seconds.map(|seconds| seconds / row.examples_evaluated.max(1) as f64);
            speeds.evaluate.entry(scored).or_default().extend(each);
        }
        Self { kinds }
    }

    /// Returns how many seconds a run will take by the speed of finished runs of its model, precision and method; nothing if
    /// there are none.
    ///
    /// # Errors
    /// Fails if the data cannot be made into tokens.
    pub fn seconds(&self, run: &Run, tokens: &mut Tokens) -> Result<Option<f64>> {
        let settings = &run.hyperparameters;
        let kind = Kind {
            model: run.model.sha256.clone(),
            precision: yaml_name(&settings.precision),
            method: run.method.name().to_owned(),
            freeze: yaml_name(&settings.freeze),
        };
        let Some(speeds) = self.kinds.get(&kind) else { return Ok(None) };
        let Some(tokens_per_second) = median(&speeds.tokens_per_second) else { return Ok(None) };
        let train = tokens.of(&run.model, &run.task.train.dataset, settings.max_length)?;
        let examples = run.training_examples() as f64;
        let all = train.tokens();
        let epoch = all as f64 * examples / train.len() as f64;
        let mut seconds = epoch * settings.epochs / tokens_per_second;
        seconds += examples * median(&speeds.prepare).unwrap_or(0.0);
        for on in run.evaluations.iter().map(|evaluated| &evaluated.on) {
            let known = speeds.evaluate.get(&(on.card.name.clone(), on.split.name().to_owned()));
            let any = || median(&speeds.evaluate.values().flatten().copied().collect::<Vec<_>>());
            let each = known.and_then(|each| median(each)).or_else(any).unwrap_or(0.0);
            seconds += on.dataset.examples.len() as f64 * each;
        }
        Ok(Some(seconds))
    }
}

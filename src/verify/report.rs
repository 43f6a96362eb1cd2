//! What was found, as JSON and as Markdown.

use std::fmt::Write;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::json;

use super::peer::PeerRow;
use super::{Check, FisherTimes, MatrixRate, Outcome, SpeedRow};
use crate::analysis::compare::markdown_text;

/// Sequences a second that training BERT-large on 128 tokens in bf16, batch 32, should reach on one H100.
const BAR: f64 = 1700.0;

/// Writes what was measured as `{"measured": …}`, and why it was not as `{"not_measured": reason}`.
pub(super) fn measured<T: Serialize, S: Serializer>(
    outcome: &Result<T, String>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(1))?;
    match outcome {
        Ok(value) => map.serialize_entry("measured", value)?,
        Err(reason) => map.serialize_entry("not_measured", reason)?,
    }
    map.end()
}

fn all_measured<T: Serialize, S: Serializer>(
    outcomes: &[Result<T, String>],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let one = |outcome: &Result<T, String>| match outcome {
        Ok(value) => json!({"measured": value}),
        Err(reason) => json!({"not_measured": reason}),
    };
    serializer.collect_seq(outcomes.iter().map(one))
}

/// Everything that a run of the suite found.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// When the run began, in UTC.
    pub started_at: String,
    /// The device with its name.
    pub device: String,
    /// Version of libtorch.
    pub torch: String,
    /// Version of this program.
    pub version: &'static str,
    /// Commit of this program.
    pub commit: &'static str,
    /// Whether only small sizes were run.
    pub quick: bool,
    /// All checks.
    pub checks: Vec<Check>,
    /// What products of large matrices reach.
    pub matrix_rates: Vec<MatrixRate>,
    /// All measured trainings.
    pub speeds: Vec<SpeedRow>,
    /// Fisher passes, or why they were not measured.
    #[serde(serialize_with = "all_measured")]
    pub fisher: Vec<Result<FisherTimes, String>>,
    /// The Python peer.
    pub peer: Vec<PeerRow>,
}

impl Report {
    /// Returns the number of checks with an outcome.
    pub fn count(&self, outcome: &Outcome) -> usize {
        self.checks.iter().filter(|check| check.outcome == *outcome).count()
    }

    /// Writes the report as Markdown tables.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_markdown(&mut text);
        text
    }

    fn write_markdown(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "# A device against the CPU\n")?;
        writeln!(
            text,
            "{}; {}; torch {}; child-tuning {} (commit {}){}.\n",
            self.started_at,
            self.device,
            self.torch,
            self.version,
            self.commit,
            if self.quick { "; small sizes only" } else { "" }
        )?;
        let count = |outcome| self.count(&outcome);
        writeln!(
            text,
            "{} checks passed, {} failed, {} skipped. Differences are relative, against float32 on the CPU, where the \
             name says nothing else.\n",
            count(Outcome::Passed),
            count(Outcome::Failed),
            count(Outcome::Skipped)
        )?;
        writeln!(text, "## Speed\n")?;
        for MatrixRate { precision, size, operations_per_second } in &self.matrix_rates {
            let rate = operations_per_second / 1e12;
            writeln!(text, "A product of matrices of {size} × {size} in {precision}: {rate:.3} TFLOP/s.")?;
        }
        writeln!(
            text,
            "\n| workload | batch | precision | method | sequences/s | tokens/s | of that rate | of vanilla | kernels a step | their time, ms | memory, GB | forecast |"
        )?;
        writeln!(text, "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")?;
        for row in &self.speeds {
            self.write_speed(text, row)?;
        }
        if let Some(Ok(speed)) = self.speeds.first().filter(|_| !self.quick).map(|row| &row.outcome) {
            let reached = speed.sequences_per_second >= BAR;
            let word = if reached { "reached" } else { "missed" };
            writeln!(text, "\nThe bar of the first row, {BAR} sequences/s on one H100, is {word}.")?;
        }
        writeln!(text, "\n## Fisher information\n")?;
        writeln!(
            text,
            "| workload | precision | examples | exact, one pass a batch, s | of a plain epoch | one example at a time, of the \
             exact pass |"
        )?;
        writeln!(text, "|---|---|---:|---:|---:|---:|")?;
        for times in &self.fisher {
            match times {
                Ok(FisherTimes { workload, precision, examples, exact, epoch, one_by_one }) => writeln!(
                    text,
                    "| {workload} | {precision} | {examples} | {exact:.2} | {:.2} | {:.1} |",
                    exact / epoch,
                    one_by_one / exact
                )?,
                Err(reason) => writeln!(text, "| not measured: {reason} | | | | | |")?,
            }
        }
        writeln!(text, "\n## The Python peer: transformers, in F with the released optimizer\n")?;
        writeln!(text, "| workload | precision | method | tokens/s | child-tuning against it |")?;
        writeln!(text, "|---|---|---|---:|---:|")?;
        for row in &self.peer {
            let cells = match &row.outcome {
                Ok(speed) => format!("{speed:.0} | {}", self.against(row, *speed)),
                Err(reason) => format!("not run: {} | ", markdown_text(reason)),
            };
            writeln!(text, "| {} | {} | {} | {cells} |", row.workload, row.precision, row.method)?;
        }
        writeln!(text, "\n## Checks\n")?;
        writeln!(text, "| topic | check | measured | allowed | |\n|---|---|---:|---:|---|")?;
        for check in &self.checks {
            let measured = check.measured.map_or(String::new(), |measured| format!("{measured:.1e}"));
            let word = match check.outcome {
                Outcome::Passed => "passed",
                Outcome::Failed => "**failed**",
                Outcome::Skipped => "skipped",
            };
            let reason =
                check.reason.as_ref().map_or(String::new(), |reason| format!(": {}", markdown_text(reason)));
            let (topic, name, allowed) = (&check.topic, &check.name, check.allowed);
            writeln!(text, "| {topic} | {name} | {measured} | {allowed:.0e} | {word}{reason} |")?;
        }
        Ok(())
    }

    /// Returns how many times as fast as a row of the peer the same training is here, if it was measured.
    fn against(&self, peer: &PeerRow, speed: f64) -> String {
        let own = self.speeds.iter().find(|own| {
            (own.workload.as_str(), own.method, own.precision.as_str())
                == (peer.workload.as_str(), peer.method, peer.precision)
        });
        match own.map(|own| &own.outcome) {
            Some(Ok(own)) => format!("{:.2}", own.tokens_per_second / speed),
            _ => String::new(),
        }
    }

    fn write_speed(&self, text: &mut String, row: &SpeedRow) -> std::fmt::Result {
        let SpeedRow { workload, batch_size, method, precision, .. } = row;
        let how = if row.replayed { ", replayed" } else { "" };
        write!(text, "| {workload} | {batch_size} | {precision} | {method}{how} |")?;
        let speed = match &row.outcome {
            Ok(speed) => speed,
            Err(reason) => return writeln!(text, " not measured: {reason} | | | | | | | |"),
        };
        let vanilla = self.speeds.iter().find(|other| {
            (other.method, &other.workload, &other.precision) == ("vanilla", workload, precision)
        });
        let of_vanilla = match vanilla.map(|vanilla| &vanilla.outcome) {
            Some(Ok(vanilla)) => {
                format!("{:.2}", speed.sequences_per_second / vanilla.sequences_per_second)
            }
            _ => String::new(),
        };
        let rate = self.matrix_rates.iter().find(|rate| rate.precision == *precision);
        let of_rate = rate.map_or(String::new(), |rate| {
            format!("{:.0} %", 100.0 * speed.operations_per_second / rate.operations_per_second)
        });
        let kernels = row.profile.as_ref().map_or(" | ".to_owned(), |profile| {
            format!("{} | {:.2}", profile.kernels_per_step, profile.kernel_milliseconds)
        });
        let memory = speed.peak_memory.map_or(String::new(), |bytes| format!("{:.2}", bytes as f64 / 1e9));
        let forecast =
            speed.peak_memory.map_or(String::new(), |_| format!("{:.2}", speed.forecast_memory / 1e9));
        writeln!(
            text,
            " {:.0} | {:.0} | {of_rate} | {of_vanilla} | {kernels} | {memory} | {forecast} |",
            speed.sequences_per_second, speed.tokens_per_second
        )
    }
}

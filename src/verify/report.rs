//! What was found, as JSON and as Markdown.

use std::fmt::Write;

use serde::ser::{Serialize, SerializeMap, Serializer};

use super::peer::PeerRow;
use super::{Check, FisherTimes, Outcome, SpeedRow};

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
    /// All measured trainings.
    pub speeds: Vec<SpeedRow>,
    /// The Fisher pass, or why it was not measured.
    #[serde(serialize_with = "measured")]
    pub fisher: Result<FisherTimes, String>,
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
        writeln!(
            text,
            "| workload | batch | precision | method | sequences/s | tokens/s | of vanilla | kernels a step | memory, GB |"
        )?;
        writeln!(text, "|---|---:|---|---|---:|---:|---:|---:|---:|")?;
        for row in &self.speeds {
            self.write_speed(text, row)?;
        }
        if let Some(Ok(speed)) = self.speeds.first().filter(|_| !self.quick).map(|row| &row.outcome) {
            let reached = speed.sequences_per_second >= BAR;
            let word = if reached { "reached" } else { "missed" };
            writeln!(text, "\nThe bar of the first row, {BAR} sequences/s on one H100, is {word}.")?;
        }
        writeln!(text, "\n## Fisher information\n")?;
        match &self.fisher {
            Ok(times) => writeln!(
                text,
                "{}, {} examples: exact, one pass a batch {:.2} s; a plain epoch {:.2} s ({:.2} of it); one example at a \
                 time {:.2} s ({:.1} times as long as the exact pass).",
                times.workload,
                times.examples,
                times.exact,
                times.epoch,
                times.exact / times.epoch,
                times.one_by_one,
                times.one_by_one / times.exact
            )?,
            Err(reason) => writeln!(text, "Not measured: {reason}.")?,
        }
        writeln!(text, "\n## The Python peer: transformers, BERT-base, lengths of RTE, batch 16\n")?;
        writeln!(text, "| precision | method | tokens/s |\n|---|---|---:|")?;
        for row in &self.peer {
            let speed = row.outcome.as_ref().map(|speed| format!("{speed:.0}"));
            let cell = speed.unwrap_or_else(|reason| format!("not run: {reason}"));
            writeln!(text, "| {} | {} | {cell} |", row.precision, row.method)?;
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
            let reason = check.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
            let (topic, name, allowed) = (&check.topic, &check.name, check.allowed);
            writeln!(text, "| {topic} | {name} | {measured} | {allowed:.0e} | {word}{reason} |")?;
        }
        Ok(())
    }

    fn write_speed(&self, text: &mut String, row: &SpeedRow) -> std::fmt::Result {
        let SpeedRow { workload, batch_size, method, precision, .. } = row;
        let how = if row.replayed { ", replayed" } else { "" };
        write!(text, "| {workload} | {batch_size} | {precision} | {method}{how} |")?;
        let speed = match &row.outcome {
            Ok(speed) => speed,
            Err(reason) => return writeln!(text, " not measured: {reason} | | | | |"),
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
        let kernels = row.profile.as_ref().map(|profile| profile.kernels_per_step.to_string());
        let kernels = kernels.unwrap_or_default();
        let memory = speed.peak_memory.map_or(String::new(), |bytes| format!("{:.2}", bytes as f64 / 1e9));
        writeln!(
            text,
            " {:.0} | {:.0} | {of_vanilla} | {} | {memory} |",
            speed.sequences_per_second, speed.tokens_per_second, kernels
        )
    }
}

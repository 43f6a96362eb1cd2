//! Progress: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use child_tuning::data::FetchEvent;
use child_tuning::experiment::RunEvent;
use child_tuning::experiment::results::{Row, Status};
use child_tuning::train::{Event, Progress};
use indicatif::{BinaryBytes, HumanDuration, ProgressBar, ProgressStyle};

/// How often a transfer reports where there is no bar.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Shows what a runner reports, on standard error.
pub struct Display {
    bar: Option<ProgressBar>,
    place: String,
}

impl Display {
    /// Makes a display that fits what standard error is.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} [{elapsed} < {eta}]");
            let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { bar, place: String::new() }
    }

    /// Shows one event.
    pub fn show(&mut self, event: RunEvent) {
        match event {
            RunEvent::Note(text) => self.line(&format!("note: {text}")),
            RunEvent::Skipped(Progress { done, total }) => {
                self.line(&format!("{done} of {total} runs are in the results already"));
            }
            RunEvent::Started(number, total, run) => {
                self.place = format!("[{number}/{total}] {}", run.label());
                match &self.bar {
                    Some(bar) => {
                        bar.set_prefix(self.place.clone());
                        bar.set_message("");
                        bar.reset();
                    }
                    None => eprintln!("{}: {} steps", self.place, run.total_steps()),
                }
            }
            RunEvent::Progress(event) => self.progress(event),
            RunEvent::Finished(rows) => self.line(&format!("{}: {}", self.place, outcome(rows))),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn progress(&self, event: Event) {
        let (progress, message) = match event {
            Event::Encoded(progress) => (progress, "examples through the frozen encoder".to_owned()),
            Event::Prepared(progress) => (progress, "examples for the mask".to_owned()),
            Event::Step { progress, loss } => (progress, format!("steps, loss {loss:.4}")),
            Event::Evaluated(progress) => (progress, "examples scored".to_owned()),
            Event::MicroBatch(examples) => {
                let place = &self.place;
                self.line(&format!(
                    "note: {place}: out of memory; passes of at most {examples} examples from here on"
                ));
                return;
            }
            Event::Epoch { .. } if self.bar.is_none() => return,
            Event::Epoch { epoch, headline } => {
                self.line(&format!("{}: epoch {epoch}: {headline:.4}", self.place));
                return;
            }
        };
        let Some(bar) = &self.bar else { return };
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(message);
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

/// Puts a finished run in a few words.
fn outcome(rows: &[Row]) -> String {
    let Some(first) = rows.first() else { return "nothing was scored".into() };
    if first.status != Status::Ok {
        let status = if first.status == Status::Diverged { "diverged" } else { "failed" };
        return format!("{status}: {}", first.reason.as_deref().unwrap_or("no reason recorded"));
    }
    let seconds = [first.prepare_seconds, first.train_seconds].into_iter().flatten().sum::<f64>()
        + rows.iter().filter_map(|row| row.evaluate_seconds).sum::<f64>();
    let score = |row: &Row| {
        let score = row.score.filter(|score| score.is_finite());
        let score = score.map_or("undefined".to_owned(), |score| format!("{:.2}", 100.0 * score));
        let degenerate = if row.degenerate == Some(true) { ", predicts one class only" } else { "" };
        let place = if rows.len() > 1 { format!("{} ", row.evaluated_on) } else { String::new() };
        format!("{place}{} {score}{degenerate}", row.headline)
    };
    format!("{} ({seconds:.1} s)", rows.iter().map(score).collect::<Vec<_>>().join(", "))
}

/// Shows what a transfer reports, on standard error.
pub struct TransferDisplay {
    bar: Option<ProgressBar>,
    name: String,
    bytes: u64,
    /// How much was there when the transfer started, and when that was.
    start: (u64, Instant),
    last_line: Instant,
}

impl TransferDisplay {
    /// Makes a display that fits what standard error is.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template(
                "{prefix} {bar:24} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec} [{elapsed} < {eta}]",
            );
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, name: String::new(), bytes: 0, start: (0, Instant::now()), last_line: Instant::now() }
    }

    /// Shows one event.
    pub fn show(&mut self, event: FetchEvent) {
        match event {
            FetchEvent::Started { url, start, bytes } => {
                let path = url.split('?').next().unwrap_or(url);
                self.name = path.rsplit('/').next().unwrap_or(path).to_owned();
                (self.bytes, self.start, self.last_line) = (bytes, (start, Instant::now()), Instant::now());
                let there = match start {
                    0 => String::new(),
                    start => format!(", {} are there already", BinaryBytes(start)),
                };
                self.line(&format!("{url}: {}{there}", BinaryBytes(bytes)));
                if let Some(bar) = &self.bar {
                    bar.set_prefix(self.name.clone());
                    bar.reset();
                    bar.set_length(bytes);
                    bar.set_position(start);
                    bar.reset_eta();
                }
            }
            FetchEvent::Received(done) => self.received(done),
            FetchEvent::Waiting { reason, pause } => {
                self.line(&format!("{reason}; trying again in {} s", pause.as_secs()));
            }
            FetchEvent::Unpacking => self.line("unpacking"),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn received(&mut self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        } else if done == self.bytes || self.last_line.elapsed() >= BETWEEN_LINES {
            self.last_line = Instant::now();
            let (start, since) = self.start;
            let speed = (done - start) as f64 / since.elapsed().as_secs_f64().max(1e-3);
            let left = match self.bytes - done {
                0 => String::new(),
                left => {
                    format!(", {} left", HumanDuration(Duration::from_secs_f64(left as f64 / speed.max(1.0))))
                }
            };
            let share = 100.0 * done as f64 / self.bytes as f64;
            eprintln!("{}: {share:.0} %, {}/s{left}", self.name, BinaryBytes(speed as u64));
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

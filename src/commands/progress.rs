//! Progress: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use child_tuning::experiment::results::{Row, Status};
use child_tuning::experiment::{RunEvent, Turn};
use child_tuning::train::Event;
use child_tuning::transfer::TransferEvent;
use indicatif::{BinaryBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};

use super::tell;

/// How often a transfer reports where there is no bar.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

/// Shows what happens to the runs of an experiment, on standard error: on a terminal a bar for each worker and below them
/// one for the whole, elsewhere a line as a run starts or ends.
pub struct Display {
    bars: Option<Bars>,
    /// What each worker is at, by its number.
    places: Vec<Place>,
}

#[derive(Default)]
struct Place {
    /// The run in a few words.
    run: String,
    /// Its optimizer steps: all, and those that are done.
    steps: (u64, u64),
    bar: Option<ProgressBar>,
}

struct Bars {
    all: MultiProgress,
    whole: ProgressBar,
    /// Runs that have ended, and those there are; optimizer steps of those that have ended.
    runs: (usize, usize),
    steps: u64,
}

impl Display {
    /// Makes a display that fits what standard error is.
    pub fn new() -> Self {
        let bars = std::io::stderr().is_terminal().then(|| {
            let all = MultiProgress::new();
            let whole = all.add(bar("{msg} {bar:24} [{elapsed} < {eta}]"));
            Bars { all, whole, runs: (0, 0), steps: 0 }
        });
        Self { bars, places: Vec::new() }
    }

    /// Shows one event.
    pub fn show(&mut self, event: RunEvent) {
        match event {
            RunEvent::Note(text) => self.line(&format!("note: {text}")),
            RunEvent::Queued { there, total, steps } => {
                if there > 0 {
                    self.line(&format!("{there} of {total} runs are in the results already"));
                }
                if let Some(bars) = &mut self.bars {
                    (bars.runs, bars.steps) = ((there, total), 0);
                    bars.whole.reset();
                    bars.whole.set_length(steps);
                    bars.whole.set_message(format!("{there}/{total} runs"));
                }
            }
            RunEvent::Started { worker, turn } => {
                let Turn { number, total, run } = turn;
                let name = format!("[{number}/{total}] {}", run.label());
                if self.bars.is_none() {
                    tell(format_args!("{name}: {} steps", run.total_steps()));
                }
                let bars = &self.bars;
                let place = place(&mut self.places, worker);
                (place.run, place.steps) = (name, (run.total_steps(), 0));
                if let Some(bars) = bars {
                    let own = || {
                        bars.all.insert_before(
                            &bars.whole,
                            bar("{prefix} {bar:24} {pos}/{len} {msg} [{elapsed}]"),
                        )
                    };
                    let bar = place.bar.get_or_insert_with(own);
                    bar.set_prefix(place.run.clone());
                    bar.set_message("");
                    bar.reset();
                    bar.set_length(run.total_steps());
                }
            }
            RunEvent::Progress { worker, event } => self.progress(worker, event),
            RunEvent::Finished { worker, rows } => {
                let place = place(&mut self.places, worker);
                let line = format!("{}: {}", place.run, outcome(rows));
                let (steps, _) = std::mem::take(&mut place.steps);
                if let Some(bar) = place.bar.take() {
                    bar.finish_and_clear();
                }
                if let Some(bars) = &mut self.bars {
                    bars.runs.0 += 1;
                    bars.steps += steps;
                    bars.whole.set_message(format!("{}/{} runs", bars.runs.0, bars.runs.1));
                }
                self.show_whole();
                self.line(&line);
            }
        }
    }

    /// Removes the bars.
    pub fn finish(&self) {
        if let Some(bars) = &self.bars {
            self.places.iter().filter_map(|place| place.bar.as_ref()).for_each(ProgressBar::finish_and_clear);
            bars.whole.finish_and_clear();
        }
    }

    fn progress(&mut self, worker: usize, event: Event) {
        let place = place(&mut self.places, worker);
        let (progress, message) = match event {
            Event::Encoded(progress) => (progress, "examples through the frozen encoder".to_owned()),
            Event::Prepared(progress) => (progress, "examples for the mask".to_owned()),
            Event::FirstTraining(progress) => (progress, "steps of the first training".to_owned()),
            Event::Step { progress, loss } => {
                place.steps.1 = progress.done;
                (progress, format!("steps, loss {loss:.4}"))
            }
            Event::Evaluated(progress) => (progress, "examples scored".to_owned()),
            Event::MicroBatch(examples) => {
                let run = &place.run;
                let line =
                    format!("note: {run}: out of memory; passes of at most {examples} examples from here on");
                self.line(&line);
                return;
            }
            Event::Epoch { epoch, headline } => {
                if self.bars.is_some() {
                    let line = format!("{}: epoch {epoch}: {headline:.4}", place.run);
                    self.line(&line);
                }
                return;
            }
        };
        if let Some(bar) = &place.bar {
            bar.set_length(progress.total);
            bar.set_position(progress.done);
            bar.set_message(message);
            self.show_whole();
        }
    }

    /// Moves the bar of the whole to the steps that have been taken.
    fn show_whole(&self) {
        if let Some(bars) = &self.bars {
            let under_way: u64 = self.places.iter().map(|place| place.steps.1).sum();
            bars.whole.set_position(bars.steps + under_way);
        }
    }

    fn line(&self, text: &str) {
        match &self.bars {
            // Fails where the terminal is gone, and then nobody reads the line.
            Some(bars) => drop(bars.all.println(text)),
            None => tell(format_args!("{text}")),
        }
    }
}

fn place(places: &mut Vec<Place>, worker: usize) -> &mut Place {
    if places.len() <= worker {
        places.resize_with(worker + 1, Place::default);
    }
    &mut places[worker]
}

fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
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
        let has_classes = row.accuracy.or(row.f1).or(row.matthews).is_some();
        let degenerate = match (row.degenerate, has_classes) {
            (Some(true), true) => ", predicts one class only",
            (Some(true), false) => ", predicts nearly one value only",
            _ => "",
        };
        let of_task = rows.iter().filter(|other| other.evaluated_on == row.evaluated_on);
        let place = match (rows.len(), of_task.count()) {
            (1, _) => String::new(),
            (_, 1) => format!("{} ", row.evaluated_on),
            _ => format!("{} {} ", row.evaluated_on, row.split),
        };
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
    pub fn show(&mut self, event: TransferEvent) {
        match event {
            TransferEvent::Started { url, start, bytes } => {
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
            TransferEvent::Received(done) => self.received(done),
            TransferEvent::Waiting { reason, pause } => {
                self.line(&format!("{reason}; trying again in {} s", pause.as_secs()));
            }
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
            tell(format_args!("{}: {share:.0} %, {}/s{left}", self.name, BinaryBytes(speed as u64)));
        }
    }

    /// Shows a line.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => tell(format_args!("{text}")),
        }
    }
}

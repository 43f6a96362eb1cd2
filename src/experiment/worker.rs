//! A worker: a process that trains the runs that its parent names, and tells what happens.
//!
//! Both directions are JSON lines. On standard input come [`Order`]s; when it ends, so does the worker, between two
//! batches if it is training: then its parent is gone or has been stopped. On standard output go [`Message`]s.

use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::Device;

use super::plan::Plan;
use super::queue::Turn;
use super::results::{ResultsFile, from_text, to_text};
use super::runner::{Attempt, RunEvent, Runner};
use crate::error::{Error, Result};
use crate::locking::locked;
use crate::train::Event;

/// How often a worker reports progress at most; a tiny model takes thousands of steps a second.
const BETWEEN_REPORTS: Duration = Duration::from_millis(100);

/// A run to train.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// The number of its plan.
    pub plan: usize,
    /// Its id.
    pub run: String,
}

/// What a worker tells its parent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    /// A sentence for the user.
    Note(String),
    /// The run that was ordered starts.
    Started,
    /// Something happened within it.
    Progress(Event),
    /// It ended; these are its rows, as text.
    Ended(String),
    /// The results had it already.
    There,
    /// Another process is at work on it, or on what it starts from.
    Elsewhere,
    /// Training was stopped; the worker ends.
    Interrupted,
    /// The grid cannot go on; the worker ends.
    Failed(Fault),
}

/// An error as it goes from process to process: its exit code and its text.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Fault {
    code: u8,
    text: String,
}

impl From<&Error> for Fault {
    fn from(error: &Error) -> Self {
        let text = match error {
            Error::Libtorch(text) => text.clone(),
            other => other.to_string(),
        };
        Self { code: error.exit_code(), text }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault.code {
            2 => Error::Configuration(fault.text),
            3 => Error::Environment(fault.text),
            _ => Error::Libtorch(fault.text),
        }
    }
}

impl TryFrom<Attempt> for Message {
    type Error = Error;

    fn try_from(attempt: Attempt) -> Result<Self> {
        Ok(match attempt {
            Attempt::Ended(rows) => Message::Ended(to_text(&rows)?),
            Attempt::There => Message::There,
            Attempt::Elsewhere => Message::Elsewhere,
            Attempt::Interrupted | Attempt::Lost => Message::Interrupted,
        })
    }
}

impl Message {
    /// Returns what became of the run, if this tells it.
    pub fn attempt(&self) -> Result<Option<Attempt>> {
        Ok(Some(match self {
            Message::Ended(rows) => Attempt::Ended(from_text(rows)?),
            Message::There => Attempt::There,
            Message::Elsewhere => Attempt::Elsewhere,
            Message::Interrupted => Attempt::Interrupted,
            Message::Note(_) | Message::Started | Message::Progress(_) | Message::Failed(_) => {
                return Ok(None);
            }
        }))
    }
}

/// Trains the runs of some plans that `input` names, one after the other, and writes to `output` what happens.
///
/// # Errors
/// Returns, and tells the parent, what kept the plans or a run from being used; [`Error::Interrupted`] if a run was stopped.
pub fn serve(
    plans: Result<Vec<Plan>>,
    device: Device,
    interrupted: &Arc<AtomicBool>,
    input: impl BufRead + Send + 'static,
    output: impl Write,
) -> Result<()> {
    let output = Mutex::new(output);
    let tell = |message: &Message| {
        let Ok(line) = serde_json::to_string(message) else { return };
        let mut output = locked(&output);
        // Where nobody reads any more, the input ends too, which stops the worker.
        let _ = writeln!(output, "{line}").and_then(|()| output.flush());
    };
    let served =
        plans.and_then(|plans| train_ordered(&plans, device, interrupted, orders(input, interrupted), &tell));
    match &served {
        Ok(()) => {}
        Err(Error::Interrupted) => tell(&Message::Interrupted),
        Err(error) => tell(&Message::Failed(error.into())),
    }
    served
}

/// Reads orders in the background, so that the end of the input stops a run that is being trained.
fn orders(input: impl BufRead + Send + 'static, interrupted: &Arc<AtomicBool>) -> mpsc::Receiver<Order> {
    let (sender, receiver) = mpsc::channel();
    let interrupted = interrupted.clone();
    std::thread::spawn(move || {
        let orders = input.lines().map_while(|line| serde_json::from_str(&line.ok()?).ok());
        for order in orders {
            if sender.send(order).is_err() {
                break;
            }
        }
        interrupted.store(true, Ordering::Relaxed);
    });
    receiver
}

fn train_ordered(
    plans: &[Plan],
    device: Device,
    interrupted: &AtomicBool,
    orders: mpsc::Receiver<Order>,
    tell: &dyn Fn(&Message),
) -> Result<()> {
    let mut last_report = Instant::now();
    let mut report = |event: RunEvent| match event {
        RunEvent::Note(text) => tell(&Message::Note(text)),
        RunEvent::Started { .. } => tell(&Message::Started),
        RunEvent::Progress { event, .. } => {
            if matches!(event, Event::Epoch { .. } | Event::MicroBatch(_))
                || last_report.elapsed() >= BETWEEN_REPORTS
            {
                last_report = Instant::now();
                tell(&Message::Progress(event));
            }
        }
        // Told by the parent, who has the queue and is told the rows.
        RunEvent::Queued { .. } | RunEvent::Finished { .. } => {}
    };
    let mut next = orders.recv().ok();
    while let Some(number) = next.as_ref().map(|order| order.plan) {
        let unknown = || Error::Environment("the experiment changed while it ran; start it again".into());
        let plan = plans.get(number).ok_or_else(unknown)?;
        let results = ResultsFile::open(&plan.results)?;
        let mut runner = Runner::new(plan, device, interrupted, &mut report);
        while let Some(order) = next.take_if(|order| order.plan == number) {
            let run = plan.all_runs().find(|run| run.id == order.run).ok_or_else(unknown)?.clone();
            // Place and number of runs are the parent's business.
            let attempt = runner.attempt(&Turn { number: 0, total: 0, run }, &results)?;
            if matches!(attempt, Attempt::Interrupted) {
                return Err(Error::Interrupted);
            }
            tell(&attempt.try_into()?);
            next = orders.recv().ok();
        }
    }
    Ok(())
}

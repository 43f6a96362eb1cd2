//! Several worker processes at one plan: they are started, fed with runs, watched, and replaced where it makes sense.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, SystemTime};

use tch::Device;

use super::execution::Executor;
use super::plan::Plan;
use super::queue::Turn;
use super::results::{ResultsFile, Status};
use super::run::Run;
use super::runner::{Attempt, RunEvent, Runner, rows_without_scores};
use super::worker::{Message, Order};
use crate::error::{Error, Result};

/// How long a stop may go unnoticed while no worker has anything to tell.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
/// How often a run is tried whose process is killed each time.
const TRIES: usize = 2;

/// The worker processes of a `run`; they serve all its experiments.
pub struct WorkerPool {
    /// The device of each worker; a pool has no more workers than these.
    devices: Vec<Device>,
    command: Box<dyn Fn(Device) -> Command>,
    workers: Vec<Worker>,
    sender: Sender<(usize, Heard)>,
    heard: Receiver<(usize, Heard)>,
}

/// What is heard from a worker.
enum Heard {
    Message(Message),
    /// A line that is none: of a library that writes to standard output.
    Text(String),
    /// The process has ended, or is about to.
    End,
}

struct Worker {
    process: Child,
    /// Gone once the worker is to end, or has ended.
    orders: Option<ChildStdin>,
    device: Device,
    turn: Option<Turn>,
}

impl WorkerPool {
    /// Makes a pool of at most one worker for each of `devices`, which may name one several times. `command` makes the
    /// command that starts a worker ([`serve`](super::serve)) on a device.
    pub fn new(devices: Vec<Device>, command: impl Fn(Device) -> Command + 'static) -> Self {
        let (sender, heard) = channel();
        Self { devices, command: Box::new(command), workers: Vec::new(), sender, heard }
    }

    /// Returns the executor of one of the plans that the workers know by this number.
    pub fn for_plan<'a>(
        &'a mut self,
        plan: &'a Plan,
        number: usize,
        interrupted: &'a AtomicBool,
        report: &'a mut dyn FnMut(RunEvent),
    ) -> impl Executor + 'a {
        PoolExecutor { pool: self, plan, number, interrupted, report, killed: HashMap::new() }
    }

    /// Starts a worker on a device.
    fn spawn(&mut self, device: Device) -> Result<()> {
        let number = self.workers.len();
        let failed =
            |error: std::io::Error| Error::Environment(format!("cannot start a worker process: {error}"));
        let mut command = (self.command)(device);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (orders, output) = (process.stdin.take(), process.stdout.take());
        let sender = self.sender.clone();
        std::thread::spawn(move || {
            for line in
                output.into_iter().flat_map(|output| BufReader::new(output).lines().map_while(Result::ok))
            {
                let heard = serde_json::from_str(&line).map_or(Heard::Text(line), Heard::Message);
                let _ = sender.send((number, heard));
            }
            let _ = sender.send((number, Heard::End));
        });
        self.workers.push(Worker { process, orders, device, turn: None });
        Ok(())
    }

    /// Starts workers until as many live as are asked for, or as the pool may have; each device gets its share.
    fn grow(&mut self, wanted: usize) -> Result<()> {
        let mut free = self.devices.clone();
        for worker in self.workers.iter().filter(|worker| worker.orders.is_some()) {
            if let Some(place) = free.iter().position(|device| *device == worker.device) {
                free.remove(place);
            }
        }
        let living = self.devices.len() - free.len();
        for device in free.into_iter().take(wanted.saturating_sub(living)) {
            self.spawn(device)?;
        }
        Ok(())
    }

    fn idle(&mut self) -> Option<&mut Worker> {
        self.workers.iter_mut().find(|worker| worker.orders.is_some() && worker.turn.is_none())
    }

    /// Tells all workers to end; one that trains does so between two batches.
    fn stop(&mut self) {
        self.workers.iter_mut().for_each(|worker| worker.orders = None);
    }
}

impl Drop for WorkerPool {
    /// Ends all workers and waits for them.
    fn drop(&mut self) {
        self.stop();
        for worker in &mut self.workers {
            // Whatever it ended with has been told already.
            let _ = worker.process.wait();
        }
    }
}

/// The workers at one plan.
struct PoolExecutor<'a> {
    pool: &'a mut WorkerPool,
    plan: &'a Plan,
    number: usize,
    interrupted: &'a AtomicBool,
    report: &'a mut dyn FnMut(RunEvent),
    /// How often the process that trained a run was killed.
    killed: HashMap<String, usize>,
}

impl PoolExecutor<'_> {
    /// Deals with the end of a worker. Returns what became of its run, if it had one.
    fn end(&mut self, number: usize, results: &ResultsFile) -> Result<Option<(Turn, Attempt)>> {
        let worker = &mut self.pool.workers[number];
        worker.orders = None;
        let status =
            worker.process.wait().map_err(|error| Error::Environment(format!("cannot wait: {error}")))?;
        let (turn, device) = (worker.turn.take(), worker.device);
        // A worker that the user stopped himself is as good as the whole grid stopped.
        if status.code() == Some(130) {
            self.interrupted.store(true, Ordering::Relaxed);
        }
        let Some(turn) = turn else {
            if !status.success() && !self.interrupted.load(Ordering::Relaxed) {
                self.note(format!("worker {} ended ({status}) while it had nothing to do", number + 1));
            }
            return Ok(None);
        };
        if self.interrupted.load(Ordering::Relaxed) {
            return Ok(Some((turn, Attempt::Interrupted)));
        }
        let tries = self.killed.entry(turn.run.id.clone()).or_default();
        *tries += 1;
        let last = *tries == TRIES;
        let then = if last { "it is given up" } else { "it is tried once more" };
        self.note(format!(
            "worker {} ended ({status}) while it trained {}; {then}",
            number + 1,
            turn.run.label()
        ));
        // Where memory is short, fewer workers do better; a device without any is of no use.
        let is_on_it = |other: &Worker| other.device == device && other.orders.is_some();
        if !self.pool.workers.iter().any(is_on_it) {
            self.pool.spawn(device)?;
        }
        if !last {
            return Ok(Some((turn, Attempt::Lost)));
        }
        let reason = format!("the process that trained it ended {TRIES} times, at last with {status}");
        let outcome = (Status::Failed, reason.as_str());
        let rows = rows_without_scores(self.plan, &turn.run, device, outcome, SystemTime::now());
        results.append(&rows)?;
        (self.report)(RunEvent::Finished { worker: number, rows: &rows });
        Ok(Some((turn, Attempt::Ended(rows))))
    }

    fn note(&mut self, text: String) {
        (self.report)(RunEvent::Note(text));
    }
}

impl Executor for PoolExecutor<'_> {
    fn report(&mut self, event: RunEvent) {
        (self.report)(event);
    }

    /// Starts the workers, and checks the models in the memory of this process while they get ready.
    fn prepare(&mut self, missing: &[&Arc<Run>]) -> Result<()> {
        self.pool.grow(missing.len())?;
        let report = &mut *self.report;
        Runner::new(self.plan, Device::Cpu, self.interrupted, report).check_models(missing.iter().copied())
    }

    fn has_room(&self) -> bool {
        // Without any worker left, starting a run says what is wrong.
        let mut living = self.pool.workers.iter().filter(|worker| worker.orders.is_some()).peekable();
        living.peek().is_none() || living.any(|worker| worker.turn.is_none())
    }

    fn start(&mut self, turn: Turn) -> Result<()> {
        let order = Order { plan: self.number, run: turn.run.id.clone() };
        let line = serde_json::to_string(&order).map_err(|error| Error::Environment(error.to_string()))?;
        let worker = self.pool.idle().ok_or_else(|| {
            Error::Environment("all worker processes have ended; run the same command again to resume".into())
        })?;
        worker.turn = Some(turn);
        if let Some(orders) = &mut worker.orders {
            // A worker that no longer reads is one whose end is heard next.
            let _ = writeln!(orders, "{line}");
        }
        Ok(())
    }

    fn wait(&mut self, results: &ResultsFile) -> Result<Option<(Turn, Attempt)>> {
        while self.pool.workers.iter().any(|worker| worker.turn.is_some()) {
            if self.interrupted.load(Ordering::Relaxed) {
                self.pool.stop();
            }
            let (number, heard) = match self.pool.heard.recv_timeout(BETWEEN_LOOKS) {
                Ok(heard) => heard,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let message = match heard {
                Heard::Message(message) => message,
                Heard::Text(text) => {
                    self.note(format!("worker {}: {text}", number + 1));
                    continue;
                }
                Heard::End => match self.end(number, results)? {
                    Some(ended) => return Ok(Some(ended)),
                    None => continue,
                },
            };
            let worker = &mut self.pool.workers[number];
            if let Some(attempt) = message.attempt()? {
                let Some(turn) = worker.turn.take() else { continue };
                match &attempt {
                    Attempt::Ended(rows) => (self.report)(RunEvent::Finished { worker: number, rows }),
                    Attempt::Interrupted => self.interrupted.store(true, Ordering::Relaxed),
                    _ => {}
                }
                return Ok(Some((turn, attempt)));
            }
            match (message, &worker.turn) {
                (Message::Started, Some(turn)) => (self.report)(RunEvent::Started { worker: number, turn }),
                (Message::Progress(event), _) => (self.report)(RunEvent::Progress { worker: number, event }),
                (Message::Note(text), _) => self.note(text),
                (Message::Failed(fault), _) => return Err(fault.into()),
                _ => {}
            }
        }
        Ok(None)
    }
}

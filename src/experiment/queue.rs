//! Which run of a plan comes next: what is missing, in the plan's order, sources before what starts from them.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::results::Recorded;
use super::run::Run;

/// A run whose turn it is.
#[derive(Clone)]
pub struct Turn {
    /// Its number among the runs of the plan, from 1.
    pub number: usize,
    /// The number of runs of the plan.
    pub total: usize,
    /// The run.
    pub run: Arc<Run>,
}

/// The runs of a plan that are not done, and who waits for whom.
pub(super) struct Queue {
    turns: Vec<Turn>,
    /// Runs nobody has started, by place, so that the first of the plan comes first.
    waiting: BTreeSet<usize>,
    running: BTreeSet<usize>,
    /// Runs that somebody else was at work on when they were tried.
    elsewhere: BTreeSet<usize>,
    places: HashMap<String, usize>,
    there: usize,
}

impl Queue {
    /// Makes the queue of those runs that the results do not have yet.
    pub fn new(runs: &[Arc<Run>], recorded: &Recorded) -> Self {
        let total = runs.len();
        let turn = |(place, run): (usize, &Arc<Run>)| Turn { number: place + 1, total, run: run.clone() };
        let waiting: BTreeSet<usize> =
            (0..total).filter(|&place| !recorded.has(&runs[place].id, runs[place].rows())).collect();
        Self {
            turns: runs.iter().enumerate().map(turn).collect(),
            there: total - waiting.len(),
            waiting,
            running: BTreeSet::new(),
            elsewhere: BTreeSet::new(),
            places: runs.iter().enumerate().map(|(place, run)| (run.id.clone(), place)).collect(),
        }
    }

    /// Returns how many runs the results had when the queue was made.
    pub fn there(&self) -> usize {
        self.there
    }

    /// Returns the number of all runs, those that are there included.
    pub fn total(&self) -> usize {
        self.turns.len()
    }

    /// Returns the runs that wait for their turn.
    pub fn waiting(&self) -> impl Iterator<Item = &Arc<Run>> {
        self.waiting.iter().map(|&place| &self.turns[place].run)
    }

    /// Returns how many runs are left to somebody else.
    pub fn elsewhere(&self) -> usize {
        self.elsewhere.len()
    }

    /// Takes the next run that can start: the first whose source nobody has yet to train.
    pub fn take_next(&mut self) -> Option<Turn> {
        let open = |place: &usize| self.waiting.contains(place) || self.running.contains(place);
        let ready = |place: &&usize| {
            let source = self.turns[**place].run.source_run();
            !source.and_then(|source| self.places.get(&source.id)).is_some_and(open)
        };
        let place = *self.waiting.iter().find(ready)?;
        self.waiting.remove(&place);
        self.running.insert(place);
        Some(self.turns[place].clone())
    }

    /// Takes note that a run ended, well or not. What somebody else had is tried again: that may have ended too.
    pub fn ended(&mut self, turn: &Turn) {
        self.running.remove(&(turn.number - 1));
        self.waiting.append(&mut self.elsewhere);
    }

    /// Takes note that somebody else is at work on a run, or on what it starts from.
    pub fn is_elsewhere(&mut self, turn: &Turn) {
        self.running.remove(&(turn.number - 1));
        self.elsewhere.insert(turn.number - 1);
    }

    /// Puts a run back that was not finished.
    pub fn put_back(&mut self, turn: &Turn) {
        self.running.remove(&(turn.number - 1));
        self.waiting.insert(turn.number - 1);
    }
}

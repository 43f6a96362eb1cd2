//! What of the flat buffers trains, and how.

use std::ops::Range;

use super::parameter::Parameter;
use super::params::ALIGNMENT;

/// The parameters that a run trains, as ranges of the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct Trainable {
    /// Ranges without a gap between two parameters, each of one treatment, in order.
    pub groups: Vec<TrainableGroup>,
    /// The same ranges, joined wherever one begins at the end of another.
    pub spans: Vec<Range<usize>>,
    /// Number of weights.
    pub count: usize,
    /// Ranges of them whose gradients are always zero, in order and in multiples of 64; none unless
    /// [`Trainable::note_rows`] has found some.
    pub idle: Vec<Range<usize>>,
}

/// Returns what of a range is not idle, from the range's start on.
pub fn busy(range: &Range<usize>, idle: &[Range<usize>]) -> Vec<Range<usize>> {
    let first = idle.partition_point(|idle| idle.end <= range.start);
    let mut busy = Vec::new();
    let mut start = range.start;
    for idle in idle[first..].iter().take_while(|idle| idle.start < range.end) {
        busy.push(start..idle.start);
        start = idle.end;
    }
    busy.push(start..range.end);
    let parts = busy.into_iter().filter(|part| part.start < part.end);
    parts.map(|part| part.start - range.start..part.end - range.start).collect()
}

impl Trainable {
    /// Returns whether a parameter is among those that train.
    pub fn holds(&self, parameter: &Parameter) -> bool {
        self.treatment(parameter).is_some()
    }

    /// Returns how a parameter is treated, if it trains.
    pub fn treatment(&self, parameter: &Parameter) -> Option<Treatment> {
        let own = &parameter.range;
        let holds = |group: &&TrainableGroup| group.range.start <= own.start && own.end <= group.range.end;
        self.groups.iter().find(holds).map(|group| group.treatment)
    }

    /// Notes that of the rows of the one table of words only the given ones ever have a gradient.
    pub fn note_rows(&mut self, table: &Parameter, rows: &[usize]) {
        let entries = table.shape.first().map_or(0, |&entries| entries as usize);
        if !self.holds(table) || entries == 0 {
            return;
        }
        let width = table.count() / entries;
        let mut has_gradient = vec![false; entries];
        rows.iter().filter(|&&row| row < entries).for_each(|&row| has_gradient[row] = true);
        let mut start = 0;
        self.idle.clear();
        for rows in has_gradient.chunk_by(|one, next| one == next) {
            let end = start + rows.len();
            let range = (table.range.start + start * width).next_multiple_of(ALIGNMENT)
                ..(table.range.start + end * width) / ALIGNMENT * ALIGNMENT;
            if !rows[0] && range.start < range.end {
                self.idle.push(range);
            }
            start = end;
        }
    }

    /// Returns the parameters that train one by one, without the gaps behind them, in the order of the flat buffers.
    pub fn one_by_one<'a>(&self, parameters: impl Iterator<Item = &'a Parameter>) -> Vec<TrainableGroup> {
        let group = |parameter: &Parameter| {
            let treatment = self.treatment(parameter)?;
            Some(TrainableGroup { range: parameter.range.clone(), treatment })
        };
        let mut groups: Vec<TrainableGroup> = parameters.filter_map(group).collect();
        groups.sort_by_key(|group| group.range.start);
        groups
    }
}

/// Parameters side by side that the optimizer treats alike.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainableGroup {
    /// Their elements.
    pub range: Range<usize>,
    /// How they are treated.
    pub treatment: Treatment,
}

/// How the optimizer treats a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Treatment {
    /// Factor on the learning rate.
    pub rate: f64,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Whether there are values that training started from and may be held near to; a new head has none.
    pub pretrained: bool,
}

impl Treatment {
    /// Returns how plain fine-tuning treats a parameter.
    pub fn plain(parameter: &Parameter) -> Self {
        Self { rate: 1.0, decays: parameter.decays(), pretrained: true }
    }
}

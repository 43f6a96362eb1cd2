//! What runs took: time, memory and weights.

use crate::experiment::device_kind;
use crate::experiment::results::{Row, Status};
use crate::statistics::median;

/// What the runs of a group took. Numbers are medians over the runs that ended well, and nothing where none says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Forward passes over each example of an optimizer step.
    pub passes_per_step: Option<f64>,
    /// Weights that the optimizer may change.
    pub trainable_parameters: Option<f64>,
    /// Child network as a share of the weights in the mask's scope.
    pub child_share: Option<f64>,
    /// Optimizer state and what the method keeps besides, in MiB.
    pub state_mb: Option<f64>,
    /// Most memory held, in MiB.
    pub peak_memory_mb: Option<f64>,
    /// Seconds before training, such as those of the Fisher information.
    pub prepare_seconds: Option<f64>,
    /// Seconds of training.
    pub train_seconds: Option<f64>,
    /// Seconds of both.
    pub seconds: Option<f64>,
    /// The kinds of devices, each once: their names without the numbers.
    pub devices: Vec<String>,
}

impl Cost {
    /// Sums up the rows of a group.
    pub fn of(rows: &[&Row]) -> Self {
        let ok: Vec<&&Row> = rows.iter().filter(|row| row.status == Status::Ok).collect();
        let median_of = |number: fn(&Row) -> Option<f64>| {
            median(&ok.iter().filter_map(|row| number(row)).collect::<Vec<f64>>())
        };
        let mut devices: Vec<String> = ok.iter().map(|row| device_kind(&row.device).to_owned()).collect();
        devices.sort_unstable();
        devices.dedup();
        Self {
            passes_per_step: median_of(|row| Some(row.passes_per_step as f64)),
            trainable_parameters: median_of(|row| row.trainable_parameters.map(|count| count as f64)),
            child_share: median_of(|row| row.child_share),
            state_mb: median_of(|row| Some(row.optimizer_state_mb? + row.method_state_mb.unwrap_or(0.0))),
            peak_memory_mb: median_of(|row| row.peak_memory_mb),
            prepare_seconds: median_of(|row| row.prepare_seconds),
            train_seconds: median_of(|row| row.train_seconds),
            seconds: median_of(|row| Some(row.prepare_seconds? + row.train_seconds?)),
            devices,
        }
    }

    /// Returns the seconds as a multiple of those of other runs; nothing unless all ran on devices of one kind.
    pub fn relative_time(&self, other: &Self) -> Option<f64> {
        let alike = self.devices.len() == 1 && self.devices == other.devices;
        let ratio = self.seconds? / other.seconds?;
        Some(ratio).filter(|ratio| alike && ratio.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(device: &str, train_seconds: f64) -> Row {
        Row {
            device: device.into(),
            passes_per_step: 2,
            prepare_seconds: Some(1.0),
            train_seconds: Some(train_seconds),
            optimizer_state_mb: Some(8.0),
            trainable_parameters: Some(100),
            ..Row::default()
        }
    }

    #[test]
    fn sums_up_the_runs_that_ended_well() {
        let broken = Row { status: Status::Failed, train_seconds: Some(900.0), ..run("cuda", 0.0) };
        let rows = [run("cpu", 3.0), run("cpu", 9.0), run("cpu", 4.0), broken];
        let cost = Cost::of(&rows.iter().collect::<Vec<_>>());
        assert_eq!((cost.passes_per_step, cost.trainable_parameters), (Some(2.0), Some(100.0)));
        assert_eq!(
            (cost.prepare_seconds, cost.train_seconds, cost.seconds),
            (Some(1.0), Some(4.0), Some(5.0))
        );
        assert_eq!((cost.state_mb, cost.peak_memory_mb, cost.child_share), (Some(8.0), None, None));
        assert_eq!(cost.devices, ["cpu"]);
    }

    #[test]
    fn times_are_compared_on_the_same_device_only() {
        let of = |device, seconds| Cost::of(&[&run(device, seconds)]);
        assert_eq!(of("cpu", 9.0).relative_time(&of("cpu", 4.0)), Some(2.0));
        assert_eq!(of("cuda", 9.0).relative_time(&of("cpu", 4.0)), None);
        assert_eq!(of("cpu", 9.0).relative_time(&Cost::default()), None);
        assert_eq!(of("cuda:0 (H100)", 9.0).relative_time(&of("cuda:1 (H100)", 4.0)), Some(2.0));
        let mixed = Cost::of(&[&run("cpu", 9.0), &run("cuda", 9.0)]);
        assert_eq!(mixed.relative_time(&mixed), None);
    }
}

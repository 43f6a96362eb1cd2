//! A device against the CPU, and its speed: what `gpu-check` shows and writes down.
//!
//! The CPU in float32 is the reference, since its numbers are the ones that the tests hold against PyTorch, transformers
//! and the released optimizer. On the CPU itself the same suite runs CPU against CPU.

mod agreement;
mod families;
mod floor;
mod graphs;
mod masks;
mod memory;
mod methods;
mod peer;
mod random_model;
mod report;
mod speed;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::SystemTime;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

pub use floor::MatrixRate;
pub use random_model::{EXAMPLES_OF_RTE, Shape, WORDS_OF_RTE, family_config, measured_method, random_data};
pub use report::Report;
pub use speed::{FisherTimes, Speed, SpeedRow, StepProfile};

use crate::error::Result;
use crate::experiment::device_name;
use crate::libtorch;

/// What to verify.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The device under test.
    pub device: Device,
    /// Small sizes only, and no Python peer: seconds instead of minutes.
    pub quick: bool,
    /// What alone is done of it, if anything is left out.
    pub only: Option<Stage>,
}

impl Options {
    fn includes(&self, stage: Stage) -> bool {
        self.only.is_none_or(|only| only == stage)
    }
}

/// A stage of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The device's numbers against those of the CPU.
    Checks,
    /// How fast it trains.
    Speed,
    /// How fast the Python peer trains on it.
    Peer,
}

/// How a check came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// What was measured is at most what is allowed.
    Passed,
    /// It is more, or it is no number.
    Failed,
    /// The device does not have what the check is about.
    Skipped,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What it belongs to, such as `masks`.
    pub topic: String,
    /// What is compared.
    pub name: String,
    /// The difference that was found; none if an error came first or the check was skipped.
    pub measured: Option<f64>,
    /// The largest difference that passes.
    pub allowed: f64,
    /// How it came out.
    pub outcome: Outcome,
    /// Why it was skipped, or the error that came first.
    pub reason: Option<String>,
}

/// Collects checks and shows each as it is made.
pub struct Checks<'a> {
    list: Vec<Check>,
    show: &'a mut dyn FnMut(&Check),
}

impl<'a> Checks<'a> {
    /// Starts a collection.
    pub fn new(show: &'a mut dyn FnMut(&Check)) -> Self {
        Self { list: Vec::new(), show }
    }

    /// Makes a check of a difference that must be at most `allowed`. An error or a panic fails this check and no other.
    fn at_most(
        &mut self,
        topic: &str,
        name: impl Into<String>,
        allowed: f64,
        measured: impl FnOnce() -> Result<f64>,
    ) {
        let (measured, reason) = match attempt(measured) {
            Ok(measured) => (Some(measured), None),
            Err(reason) => (None, Some(reason)),
        };
        let passed = measured.is_some_and(|measured| measured <= allowed);
        let outcome = if passed { Outcome::Passed } else { Outcome::Failed };
        self.add(Check { topic: topic.into(), name: name.into(), measured, allowed, outcome, reason });
    }

    /// Makes a check that passes if nothing differs.
    fn same(&mut self, topic: &str, name: impl Into<String>, same: impl FnOnce() -> Result<bool>) {
        self.at_most(topic, name, 0.0, || Ok(if same()? { 0.0 } else { 1.0 }));
    }

    /// Notes that the checks of a part could not go on.
    fn broken_off(&mut self, part: &str, reason: String) {
        let (name, outcome, reason) =
            ("the checks of this part that would follow".into(), Outcome::Failed, Some(reason));
        let topic = part.to_owned();
        self.add(Check { topic, name, measured: None, allowed: 0.0, outcome, reason });
    }

    fn skip(&mut self, topic: &str, name: impl Into<String>, reason: &str) {
        let (outcome, reason) = (Outcome::Skipped, Some(reason.to_owned()));
        let (topic, name) = (topic.to_owned(), name.into());
        self.add(Check { topic, name, measured: None, allowed: 0.0, outcome, reason });
    }

    fn add(&mut self, check: Check) {
        (self.show)(&check);
        self.list.push(check);
    }
}

/// A part of the suite: what it is, and the checks that it makes.
type Part<'p> = (String, Box<dyn Fn(&mut Checks) -> Result<()> + 'p>);

/// Returns the checks of correctness, in their order.
fn parts(options: Options) -> Vec<Part<'static>> {
    let device = options.device;
    let shapes = if options.quick { &[Shape::TINY][..] } else { &[Shape::TINY, Shape::SMALL] };
    let mut parts: Vec<Part> = Vec::new();
    for shape in shapes {
        let named = |what: &str| format!("{}: {what}", shape.name);
        let passes = move |checks: &mut Checks| agreement::check(checks, shape, device);
        parts.push((named("passes, steps, predictions"), Box::new(passes)));
        let masks = move |checks: &mut Checks| masks::check(checks, shape, device);
        parts.push((named("masks, Fisher information, thresholds"), Box::new(masks)));
    }
    for family in families::checked() {
        let check = move |checks: &mut Checks| families::check(checks, family, device);
        parts.push((format!("{family}: passes and Fisher information"), Box::new(check)));
    }
    let methods = move |checks: &mut Checks| methods::check(checks, device);
    parts.push(("every method: whole trainings".into(), Box::new(methods)));
    let memory = move |checks: &mut Checks| memory::check(checks, options);
    parts.push(("memory".into(), Box::new(memory)));
    // Behind all others, since a recording that fails may leave a device in disorder.
    for shape in shapes {
        let graphs = move |checks: &mut Checks| graphs::check(checks, shape, device);
        parts.push((format!("{}: recorded steps", shape.name), Box::new(graphs)));
    }
    for family in families::checked() {
        let graphs = move |checks: &mut Checks| graphs::check_family(checks, family, device);
        parts.push((format!("{family}: recorded steps"), Box::new(graphs)));
    }
    parts
}

/// Runs the whole suite: correctness first, then speed. `show` sees every check, `note` what comes next and what was measured,
/// and `keep` the report as far as it is, after each part and each measurement: whatever ends the process, little is lost.
///
/// # Errors
/// Fails if `keep` does; all else that fails is a failed check, or a measurement that is missing with its reason.
pub fn verify(
    options: Options,
    show: &mut dyn FnMut(&Check),
    note: &mut dyn FnMut(&str),
    keep: &mut dyn FnMut(&Report) -> Result<()>,
) -> Result<Report> {
    let report = Report {
        started_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        device: device_name(options.device),
        torch: libtorch::version(),
        version: env!("CARGO_PKG_VERSION"),
        commit: env!("CHILD_TUNING_COMMIT"),
        quick: options.quick,
        checks: Vec::new(),
        matrix_rates: Vec::new(),
        speeds: Vec::new(),
        fisher: Vec::new(),
        peer: Vec::new(),
    };
    let mut account = Account { report, note, keep };
    let parts = if options.includes(Stage::Checks) { parts(options) } else { Vec::new() };
    for (name, check) in parts {
        account.note(&format!("{name} …"));
        let mut checks = Checks::new(show);
        if let Err(reason) = attempt(|| check(&mut checks)) {
            checks.broken_off(&name, reason);
        }
        account.report.checks.append(&mut checks.list);
        account.keep()?;
    }
    let workloads = speed::workloads(options);
    if options.includes(Stage::Speed) {
        speed::measure(&workloads, options, &mut account)?;
    }
    if options.includes(Stage::Peer) {
        peer::measure(&workloads, options, &mut account)?;
    }
    if options.includes(Stage::Speed) {
        // A profiler that has run once may slow what comes after it.
        speed::profile_steps(&workloads, options, &mut account)?;
    }
    Ok(account.report)
}

/// The report as far as it is, and who is told of it.
struct Account<'a> {
    report: Report,
    note: &'a mut dyn FnMut(&str),
    keep: &'a mut dyn FnMut(&Report) -> Result<()>,
}

impl Account<'_> {
    /// Says what comes next, or what was measured.
    fn note(&mut self, what: &str) {
        (self.note)(what);
    }

    /// Hands the report on, so that what comes next cannot take it along.
    fn keep(&mut self) -> Result<()> {
        (self.keep)(&self.report)
    }
}

/// Does work of which neither an error nor a panic may end the suite.
fn attempt<T>(work: impl FnOnce() -> Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("panic: {}", libtorch::panic_message(panic.as_ref()))),
    }
}

/// Returns ‖subject − reference‖ / ‖reference‖ in float64 on the CPU.
fn difference(subject: &Tensor, reference: &Tensor) -> Result<f64> {
    let [subject, reference] = [subject, reference]
        .map(|tensor| tensor.f_to_device(Device::Cpu).and_then(|tensor| tensor.f_to_kind(Kind::Double)));
    let reference = reference?;
    let norm = |tensor: Tensor| -> Result<f64> { Ok(f64::try_from(tensor.f_norm()?)?) };
    Ok(norm(subject?.f_sub(&reference)?)? / norm(reference)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_relative_and_a_check_can_fail() {
        let reference = Tensor::from_slice(&[3.0f32, 4.0]);
        let subject = Tensor::from_slice(&[3.0f32, 4.5]);
        assert!((difference(&subject, &reference).unwrap() - 0.1).abs() < 1e-7);
        let mut seen = 0;
        let mut count = |_: &Check| seen += 1;
        let mut checks = Checks::new(&mut count);
        checks.at_most("topic", "close", 0.11, || difference(&subject, &reference));
        checks.at_most("topic", "far", 0.09, || difference(&subject, &reference));
        checks.at_most("topic", "no number", 1.0, || Ok(f64::NAN));
        checks
            .at_most("topic", "no shape", 1.0, || difference(&Tensor::from_slice(&[1.0f32; 3]), &reference));
        checks.same("topic", "other", || Ok(false));
        checks.same("topic", "panic", || panic!("out of luck"));
        checks.skip("topic", "missing", "not there");
        let outcomes: Vec<_> = checks.list.iter().map(|check| check.outcome.clone()).collect();
        use Outcome::{Failed, Passed, Skipped};
        assert_eq!(outcomes, [Passed, Failed, Failed, Failed, Failed, Failed, Skipped]);
        assert!(checks.list[3].reason.is_some());
        assert_eq!(checks.list[5].reason.as_deref(), Some("panic: out of luck"));
        assert_eq!(seen, 7);
    }
}

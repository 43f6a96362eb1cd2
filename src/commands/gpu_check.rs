//! `gpu-check`: a device against the CPU, and its speed.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::error::Error;
use child_tuning::files::write_bytes;
use child_tuning::verify::{Check, Options, Outcome, Report, Stage, verify};
use clap::{Args, ValueEnum};
use tch::Cuda;

use super::{device_named, show, tell};

#[derive(Args)]
pub struct GpuCheckArguments {
    /// Folder for gpu_check.json and gpu_check.md
    #[arg(long, default_value = "docs/results", value_name = "FOLDER")]
    output: PathBuf,
    /// Device: cuda, cuda:1, or cpu
    #[arg(long, default_value = "cuda", value_name = "DEVICE")]
    device: String,
    /// Only small sizes, and no Python peer: about a minute on a CPU
    #[arg(long)]
    quick: bool,
    /// Do one part alone: the checks of numbers, the speed, or that of the Python peer
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    Checks,
    Speed,
    Peer,
}

/// Runs the suite, shows each check, and writes both reports.
pub fn gpu_check(arguments: GpuCheckArguments) -> Result<ExitCode> {
    if arguments.device == "cuda" && Cuda::device_count() < 1 {
        return Err(Error::Environment(
            "gpu-check needs a CUDA device, and none is usable here; see `child-tuning doctor`, or try the suite with \
             --device cpu --quick"
                .into(),
        )
        .into());
    }
    let only = arguments.only.map(|part| match part {
        Part::Checks => Stage::Checks,
        Part::Speed => Stage::Speed,
        Part::Peer => Stage::Peer,
    });
    let options = Options { device: device_named(&arguments.device)?, quick: arguments.quick, only };
    // Before minutes of measurements: a folder that cannot be written is known now.
    std::fs::create_dir_all(&arguments.output).map_err(Error::io("create", &arguments.output))?;
    let mut keep = |report: &Report| {
        let json = serde_json::to_string_pretty(report);
        let json =
            json.map_err(|error| Error::Environment(format!("cannot write the report: {error}")))? + "\n";
        write_bytes(&arguments.output.join("gpu_check.json"), json.as_bytes())?;
        write_bytes(&arguments.output.join("gpu_check.md"), report.markdown().as_bytes())
    };
    let report =
        verify(options, &mut |check| show_check(check), &mut |what| tell(format_args!("{what}")), &mut keep)?;
    let [passed, failed, skipped] =
        [Outcome::Passed, Outcome::Failed, Outcome::Skipped].map(|outcome| report.count(&outcome));
    show(format_args!("{passed} checks passed, {failed} failed, {skipped} skipped"))?;
    show(format_args!("{}", arguments.output.join("gpu_check.md").display()))?;
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// Shows a check; that nobody reads it must not end the measurements.
fn show_check(check: &Check) {
    let Check { topic, name, allowed, .. } = check;
    let reason = check.reason.as_deref().unwrap_or_default();
    let measured = check.measured.map_or(String::new(), |measured| format!("{measured:.1e}"));
    let _ = match check.outcome {
        Outcome::Passed => show(format_args!("passed   {topic}: {name} ({measured} of {allowed:.0e})")),
        Outcome::Failed => {
            show(format_args!("FAILED   {topic}: {name} ({measured} of {allowed:.0e}) {reason}"))
        }
        Outcome::Skipped => show(format_args!("skipped  {topic}: {name}: {reason}")),
    };
}

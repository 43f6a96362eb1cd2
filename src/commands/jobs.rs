//! `--jobs`: where the worker processes of a `run` compute, and how they are started.

use std::io::BufReader;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use child_tuning::error::Error;
use child_tuning::experiment::{Plan, Speed, Tokens, WorkerPool, forecast, serve};
use child_tuning::libtorch::use_threads;
use child_tuning::train::available_memory;
use clap::Args;
use tch::{Cuda, Device};

use super::{ComputeArguments, device_named};

/// How many runs are trained at once.
#[derive(Args)]
pub struct JobsArguments {
    /// Runs at once, in processes that share the GPUs or the cores: a number, or auto for one a GPU, or on the CPU one a
    /// core, as far as memory goes
    #[arg(long, default_value = "1", value_name = "N|auto")]
    jobs: Jobs,
}

/// More processes than any machine has room for.
const MOST_JOBS: usize = 1024;

#[derive(Clone, Copy)]
enum Jobs {
    Auto,
    Count(usize),
}

impl FromStr for Jobs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("auto", _) => Ok(Jobs::Auto),
            (_, Ok(count @ 1..=MOST_JOBS)) => Ok(Jobs::Count(count)),
            _ => Err(format!("must be a whole number from 1 to {MOST_JOBS}, or `auto`")),
        }
    }
}

/// Where one of several worker processes computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerPlace {
    /// Its device.
    pub device: Device,
    /// Its CPU threads.
    pub threads: u16,
}

impl JobsArguments {
    /// Settles where each worker computes: in turn on all GPUs, or on the one that is named; with the threads that are
    /// given, or with their share of the cores.
    ///
    /// # Errors
    /// Fails if the device is not usable, or if what the runs of the plans need cannot be told.
    pub fn places(&self, compute: &ComputeArguments, plans: &[Plan]) -> Result<Vec<WorkerPlace>, Error> {
        let first = device_named(&compute.device)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let devices: Vec<Device> = match (first, compute.device.as_str()) {
            (Device::Cuda(_), "cuda") => {
                (0..Cuda::device_count().max(1) as usize).map(Device::Cuda).collect()
            }
            _ => vec![first],
        };
        let count = match self.jobs {
            Jobs::Count(count) => count,
            Jobs::Auto if first.is_cuda() => devices.len(),
            Jobs::Auto => match cores / compute.threads.map_or(1, usize::from) {
                0 | 1 => 1,
                most => most.min(fitting(plans, first)?).max(1),
            },
        };
        let share = u16::try_from(cores / count).unwrap_or(u16::MAX).max(1);
        let threads = compute.threads.unwrap_or(share);
        let devices = devices.into_iter().cycle().take(count);
        Ok(devices.map(|device| WorkerPlace { device, threads }).collect())
    }
}

/// Returns how many processes have room in memory, each with the most that a run of the plans needs.
fn fitting(plans: &[Plan], device: Device) -> Result<usize, Error> {
    let Some(available) = available_memory(Device::Cpu)? else { return Ok(usize::MAX) };
    let (speed, mut tokens) = (Speed::measure(device)?, Tokens::default());
    let mut most: f64 = 1.0;
    for run in plans.iter().flat_map(Plan::all_runs) {
        most = most.max(forecast(run, &mut tokens, &speed)?.memory);
    }
    Ok((available as f64 / most) as usize)
}

/// Makes the pool of workers at some places, of which there is one at least. Each is this program with the same arguments.
pub fn worker_pool(places: &[WorkerPlace]) -> WorkerPool {
    let threads = places.first().map_or(1, |place| place.threads);
    WorkerPool::new(places.iter().map(|place| place.device).collect(), move |device| {
        // Where its file has been replaced meanwhile, by a build for instance, Linux' own name still stands for what runs.
        let file = std::env::current_exe().ok().filter(|file| file.exists());
        let program = file.unwrap_or_else(|| "/proc/self/exe".into());
        let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
        // Behind the subcommand's name, and so before a `--` that ends the options.
        arguments.insert(1, format!("--worker={}", WorkerPlace { device, threads }).into());
        let mut command = Command::new(program);
        command.args(arguments);
        command
    })
}

impl WorkerPlace {
    /// Sets up the thread pools of this process to compute here.
    pub fn set_up(self) {
        use_threads(Some(usize::from(self.threads)), self.device);
    }

    /// Works for the process that started this one.
    pub fn serve(
        self,
        plans: impl FnOnce() -> Result<Vec<Plan>, Error>,
        interrupted: &Arc<AtomicBool>,
    ) -> Result<ExitCode> {
        self.set_up();
        let (input, output) = (BufReader::new(std::io::stdin()), std::io::stdout());
        Ok(match serve(plans(), self.device, interrupted, input, output) {
            Ok(()) => ExitCode::SUCCESS,
            // The other process has been told, and tells the user.
            Err(error) => ExitCode::from(error.exit_code()),
        })
    }
}

impl std::fmt::Display for WorkerPlace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.device {
            Device::Cuda(index) => write!(formatter, "cuda:{index},{}", self.threads),
            _ => write!(formatter, "cpu,{}", self.threads),
        }
    }
}

impl FromStr for WorkerPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = || {
            let (device, threads) = text.split_once(',')?;
            let device = match device.strip_prefix("cuda:") {
                Some(index) => Device::Cuda(index.parse().ok()?),
                None => Device::Cpu,
            };
            Some(Self { device, threads: threads.parse().ok()? })
        };
        place().ok_or_else(|| format!("`{text}` is not a device and a number of threads"))
    }
}

//! What Ctrl-C and a polite kill do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use child_tuning::libtorch::{end_now, keeping_ignored_signals};

use super::tell;

/// The exit code of a command that was interrupted.
const INTERRUPTED: i32 = 130;

/// Makes a signal end work whose every state on the disk can be gone on from: downloads.
pub fn end_at_once() -> Result<()> {
    listen(end)
}

/// Returns what a signal sets, for the current run to end between two batches; a second one ends at once. Until
/// `is_training` is set signals do what [`end_at_once`] makes them do.
pub fn stop_between_batches(is_training: Arc<AtomicBool>) -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    listen(move || {
        if !is_training.load(Ordering::Relaxed) {
            end();
        }
        if flag.swap(true, Ordering::Relaxed) {
            end_now(INTERRUPTED);
        }
    })?;
    Ok(interrupted)
}

fn listen(handler: impl FnMut() + Send + 'static) -> Result<()> {
    keeping_ignored_signals(|| ctrlc::set_handler(handler)).context("cannot listen for Ctrl-C")
}

fn end() {
    tell(format_args!("\ninterrupted: run the same command again to resume"));
    end_now(INTERRUPTED);
}

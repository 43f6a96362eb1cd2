//! When a failed attempt is worth another one, and how long to wait before it.

use std::time::Duration;

use super::http::Fault;
use crate::error::{Error, Result};

/// After so many new bytes the count of failures starts anew: a slow line that is cut often still gets there.
const PROGRESS: u64 = 1024 * 1024;

/// The longest wait that a server may ask for: the Hub counts requests in windows of five minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// How often, and with what pauses, something is tried.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Failures in a row before giving up.
    pub attempts: u32,
    /// The first pause; each further one is twice as long.
    pub first_wait: Duration,
    /// What waits.
    pub sleep: fn(Duration),
}

impl Default for Patience {
    fn default() -> Self {
        Self { attempts: 5, first_wait: Duration::from_secs(1), sleep: std::thread::sleep }
    }
}

/// What happens while a file is loaded.
#[derive(Debug)]
pub enum TransferEvent<'a> {
    /// A file is on its way.
    Started {
        /// Its address.
        url: &'a str,
        /// How much of it was there already.
        start: u64,
        /// Its length.
        bytes: u64,
    },
    /// So many bytes of the file are there now.
    Received(u64),
    /// An attempt failed; another one follows after a pause.
    Waiting {
        /// Why it failed.
        reason: &'a str,
        /// The pause.
        pause: Duration,
    },
}

impl Patience {
    /// Attempts something until it works, cannot work, or has failed too often in a row. `progress` tells how many
    /// bytes are there, and `give_up` makes the error from the reason of the last failure.
    pub(crate) fn persist<T>(
        &self,
        report: &mut dyn FnMut(TransferEvent),
        progress: impl Fn() -> u64,
        give_up: impl Fn(String) -> Error,
        mut attempt: impl FnMut(&mut dyn FnMut(TransferEvent)) -> Result<T, Fault>,
    ) -> Result<T> {
        let mut failures = 0;
        loop {
            let before = progress();
            let (reason, pause) = match attempt(report) {
                Ok(value) => return Ok(value),
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Passing { reason, pause }) => (reason, pause),
            };
            failures = if progress() >= before + PROGRESS { 1 } else { failures + 1 };
            let pause = pause.unwrap_or(self.first_wait * 2_u32.saturating_pow(failures - 1));
            if failures >= self.attempts {
                return Err(give_up(format!("{reason}; gave up after {failures} attempts")));
            }
            if pause > LONGEST_WAIT {
                let seconds = pause.as_secs();
                return Err(give_up(format!("{reason}; the server asks to wait {seconds} s")));
            }
            report(TransferEvent::Waiting { reason: &reason, pause });
            (self.sleep)(pause);
        }
    }
}

//! One file over HTTP: resumed where it was cut off, tried again where that can help, and used only if its hash is the
//! published one.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use super::FetchEvent;
use crate::error::{Error, Result};
use crate::values::hexadecimal;

/// How much is read at once.
const BLOCK: usize = 64 * 1024;

/// After so many new bytes the count of failures starts anew: a slow line that is cut often still gets there.
const PROGRESS: u64 = 1024 * 1024;

/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// How long a silent server is waited for.
const SILENCE: Duration = Duration::from_secs(60);

/// How often, and with what pauses, a transfer is tried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Failures in a row before giving up.
    pub attempts: u32,
    /// The first pause; each further one is twice as long.
    pub first_wait: Duration,
}

/// A file to load.
pub(super) struct Transfer<'a> {
    /// Where it is.
    pub url: &'a str,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: &'a str,
    /// Where it grows.
    pub part: &'a Path,
}

/// Why an attempt did not bring the whole file.
enum Fault {
    /// Another attempt may help, after the pause that the server asked for.
    Passing { reason: String, pause: Option<Duration> },
    /// No other attempt helps.
    Final(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Fault::Final(error)
    }
}

fn passing(reason: impl Into<String>) -> Fault {
    Fault::Passing { reason: reason.into(), pause: None }
}

impl Transfer<'_> {
    /// Loads the file to `part`, going on from what is there already.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] if the server refuses, stays unreachable, or has another file; [`Error::Io`] if `part`
    /// cannot be written. What was loaded is kept unless it is of no use.
    pub fn run(&self, patience: Patience, report: &mut dyn FnMut(FetchEvent)) -> Result<()> {
        let agent = agent(self.url);
        let mut failures = 0;
        loop {
            let before = self.length();
            let Err(fault) = self.attempt(&agent, report) else { break };
            let (reason, pause) = match fault {
                Fault::Final(error) => return Err(error),
                Fault::Passing { reason, pause } => (reason, pause),
            };
            failures = if self.length() >= before + PROGRESS { 1 } else { failures + 1 };
            let pause = pause.unwrap_or(patience.first_wait * 2_u32.saturating_pow(failures - 1));
            if failures >= patience.attempts {
                return Err(
                    self.fault(format!("{reason}; gave up after {failures} attempts: {}", self.kept()))
                );
            }
            if pause > LONGEST_WAIT {
                let seconds = pause.as_secs();
                return Err(
                    self.fault(format!("{reason}; the server asks to wait {seconds} s: try again then"))
                );
            }
            report(FetchEvent::Waiting { reason: &reason, pause });
            std::thread::sleep(pause);
        }
        self.verify()
    }

    /// Removes what was loaded.
    pub fn discard(&self) -> Result<()> {
        for path in [self.part, &self.validator_path()] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn attempt(&self, agent: &Agent, report: &mut dyn FnMut(FetchEvent)) -> Result<(), Fault> {
        if self.length() > self.bytes {
            self.discard()?;
        }
        let start = self.length();
        if start == self.bytes {
            return Ok(());
        }
        let mut request = agent.get(self.url);
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
            // With it, a server whose file has changed sends the whole new one.
            if let Ok(validator) = std::fs::read_to_string(self.validator_path()) {
                request = request.header("If-Range", validator);
            }
        }
        let response = request.call().map_err(|error| self.connection_fault(&error))?;
        let start = self.judge(&response, start)?;
        report(FetchEvent::Started { url: self.url, start, bytes: self.bytes });
        self.receive(response, start, report)
    }

    /// Decides from status and headers where in the file the body of an answer starts.
    fn judge(&self, response: &Response<Body>, start: u64) -> Result<u64, Fault> {
        let status = response.status();
        match status.as_u16() {
            200 => {
                self.discard()?;
                self.check_length(number(response.headers(), "content-length"))?;
                if let Some(validator) = validator(response.headers()) {
                    let path = self.validator_path();
                    std::fs::write(&path, validator).map_err(write_fault(&path))?;
                }
                Ok(0)
            }
            206 => {
                let (first, whole) = content_range(response.headers());
                self.check_length(whole)?;
                if first == Some(start) {
                    return Ok(start);
                }
                self.discard()?;
                Err(passing("the server sent another part than was asked for"))
            }
            416 => {
                self.discard()?;
                Err(passing("the server no longer has the rest of this file (416)"))
            }
            401 | 403 => Err(self.fault(format!("the server refuses access ({status}); {MIRROR}")).into()),
            404 | 410 => Err(self.fault(format!("there is no such file ({status}); {MIRROR}")).into()),
            408 | 429 | 500..=599 => {
                let seconds = number(response.headers(), "retry-after");
                let pause = seconds.map(Duration::from_secs);
                Err(Fault::Passing { reason: format!("the server answers {status}"), pause })
            }
            _ => Err(self.fault(format!("the server answers {status}; {MIRROR}")).into()),
        }
    }

    fn check_length(&self, found: Option<u64>) -> Result<(), Fault> {
        match found {
            Some(found) if found != self.bytes => {
                self.discard()?;
                let (url, bytes) = (self.url, self.bytes);
                Err(Error::Environment(format!(
                    "{url}: has {found} bytes where {bytes} were published, so it is another file; nothing was kept; \
                     {MIRROR}"
                ))
                .into())
            }
            _ => Ok(()),
        }
    }

    fn receive(
        &self,
        response: Response<Body>,
        start: u64,
        report: &mut dyn FnMut(FetchEvent),
    ) -> Result<(), Fault> {
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.part)
            .map_err(write_fault(self.part))?;
        file.seek(SeekFrom::Start(start)).map_err(write_fault(self.part))?;
        let mut reader = response.into_body().into_reader();
        let mut block = vec![0; BLOCK];
        let mut done = start;
        loop {
            let cut = |why: String| passing(format!("cut off after {done} of {} bytes{why}", self.bytes));
            let count = reader.read(&mut block).map_err(|error| cut(format!(" ({error})")))?;
            if count == 0 {
                return if done == self.bytes { Ok(()) } else { Err(cut(String::new())) };
            }
            // Longer than it said, or than it may be: at most the first byte too many is looked at.
            self.check_length((done + count as u64 > self.bytes).then_some(done + count as u64))?;
            file.write_all(&block[..count]).map_err(write_fault(self.part))?;
            done += count as u64;
            report(FetchEvent::Received(done));
        }
    }

    fn verify(&self) -> Result<()> {
        let mut file = File::open(self.part).map_err(Error::io("read", self.part))?;
        file.sync_all().map_err(write_fault(self.part))?;
        let mut hash = Sha256::new();
        let mut block = vec![0; BLOCK];
        loop {
            let count = file.read(&mut block).map_err(Error::io("read", self.part))?;
            if count == 0 {
                break;
            }
            hash.update(&block[..count]);
        }
        let found = hexadecimal(&hash.finalize());
        if found == self.sha256 {
            return Ok(());
        }
        self.discard()?;
        Err(self.fault(format!(
            "has the SHA-256 {found} where {} was published; the file was removed; {MIRROR}",
            self.sha256
        )))
    }

    fn connection_fault(&self, error: &ureq::Error) -> Fault {
        match error {
            ureq::Error::HostNotFound => {
                let text =
                    format!("the server's name is not known here, perhaps for want of a network; {MIRROR}");
                self.fault(text).into()
            }
            // Among the errors of a connection, the kind of those about certificates.
            ureq::Error::Io(error) if error.kind() == ErrorKind::InvalidData => {
                self.fault(format!("the connection cannot be trusted ({error}); {MIRROR}")).into()
            }
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::ConnectionFailed
            | ureq::Error::Protocol(_) => passing(format!("no answer ({error})")),
            _ => self.fault(format!("{error}; {MIRROR}")).into(),
        }
    }

    fn fault(&self, message: impl std::fmt::Display) -> Error {
        Error::Environment(format!("{}: {message}", self.url))
    }

    fn kept(&self) -> String {
        match self.length() {
            0 => format!("try again later; {MIRROR}"),
            kept => {
                format!("{kept} of {} bytes are kept, and the same command goes on from there", self.bytes)
            }
        }
    }

    fn length(&self) -> u64 {
        std::fs::metadata(self.part).map_or(0, |data| data.len())
    }

    fn validator_path(&self) -> PathBuf {
        self.part.with_extension("validator")
    }
}

/// What helps where a server does not.
const MIRROR: &str = "CHILD_TUNING_DATA_ENDPOINT names a mirror";

fn agent(url: &str) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("child-tuning/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(SILENCE))
        .timeout_per_read(Some(SILENCE))
        .timeout_per_write(Some(SILENCE));
    let host = url.split("://").nth(1).unwrap_or(url);
    if ["127.0.0.1", "localhost", "[::1]"].iter().any(|local| host.starts_with(local)) {
        // A mirror on this machine is not reached through somebody else's.
        config = config.proxy(None);
    }
    config.build().into()
}

/// Turns a failed write into an error that tells a full disk from others.
pub(super) fn write_fault(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |error| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Error::Environment(format!(
            "{}: the disk is full ({error}); make room, or name another folder with --to",
            path.display()
        )),
        _ => Error::io("write", &path)(error),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

/// Returns what tells versions of a file apart in `If-Range`, which takes no weak ETags.
fn validator(headers: &HeaderMap) -> Option<&str> {
    let strong = text(headers, "etag").filter(|etag| etag.starts_with('"'));
    strong.or_else(|| text(headers, "last-modified"))
}

/// Reads `Content-Range: bytes FIRST-LAST/WHOLE`.
fn content_range(headers: &HeaderMap) -> (Option<u64>, Option<u64>) {
    let range = text(headers, "content-range").and_then(|range| range.strip_prefix("bytes "));
    let Some((part, whole)) = range.and_then(|range| range.split_once('/')) else { return (None, None) };
    let first = part.split_once('-').and_then(|(first, _)| first.parse().ok());
    (first, whole.parse().ok())
}

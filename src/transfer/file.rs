//! One file over HTTP.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use super::checksum::Checksum;
use super::http::{Advice, Fault, agent, connection_fault, header, number, status_fault};
use super::patience::{Patience, TransferEvent};
use crate::error::{Error, Result};

/// How much is read at once.
const BLOCK: usize = 64 * 1024;

/// How many servers may pass a request on.
const REDIRECTS: u32 = 10;

/// A file to load.
pub(crate) struct Transfer<'a> {
    /// Where it is.
    pub url: &'a str,
    /// The value of `Authorization` for the server of this address; others, that it redirects to, do not get it.
    pub authorization: Option<&'a str>,
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub checksum: &'a Checksum,
    /// Where it grows.
    pub part: &'a Path,
    /// Whether the address may have another content tomorrow. If it cannot, a part is gone on with whatever the server
    /// says of versions: each of several servers behind one address may have its own names for the same content.
    pub may_change: bool,
    /// What helps where this does not work.
    pub advice: Advice,
}

impl Transfer<'_> {
    /// Loads the file to `part`, going on from what is there already.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] if the server refuses, stays unreachable, or has another file; [`Error::Io`] if `part`
    /// cannot be written. What was loaded is kept unless it is of no use.
    pub fn run(&self, patience: &Patience, report: &mut dyn FnMut(TransferEvent)) -> Result<()> {
        let began_before = self.length() > 0;
        self.load(patience, report)?;
        let Some(mismatch) = self.mismatch()? else { return Ok(()) };
        if !began_before {
            return Err(self.fault(format!("{mismatch}; the file was removed")));
        }
        // The fault may be in what was there: whoever wrote it may have left holes.
        let reason = format!("{}: together with what was there before it {mismatch}", self.url);
        report(TransferEvent::Waiting { reason: &reason, pause: Duration::ZERO });
        self.load(patience, report)?;
        match self.mismatch()? {
            None => Ok(()),
            Some(mismatch) => Err(self.fault(format!("{mismatch}; the file was removed"))),
        }
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

    fn load(&self, patience: &Patience, report: &mut dyn FnMut(TransferEvent)) -> Result<()> {
        let agent = agent(self.url, REDIRECTS);
        let give_up = |reason: String| match self.length() {
            0 => self.fault(format!("{reason}: try again later")),
            kept => Error::Environment(format!(
                "{}: {reason}: {kept} of {} bytes are kept, and the same command goes on from there",
                self.url, self.bytes
            )),
        };
        patience.persist(report, || self.length(), give_up, |report| self.attempt(&agent, report))
    }

    fn attempt(&self, agent: &Agent, report: &mut dyn FnMut(TransferEvent)) -> Result<(), Fault> {
        if self.length() > self.bytes {
            self.discard()?;
        }
        let start = self.length();
        if start == self.bytes && self.part.exists() {
            return Ok(());
        }
        let mut request = agent.get(self.url).header("Accept-Encoding", "identity");
        if let Some(authorization) = self.authorization {
            request = request.header("Authorization", authorization);
        }
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
            // With it, a server whose file has changed sends the whole new one.
            if let Ok(validator) = std::fs::read_to_string(self.validator_path()) {
                request = request.header("If-Range", validator);
            }
        }
        let response = request.call().map_err(|error| connection_fault(self.url, &error, &self.advice))?;
        let start = self.judge(&response, start)?;
        report(TransferEvent::Started { url: self.url, start, bytes: self.bytes });
        self.receive(response, start, report)
    }

    /// Decides from status and headers where in the file the body of an answer starts.
    fn judge(&self, response: &Response<Body>, start: u64) -> Result<u64, Fault> {
        match response.status().as_u16() {
            200 => {
                self.discard()?;
                self.check_length(number(response.headers(), "content-length"))?;
                if let Some(validator) = validator(response.headers()).filter(|_| self.may_change) {
                    let path = self.validator_path();
                    std::fs::write(&path, validator).map_err(write_fault(&path, self.advice.disk))?;
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
                Err(Fault::passing("the server sent another part than was asked for"))
            }
            416 => {
                self.discard()?;
                Err(Fault::passing("the server no longer has the rest of this file (416)"))
            }
            _ => Err(status_fault(self.url, response, &self.advice)),
        }
    }

    fn check_length(&self, found: Option<u64>) -> Result<(), Fault> {
        match found {
            Some(found) if found != self.bytes => {
                self.discard()?;
                let bytes = self.bytes;
                Err(self
                    .fault(format!(
                        "has {found} bytes, but {bytes} were published, so it is a different file; the download was discarded"
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
        report: &mut dyn FnMut(TransferEvent),
    ) -> Result<(), Fault> {
        let unwritable = |error| write_fault(self.part, self.advice.disk)(error);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.part)
            .map_err(unwritable)?;
        file.seek(SeekFrom::Start(start)).map_err(unwritable)?;
        let mut reader = response.into_body().into_reader();
        let mut block = vec![0; BLOCK];
        let mut done = start;
        loop {
            let cut =
                |why: String| Fault::passing(format!("cut off after {done} of {} bytes{why}", self.bytes));
            let count = reader.read(&mut block).map_err(|error| cut(format!(" ({error})")))?;
            if count == 0 {
                return if done == self.bytes { Ok(()) } else { Err(cut(String::new())) };
            }
            // Longer than it said, or than it may be: at most the first byte too many is looked at.
            self.check_length((done + count as u64 > self.bytes).then_some(done + count as u64))?;
            file.write_all(&block[..count]).map_err(unwritable)?;
            done += count as u64;
            report(TransferEvent::Received(done));
        }
    }

    /// Says how the hash of the loaded file differs from the published one, and removes the file then; nothing if it is
    /// the published one, which then is on the disk.
    fn mismatch(&self) -> Result<Option<String>> {
        let file = File::open(self.part).map_err(Error::io("read", self.part))?;
        file.sync_all().map_err(write_fault(self.part, self.advice.disk))?;
        let found = self.checksum.of_file(self.part)?;
        if found == *self.checksum {
            return Ok(None);
        }
        self.discard()?;
        Ok(Some(format!("has the {found} where {} was published", self.checksum.digits())))
    }

    fn fault(&self, message: impl std::fmt::Display) -> Error {
        Error::Environment(format!("{}: {message}; {}", self.url, self.advice.server))
    }

    fn length(&self) -> u64 {
        std::fs::metadata(self.part).map_or(0, |data| data.len())
    }

    fn validator_path(&self) -> PathBuf {
        self.part.with_extension("validator")
    }
}

/// Turns a failed write into an error that tells a full disk from others, with what helps there.
pub(crate) fn write_fault(path: &Path, full_disk: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |error| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Error::Environment(format!("{}: the disk is full ({error}); {full_disk}", path.display()))
        }
        _ => Error::io("write", &path)(error),
    }
}

/// Returns what tells versions of a file apart in `If-Range`, which takes no weak ETags.
fn validator(headers: &HeaderMap) -> Option<&str> {
    let strong = header(headers, "etag").filter(|etag| etag.starts_with('"'));
    strong.or_else(|| header(headers, "last-modified"))
}

/// Reads `Content-Range: bytes FIRST-LAST/WHOLE`.
fn content_range(headers: &HeaderMap) -> (Option<u64>, Option<u64>) {
    let range = header(headers, "content-range").and_then(|range| range.strip_prefix("bytes "));
    let Some((part, whole)) = range.and_then(|range| range.split_once('/')) else { return (None, None) };
    let first = part.split_once('-').and_then(|(first, _)| first.parse().ok());
    (first, whole.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_from_other_faults() {
        let write = |path: &str| {
            std::fs::write(path, "x").map_err(write_fault(Path::new(path), "make room")).unwrap_err()
        };
        let full = write("/dev/full").to_string();
        assert!(full.starts_with("/dev/full: the disk is full (") && full.ends_with("; make room"), "{full}");
        assert!(write("/dev/null/x").to_string().starts_with("cannot write /dev/null/x: "));
    }
}

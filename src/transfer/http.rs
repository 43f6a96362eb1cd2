//! Requests and what their answers mean, whatever is asked for.

use std::io::ErrorKind;
use std::time::Duration;

use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use crate::error::Error;

/// How long a silent server is waited for.
const SILENCE: Duration = Duration::from_secs(60);

/// What helps, by the part that fails; each a clause without a full stop.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Advice {
    /// Where a server does not give what is needed.
    pub server: &'static str,
    /// Where a disk is full.
    pub disk: &'static str,
}

/// Why an attempt did not bring what was asked for.
pub(crate) enum Fault {
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

impl Fault {
    /// Makes a fault that may pass, without a pause that somebody asked for.
    pub fn passing(reason: impl Into<String>) -> Self {
        Fault::Passing { reason: reason.into(), pause: None }
    }
}

/// Makes a client for an address. It follows so many redirects, and none of them carries an `Authorization` on.
pub(crate) fn agent(url: &str, redirects: u32) -> Agent {
    let mut config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(redirects)
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

/// Says what it means that there was no answer.
pub(crate) fn connection_fault(url: &str, error: &ureq::Error, advice: &Advice) -> Fault {
    let fault = |message: String| Error::Environment(format!("{url}: {message}; {}", advice.server)).into();
    match error {
        ureq::Error::HostNotFound => {
            fault("the server's name is not known here, perhaps for want of a network".into())
        }
        // Among the errors of a connection, the kind of those about certificates.
        ureq::Error::Io(error) if error.kind() == ErrorKind::InvalidData => {
            fault(format!("the connection cannot be trusted ({error})"))
        }
        ureq::Error::Io(_)
        | ureq::Error::Timeout(_)
        | ureq::Error::ConnectionFailed
        | ureq::Error::Protocol(_) => Fault::passing(format!("no answer ({error})")),
        _ => fault(error.to_string()),
    }
}

/// Says what an answer means that is none of those that were hoped for.
pub(crate) fn status_fault(url: &str, response: &Response<Body>, advice: &Advice) -> Fault {
    let status = response.status();
    let what = match status.as_u16() {
        408 | 429 | 500..=599 => {
            let pause = pause_asked_for(response.headers());
            return Fault::Passing { reason: format!("the server answers {status}"), pause };
        }
        401 | 403 => format!("the server refuses access ({status})"),
        404 | 410 => format!("there is no such file ({status})"),
        _ => format!("the server answers {status}"),
    };
    Error::Environment(format!("{url}: {what}; {}", advice.server)).into()
}

/// Reads how long a server wants to be left alone: `Retry-After` in seconds, or the time until the window of a
/// `RateLimit` that is used up begins anew.
fn pause_asked_for(headers: &HeaderMap) -> Option<Duration> {
    let window = || {
        let fields: Vec<&str> = header(headers, "ratelimit")?.split(';').map(str::trim).collect();
        let field =
            |name: &str| fields.iter().find_map(|field| field.strip_prefix(name)?.parse::<u64>().ok());
        // A second more, since the time is rounded down.
        (field("r=") == Some(0)).then(|| field("t="))?.map(|seconds| seconds.saturating_add(1))
    };
    number(headers, "retry-after").or_else(window).map(Duration::from_secs)
}

/// Returns the text of a header, if it is there.
pub(crate) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Returns the number in a header, if it is there.
pub(crate) fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    header(headers, name)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_how_long_to_wait_in_either_of_two_headers() {
        let pause = |name: &'static str, value: &str| {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
            pause_asked_for(&headers).map(|pause| pause.as_secs())
        };
        assert_eq!(pause("retry-after", "7"), Some(7));
        assert_eq!(pause("ratelimit", "\"api\";r=0;t=55"), Some(56));
        for (name, value) in [
            ("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT"),
            ("retry-after", "-1"),
            ("ratelimit", "\"api\";r=12;t=55"),
            ("ratelimit", "\"api\""),
            ("age", "7"),
        ] {
            assert_eq!(pause(name, value), None, "{name}: {value}");
        }
    }
}

//! What the Hub says of a file before it is loaded: the commit, the length, the hash, or why there is none.

use ureq::Body;
use ureq::http::{HeaderMap, Response};

use super::id::{ModelId, is_commit};
use super::locate::similar_folder;
use super::settings::Hub;
use crate::error::{Error, Result};
use crate::transfer::{
    Advice, Checksum, Fault, TransferEvent, agent, connection_fault, header, number, status_fault,
};

/// What helps where the Hub or the disk does not give what is needed.
pub(super) const ADVICE: Advice = Advice {
    server: "HF_ENDPOINT names a mirror",
    disk: "make room, or name a folder on another disk with HF_HOME",
};

/// How often the Hub may send on to another address of its own.
const HOPS: usize = 5;

/// A file of a repository.
pub(super) struct RemoteFile {
    /// Its address on the endpoint, which may redirect to where large files are.
    pub url: String,
    /// The commit that the revision is.
    pub commit: String,
    /// Its hash.
    pub checksum: Checksum,
    /// Its length.
    pub bytes: u64,
}

/// A repository on the Hub, as somebody with or without a token sees it.
pub(super) struct Remote<'a> {
    pub hub: &'a Hub,
    pub id: &'a ModelId,
    pub authorization: Option<String>,
}

impl Remote<'_> {
    /// Asks for a file of a revision; nothing if the revision has no such file.
    ///
    /// # Errors
    /// Fails if there is no such model or revision, it may not be read, or the server is not there or not like the Hub.
    pub fn find(
        &self,
        file: &str,
        revision: &str,
        report: &mut dyn FnMut(TransferEvent),
    ) -> Result<Option<RemoteFile>> {
        let revision = revision.replace('/', "%2F");
        let mut url = format!("{}/{}/resolve/{revision}/{file}", self.hub.endpoint, self.id.repository);
        for _ in 0..HOPS {
            let give_up = |reason: String| {
                Error::Environment(format!("{url}: {reason}: try again later; {}", ADVICE.server))
            };
            let response = self.hub.patience.persist(report, || 0, give_up, |_| self.ask(&url))?;
            match own_redirect(&url, &response) {
                Some(next) => url = next,
                None => return self.read(url, &response),
            }
        }
        Err(self.unlike_the_hub(&url, "redirects in a circle"))
    }

    fn ask(&self, url: &str) -> Result<Response<Body>, Fault> {
        let mut request = agent(url, 0).head(url).header("Accept-Encoding", "identity");
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let response = request.call().map_err(|error| connection_fault(url, &error, &ADVICE))?;
        match response.status().as_u16() {
            200..=399 | 401 | 403 | 404 => Ok(response),
            _ => Err(status_fault(url, &response, &ADVICE)),
        }
    }

    fn read(&self, url: String, response: &Response<Body>) -> Result<Option<RemoteFile>> {
        let (status, headers) = (response.status(), response.headers());
        if status.is_client_error() {
            return match (status.as_u16(), header(headers, "x-error-code")) {
                (404, None | Some("EntryNotFound")) => Ok(None),
                (status, code) => Err(self.refusal(status, code.unwrap_or_default(), headers)),
            };
        }
        let commit = header(headers, "x-repo-commit").filter(|commit| is_commit(commit));
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag"));
        // Of a redirect, the length is that of the redirect.
        let own_length = || number(headers, "content-length").filter(|_| !status.is_redirection());
        let bytes = number(headers, "x-linked-size").or_else(own_length);
        match (commit, etag.and_then(Checksum::of_etag), bytes) {
            (Some(commit), Some(checksum), Some(bytes)) => {
                Ok(Some(RemoteFile { url, commit: commit.to_owned(), checksum, bytes }))
            }
            (None, _, _) => Err(self.unlike_the_hub(&url, "names no commit (X-Repo-Commit)")),
            (_, None, _) => {
                Err(self
                    .unlike_the_hub(&url, "gives no SHA-256 and no git SHA-1 to check the file by (ETag)"))
            }
            (_, _, None) => Err(self.unlike_the_hub(&url, "does not say how long the file is")),
        }
    }

    /// Says why the Hub does not show a file, and what helps.
    fn refusal(&self, status: u16, code: &str, headers: &HeaderMap) -> Error {
        let Self { hub, id, .. } = self;
        let (endpoint, repository) = (&hub.endpoint, &id.repository);
        let token = hub.token_place().filter(|_| self.authorization.is_some());
        let places = match &hub.token_file {
            Some(file) => format!("HF_TOKEN or the file {}", file.display()),
            None => "HF_TOKEN".into(),
        };
        let new_token = format!("a token from {endpoint}/settings/tokens");
        match (code, status, token) {
            ("GatedRepo", _, None) => Error::Environment(format!(
                "model `{repository}` is gated: accept its terms at {endpoint}/{repository}, and put {new_token} into \
                 {places}"
            )),
            ("GatedRepo", _, Some(token)) => Error::Environment(format!(
                "model `{repository}` is gated, and the token in {token} has no access to it: accept its terms at \
                 {endpoint}/{repository} with the token's account, and let the token read gated models"
            )),
            ("RevisionNotFound", _, _) => Error::configuration(format!(
                "model `{repository}` has no revision `{}`; {endpoint}/{repository}/commits/main lists commits",
                id.revision
            )),
            ("RepoNotFound", _, None) | (_, 401, None) => Error::configuration(format!(
                "{endpoint} has no model `{repository}`{}, or it is private and needs {new_token} in {places}",
                similar_folder(repository)
            )),
            ("RepoNotFound", _, Some(token)) => Error::configuration(format!(
                "{endpoint} has no model `{repository}`{}, or it is private and the token in {token} may not read it",
                similar_folder(repository)
            )),
            (_, 401, Some(token)) => Error::Environment(format!(
                "{endpoint} does not take the token in {token} (401); put {new_token} there"
            )),
            (_, status, token) => {
                let said =
                    header(headers, "x-error-message").map_or(String::new(), |text| format!(": {text}"));
                let token =
                    token.map_or(format!("{new_token} in {places}"), |token| format!("the token in {token}"));
                Error::Environment(format!(
                    "{endpoint} refuses access to model `{repository}` ({status}{said}); {token} must be allowed to read it"
                ))
            }
        }
    }

    fn unlike_the_hub(&self, url: &str, what: &str) -> Error {
        Error::Environment(format!(
            "{url}: the server {what}, so it is not like the Hub; HF_ENDPOINT names another one"
        ))
    }
}

/// Returns where a redirect leads, if that is on the same server; anything else is for whoever loads the file.
fn own_redirect(url: &str, response: &Response<Body>) -> Option<String> {
    let location = header(response.headers(), "location").filter(|_| response.status().is_redirection())?;
    let (scheme, rest) = url.split_once("://")?;
    let origin = format!("{scheme}://{}", rest.split('/').next()?);
    if location.starts_with('/') && !location.starts_with("//") {
        return Some(origin + location);
    }
    location.starts_with(&format!("{origin}/")).then(|| location.to_owned())
}

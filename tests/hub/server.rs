//! A server on this machine that behaves like the Hub: it answers questions about files with headers, sends small files
//! itself, and redirects to a second server, on another port, for large ones.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that `main` is unless a test says otherwise.
pub const COMMIT: &str = "1d0f8c4a1d0f8c4a1d0f8c4a1d0f8c4a1d0f8c4a";

/// The token that opens what is gated or private.
pub const TOKEN: &str = "hf_right";

/// A file of a repository.
#[derive(Clone, Default)]
pub struct HubFile {
    pub content: Vec<u8>,
    /// Whether the second server has it.
    pub large: bool,
    /// Statuses to answer with first, one a request that is not `HEAD`, each with a `Retry-After`.
    pub statuses: Vec<(u16, u64)>,
    /// Ends the connection after so many bytes of a body, once for each number.
    pub cuts: Vec<usize>,
    /// What is sent in place of the content that was promised.
    pub sent: Option<Vec<u8>>,
}

/// A repository.
#[derive(Clone, Default)]
pub struct Repository {
    /// The commits that branches and tags are.
    pub references: HashMap<String, String>,
    /// Files by commit and name.
    pub files: HashMap<(String, String), HubFile>,
    pub gated: bool,
    pub private: bool,
    /// Where it is now, if it was renamed.
    pub renamed: Option<String>,
    /// Statuses to answer questions with first, each with a further header.
    pub statuses: Vec<(u16, &'static str)>,
    /// Headers that are left out of answers, in lower case.
    pub without: Vec<&'static str>,
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Whether it came to the second server.
    pub second: bool,
    pub path: String,
    /// The value of `Range`, or nothing.
    pub range: String,
    /// The value of `Authorization`, or nothing.
    pub authorization: String,
}

#[derive(Default)]
struct State {
    repositories: HashMap<String, Repository>,
    requests: Vec<Request>,
    second: String,
}

/// Both servers, which live as long as the test's process.
pub struct HubServer {
    pub address: String,
    state: Arc<Mutex<State>>,
}

/// Makes a small file.
pub fn small(content: impl Into<Vec<u8>>) -> HubFile {
    HubFile { content: content.into(), ..HubFile::default() }
}

/// Makes a large file.
pub fn large(content: impl Into<Vec<u8>>) -> HubFile {
    HubFile { large: true, ..small(content) }
}

/// Makes a repository whose `main` is [`COMMIT`].
pub fn repository(files: &[(&str, HubFile)]) -> Repository {
    let mut repository = Repository::default();
    repository.commit(COMMIT, files);
    repository.references.insert("main".into(), COMMIT.into());
    repository
}

impl Repository {
    /// Adds files at a commit.
    pub fn commit(&mut self, commit: &str, files: &[(&str, HubFile)]) {
        for (name, file) in files {
            self.files.insert((commit.to_owned(), name.to_string()), file.clone());
        }
    }
}

impl HubServer {
    /// Starts to serve repositories by their names.
    pub fn new(repositories: &[(&str, Repository)]) -> Self {
        let repositories =
            repositories.iter().map(|(name, repository)| (name.to_string(), repository.clone()));
        let state = State { repositories: repositories.collect(), ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let second = serve(state.clone(), true);
        state.lock().unwrap().second = second;
        Self { address: serve(state.clone(), false), state }
    }

    /// Changes a repository.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Repository)) {
        change(self.state.lock().unwrap().repositories.entry(name.to_owned()).or_default());
    }

    /// Changes a file at [`COMMIT`].
    pub fn change_file(&self, name: &str, file: &str, change: impl FnOnce(&mut HubFile)) {
        self.change(name, |repository| {
            change(repository.files.get_mut(&(COMMIT.to_owned(), file.to_owned())).unwrap())
        });
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }

    /// The requests so far that loaded a file, by the end of their path and their range.
    pub fn loads(&self) -> Vec<(String, String)> {
        let loads = self.requests().into_iter().filter(|request| request.method == "GET");
        // What the first server redirects is counted where it is sent.
        let state = self.state.lock().unwrap();
        loads
            .filter(|request| request.second || !state.is_large(&request.path))
            .map(|request| (file_name(&request.path), request.range))
            .collect()
    }
}

impl State {
    fn is_large(&self, path: &str) -> bool {
        let name = file_name(path);
        self.repositories
            .values()
            .any(|repository| repository.files.iter().any(|((_, other), file)| *other == name && file.large))
    }
}

fn file_name(path: &str) -> String {
    path.split('?').next().and_then(|path| path.rsplit('/').next()).unwrap_or_default().to_owned()
}

fn serve(state: Arc<Mutex<State>>, second: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let state = state.clone();
            // Whoever goes away in the middle, as a killed process does, ends an answer and no more.
            std::thread::spawn(move || drop(answer(stream, &state, second)));
        }
    });
    address
}

/// Status, headers, body, and how much of the body is sent.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
}

impl Answer {
    fn new(status: u16, headers: Vec<(&'static str, String)>) -> Self {
        Self { status, headers, body: Vec::new(), cut: None }
    }

    fn refusal(status: u16, code: &str) -> Self {
        Self::new(status, vec![("X-Error-Code", code.to_owned()), ("X-Error-Message", "told so".to_owned())])
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>, second: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let get = |name: &str| headers.get(name).cloned().unwrap_or_default();
    let request = Request { method, second, path, range: get("range"), authorization: get("authorization") };
    let answer = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        if second { send_large(&mut state, &request) } else { resolve(&mut state, &request) }
    };
    let mut head = format!("HTTP/1.1 {} Told So\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !answer.headers.iter().any(|(name, _)| *name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len()).min(answer.body.len())])
}

/// Answers `/NAME/resolve/REVISION/FILE`.
fn resolve(state: &mut State, request: &Request) -> Answer {
    let Some((name, rest)) = request.path.trim_start_matches('/').split_once("/resolve/") else {
        return Answer::refusal(404, "RepoNotFound");
    };
    let (revision, file) = rest.split_once('/').unwrap_or((rest, ""));
    let (revision, second) = (revision.replace("%2F", "/"), state.second.clone());
    let has_token = request.authorization == format!("Bearer {TOKEN}");
    let Some(repository) = state.repositories.get_mut(name) else {
        // Whoever is not known does not learn whether there is one.
        return Answer::refusal(if has_token { 404 } else { 401 }, "RepoNotFound");
    };
    if !request.authorization.is_empty() && !has_token {
        return Answer::new(
            401,
            vec![("X-Error-Message", "Invalid credentials in Authorization header".into())],
        );
    }
    if repository.private && !has_token {
        return Answer::refusal(401, "RepoNotFound");
    }
    if let Some(renamed) = &repository.renamed {
        return Answer::new(307, vec![("Location", format!("/{renamed}/resolve/{revision}/{file}"))]);
    }
    if !repository.statuses.is_empty() {
        let (status, header) = repository.statuses.remove(0);
        let header = header.split_once(": ").map(|(name, value)| (name, value.to_owned()));
        return Answer::new(status, header.into_iter().collect());
    }
    if repository.gated && request.authorization.is_empty() {
        return Answer::refusal(401, "GatedRepo");
    }
    let is_commit = repository.files.keys().any(|(commit, _)| *commit == revision);
    let commit = repository.references.get(&revision).cloned().or(is_commit.then_some(revision));
    let Some(commit) = commit else { return Answer::refusal(404, "RevisionNotFound") };
    let without = repository.without.clone();
    let Some(found) = repository.files.get_mut(&(commit.clone(), file.to_owned())) else {
        return Answer::refusal(404, "EntryNotFound");
    };
    let mut answer = if found.large {
        Answer::new(
            302,
            vec![
                ("Location", format!("{second}/{name}/{commit}/{file}?X-Signature=secret")),
                ("X-Linked-Etag", format!("\"{}\"", hexadecimal(&Sha256::digest(&found.content)))),
                ("X-Linked-Size", found.content.len().to_string()),
                ("ETag", "\"of-the-redirect\"".into()),
            ],
        )
    } else {
        let blob = [format!("blob {}\0", found.content.len()).as_bytes(), &found.content[..]].concat();
        let mut answer = if request.method == "HEAD" {
            Answer::new(200, vec![("Content-Length", found.content.len().to_string())])
        } else {
            send(found, &request.range)
        };
        answer.headers.push(("ETag", format!("\"{}\"", hexadecimal(&Sha1::digest(blob)))));
        answer
    };
    answer.headers.push(("X-Repo-Commit", commit));
    answer.headers.retain(|(name, _)| !without.contains(&name.to_lowercase().as_str()));
    answer
}

/// Answers `/NAME/COMMIT/FILE?SIGNATURE`, as a store does that takes no second kind of proof beside the signature.
fn send_large(state: &mut State, request: &Request) -> Answer {
    let path = request.path.split('?').next().unwrap_or_default().trim_start_matches('/');
    if !request.authorization.is_empty() {
        return Answer::new(400, Vec::new());
    }
    let mut parts = path.rsplitn(3, '/');
    let (file, commit, name) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
    let file = state.repositories.get_mut(name).unwrap().files.get_mut(&(commit.to_owned(), file.to_owned()));
    let mut answer = send(file.unwrap(), &request.range);
    // A store has its own names for versions, and each of its machines another one.
    answer.headers.push(("ETag", format!("\"store-{}\"", state.requests.len())));
    answer
}

fn send(file: &mut HubFile, range: &str) -> Answer {
    if !file.statuses.is_empty() {
        let (status, wait) = file.statuses.remove(0);
        return Answer::new(status, vec![("Retry-After", wait.to_string())]);
    }
    let content = file.sent.as_ref().unwrap_or(&file.content);
    let start =
        range.strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
    let mut answer = match start {
        Some(start) if start >= content.len() => return Answer::new(416, Vec::new()),
        Some(start) => {
            let of = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
            Answer::new(206, vec![("Content-Range", of)])
        }
        None => Answer::new(200, Vec::new()),
    };
    answer.body = content[start.unwrap_or(0)..].to_vec();
    answer.cut = (!file.cuts.is_empty()).then(|| file.cuts.remove(0));
    answer
}

/// Writes a hash as hexadecimal digits.
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

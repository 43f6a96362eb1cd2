//! A small HTTP/1.1 server on this machine that answers as it is told, for tests of transfers.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a file is answered with.
#[derive(Clone, Default)]
pub struct Page {
    pub content: Vec<u8>,
    /// Statuses to answer with first, one a request, each with a `Retry-After`.
    pub statuses: Vec<(u16, u64)>,
    /// Ends the connection after so many bytes of a body, once for each number.
    pub cuts: Vec<usize>,
    /// Ignores `Range`.
    pub whole_only: bool,
    /// The version of the file; `If-Range` with another one gets the whole file.
    pub etag: String,
    /// Sends 1000 bytes, then waits for so long after each further 1000.
    pub pause: Duration,
}

/// A request as it came: the path, and the value of `Range`, or nothing.
pub type Request = (String, String);

/// A server that lives as long as the test's process.
pub struct Server {
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    pages: Arc<Mutex<HashMap<String, Page>>>,
}

impl Server {
    /// Starts to serve pages by their paths.
    pub fn new(pages: &[(&str, Page)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let pages = pages.iter().map(|(path, page)| (path.to_string(), page.clone())).collect();
        let server = Self { address, requests, pages: Arc::new(Mutex::new(pages)) };
        let (requests, pages) = (server.requests.clone(), server.pages.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (requests, pages) = (requests.clone(), pages.clone());
                // Whoever goes away in the middle, as a killed process does, ends an answer and no more.
                std::thread::spawn(move || drop(answer(stream, &requests, &pages)));
            }
        });
        server
    }

    /// Puts another page in the place of one.
    pub fn replace(&self, path: &str, page: Page) {
        self.pages.lock().unwrap().insert(path.to_string(), page);
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(
    mut stream: TcpStream,
    requests: &Mutex<Vec<Request>>,
    pages: &Mutex<HashMap<String, Page>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let range = headers.get("range").cloned().unwrap_or_default();
    requests.lock().unwrap().push((path.clone(), range.clone()));
    let mut all = pages.lock().unwrap();
    let Some(page) = all.get_mut(&path) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    if !page.statuses.is_empty() {
        let (status, wait) = page.statuses.remove(0);
        let head = format!("HTTP/1.1 {status} Told So\r\nRetry-After: {wait}\r\nContent-Length: 0\r\n");
        return stream.write_all((head + "Connection: close\r\n\r\n").as_bytes());
    }
    let cut = (!page.cuts.is_empty()).then(|| page.cuts.remove(0));
    let page = page.clone();
    drop(all);
    let same = headers.get("if-range").is_none_or(|validator| *validator == page.etag);
    let start =
        range.strip_prefix("bytes=").and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
    let length = page.content.len();
    let (start, head) = match start.filter(|_| same && !page.whole_only) {
        Some(start) if start >= length => {
            return stream.write_all(b"HTTP/1.1 416 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        Some(start) => {
            let range = format!("Content-Range: bytes {start}-{}/{length}", length - 1);
            (start, format!("HTTP/1.1 206 Partial Content\r\n{range}\r\n"))
        }
        None => (0, "HTTP/1.1 200 OK\r\n".to_owned()),
    };
    let etag = if page.etag.is_empty() { String::new() } else { format!("ETag: {}\r\n", page.etag) };
    let body = &page.content[start..];
    let head = format!("{head}{etag}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    let body = &body[..cut.unwrap_or(body.len()).min(body.len())];
    if page.pause.is_zero() {
        return stream.write_all(body);
    }
    for block in body.chunks(1000) {
        stream.write_all(block)?;
        std::thread::sleep(page.pause);
    }
    Ok(())
}

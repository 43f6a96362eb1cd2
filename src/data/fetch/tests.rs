//! Whole fetches against a server on this machine.

use super::archive::tests::archive;
use std::time::Duration;

use super::*;
use crate::data::Split;
use crate::values::hexadecimal;
use server::{Page, Server};
use sha2::{Digest, Sha256};

#[path = "../../../tests/cli/server.rs"]
mod server;

const PATIENCE: Patience = Patience { attempts: 4, first_wait: Duration::from_secs(1), sleep: |_| {} };

/// A data set of one archive that a server has.
struct Setting {
    server: Server,
    folder: tempfile::TempDir,
    download: Download,
}

fn rows() -> Vec<u8> {
    let mut zip = archive(&[("RTE/train.tsv", "train"), ("RTE/dev.tsv", "dev"), ("RTE/junk", "junk")]);
    // A comment at the end, behind which nothing stands, makes it long enough to be cut.
    let comment = vec![b'#'; 3000];
    let length = zip.len();
    zip[length - 2..].copy_from_slice(&3000_u16.to_le_bytes());
    zip.extend(comment);
    zip
}

fn page(content: Vec<u8>) -> Page {
    Page { content, etag: "\"one\"".into(), ..Page::default() }
}

fn setting(change: impl FnOnce(&mut Page)) -> Setting {
    let mut page = page(rows());
    let (bytes, sha256) = (page.content.len(), hexadecimal(&Sha256::digest(&page.content)));
    change(&mut page);
    let server = Server::new(&[("/some/RTE.zip?download=1", page)]);
    let yaml = format!(
        "{{tasks: [rte], folder: RTE, sources: [{{url: 'https://example.org/some/RTE.zip?download=1', bytes: {bytes}, \
         sha256: {sha256}, within: RTE, files: [train.tsv, dev.tsv], optional: [LICENSE.txt]}}]}}"
    );
    Setting { server, folder: tempfile::tempdir().unwrap(), download: serde_yaml::from_str(&yaml).unwrap() }
}

impl Setting {
    fn fetch(&self) -> (Result<Fetched>, Vec<String>) {
        let card = TaskCard::builtin("rte").unwrap();
        let options =
            FetchOptions { to: self.folder.path().into(), endpoint: Some(self.server.address.clone() + "/") };
        let mut events = Vec::new();
        let mut note = |event: FetchEvent| match event {
            FetchEvent::Transfer(TransferEvent::Started { start, .. }) => {
                events.push(format!("from {start}"))
            }
            FetchEvent::Transfer(TransferEvent::Waiting { reason, .. }) => events.push(reason.to_owned()),
            FetchEvent::Transfer(TransferEvent::Received(_)) | FetchEvent::Unpacking => {}
        };
        let result = self.download.fetch_with(&PATIENCE, &card, &options, &mut note);
        (result, events)
    }

    fn refused(&self) -> String {
        let error = self.fetch().0.unwrap_err();
        assert_eq!(error.exit_code(), 3, "{error}");
        assert!(!self.folder.path().join("RTE").exists());
        assert!(!error.to_string().contains('\n'));
        error.to_string()
    }

    /// The names in a folder under the one that is fetched to.
    fn files(&self, name: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.folder.path().join(name)) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn assert_fetched(&self) {
        assert_eq!(self.files(""), ["RTE"]);
        assert_eq!(self.files("RTE"), ["SOURCE.txt", "dev.tsv", "train.tsv"]);
        assert_eq!(std::fs::read_to_string(self.folder.path().join("RTE/train.tsv")).unwrap(), "train");
        assert!(self.download.is_complete(self.folder.path()));
    }

    fn ranges(&self) -> Vec<String> {
        self.server.requests().into_iter().map(|(_, range)| range).collect()
    }
}

#[test]
fn a_data_set_is_fetched_once() {
    let setting = setting(|_| {});
    let (result, events) = setting.fetch();
    assert_eq!((result.unwrap(), events), (Fetched::New, vec!["from 0".to_owned()]));
    setting.assert_fetched();
    let receipt = std::fs::read_to_string(setting.folder.path().join("RTE/SOURCE.txt")).unwrap();
    assert!(
        receipt.contains("Licence: distributed by") && receipt.contains("https://example.org/some/RTE.zip")
    );
    assert_eq!(setting.fetch().0.unwrap(), Fetched::Already);
    assert_eq!(setting.ranges(), [""]);
    // What somebody removed comes back.
    std::fs::remove_file(setting.folder.path().join("RTE/dev.tsv")).unwrap();
    assert_eq!(setting.fetch().0.unwrap(), Fetched::New);
    setting.assert_fetched();
}

#[test]
fn a_cut_transfer_goes_on_where_it_was() {
    let setting = setting(|page| page.cuts = vec![1000, 500]);
    let (result, events) = setting.fetch();
    assert_eq!(result.unwrap(), Fetched::New);
    setting.assert_fetched();
    assert_eq!(setting.ranges(), ["", "bytes=1000-", "bytes=1500-"]);
    assert!(events[1].contains("cut off after 1000 of"), "{events:?}");
    assert_eq!((events[2].as_str(), events[4].as_str()), ("from 1000", "from 1500"));
}

#[test]
fn what_is_there_survives_giving_up() {
    let setting = setting(|page| page.cuts = vec![1000, 0, 0, 0]);
    let message = setting.refused();
    assert!(message.contains("gave up after 4 attempts: 1000 of"), "{message}");
    assert!(message.contains("the same command goes on from there"), "{message}");
    assert_eq!(setting.fetch().0.unwrap(), Fetched::New);
    assert_eq!(setting.ranges().last().unwrap(), "bytes=1000-");
    setting.assert_fetched();
}

#[test]
fn a_server_without_ranges_and_a_changed_file_start_anew() {
    let setting_without = setting(|page| (page.cuts, page.whole_only) = (vec![1000], true));
    let (result, events) = setting_without.fetch();
    assert_eq!(result.unwrap(), Fetched::New);
    assert_eq!((setting_without.ranges()[1].as_str(), events[2].as_str()), ("bytes=1000-", "from 0"));
    setting_without.assert_fetched();

    let changed = setting(|page| {
        (page.content[10], page.cuts, page.etag) = (b'!', vec![1000, 0, 0, 0], "\"old\"".into());
    });
    changed.refused();
    changed.server.replace("/some/RTE.zip?download=1", page(rows()));
    let (result, events) = changed.fetch();
    assert_eq!((result.unwrap(), events), (Fetched::New, vec!["from 0".to_owned()]));
    changed.assert_fetched();
}

#[test]
fn a_part_that_is_too_long_or_asks_for_too_much_is_dropped() {
    let setting = setting(|_| {});
    let part = setting.folder.path().join(".fetching/RTE-RTE.zip.part");
    std::fs::create_dir_all(part.parent().unwrap()).unwrap();
    std::fs::write(&part, vec![0; rows().len() + 1]).unwrap();
    assert_eq!(setting.fetch().0.unwrap(), Fetched::New);
    assert_eq!(setting.ranges(), [""]);
    setting.assert_fetched();
}

#[test]
fn a_file_of_the_wrong_length_or_content_is_refused_and_removed() {
    for (change, parts) in [
        (
            (|page: &mut Page| page.content.push(0)) as fn(&mut Page),
            ["but", "were published, so it is a different file"],
        ),
        (|page| page.content.truncate(100), ["has 100 bytes", "the download was discarded"]),
        (|page| page.content[0] ^= 1, ["has the SHA-256", "the file was removed"]),
    ] {
        let setting = setting(change);
        let message = setting.refused();
        for part in parts {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert_eq!(setting.files(".fetching"), ["RTE.lock"]);
        assert_eq!(setting.ranges().len(), 1, "no second attempt helps");
    }
}

#[test]
fn refusals_are_told_apart_and_not_tried_again() {
    for (status, expected) in
        [(401, "refuses access (401"), (403, "refuses access (403"), (404, "no such file (404")]
    {
        let setting = setting(|page| page.statuses = vec![(status, 0)]);
        let message = setting.refused();
        assert!(message.contains(expected) && message.contains("CHILD_TUNING_DATA_ENDPOINT"), "{message}");
        assert_eq!(setting.ranges().len(), 1);
    }
}

#[test]
fn a_busy_server_is_asked_again() {
    let busy = setting(|page| page.statuses = vec![(429, 0), (500, 0), (503, 0)]);
    let (result, events) = busy.fetch();
    assert_eq!(result.unwrap(), Fetched::New);
    assert!(events[0].contains("answers 429") && events[2].contains("answers 503"), "{events:?}");
    busy.assert_fetched();
    let broken = setting(|page| page.statuses = vec![(500, 0); 4]);
    assert!(broken.refused().contains("answers 500 Internal Server Error; gave up after 4 attempts"));
    let patient = setting(|page| page.statuses = vec![(429, 3600)]);
    assert!(patient.refused().contains("asks to wait 3600 s"));
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let setting = setting(|_| {});
    let card = TaskCard::builtin("rte").unwrap();
    let fetch = |endpoint: &str| {
        let options = FetchOptions { to: setting.folder.path().into(), endpoint: Some(endpoint.into()) };
        setting.download.fetch_with(&PATIENCE, &card, &options, &mut |_| {}).unwrap_err()
    };
    // Bound and dropped: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let message = fetch(&format!("http://127.0.0.1:{port}")).to_string();
    assert!(message.contains("no answer") && message.contains("try again later"), "{message}");
    let error = fetch("127.0.0.1:80");
    assert!(error.exit_code() == 2 && error.to_string().contains("write it as https://"), "{error}");
}

#[test]
fn an_archive_that_leads_out_is_refused() {
    let mut setting = setting(|page| page.content = archive(&[("RTE/train.tsv", "a"), ("../dev.tsv", "b")]));
    let content = archive(&[("RTE/train.tsv", "a"), ("../dev.tsv", "b")]);
    setting.download.sources[0].bytes = content.len() as u64;
    setting.download.sources[0].sha256 = hexadecimal(&Sha256::digest(&content));
    let error = setting.fetch().0.unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("`../dev.tsv`, which leads out"), "{error}");
    assert!(!setting.folder.path().join("dev.tsv").exists() && !setting.folder.path().join("RTE").exists());
}

#[test]
fn a_folder_of_somebody_else_and_a_fetch_at_work_are_left_alone() {
    let setting = setting(|_| {});
    let own = setting.folder.path().join("RTE/train.tsv");
    std::fs::create_dir_all(own.parent().unwrap()).unwrap();
    std::fs::write(&own, "mine").unwrap();
    let error = setting.fetch().0.unwrap_err();
    assert!(
        error.exit_code() == 2 && error.to_string().contains("was not fetched by this program"),
        "{error}"
    );
    assert_eq!(std::fs::read_to_string(&own).unwrap(), "mine");
    std::fs::remove_file(&own).unwrap();

    let workshop = setting.folder.path().join(WORKSHOP);
    std::fs::create_dir_all(&workshop).unwrap();
    let lock = setting.download.lock(&workshop).unwrap();
    let message = setting.fetch().0.unwrap_err().to_string();
    assert!(message.contains("another process is fetching RTE"), "{message}");
    assert!(setting.ranges().is_empty());
    drop(lock);
    assert_eq!(setting.fetch().0.unwrap(), Fetched::New);
}

#[test]
fn the_list_of_downloads_is_sound_and_fits_the_cards() {
    let mut folders = BTreeSet::new();
    for download in DOWNLOADS.iter() {
        assert!(folders.insert(&download.folder), "{} is listed twice", download.folder);
        let mut files: Vec<PathBuf> = Vec::new();
        for source in &download.sources {
            assert!(source.bytes > 0 && source.url.starts_with("http"), "{}", source.url);
            assert!(
                source.sha256.len() == 64 && source.sha256.bytes().all(|digit| digit.is_ascii_hexdigit())
            );
            assert!(source.within.is_some() || (source.files.len() == 1 && source.optional.is_empty()));
            assert_eq!(source.within.is_some(), source.url.contains(".zip"), "{}", source.url);
            files.extend(source.files.iter().map(PathBuf::from));
        }
        for card in download.tasks.iter().filter_map(|task| TaskCard::builtin(task)) {
            assert!(card.folders.contains(&download.folder), "{}: {:?}", card.name, card.folders);
            for (split, choices) in &card.splits {
                let is_fetched = |file: &PathBuf| files.contains(file);
                assert!(
                    choices.iter().any(|choice| choice.files.iter().all(is_fetched)),
                    "{} {split}",
                    card.name
                );
            }
        }
    }
    for name in TaskCard::builtin_names() {
        let card = TaskCard::builtin(name).unwrap();
        assert!(Download::of(name).is_some(), "{name} cannot be fetched");
        assert!(card.published.contains_key(&Split::Test), "{name} has no published counts");
    }
}

#[test]
fn tasks_that_share_a_data_set_fetch_it_once() {
    let card = |name: &str| TaskCard { name: name.to_owned(), ..TaskCard::builtin("rte").unwrap() };
    let cards = [card("mnli"), card("rte"), card("mnli_mm")];
    let downloads = downloads_of(&cards).unwrap();
    assert_eq!(
        downloads.iter().map(|(_, download)| download.folder.as_str()).collect::<Vec<_>>(),
        ["MNLI", "RTE"]
    );
    assert_eq!(downloads[0].1.bytes(), 312_783_507);
    let own = [card("own")];
    assert!(downloads_of(&own).unwrap_err().to_string().contains("`own` is not published anywhere"));
}

#[test]
fn an_endpoint_takes_the_place_of_scheme_and_host() {
    let url = "https://zenodo.org/record/1/files/SICK.zip?download=1";
    assert_eq!(relocated(url, None).unwrap(), url);
    let moved = relocated(url, Some("http://127.0.0.1:8000/mirror/")).unwrap();
    assert_eq!(moved, "http://127.0.0.1:8000/mirror/record/1/files/SICK.zip?download=1");
}

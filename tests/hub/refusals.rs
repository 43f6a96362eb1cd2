//! What cannot be had: each in one sentence that says what helps.

use child_tuning::error::Error;

use crate::server::{COMMIT, HubFile, Repository, small};
use crate::setting::{NAME, Setting, files, weights, without};

#[test]
fn a_model_that_is_not_there_is_told() {
    let setting = Setting::with(&[]);
    let message = setting.refused(2);
    for part in [
        &format!("{} has no model `owner/tiny`, or it is private and needs a token", setting.server.address),
        "/settings/tokens in HF_TOKEN or the file ",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    setting.write_token("hf_right");
    let known = setting.refused(2);
    assert!(
        known.contains("or it is private and the token in ") && known.contains("may not read it"),
        "{known}"
    );
    assert_eq!(setting.server.requests().len(), 2, "no second attempt helps");
}

#[test]
fn a_gated_model_says_where_a_token_goes() {
    let setting = Setting::new(|repository| repository.gated = true);
    let message = setting.refused(3);
    let address = &setting.server.address;
    for part in [
        format!(
            "model `owner/tiny` is gated: accept its terms at {address}/owner/tiny, and put a token from"
        ),
        format!("{address}/settings/tokens into HF_TOKEN or the file "),
    ] {
        assert!(message.contains(&part), "{part}: {message}");
    }
    // A token that is known but was not let in.
    setting.write_token("hf_right");
    setting.server.change(NAME, |repository| repository.statuses = vec![(403, "X-Error-Code: GatedRepo")]);
    let message = setting.refused(3);
    assert!(
        message.contains("is gated, and the token in ") && message.contains("has no access"),
        "{message}"
    );
}

#[test]
fn a_token_that_is_not_taken_is_named_by_its_place() {
    let mut setting = Setting::new(|_| {});
    setting.write_token("hf_wrong");
    let message = setting.refused(3);
    assert!(message.contains("does not take the token in ") && message.contains("/token (401)"), "{message}");
    setting.hub.token = Some("hf_wrong_too".into());
    let message = setting.refused(3);
    assert!(message.contains("does not take the token in HF_TOKEN (401)"), "{message}");
    (setting.hub.token, setting.hub.token_file) = (None, None);
    let forbidden = "X-Error-Message: this network is not allowed";
    setting.server.change(NAME, |repository| repository.statuses = vec![(403, forbidden)]);
    let message = setting.refused(3);
    assert!(
        message.contains("refuses access to model `owner/tiny` (403: this network is not allowed)"),
        "{message}"
    );
    assert!(message.contains("settings/tokens in HF_TOKEN must be allowed"), "{message}");
}

#[test]
fn what_a_repository_lacks_is_named() {
    let setting = Setting::new(|_| {});
    let message = setting.refused_as("owner/tiny@v9", 2);
    assert!(message.contains("model `owner/tiny` has no revision `v9`"), "{message}");
    let message = |missing: &[&str]| {
        let setting = Setting::with(&[(NAME, without(missing))]);
        let message = setting.refused(2);
        // Nothing large is loaded where something is missing that shows before.
        assert!(setting.server.loads().iter().all(|(name, _)| name != "model.safetensors"));
        message
    };
    let no_config = message(&["config.json"]);
    assert!(no_config.contains("has no config.json of a model `owner/tiny`"), "{no_config}");
    let no_tokenizer = message(&["tokenizer.json", "vocab.txt"]);
    assert!(
        no_tokenizer.contains("owner/tiny: has no tokenizer (tokenizer.json, vocab.txt"),
        "{no_tokenizer}"
    );
    let no_weights = message(&["model.safetensors", "pytorch_model.bin"]);
    assert!(
        no_weights.contains("owner/tiny: has no weights that can be read (model.safetensors"),
        "{no_weights}"
    );
}

#[test]
fn an_index_of_weights_may_name_files_beside_it_only() {
    let with_index = |index: &str| {
        let mut repository = without(&["model.safetensors"]);
        repository.commit(COMMIT, &[("model.safetensors.index.json", small(index))]);
        Setting::with(&[(NAME, repository)])
    };
    for name in ["../../../evil", "/etc/passwd", "sub/model.safetensors", ".hidden"] {
        let setting = with_index(&format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#));
        let message = setting.refused(2);
        assert!(message.contains("names the file") && message.contains(name), "{message}");
        assert!(setting.server.requests().iter().all(|request| !request.path.contains(name)));
    }
    assert!(with_index("[1, 2").refused(2).contains("is no index of shards"));
    let absent = with_index(r#"{"weight_map": {"a": "model-1.safetensors"}}"#).refused(2);
    assert!(absent.contains("has no model-1.safetensors, which belongs to its weights"), "{absent}");
}

#[test]
fn a_file_of_another_length_or_content_is_refused_and_removed() {
    let shorter = weights()[..100].to_vec();
    let longer = [weights(), vec![0]].concat();
    let mut other = weights();
    other[12_000] ^= 1;
    for (sent, part) in [
        (shorter, "has 100 bytes, but 12800 were published"),
        (longer, "has 12801 bytes, but 12800 were published"),
        (other, "has the SHA-256 "),
    ] {
        let setting = Setting::new(|_| {});
        setting.server.change_file(NAME, "model.safetensors", |file| file.sent = Some(sent.clone()));
        let message = setting.refused(3);
        assert!(message.contains("model.safetensors: ") && message.contains(part), "{message}");
        assert!(message.contains("HF_ENDPOINT names a mirror"), "{message}");
        assert!(!setting.blob(&weights()).exists());
        assert!(setting.names("blobs").iter().all(|name| !name.contains("incomplete")));
        let loads = setting.server.loads().into_iter().filter(|(name, _)| name == "model.safetensors");
        assert_eq!(loads.count(), 1, "no second attempt helps");
        setting.server.change_file(NAME, "model.safetensors", |file| file.sent = None);
        setting.fetch().result.unwrap();
        setting.assert_whole();
    }
    let setting = Setting::new(|_| {});
    setting.server.change_file(NAME, "vocab.txt", |file| file.sent = Some("[PAX]\n".into()));
    let message = setting.refused(3);
    assert!(
        message.contains("has the git SHA-1 ")
            && message.contains("7d59d1552e25259c1631f1f59a861832f3137588")
    );
}

/// Changes a repository.
type Change = fn(&mut Repository);

#[test]
fn a_server_that_is_not_like_the_hub_is_found_out() {
    let changes: [(Change, &str); 5] = [
        (|repository| repository.without = vec!["x-repo-commit"], "names no commit (X-Repo-Commit)"),
        (
            |repository| drop(repository.references.insert("main".into(), "../../evil".into())),
            "has no config.json",
        ),
        (
            |repository| repository.without = vec!["etag", "x-linked-etag"],
            "gives no SHA-256 and no git SHA-1",
        ),
        (|repository| repository.without = vec!["x-linked-size"], "does not say how long the file is"),
        (|repository| repository.renamed = Some(NAME.into()), "redirects in a circle"),
    ];
    for (change, part) in changes {
        let setting = Setting::new(change);
        let error = setting.fetch().result.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert!(!setting.blob(&weights()).exists());
    }
    // A commit that would lead out of the cache.
    let setting = Setting::new(|repository| {
        repository.commit("../../evil", &files());
        repository.references.insert("main".into(), "../../evil".into());
    });
    assert!(setting.refused(3).contains("names no commit"));
    assert!(!setting.hub.cache.exists());
}

#[test]
fn a_busy_server_is_waited_for_as_long_as_it_asks() {
    let setting = Setting::new(|repository| {
        repository.statuses = vec![(429, "Retry-After: 7"), (503, ""), (429, "RateLimit: \"api\";r=0;t=55")];
    });
    setting.server.change_file(NAME, "model.safetensors", |file| file.statuses = vec![(429, 11), (500, 13)]);
    let fetched = setting.fetch();
    fetched.result.unwrap();
    setting.assert_whole();
    let waits: Vec<_> = fetched.events.iter().filter(|event| event.starts_with("wait")).collect();
    let starts = [
        "wait 7: the server answers 429",
        "wait 2: the server answers 503",
        "wait 56: ",
        "wait 11: ",
        "wait 13: ",
    ];
    assert_eq!(waits.len(), starts.len(), "{waits:?}");
    for (wait, start) in waits.iter().zip(starts) {
        assert!(wait.starts_with(start), "{start}: {waits:?}");
    }

    let stubborn = Setting::new(|repository| repository.statuses = vec![(429, "Retry-After: 2"); 4]);
    let message = stubborn.refused(3);
    assert!(
        message.contains("answers 429 Too Many Requests; gave up after 4 attempts: try again later"),
        "{message}"
    );
    let broken = Setting::new(|repository| repository.statuses = vec![(502, ""); 4]);
    assert!(broken.refused(3).contains("answers 502 Bad Gateway; gave up after 4 attempts"));
    let closed = Setting::new(|repository| repository.statuses = vec![(429, "Retry-After: 3600")]);
    assert!(closed.refused(3).contains("the server asks to wait 3600 s: try again later"));
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let mut setting = Setting::new(|_| {});
    // Bound and dropped: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    setting.hub.endpoint = format!("http://127.0.0.1:{port}");
    let fetched = setting.fetch();
    let waits: Vec<_> = fetched.events.iter().map(|event| &event[..16]).collect();
    assert_eq!(waits, ["wait 1: no answe", "wait 2: no answe", "wait 4: no answe"]);
    let message = fetched.result.unwrap_err().to_string();
    assert!(message.contains("gave up after 4 attempts") && message.contains(&port.to_string()), "{message}");
}

#[test]
fn offline_takes_the_cache_or_says_what_to_put_where() {
    let mut setting = Setting::new(|_| {});
    setting.hub.offline = true;
    let message = setting.refused(2);
    let cache = setting.hub.cache.display().to_string();
    for part in [
        "owner/tiny: no such model folder, and it is not in the Hugging Face cache ",
        "HF_HUB_OFFLINE forbids the download: run `child-tuning model fetch owner/tiny` where there is a network",
        &format!("copy models--owner--tiny into {cache}, or put a Hugging Face folder"),
        "at models/owner/tiny",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(setting.server.requests().is_empty());
    setting.hub.offline = false;
    setting.fetch().result.unwrap();
    let requests = setting.server.requests().len();
    setting.hub.offline = true;
    assert_eq!(setting.fetch().result.unwrap().commit, COMMIT);
    assert_eq!(setting.server.requests().len(), requests);
    std::fs::remove_file(setting.blob(&weights())).unwrap();
    assert!(setting.refused(2).contains("lacks its weights"));
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let mut setting = Setting::new(|_| {});
    let file = setting.hub.cache.with_file_name("file");
    std::fs::write(&file, "").unwrap();
    setting.hub.cache = file.join("hub");
    let error = setting.fetch().result.unwrap_err();
    assert!(
        matches!(error, Error::Environment(_))
            && error.to_string().contains("name another place with HF_HOME")
    );
    assert_eq!(setting.server.loads(), [] as [(String, String); 0]);
}

/// Has no content, and is answered as every other file.
#[test]
fn an_empty_file_is_a_file() {
    let setting = Setting::new(|repository| repository.commit(COMMIT, &[("merges.txt", HubFile::default())]));
    setting.fetch().result.unwrap();
    let merges = setting.path("snapshots").join(COMMIT).join("merges.txt");
    assert_eq!(std::fs::read(merges).unwrap(), b"");
    assert!(setting.path("blobs/e69de29bb2d1d6434b8b29ae775ad8c2e48c5391").is_file());
}

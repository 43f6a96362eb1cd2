//! What is loaded, and what of it is there already.

use std::fs::OpenOptions;
use std::path::Path;

use child_tuning::error::Error;

use crate::server::{COMMIT, HubFile, TOKEN, large, small};
use crate::setting::{NAME, Setting, files, weights, without};

#[test]
fn a_model_lands_where_python_looks_and_is_loaded_once() {
    let setting = Setting::new(|_| {});
    let fetched = setting.fetch();
    assert_eq!(fetched.result.unwrap().commit, COMMIT);
    setting.assert_whole();
    let link = |name: &str| std::fs::read_link(setting.path("snapshots").join(COMMIT).join(name)).unwrap();
    // The second is what `git hash-object` says of the file.
    let weights_link = Path::new("../../blobs").join(setting.blob(&weights()).file_name().unwrap());
    assert_eq!(link("model.safetensors"), weights_link);
    assert_eq!(link("vocab.txt"), Path::new("../../blobs/7d59d1552e25259c1631f1f59a861832f3137588"));
    let mut loads = setting.server.loads();
    loads.sort();
    let names: Vec<&str> = loads.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]);
    assert!(setting.hub.cache.join(".locks/models--owner--tiny").is_dir());

    assert!(setting.fetch().events.is_empty());
    assert_eq!(setting.server.loads().len(), loads.len());
    // What is asked for after the first file is asked for at its commit.
    let asked = setting.server.requests();
    assert!(
        asked[1..]
            .iter()
            .all(|request| request.path.contains(COMMIT) || request.path.contains("config.json"))
    );
}

#[test]
fn weights_come_in_one_form_only() {
    let index = r#"{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}"#;
    let shards = || {
        vec![
            ("model.safetensors.index.json", small(index)),
            ("model-1.safetensors", large(weights())),
            ("model-2.safetensors", large("the second")),
        ]
    };
    let loaded = |unwanted: &[&str], further: Vec<(&'static str, HubFile)>| {
        let mut repository = without(unwanted);
        repository.commit(COMMIT, &further);
        let setting = Setting::with(&[(NAME, repository)]);
        setting.fetch().result.unwrap();
        assert!(setting.hub.cached(&NAME.parse().unwrap()).is_some());
        let names = setting.server.loads().into_iter().map(|(name, _)| name);
        names.filter(|name| name.contains("model")).collect::<Vec<_>>()
    };
    let sharded = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"];
    assert_eq!(loaded(&[], shards()), ["model.safetensors"]);
    assert_eq!(loaded(&["model.safetensors"], shards()), sharded);
    assert_eq!(loaded(&["model.safetensors"], vec![]), ["pytorch_model.bin"]);
    let old_shards = vec![
        ("pytorch_model.bin.index.json", small(r#"{"weight_map": {"a": "model-1.bin"}}"#)),
        ("model-1.bin", large("the only")),
    ];
    assert_eq!(
        loaded(&["model.safetensors", "pytorch_model.bin"], old_shards),
        ["pytorch_model.bin.index.json", "model-1.bin"]
    );
}

#[test]
fn weights_that_python_chose_are_kept() {
    let setting = Setting::with(&[(NAME, without(&["model.safetensors"]))]);
    setting.fetch().result.unwrap();
    setting.server.change(NAME, |repository| repository.commit(COMMIT, &files()));
    let fetched = setting.fetch();
    fetched.result.unwrap();
    assert!(fetched.events.is_empty(), "{:?}", fetched.events);
}

#[test]
fn a_cut_transfer_goes_on_where_it_was() {
    let setting = Setting::new(|_| {});
    setting.server.change_file(NAME, "model.safetensors", |file| file.cuts = vec![5000, 2000]);
    setting.server.change_file(NAME, "vocab.txt", |file| file.cuts = vec![3]);
    let fetched = setting.fetch();
    fetched.result.unwrap();
    setting.assert_whole();
    let ranges = |name: &str| {
        let loads = setting.server.loads().into_iter().filter(|(other, _)| other == name);
        loads.map(|(_, range)| range).collect::<Vec<_>>()
    };
    assert_eq!(ranges("model.safetensors"), ["", "bytes=5000-", "bytes=7000-"]);
    assert_eq!(ranges("vocab.txt"), ["", "bytes=3-"]);
    let waits: Vec<_> = fetched.events.iter().filter(|event| event.starts_with("wait")).collect();
    assert!(waits[0].starts_with("wait 1: cut off after 3 of 6 bytes"), "{waits:?}");
    assert!(waits[1].starts_with("wait 1: cut off after 5000 of 12800 bytes"), "{waits:?}");
    assert!(waits[2].starts_with("wait 2: cut off after 7000 of 12800 bytes"), "{waits:?}");
}

#[test]
fn what_was_loaded_before_giving_up_is_gone_on_with() {
    let setting = Setting::new(|_| {});
    setting.server.change_file(NAME, "model.safetensors", |file| file.cuts = vec![5000, 0, 0, 0]);
    let message = setting.refused(3);
    assert!(message.contains("gave up after 4 attempts: 5000 of 12800 bytes are kept"), "{message}");
    assert!(!setting.path("refs").exists(), "a revision is noted when all of it is there");
    let fetched = setting.fetch();
    fetched.result.unwrap();
    assert_eq!(fetched.events, ["model.safetensors from 5000"]);
    setting.assert_whole();
}

#[test]
fn a_damaged_part_of_somebody_else_is_found_out_and_loaded_anew() {
    for damage in [vec![0; 5000], vec![0; 12800], vec![0; 12801]] {
        let setting = Setting::new(|_| {});
        std::fs::create_dir_all(setting.path("blobs")).unwrap();
        let part = setting.blob(&weights()).with_extension("incomplete");
        std::fs::write(&part, &damage).unwrap();
        setting.fetch().result.unwrap();
        setting.assert_whole();
        let whole = setting
            .server
            .loads()
            .into_iter()
            .filter(|load| *load == ("model.safetensors".into(), "".into()));
        assert_eq!(whole.count(), 1);
    }
}

#[test]
fn a_damaged_file_in_the_cache_is_replaced() {
    let setting = Setting::new(|_| {});
    setting.fetch().result.unwrap();
    let blob = setting.blob(&weights());
    let mut bytes = weights();
    bytes[7] ^= 1;
    for damaged in [&bytes[..], &bytes[..100]] {
        std::fs::write(&blob, damaged).unwrap();
        assert_eq!(setting.fetch().events, ["model.safetensors from 0"]);
        setting.assert_whole();
    }
    // A link that leads nowhere, and a file in the place of a link.
    let pointer = setting.path("snapshots").join(COMMIT).join("vocab.txt");
    for broken in [true, false] {
        std::fs::remove_file(&pointer).unwrap();
        if broken {
            std::os::unix::fs::symlink("../../blobs/nothing", &pointer).unwrap();
            assert!(setting.hub.cached(&NAME.parse().unwrap()).is_some(), "vocab.txt is not needed");
        } else {
            std::fs::write(&pointer, "[PAX]\n").unwrap();
        }
        assert!(setting.fetch().events.is_empty());
        setting.assert_whole();
    }
}

#[test]
fn revisions_are_looked_up_and_commits_are_for_ever() {
    let newer = "2".repeat(40);
    let setting = Setting::new(|repository| {
        repository.commit(&"2".repeat(40), &files());
        repository.commit(&"2".repeat(40), &[("model.safetensors", large("newer weights"))]);
        repository.references.insert("v1".into(), COMMIT.into());
        repository.references.insert("refs/pr/7".into(), "2".repeat(40));
    });
    let commit_of = |name: &str| setting.fetch_as(name).result.unwrap().commit;
    assert_eq!(commit_of("owner/tiny@v1"), COMMIT);
    assert_eq!(commit_of("owner/tiny@refs/pr/7"), newer);
    assert_eq!(commit_of(NAME), COMMIT);
    assert_eq!(std::fs::read_to_string(setting.path("refs/refs/pr/7")).unwrap(), newer);
    setting
        .server
        .change(NAME, |repository| drop(repository.references.insert("main".into(), "2".repeat(40))));
    // What is cached stays what it is until somebody fetches.
    assert_eq!(setting.hub.cached(&NAME.parse().unwrap()).unwrap().commit, COMMIT);
    let loads = setting.server.loads().len();
    assert_eq!(commit_of(NAME), newer);
    assert_eq!(setting.server.loads().len(), loads, "both commits are there");
    assert_eq!(setting.hub.cached(&NAME.parse().unwrap()).unwrap().commit, newer);
    let pinned = format!("owner/tiny@{COMMIT}");
    assert_eq!(setting.hub.cached(&pinned.parse().unwrap()).unwrap().commit, COMMIT);
    assert_eq!(commit_of(&pinned), COMMIT);
    let listed = setting.hub.cached_models();
    let listed: Vec<_> =
        listed.iter().map(|model| (&*model.commit, model.revisions.join(" "), model.missing)).collect();
    assert_eq!(listed, [(COMMIT, "v1".into(), None), (&*newer, "main refs/pr/7".into(), None)]);
}

#[test]
fn a_token_goes_to_the_hub_and_to_nobody_else() {
    let mut setting = Setting::with(&[]);
    setting.server.change("tiny", |repository| repository.renamed = Some(NAME.into()));
    setting.server.change(NAME, |repository| {
        *repository = without(&[]);
        (repository.gated, repository.private) = (true, true);
    });
    setting.write_token(&format!("{TOKEN}\n"));
    setting.fetch().result.unwrap();
    setting.assert_whole();
    let requests = setting.server.requests();
    let (second, first): (Vec<_>, Vec<_>) = requests.into_iter().partition(|request| request.second);
    assert!(!second.is_empty() && second.iter().all(|request| request.authorization.is_empty()));
    assert!(first.iter().all(|request| request.authorization == format!("Bearer {TOKEN}")));
    // The older name of a model that was renamed, and the token in the variable instead of the file.
    setting.write_token("hf_wrong");
    setting.hub.token = Some(TOKEN.into());
    setting.fetch_as("tiny").result.unwrap();
    assert!(setting.hub.cache.join("models--tiny/refs/main").is_file());
}

#[test]
fn a_model_that_is_not_wanted_is_refused_before_its_weights_are_loaded() {
    let setting = Setting::new(|_| {});
    let accept = |folder: &Path| {
        assert!(std::fs::read_to_string(folder.join("config.json")).unwrap().contains("bert"));
        Err(Error::model(folder, "is of another family"))
    };
    let error = setting.fetch_if(NAME, &accept).result.unwrap_err();
    assert!(error.to_string().contains("is of another family"), "{error}");
    assert_eq!(setting.server.loads(), [("config.json".to_owned(), String::new())]);
}

#[test]
fn whoever_waits_for_another_process_takes_what_it_loaded() {
    let setting = Setting::new(|_| {});
    let digest = setting.blob(&weights()).file_name().unwrap().to_str().unwrap().to_owned();
    let locks = setting.hub.cache.join(".locks/models--owner--tiny");
    std::fs::create_dir_all(&locks).unwrap();
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(locks.join(digest + ".lock"))
        .unwrap();
    lock.lock().unwrap();
    let blob = setting.blob(&weights());
    let mut lock = Some(lock);
    let mut locked = 0;
    let snapshot = setting.hub.fetch(&NAME.parse().unwrap(), &|_| Ok(()), &mut |event| {
        if let child_tuning::hub::HubEvent::Locked(path) = event {
            assert!(path.to_str().unwrap().ends_with(".lock"));
            // The other process is done with it, and ends.
            std::fs::write(&blob, weights()).unwrap();
            locked += 1;
            drop(lock.take());
        }
    });
    snapshot.unwrap();
    assert_eq!(locked, 1);
    setting.assert_whole();
    assert!(setting.server.loads().iter().all(|(name, _)| name != "model.safetensors"));
}

#[test]
fn several_at_once_load_every_file_once() {
    let setting = Setting::new(|_| {});
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| setting.fetch().result.unwrap());
        }
    });
    setting.assert_whole();
    assert_eq!(setting.server.loads().len(), 4, "{:?}", setting.server.loads());
}

#[test]
fn a_cache_with_foreign_things_in_it_is_read_with_care() {
    let setting = Setting::new(|_| {});
    setting.fetch().result.unwrap();
    for (name, content) in [
        ("refs/evil", "../../../outside"),
        ("refs/short", "1d0f"),
        ("refs/binary", "\u{0}"),
        ("snapshots/not-a-commit/config.json", "{}"),
        ("../models--..--evil/refs/main", COMMIT),
        ("../datasets--owner--tiny/refs/main", COMMIT),
        ("../version.txt", "1"),
    ] {
        let path = setting.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    for revision in ["evil", "short", "binary", "absent"] {
        assert!(
            setting.hub.cached(&format!("owner/tiny@{revision}").parse().unwrap()).is_none(),
            "{revision}"
        );
    }
    let listed = setting.hub.cached_models();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (&*listed[0].repository, &*listed[0].commit, &*listed[0].revisions),
        (NAME, COMMIT, &["main".to_owned()][..])
    );
    let sizes: usize = ["config.json", "tokenizer.json", "vocab.txt", "model.safetensors"]
        .iter()
        .map(|name| files().into_iter().find(|(other, _)| other == name).unwrap().1.content.len())
        .sum();
    assert_eq!(listed[0].bytes, sizes as u64);
}

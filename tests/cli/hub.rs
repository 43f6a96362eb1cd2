//! Models of the Hub in experiments: fetched before the first run, found in the cache, recorded in the results.

use std::process::{Command, Stdio};

use crate::hub_server::{COMMIT, HubServer, Repository, hexadecimal, large, repository, small};
use crate::support::{Answer, LIMIT, Workplace};
use sha2::{Digest, Sha256};

const NAME: &str = "owner/tiny";

/// The fixture's model as a repository of the Hub.
fn tiny(workplace: &Workplace) -> Repository {
    let file = |name: &str| std::fs::read(workplace.path("bert_pair").join(name)).unwrap();
    let small = |name| (name, small(file(name)));
    repository(&[
        small("config.json"),
        small("tokenizer.json"),
        small("tokenizer_config.json"),
        small("vocab.txt"),
        ("model.safetensors", large(file("model.safetensors"))),
    ])
}

fn call(workplace: &Workplace, server: &HubServer, arguments: &[&str]) -> Answer {
    let mut command = workplace.command(arguments);
    command.env("HF_ENDPOINT", &server.address).env("HF_HUB_OFFLINE", "0");
    let output = assert_cmd::Command::from_std(command).timeout(LIMIT).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Answer { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn a_model_is_fetched_before_the_first_run_and_its_commit_is_recorded() {
    let workplace = Workplace::new();
    let server = HubServer::new(&[(NAME, tiny(&workplace))]);
    workplace.experiment("results: folder.csv");
    workplace.run(&[]).with_code(0);
    workplace.experiment("model: owner/tiny");
    let plan = ["plan", "experiment.yaml", "--threads", "1"];
    let mend = "`child-tuning model fetch owner/tiny` downloads it, and so does `run`";
    call(&workplace, &server, &plan).refused(2, &["owner/tiny: ", "not in the Hugging Face cache", mend]);
    assert!(server.requests().is_empty(), "plan downloads nothing");

    let run = ["run", "experiment.yaml", "--threads", "1"];
    let answer = call(&workplace, &server, &run).with_code(0);
    for part in [
        "model.safetensors: 100 %",
        &format!("note: owner/tiny is commit {COMMIT} in the Hugging Face cache"),
    ] {
        assert!(answer.stderr.contains(part), "{part}: {}", answer.stderr);
    }
    let (row, folder) = (workplace.row("results.csv"), workplace.row("folder.csv"));
    let weights = std::fs::read(workplace.path("bert_pair/model.safetensors")).unwrap();
    for (column, value) in [
        ("model", NAME),
        ("model_revision", COMMIT),
        ("model_sha256", &hexadecimal(&Sha256::digest(weights))),
        // The same weights, config and tokenizer make the same run, wherever they come from.
        ("run", &folder["run"]),
        ("loss", &folder["loss"]),
    ] {
        assert_eq!(row[column], value, "{column}");
    }
    assert_eq!(folder["model_revision"], "");

    let requests = server.requests().len();
    assert!(call(&workplace, &server, &run).with_code(0).stdout.contains("1 were there already"));
    assert!(
        workplace.call(&plan).with_code(0).stdout.contains(&format!("note: owner/tiny is commit {COMMIT}"))
    );
    assert_eq!(server.requests().len(), requests, "what is cached is not asked for");
}

#[test]
fn workers_take_a_pinned_model_from_the_cache() {
    let workplace = Workplace::new();
    let server = HubServer::new(&[(NAME, tiny(&workplace))]);
    workplace.experiment(&format!("model: owner/tiny@{COMMIT}\nseeds: [1, 2]"));
    call(&workplace, &server, &["run", "experiment.yaml", "--jobs", "2", "--threads", "1"]).with_code(0);
    assert_eq!(workplace.column("results.csv", "model_revision"), [COMMIT, COMMIT]);
    assert_eq!(
        workplace.column("results.csv", "model"),
        [format!("owner/tiny@{COMMIT}"), format!("owner/tiny@{COMMIT}")]
    );
    assert_eq!(server.loads().len(), 5);
    assert!(!workplace.path("huggingface/hub/models--owner--tiny/refs").exists());
}

#[test]
fn fetch_list_and_doctor_say_what_is_there() {
    let workplace = Workplace::new();
    let server = HubServer::new(&[(NAME, tiny(&workplace))]);
    let empty = call(&workplace, &server, &["model", "list"]).with_code(0);
    assert!(
        empty.stdout.contains("no models in ") && empty.stdout.contains("model fetch NAME"),
        "{}",
        empty.stdout
    );
    let fetched = call(&workplace, &server, &["model", "fetch", NAME]).with_code(0);
    assert!(fetched.stdout.starts_with(&format!("owner/tiny: commit {COMMIT}, in ")), "{}", fetched.stdout);
    let list = call(&workplace, &server, &["model", "list"]).with_code(0).stdout;
    for word in [NAME, "main", COMMIT, "complete"] {
        assert!(list.contains(word), "{word}: {list}");
    }
    let cache = "huggingface/hub/models--owner--tiny";
    std::fs::remove_file(workplace.path(cache).join("snapshots").join(COMMIT).join("model.safetensors"))
        .unwrap();
    let doctor = workplace.call(&["doctor"]).with_code(0).stdout;
    for part in [
        "network not used: HF_HUB_OFFLINE, no token",
        &format!("owner/tiny   main = {COMMIT}, "),
        "lacks weights",
    ] {
        assert!(doctor.contains(part), "{part}: {doctor}");
    }
    call(&workplace, &server, &["model", "fetch", &format!("{NAME}@{COMMIT}")]).with_code(0);
    // Every command that takes a folder takes what is in the cache.
    let export = ["export", "--model", NAME, "--output", "exported"];
    workplace.call(&export).with_code(0);
    assert_eq!(
        workplace.tensors("exported/model.safetensors"),
        workplace.tensors("bert_pair/model.safetensors")
    );
    std::fs::create_dir_all(workplace.path("models/owner/tiny")).unwrap();
    let note = call(&workplace, &server, &["model", "fetch", NAME]).with_code(0).stderr;
    assert!(note.contains("experiments started here find the folder models/owner/tiny first"), "{note}");
}

#[test]
fn what_cannot_be_fetched_is_refused_in_one_line() {
    let workplace = Workplace::new();
    let server = HubServer::new(&[(NAME, tiny(&workplace))]);
    let fetch = |name: &str| call(&workplace, &server, &["model", "fetch", name]);
    fetch("bert_pear").refused(2, &["has no model `bert_pear`; did you mean `bert_pair`?", "HF_TOKEN"]);
    fetch("owner/tiny@v9").refused(2, &["model `owner/tiny` has no revision `v9`"]);
    assert!(
        fetch("./bert_pair")
            .with_code(2)
            .stderr
            .contains("`./bert_pair` is not the name of a model on the Hub")
    );
    workplace.experiment("model: bert_pear");
    let offline = [
        "bert_pear: no such model folder; did you mean `bert_pair`?",
        "HF_HUB_OFFLINE",
        "at models/bert_pear",
    ];
    workplace.run(&[]).refused(2, &offline);
    workplace.call(&["model", "fetch", "bert_pear"]).refused(2, &offline);

    server.change_file(NAME, "config.json", |file| file.content = "{\"model_type\": \"gpt2\"}".into());
    let other = fetch(NAME).with_code(2);
    assert!(
        other.stderr.contains("config.json: ") && other.stderr.contains("model_type `gpt2`"),
        "{}",
        other.stderr
    );
    assert!(server.loads().iter().all(|(name, _)| name == "config.json"));
    let mut command = workplace.command(&["model", "fetch", NAME]);
    let output = command.env("HF_HUB_OFFLINE", "0").env("HF_ENDPOINT", "hf-mirror.example").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(2) && text.contains("HF_ENDPOINT `hf-mirror.example` is no address"),
        "{text}"
    );
}

#[test]
fn an_interrupted_download_says_that_it_can_be_gone_on_with() {
    let workplace = Workplace::new();
    workplace.experiment("model: owner/tiny");
    // A server that takes the first question and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut command = workplace.command(&["run", "experiment.yaml", "--threads", "1"]);
    command.env("HF_ENDPOINT", endpoint).env("HF_HUB_OFFLINE", "0").stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let _question = silent.accept().unwrap();
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.contains("interrupted: run the same command again to resume"), "{message}");
}

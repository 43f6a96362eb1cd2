//! `data`: what is here, what is fetched over a connection that is cut, and what the data sets hold.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::server::{Page, Server};
use crate::support::{LIMIT, Workplace, project};

/// The path and the published length of CoLA's archive.
const COLA: (&str, usize) = ("/glue/data/CoLA.zip", 376_971);

fn page(content: Vec<u8>) -> Page {
    Page { content, etag: "\"one\"".into(), ..Page::default() }
}

fn miniature() -> String {
    project("data").to_str().unwrap().to_owned()
}

#[test]
fn list_says_what_is_here_and_how_to_get_the_rest() {
    let workplace = Workplace::with_models(&[]);
    workplace.copy_data("RTE");
    workplace.write("own/MRPC/train.tsv", "no table");
    let answer = workplace.call(&["data", "list", "--data", "own"]).with_code(0);
    let line = |task: &str| {
        let start = format!("{task} ");
        answer.stdout.lines().find(|line| line.trim_start().starts_with(&start)).unwrap().to_owned()
    };
    for part in ["two", "2", "accuracy", "320", "120", "40", "own/RTE", "PASCAL"] {
        assert!(line("rte").contains(part), "{part}: {}", line("rte"));
    }
    assert!(line("cola").contains("not here: child-tuning data fetch cola"), "{}", line("cola"));
    assert!(line("stsb").contains("score"), "{}", line("stsb"));
    assert!(line("mrpc").contains("not usable: own/MRPC/train.tsv:1: "), "{}", line("mrpc"));
}

#[test]
fn a_killed_fetch_goes_on_where_it_was() {
    let slow = Page { pause: Duration::from_millis(5), ..page(vec![7; COLA.1]) };
    let server = Server::new(&[(COLA.0, slow)]);
    let workplace = Workplace::with_models(&[]);
    let fetch = ["data", "fetch", "cola", "--to", "own", "--endpoint", &server.address];
    let mut child = workplace.command(&fetch).stderr(Stdio::null()).spawn().unwrap();
    let part = workplace.path("own/.fetching/CoLA-CoLA.zip.part");
    let length = || std::fs::metadata(&part).map_or(0, |data| data.len());
    let started = Instant::now();
    while length() == 0 {
        assert!(started.elapsed() < LIMIT, "nothing arrived");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = length();
    assert!((1..COLA.1 as u64).contains(&kept), "{kept}");

    server.replace(COLA.0, page(vec![7; COLA.1]));
    let answer = workplace.call(&fetch);
    let ranges: Vec<String> = server.requests().into_iter().map(|(_, range)| range).collect();
    // The bytes are not CoLA's, which is found out at the end; it might have been the fault of the first part.
    assert_eq!(ranges, ["", &format!("bytes={kept}-"), ""]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(3), ""));
    for part in
        ["licence: research use", "are there already", "CoLA.zip: 100 %", "has the SHA-256", "was removed"]
    {
        assert!(answer.stderr.contains(part), "{part}: {}", answer.stderr);
    }
    assert!(!part.exists() && !workplace.path("own/CoLA").exists());
}

#[test]
fn an_interrupted_fetch_says_so() {
    let server = Server::new(&[(COLA.0, Page { pause: Duration::from_millis(20), ..page(vec![7; COLA.1]) })]);
    let workplace = Workplace::with_models(&[]);
    let fetch = ["data", "fetch", "cola", "--endpoint", &server.address];
    let child = workplace.command(&fetch).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while !workplace.path("cache/data/.fetching/CoLA-CoLA.zip.part").exists() {
        assert!(started.elapsed() < LIMIT, "nothing arrived");
        std::thread::sleep(Duration::from_millis(5));
    }
    let kill = std::process::Command::new("sh").arg("-c").arg(format!("kill -TERM {}", child.id())).status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("interrupted: run the same command again to resume"), "{text}");
    assert!(workplace.path("cache/data/.fetching/CoLA-CoLA.zip.part").exists());
}

#[test]
fn a_fetch_that_cannot_work_is_refused() {
    let workplace = Workplace::with_models(&[]);
    let server = Server::new(&[]);
    let missing = workplace.call(&["data", "fetch", "rte", "--endpoint", &server.address]);
    assert_eq!(missing.code, Some(3), "{}", missing.stderr);
    assert!(
        missing.stderr.contains("error: ") && missing.stderr.contains("RTE.zip: there is no such file (404")
    );
    assert!(missing.stderr.contains("CHILD_TUNING_DATA_ENDPOINT names a mirror"), "{}", missing.stderr);
    workplace.call(&["data", "fetch", "rt"]).refused(2, &["unknown task `rt`", "did you mean `rte`?"]);
    let card = "name: own\ntext: [a]\nlabel: b\nlabels: [c, d]\ntrain: t.csv\ndev: t.csv\n";
    workplace.write("own.yaml", card);
    workplace.call(&["data", "fetch", "own.yaml"]).refused(2, &["`own` is not published anywhere"]);
}

/// Whole, with the real files, where they lie beside the project.
#[test]
fn a_fetched_data_set_is_found_and_checked() {
    let folder = project("../shared/data/MRPC");
    let content = |name: &str| std::fs::read(folder.join(name)).unwrap();
    if !folder.is_dir() {
        println!("skipped: the real data sets are not in {}", folder.display());
        return;
    }
    let train = Page { cuts: vec![500_000], ..page(content("senteval/msr_paraphrase_train.txt")) };
    let server = Server::new(&[
        ("/senteval/senteval_data/msr_paraphrase_train.txt", train),
        (
            "/senteval/senteval_data/msr_paraphrase_test.txt",
            page(content("senteval/msr_paraphrase_test.txt")),
        ),
        ("/glue/data/mrpc_dev_ids.tsv", page(content("dev_ids.tsv"))),
    ]);
    let workplace = Workplace::with_models(&[]);
    let fetch = |arguments: &[&str]| {
        let mut command = workplace.command(&[&["data", "fetch", "mrpc"], arguments].concat());
        let output = command.env("CHILD_TUNING_DATA_ENDPOINT", &server.address).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(fetch(&[]).starts_with("mrpc: in "));
    assert!(server.requests().iter().any(|(_, range)| range == "bytes=500000-"));
    let requests = server.requests().len();
    assert!(fetch(&[]).contains("is complete already"));
    assert_eq!(server.requests().len(), requests);
    assert!(
        workplace.read("cache/data/MRPC/SOURCE.txt").contains("Licence: Microsoft Research Shared Source")
    );

    let text = workplace.call(&["data", "check", "mrpc"]).with_code(0).stdout;
    assert_eq!(text.matches("as many rows as published").count(), 3, "{text}");
    let csv = workplace.call(&["data", "check", "MRPC", "--format", "csv"]).with_code(0).stdout;
    for line in ["task,split,measure,value", "mrpc,train,label equivalent,2474", "mrpc,dev,rows,408"] {
        assert!(csv.lines().any(|found| found == line), "{line}: {csv}");
    }
    assert!(workplace.call(&["data", "list"]).with_code(0).stdout.contains("cache/data/MRPC"));
    assert!(workplace.call(&["doctor"]).with_code(0).stdout.contains("3668 train, 408 dev"));
}

#[test]
fn check_counts_measures_and_goes_on_after_a_file_that_cannot_be_read() {
    let workplace = Workplace::new();
    let data = miniature();
    let check = ["data", "check", "rte", "--data", &data, "--model", "bert_pair", "--max-length", "16"];
    let text = workplace.call(&check).with_code(0).stdout;
    for part in
        ["train: differs: found 320 rows, published 2490", "over 16 tokens", "label entailment", "in train"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    workplace.copy_data("RTE");
    workplace.copy_data("CoLA");
    workplace.write("own/RTE/dev.tsv", "no table");
    let answer = workplace.call(&["data", "check", "--data", "own", "--format", "csv"]).with_code(2);
    assert!(answer.stderr.starts_with("error: own/RTE/dev.tsv:1: "), "{}", answer.stderr);
    workplace.write("check.csv", &answer.stdout);
    let splits = workplace.column("check.csv", "split");
    assert!(workplace.column("check.csv", "task").iter().all(|task| task == "cola"));
    assert!(["train", "dev", "test"].iter().all(|split| splits.contains(&split.to_string())));
    let nothing = workplace.call(&["data", "check"]).with_code(0).stdout;
    assert!(nothing.contains("`child-tuning data fetch TASK` gets one"), "{nothing}");
    let absent = ["no data of task `stsb`", "`child-tuning data fetch stsb` gets them"];
    workplace.call(&["data", "check", "stsb"]).refused(2, &absent);
}

/// `data/` of the project goes behind what was fetched; a `data/` of one's own goes before it.
#[test]
fn the_miniature_never_hides_a_fetched_data_set() {
    let workplace = Workplace::new();
    workplace.copy_data("RTE");
    let dev = workplace.read("own/RTE/dev.tsv");
    let first = |lines: usize| dev.split_inclusive('\n').take(lines).collect::<String>();
    workplace.write("own/RTE/dev.tsv", first(8));
    std::fs::create_dir(workplace.path("cache")).unwrap();
    std::fs::rename(workplace.path("own"), workplace.path("cache/data")).unwrap();
    std::os::unix::fs::symlink(miniature(), workplace.path("data")).unwrap();
    workplace.experiment("results: fetched.csv");
    workplace.edit("experiment.yaml", &format!("data: [own, {:?}]\n", project("data")), "");
    workplace.run(&[]).with_code(0);
    assert_eq!(workplace.row("fetched.csv")["examples_evaluated"], "7");

    std::fs::remove_file(workplace.path("data")).unwrap();
    workplace.write("data/RTE/train.tsv", workplace.read("cache/data/RTE/train.tsv"));
    workplace.write("data/RTE/dev.tsv", first(6));
    workplace.edit("experiment.yaml", "fetched.csv", "own.csv");
    workplace.run(&[]).with_code(0);
    assert_eq!(workplace.row("own.csv")["examples_evaluated"], "5");
}

#[test]
fn splits_of_different_copies_are_not_put_together() {
    let workplace = Workplace::new();
    workplace.copy_data("RTE");
    workplace.write("a/RTE/train.tsv", workplace.read("own/RTE/train.tsv"));
    workplace.write("b/RTE/dev.tsv", workplace.read("own/RTE/dev.tsv"));
    workplace.experiment("data: [a, b]");
    workplace
        .run(&[])
        .refused(2, &["its train data in ", "and its dev data in ", "put both into one folder"]);
}

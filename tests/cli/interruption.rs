//! Experiments that end before their time, or run twice at once: nothing is lost, nothing is there twice.

use std::collections::HashSet;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Answer, LIMIT, Workplace};

const RUNS: usize = 10;

/// Ten runs of a few tenths of a second each, so that there is time to disturb them.
const GRID: &str = "seeds: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n\
    train: {epochs: 15, batch_size: 8, examples: 64, max_length: 32}";

fn grid() -> Workplace {
    let workplace = Workplace::new();
    workplace.experiment(GRID);
    workplace
}

fn start(workplace: &Workplace) -> Child {
    let mut command = workplace.command(&["run", "experiment.yaml", "--threads", "1"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn end(child: Child) -> Answer {
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Answer { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Waits until the results hold a row; the file may be in the middle of a write.
fn wait_for_a_row(workplace: &Workplace) {
    let started = Instant::now();
    let rows = || {
        std::fs::read_to_string(workplace.path("results.csv")).map_or(0, |text| text.matches('\n').count())
    };
    while rows() < 2 {
        assert!(started.elapsed() < LIMIT, "no row was written");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asserts that every run is there once, in whole rows, and that nothing else is left in the folder.
fn assert_complete(workplace: &Workplace) {
    let runs: HashSet<String> = workplace.column("results.csv", "run").into_iter().collect();
    let seeds: HashSet<String> = workplace.column("results.csv", "seed").into_iter().collect();
    assert_eq!((workplace.rows("results.csv").len(), runs.len(), seeds.len()), (RUNS, RUNS, RUNS));
    assert!(workplace.column("results.csv", "status").iter().all(|status| status == "ok"));
    let files = ["bert_pair", "experiment.yaml", "results.csv", "results.csv.lock"];
    assert_eq!(workplace.files("."), files);
}

#[test]
fn a_killed_grid_goes_on_where_it_was() {
    let workplace = grid();
    let mut child = start(&workplace);
    wait_for_a_row(&workplace);
    child.kill().unwrap();
    assert_eq!(end(child).code, None, "it ended before it was killed");

    let answer = workplace.run(&[]).with_code(0);
    let done = answer.stderr.lines().filter(|line| line.contains("accuracy")).count();
    assert!((1..RUNS).contains(&done), "{}", answer.stderr);
    assert_complete(&workplace);
}

#[test]
fn a_claim_that_a_killed_process_left_goes_away() {
    let workplace = Workplace::new();
    workplace.experiment("");
    workplace.run(&[]).with_code(0);
    // Killed between its row and the end of its claim.
    let run = workplace.column("results.csv", "run").remove(0);
    workplace.write(&format!("results.csv.claims/{run}"), "");
    assert!(workplace.run(&[]).with_code(0).stdout.contains("0 runs done, 1 were there already"));
    assert!(!workplace.path("results.csv.claims").exists());
}

#[test]
fn an_interrupted_grid_says_so_and_goes_on() {
    let workplace = grid();
    let child = start(&workplace);
    wait_for_a_row(&workplace);
    let signal = Command::new("sh").arg("-c").arg(format!("kill -TERM {}", child.id())).status().unwrap();
    assert!(signal.success());
    let answer = end(child).with_code(130);
    assert!(answer.stdout.contains("interrupted: run the same command again to resume"), "{}", answer.stdout);
    let before = workplace.rows("results.csv").len();
    assert!((1..RUNS).contains(&before));
    assert!(!workplace.path("results.csv.claims").exists());

    let answer = workplace.run(&[]).with_code(0);
    let sentence = format!("{} runs done, {before} were there already", RUNS - before);
    assert!(answer.stdout.contains(&sentence), "{}", answer.stdout);
    assert_complete(&workplace);
}

/// As `nohup`, and a shell that starts a job of a script in the background, begin it.
#[test]
fn signals_that_the_program_was_started_to_ignore_end_nothing() {
    let workplace = grid();
    let mut child = Command::new("sh");
    let ignoring = "trap '' HUP INT; exec \"$@\"";
    child.args([
        "-c",
        ignoring,
        "sh",
        env!("CARGO_BIN_EXE_child-tuning"),
        "run",
        "experiment.yaml",
        "--threads",
        "1",
    ]);
    let child =
        child.current_dir(workplace.path(".")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_a_row(&workplace);
    for name in ["HUP", "INT"] {
        let signal =
            Command::new("sh").arg("-c").arg(format!("kill -{name} {}", child.id())).status().unwrap();
        assert!(signal.success());
    }
    let before = workplace.rows("results.csv").len();
    end(child).with_code(0);
    assert!(before < RUNS, "it had ended before");
    assert_complete(&workplace);
}

#[test]
fn two_processes_share_a_grid() {
    let workplace = grid();
    let children = [start(&workplace), start(&workplace)];
    let done: Vec<usize> = children
        .into_iter()
        .map(|child| {
            let answer = end(child).with_code(0);
            let count = answer.stdout.rsplit_once(" runs done").and_then(|(text, _)| text.rsplit(' ').next());
            count.unwrap().parse().unwrap()
        })
        .collect();
    assert_eq!(done.iter().sum::<usize>(), RUNS, "{done:?}");
    assert_complete(&workplace);
}

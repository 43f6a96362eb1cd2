//! `run --jobs N`: several worker processes at one experiment give what one process gives, whatever happens to them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{LIMIT, Row, Workplace};

/// Six runs, three of them on another task, with dropout, masks and an evaluation elsewhere.
const GRID: &str = "task: [rte, qnli]\nmethod: [vanilla, child_tuning_f, child_tuning_d]\nevaluate: [rte, qnli]\n\
    train: {epochs: 2, batch_size: 16, examples: 32, max_length: 32}";

/// Five runs of half a second or more each, so that there is time to disturb them.
const LONG: &str = "seeds: [1, 2, 3, 4, 5]\ntrain: {epochs: 50, batch_size: 8, examples: 64, max_length: 32}";
const LONG_RUNS: usize = 5;

/// What must not depend on who trained a run.
const OUTCOME: [&str; 14] = [
    "status",
    "score",
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "combined",
    "loss",
    "degenerate",
    "epoch",
    "step",
    "mask_sha256",
    "reason",
];

type Key = (String, String);

/// The outcomes by run and data set; a row that is there twice is an error.
fn outcomes(rows: &[Row]) -> HashMap<Key, Vec<String>> {
    let mut outcomes = HashMap::new();
    for row in rows {
        let outcome = OUTCOME.iter().map(|column| row[*column].clone()).collect();
        let twice = outcomes.insert((row["run"].clone(), row["evaluated_on"].clone()), outcome);
        assert!(twice.is_none(), "{} is there twice", row["run"]);
    }
    outcomes
}

fn assert_tidy(workplace: &Workplace, results: &str) {
    for left in [".claims", ".sources"].map(|suffix| format!("{results}{suffix}")) {
        assert!(!workplace.path(&left).exists(), "{left} was left");
    }
    let (folder, name) = results.rsplit_once('/').unwrap_or((".", results));
    assert!(!workplace.path(folder).join(format!(".{name}.partial")).exists());
}

/// A started `run` whose standard error is read line by line.
struct Started {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStderr>>,
    seen: Vec<String>,
}

impl Started {
    fn new(workplace: &Workplace, further: &[&str]) -> Self {
        let arguments = [&["run", "experiment.yaml", "--threads", "1"], further].concat();
        let mut child =
            workplace.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, lines, seen: Vec::new() }
    }

    /// Reads until a number of runs have started.
    fn wait_for_starts(&mut self, count: usize) {
        let starts = |seen: &[String]| seen.iter().filter(|line| line.ends_with(" steps")).count();
        while starts(&self.seen) < count {
            let line = self.lines.next().unwrap_or_else(|| panic!("it ended: {:?}", self.seen));
            self.seen.push(line.unwrap());
        }
    }

    /// The ids of its worker processes.
    fn workers(&self) -> Vec<u32> {
        let parent = self.child.id().to_string();
        let is_worker = |pid: &u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // The name, in brackets, may hold anything; the state and the parent follow it.
            let mut fields = status.rsplit(')').next().unwrap_or_default().split_whitespace();
            fields.next().is_some_and(|state| state != "Z") && fields.next() == Some(&parent)
        };
        let processes = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        processes.filter(is_worker).collect()
    }

    /// Waits for the end. Returns the exit code, standard output, and all of standard error.
    fn end(mut self) -> (Option<i32>, String, String) {
        self.seen.extend(self.lines.by_ref().map(|line| line.unwrap()));
        let output = self.child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), self.seen.join("\n"))
    }
}

fn signal(name: &str, process: u32) {
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {process}")).status().unwrap();
    assert!(sent.success());
}

#[test]
fn any_number_of_jobs_gives_the_bits_of_one() {
    let workplace = Workplace::new();
    workplace.experiment(GRID);
    let with = |jobs: &str| {
        let results = format!("results-{jobs}.csv");
        let answer = workplace.run(&["--jobs", jobs, "--set", &format!("results={results}")]).with_code(0);
        assert!(answer.stdout.contains("experiment: 6 runs done"), "{}", answer.stdout);
        // One whole line as a run starts, and one as it ends.
        let lines = |end: &str| {
            answer.stderr.lines().filter(|line| line.starts_with('[') && line.contains(end)).count()
        };
        assert_eq!(
            (lines(": 4 steps"), lines(" s)"), answer.stderr.lines().count()),
            (6, 6, 13),
            "{}",
            answer.stderr
        );
        assert_tidy(&workplace, &results);
        outcomes(&workplace.rows(&results))
    };
    let one = with("1");
    assert_eq!(one.len(), 12);
    assert_eq!(with("2"), one);
    assert_eq!(with("4"), one);
    assert_eq!(with("auto"), one);
}

#[test]
fn rows_are_there_once_and_a_second_start_runs_what_is_missing() {
    let workplace = Workplace::new();
    workplace.experiment(GRID);
    workplace.run(&["--jobs", "2", "--only", "task=rte"]).with_code(0);
    let before = workplace.read("results.csv");
    let answer = workplace.run(&["--jobs", "3"]).with_code(0);
    assert!(answer.stdout.contains("3 runs done, 3 were there already"), "{}", answer.stdout);
    assert!(workplace.read("results.csv").starts_with(&before));
    assert_eq!(outcomes(&workplace.rows("results.csv")).len(), 12);
    let again = workplace.run(&["--jobs", "3"]).with_code(0);
    assert_eq!(again.stderr, "6 of 6 runs are in the results already\n");
}

#[test]
fn sources_come_before_what_starts_from_them() {
    let workplace = Workplace::new();
    let then = "then: [{task: [cola, stsb], freeze: encoder}, {task: rte, then: {task: cola}}]";
    workplace.experiment(&format!("task: mrpc\nmethod: [vanilla, child_tuning_d]\n{then}\n"));
    workplace.run(&["--set", "results=one.csv"]).with_code(0);
    let answer = workplace.run(&["--jobs", "2", "--set", "results=two.csv"]).with_code(0);
    let one = outcomes(&workplace.rows("one.csv"));
    assert_eq!((one.len(), outcomes(&workplace.rows("two.csv"))), (10, one));
    assert!(!answer.stderr.contains("trained again"), "{}", answer.stderr);
    assert_tidy(&workplace, "two.csv");

    // The weights of the sources are gone now, and each of them is made again by one worker for two targets.
    let answer =
        workplace.run(&["--jobs", "2", "--set", "results=two.csv", "--set", "then.0.task=[rte, sick]"]);
    let answer = answer.with_code(0);
    assert_eq!(answer.stderr.matches("is trained again").count(), 2, "{}", answer.stderr);
    assert_eq!(outcomes(&workplace.rows("two.csv")).len(), 10 + 4);
    assert_tidy(&workplace, "two.csv");
}

#[test]
fn trials_are_done_before_they_choose() {
    let workplace = Workplace::new();
    let tuned = "train: {epochs: 1, batch_size: 16, examples: 32, max_length: 32, learning_rate: [1e-4, 1e-3]}\n\
        select: {by: dev, on_seeds: [7, 8]}\nseeds: [1, 2]\nmethod: [vanilla, child_tuning_f]";
    workplace.experiment(tuned);
    workplace.run(&["--set", "results=one.csv"]).with_code(0);
    let answer = workplace.run(&["--jobs", "3", "--set", "results=two.csv"]).with_code(0);
    assert_eq!(answer.stderr.matches(": chose ").count(), 2, "{}", answer.stderr);
    let one = outcomes(&workplace.rows("one.csv"));
    assert_eq!((one.len(), outcomes(&workplace.rows("two.csv"))), (2 * 4 + 4, one));
}

#[test]
fn several_experiments_share_the_workers_and_a_bad_run_ends_nothing() {
    let workplace = Workplace::new();
    workplace.experiment("name: first\nresults: first.csv\nseeds: [1, 2]\ntrain: {epochs: 1, examples: 32, max_length: 32, learning_rate: [1e30, 1e-4]}");
    fs::rename(workplace.path("experiment.yaml"), workplace.path("first.yaml")).unwrap();
    workplace.experiment("name: second\nseeds: [3, 4, 5]");
    let answer = workplace.run(&["first.yaml", "--jobs", "2"]).with_code(1);
    assert!(answer.stdout.contains("second: 3 runs done"), "{}", answer.stdout);
    assert!(answer.stdout.contains("first: 2 runs done, 2 diverged or failed"), "{}", answer.stdout);
    let status = workplace.column("first.csv", "status");
    assert_eq!(status.iter().filter(|status| *status == "diverged").count(), 2);
    assert_eq!(workplace.rows("results.csv").len(), 3);
}

#[test]
fn a_killed_worker_costs_no_run() {
    let workplace = Workplace::new();
    workplace.experiment(LONG);
    let mut started = Started::new(&workplace, &["--jobs", "2"]);
    started.wait_for_starts(2);
    let workers = started.workers();
    assert_eq!(workers.len(), 2);
    signal("KILL", workers[0]);
    let (code, stdout, stderr) = started.end();
    assert_eq!(code, Some(0), "{stdout}\n{stderr}");
    assert_eq!(
        stderr.matches("(signal: 9 (SIGKILL)) while it trained rte vanilla seed").count(),
        1,
        "{stderr}"
    );
    assert_eq!(stderr.matches("it is tried once more").count(), 1, "{stderr}");
    assert!(stdout.contains(&format!("{LONG_RUNS} runs done; ")), "{stdout}");
    let done = outcomes(&workplace.rows("results.csv"));
    workplace.run(&["--set", "results=alone.csv"]).with_code(0);
    assert_eq!(done, outcomes(&workplace.rows("alone.csv")));
    assert_tidy(&workplace, "results.csv");
}

#[test]
fn a_run_whose_worker_is_killed_each_time_is_a_failed_row() {
    let workplace = Workplace::new();
    workplace.experiment(LONG);
    let mut started = Started::new(&workplace, &["--jobs", "2", "--only", "seed=1"]);
    for start in 1..=2 {
        // Where it was the only worker, another one takes its place.
        started.wait_for_starts(start);
        signal("KILL", started.workers()[0]);
    }
    let (code, stdout, stderr) = started.end();
    assert_eq!(code, Some(1), "{stdout}\n{stderr}");
    assert!(stderr.contains("it is given up"), "{stderr}");
    let row = workplace.row("results.csv");
    assert_eq!((row["status"].as_str(), row["score"].as_str()), ("failed", ""));
    assert_eq!(row["reason"], "the process that trained it ended 2 times, at last with signal: 9 (SIGKILL)");

    // Failed is not finished: the next start tries it again, and takes the row's place.
    workplace.run(&["--jobs", "2", "--only", "seed=1"]).with_code(0);
    assert_eq!(workplace.row("results.csv")["status"], "ok");
}

#[test]
fn an_interruption_stops_all_workers_and_the_same_command_goes_on() {
    let workplace = Workplace::new();
    workplace.experiment(LONG);
    // A shell that starts the tests in the background lets them ignore Ctrl-C, and so the program.
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    let ignores_interrupts = u64::from_str_radix(ignored, 16).unwrap() & 2 != 0;
    for name in ["INT", "TERM"].into_iter().filter(|name| *name != "INT" || !ignores_interrupts) {
        let mut started = Started::new(&workplace, &["--jobs", "2"]);
        started.wait_for_starts(2);
        let workers = started.workers();
        signal(name, started.child.id());
        let (code, stdout, stderr) = started.end();
        assert_eq!(code, Some(130), "{stdout}\n{stderr}");
        assert!(stdout.contains("interrupted: run the same command again to resume"), "{stdout}");
        assert!(
            workers.iter().all(|worker| !fs::exists(format!("/proc/{worker}")).unwrap()),
            "a worker is left"
        );
        assert!(workplace.rows("results.csv").len() < LONG_RUNS);
        assert_tidy(&workplace, "results.csv");
    }
    workplace.run(&["--jobs", "2"]).with_code(0);
    let seeds: HashSet<String> = workplace.column("results.csv", "seed").into_iter().collect();
    assert_eq!((seeds.len(), workplace.rows("results.csv").len()), (LONG_RUNS, LONG_RUNS));
}

#[test]
fn workers_end_with_the_process_that_started_them() {
    let workplace = Workplace::new();
    workplace.experiment(LONG);
    let mut started = Started::new(&workplace, &["--jobs", "2"]);
    started.wait_for_starts(2);
    let workers = started.workers();
    assert_eq!(workers.len(), 2);
    started.child.kill().unwrap();
    started.child.wait().unwrap();
    let since = Instant::now();
    while workers.iter().any(|worker| fs::exists(format!("/proc/{worker}")).unwrap()) {
        assert!(since.elapsed() < LIMIT, "a worker outlives its parent");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(workplace.rows("results.csv").len() < LONG_RUNS, "the workers went on");
    workplace.run(&["--jobs", "2"]).with_code(0);
    assert_eq!(outcomes(&workplace.rows("results.csv")).len(), LONG_RUNS);
}

#[test]
fn what_is_wrong_is_said_once_and_before_anything_runs() {
    let workplace = Workplace::new();
    workplace.experiment("train: {max_length: 4096}");
    workplace.run(&["--jobs", "2"]).refused(2, &["max_length is 4096"]);
    assert!(!workplace.path("results.csv").exists());
    for jobs in ["0", "-1", "many", "99999999999"] {
        let answer = workplace.run(&[&format!("--jobs={jobs}")]).with_code(2);
        assert!(
            answer.stderr.contains("must be a whole number from 1 to 1024, or `auto`"),
            "{}",
            answer.stderr
        );
    }
}

#[test]
fn an_experiment_may_be_a_pipe_unless_workers_have_to_read_it_too() {
    let workplace = Workplace::new();
    workplace.experiment("seeds: [1, 2]");
    let piped = |jobs: &str| {
        let call = workplace.command(&["run", "/dev/stdin", "--threads", "1", "--jobs", jobs]);
        let experiment = workplace.read("experiment.yaml");
        assert_cmd::Command::from_std(call).write_stdin(experiment).output().unwrap()
    };
    let refused = piped("2");
    let message = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(message.contains("/dev/stdin") && message.contains("--jobs 1"), "{message}");
    assert!(!workplace.path("results.csv").exists());
    // Standard input of a worker is not that of this process, whatever it is here.
    let mut redirected = workplace.command(&["run", "/dev/stdin", "--jobs", "2"]);
    redirected.stdin(std::fs::File::open(workplace.path("experiment.yaml")).unwrap());
    let redirected = redirected.output().unwrap();
    assert_eq!(redirected.status.code(), Some(2), "{}", String::from_utf8_lossy(&redirected.stderr));
    assert_eq!(piped("1").status.code(), Some(0));
    // What the pipe and the file say is the same experiment.
    workplace.run(&[]).with_code(0);
    assert_eq!(workplace.rows("results.csv").len(), 2);
}

#[test]
fn a_plan_goes_by_the_speed_of_finished_runs_and_divides_it_by_the_jobs() {
    let workplace = Workplace::new();
    workplace.experiment("seeds: [1, 2, 3, 4]\ntrain: {epochs: 2, batch_size: 16, max_length: 32}\nmethod: [vanilla, child_tuning_f]");
    workplace.run(&["--only", "seed=1,method=vanilla"]).with_code(0);
    let plan = |threads: &str, further: &[&str]| {
        let call = [&["plan", "experiment.yaml", "--threads", threads], further].concat();
        workplace.call(&call).with_code(0).stdout.lines().last().unwrap().to_owned()
    };
    // As slow as nothing is here: 987 s of training, 40 s of preparation, 200 s of scoring.
    let (mut row, header) = (workplace.row("results.csv"), workplace.read("results.csv"));
    let number = |row: &Row, column: &str| row[column].parse::<f64>().unwrap();
    let tokens = number(&row, "tokens_per_second") * number(&row, "train_seconds");
    for (column, seconds) in
        [("train_seconds", 987.0), ("prepare_seconds", 40.0), ("evaluate_seconds", 200.0)]
    {
        row.insert(column.into(), format!("{seconds}"));
    }
    row.insert("tokens_per_second".into(), format!("{}", tokens / 987.0));
    let columns: Vec<&str> = header.lines().next().unwrap().split(',').collect();
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(&columns).unwrap();
    writer.write_record(columns.iter().map(|column| &row[*column])).unwrap();
    workplace.write("results.csv", writer.into_inner().unwrap());

    let vanilla = ["--only", "method=vanilla"];
    let all = plan("1", &vanilla);
    assert!(
        all.contains("3 to do, 120 optimizer steps; about 1h 2m by the speed of finished runs, up to "),
        "{all}"
    );
    let shared = plan("1", &[&vanilla[..], &["--jobs", "2"]].concat());
    assert!(
        shared.contains("about 30m 50s by the speed of finished runs with 2 jobs, up to 2 × "),
        "{shared}"
    );
    // Three runs cannot be shared by more than three, and none of them ends sooner for it.
    let shared = plan("1", &[&vanilla[..], &["--jobs", "8"]].concat());
    assert!(
        shared.contains("about 20m 30s by the speed of finished runs with 3 jobs, up to 3 × "),
        "{shared}"
    );
    let mixed = plan("1", &[]);
    assert!(mixed.contains("about 1h 2m (3 runs by the speed of finished ones), up to "), "{mixed}");
    // Another number of threads says nothing about this one.
    let measured = plan("2", &vanilla);
    assert!(measured.contains(" on this machine, up to "), "{measured}");
}

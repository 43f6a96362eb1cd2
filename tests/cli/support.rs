//! A folder to work in, the program to start there, and what it answered.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use safetensors::SafeTensors;
use tempfile::TempDir;

/// A generous limit for one call: reached only by a program that hangs.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Top-level keys of an experiment that a test does not write itself. 32 examples in two steps take milliseconds.
const DEFAULTS: [&str; 6] = [
    "model: bert_pair",
    "task: rte",
    "method: vanilla",
    "seeds: [1]",
    "train: {epochs: 1, batch_size: 16, examples: 32, max_length: 32}",
    "results: results.csv",
];

/// One row of a CSV by column.
pub type Row = HashMap<String, String>;

/// Returns a path of the project.
pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A temporary folder that the program is started in.
pub struct Workplace {
    folder: TempDir,
}

/// What a call came to.
#[derive(Debug)]
pub struct Answer {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Workplace {
    /// Makes a folder with copies of the fixtures' models that are named.
    pub fn with_models(fixtures: &[&str]) -> Self {
        let workplace = Self { folder: tempfile::tempdir().unwrap() };
        for fixture in fixtures {
            workplace.copy_model(fixture, fixture);
        }
        workplace
    }

    /// Makes a folder with the model that experiments start from by default.
    pub fn new() -> Self {
        Self::with_models(&["bert_pair"])
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), content).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Changes a text file; what is replaced must be there.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{name} has no `{from}`");
        self.write(name, text.replace(from, to));
    }

    /// Copies a fixture's model folder.
    pub fn copy_model(&self, fixture: &str, name: &str) {
        self.copy_folder(&project("tests/fixtures").join(fixture), name);
    }

    /// Copies a miniature data set to `own/`, where experiments look first.
    pub fn copy_data(&self, dataset: &str) {
        self.copy_folder(&project("data").join(dataset), &format!("own/{dataset}"));
    }

    fn copy_folder(&self, source: &Path, name: &str) {
        for entry in fs::read_dir(source).unwrap().map(|entry| entry.unwrap()) {
            let target = format!("{name}/{}", entry.file_name().to_str().unwrap());
            self.write(&target, fs::read(entry.path()).unwrap());
        }
    }

    /// Writes `experiment.yaml`: the given text, and after it a default for every key that the text leaves out.
    pub fn experiment(&self, text: &str) {
        let data = format!("data: [own, {:?}]", project("data"));
        let mut lines = vec![text];
        for default in DEFAULTS.into_iter().chain([data.as_str()]) {
            let key = default.split_inclusive(':').next().unwrap();
            if !text.lines().any(|line| line.starts_with(key)) {
                lines.push(default);
            }
        }
        self.write("experiment.yaml", lines.join("\n") + "\n");
    }

    /// Prepares a call in this folder, free of what the user's own environment says.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("child-tuning"));
        command.args(arguments).current_dir(self.folder.path());
        for variable in ["DATA", "LIBTORCH", "CHILD_TUNING_DATA_ENDPOINT", "HF_TOKEN", "HF_HUB_CACHE"] {
            command.env_remove(variable);
        }
        command.env("CHILD_TUNING_CACHE", self.path("cache"));
        // Nothing is asked for on the network unless a test says where.
        command.env("HF_HOME", self.path("huggingface")).env("HF_HUB_OFFLINE", "1");
        command
    }

    /// Calls the program and waits for its end.
    pub fn call(&self, arguments: &[&str]) -> Answer {
        let output = assert_cmd::Command::from_std(self.command(arguments)).timeout(LIMIT).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Answer { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Runs `experiment.yaml` on one thread.
    pub fn run(&self, further: &[&str]) -> Answer {
        self.call(&[&["run", "experiment.yaml", "--threads", "1"], further].concat())
    }

    /// Reads a CSV that must be whole: as many fields in every row as in the header, and a final newline.
    pub fn rows(&self, name: &str) -> Vec<Row> {
        assert!(self.read(name).ends_with('\n'), "{name} ends in the middle of a row");
        csv::Reader::from_path(self.path(name)).unwrap().deserialize().map(|row| row.unwrap()).collect()
    }

    /// The only row of a CSV.
    pub fn row(&self, name: &str) -> Row {
        let mut rows = self.rows(name);
        assert_eq!(rows.len(), 1, "{name}");
        rows.remove(0)
    }

    /// The cells of one column of a CSV.
    pub fn column(&self, name: &str, column: &str) -> Vec<String> {
        self.rows(name).into_iter().map(|mut row| row.remove(column).unwrap()).collect()
    }

    /// The names of the files in a folder, sorted.
    pub fn files(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The tensors of a safetensors file as bytes, by name.
    pub fn tensors(&self, name: &str) -> HashMap<String, Vec<u8>> {
        let bytes = fs::read(self.path(name)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        file.iter().map(|(name, view)| (name.to_owned(), view.data().to_vec())).collect()
    }
}

impl Answer {
    /// Asserts the exit code and hands the answer on.
    pub fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts that the call was refused: nothing on standard output, and on standard error one line that names all
    /// that is given.
    pub fn refused(&self, code: i32, parts: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (Some(code), ""), "{}", self.stderr);
        assert!(self.stderr.starts_with("error: ") && self.stderr.lines().count() == 1, "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "`{part}` is not in: {}", self.stderr);
        }
        // A cause that is told twice is a line that nobody reads to its end.
        assert!(self.stderr.matches("os error").count() <= 1, "{}", self.stderr);
    }
}

/// Returns the number in a column of a row.
pub fn number(row: &Row, column: &str) -> f64 {
    row[column].parse().unwrap_or_else(|_| panic!("{column} is `{}`", row[column]))
}

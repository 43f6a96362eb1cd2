//! Splits and files of a task as data sets: which files there are, and what they hold together.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::files::{expand, find};
use super::label::Label;
use super::layout::{RowFilter, SplitFiles};
use super::sheet::{Example, Listed, Purpose, Sheet};
use super::table::DataFile;
use super::task::{Split, TaskCard};
use crate::error::{Error, Result};
use crate::values::hexadecimal;

/// The examples of one split or file, in file order.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The examples, at least one.
    pub examples: Vec<Example>,
    /// How many rows were left out because the card says so: those with a label of `drop_labels`,
    /// and with `skip_short_rows` those with missing cells.
    pub dropped: usize,
    /// The file they come from; the first where there are several.
    pub path: PathBuf,
}

impl Dataset {
    /// Returns the SHA-256 of texts and labels, in hexadecimal: equal for the same examples in any file format.
    pub fn examples_sha256(&self) -> String {
        let mut checksum = Sha256::new();
        for Example { first, second, label } in &self.examples {
            for text in [Some(first), second.as_ref()].into_iter().flatten() {
                checksum.update((text.len() as u64).to_le_bytes());
                checksum.update(text);
            }
            checksum.update(match label {
                None => [0; 9],
                Some(Label::Class(id)) => tagged(1, *id as u64),
                Some(Label::Score(score)) => tagged(2, u64::from(score.to_bits())),
            });
        }
        hexadecimal(&checksum.finalize())
    }
}

/// A number behind a byte that tells what it is.
fn tagged(kind: u8, number: u64) -> [u8; 9] {
    let mut bytes = [kind; 9];
    bytes[1..].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// Reads a split of a task, from the first of `roots` that holds it.
///
/// Train and dev examples must be labelled, test examples may be. Rows that the card gives up
/// (`drop_labels`, `skip_short_rows`) are left out and counted.
///
/// # Errors
///
/// [`Error::Configuration`] if no root holds the split, with the places and names tried;
/// [`Error::Data`] with file and line if a row is not an example of the task.
pub fn read_split(card: &TaskCard, roots: &[PathBuf], split: Split) -> Result<Dataset> {
    if let Some(dataset) = read_if_there(card, roots, split)? {
        return Ok(dataset);
    }
    let choices = card.splits.get(&split).map_or(&[][..], Vec::as_slice);
    if choices.is_empty() {
        return Err(Error::configuration(match TaskCard::builtin(&card.name) {
            Some(own) if own == *card => {
                format!("task `{}` has no {split} data: none are published", card.name)
            }
            _ => format!("task `{}` has no {split} data; name a file as `{split}:` in its card", card.name),
        }));
    }
    Err(not_found(card, roots, split, choices))
}

/// Reads a split of a task from the first root that holds it; nothing if none does.
///
/// # Errors
///
/// [`Error::Data`] and [`Error::Io`] if a file that is there cannot be read as the task.
pub(super) fn read_if_there(card: &TaskCard, roots: &[PathBuf], split: Split) -> Result<Option<Dataset>> {
    let choices = card.splits.get(&split).map_or(&[][..], Vec::as_slice);
    let Some(only) = choices.first() else { return Ok(None) };
    let purpose = if split == Split::Test { Purpose::Testing } else { Purpose::Learning };
    if card.folders.is_empty() {
        let mut files = Vec::new();
        for pattern in &only.files {
            files.extend(expand_to_some(pattern)?);
        }
        return read_files(card, Path::new(""), &files, only.rows.as_ref(), purpose).map(Some);
    }
    for root in roots {
        for folder in card.folders.iter().map(|folder| root.join(folder)) {
            for choice in choices {
                if let Some(files) = find(choice, &folder)? {
                    return read_files(card, &folder, &files, choice.rows.as_ref(), purpose).map(Some);
                }
            }
        }
    }
    Ok(None)
}

/// Returns the roots that train and dev data of a task are looked for in: the first that holds both, if one does, since parts of
/// different copies do not belong together.
///
/// # Errors
///
/// [`Error::Configuration`] if both are there, but nowhere together.
pub fn roots_of_training(card: &TaskCard, roots: &[PathBuf]) -> Result<Vec<PathBuf>> {
    // One that cannot be looked into counts as holding it: reading says why.
    let holding = |split| {
        let holding = |root: &&PathBuf| holds(card, root, split).unwrap_or(true);
        roots.iter().filter(holding).collect::<Vec<_>>()
    };
    let (train, dev) = (holding(Split::Train), holding(Split::Dev));
    match train.iter().find(|root| dev.contains(root)) {
        Some(root) => Ok(vec![root.to_path_buf()]),
        None if train.is_empty() || dev.is_empty() => Ok(roots.to_vec()),
        None => Err(Error::configuration(format!(
            "task `{}` has its train data in {} and its dev data in {}; put both into one folder",
            card.name,
            train[0].display(),
            dev[0].display()
        ))),
    }
}

/// Returns whether a root holds a split of a task; a task without folders of its own is in none.
///
/// # Errors
///
/// [`Error::Data`] if some of the files of a split are there and others are not.
fn holds(card: &TaskCard, root: &Path, split: Split) -> Result<bool> {
    for folder in card.folders.iter().map(|folder| root.join(folder)) {
        for choice in card.splits.get(&split).into_iter().flatten() {
            if find(choice, &folder)?.is_some() {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Reads one file of a task, such as the input of a prediction, each row as an example; labels
/// may be missing or unknown to the card.
///
/// # Errors
///
/// [`Error::Data`] with file and line if the file has none of the card's layouts or a row is not
/// an example of the task.
pub fn read_file(card: &TaskCard, path: &Path) -> Result<Dataset> {
    read_files(card, Path::new(""), &[path.to_path_buf()], None, Purpose::Predicting)
}

/// Returns the distinct spellings in the label column of a file, for a card without label names.
pub(super) fn label_spellings(card: &TaskCard, path: &Path) -> Result<BTreeSet<String>> {
    let mut spellings = BTreeSet::new();
    for path in expand_to_some(path)? {
        let file = DataFile::read(&path)?;
        spellings.extend(Sheet::open(card, &file)?.label_spellings()?.map(str::to_string));
    }
    Ok(spellings)
}

/// Returns the files that a user's path stands for, at least one.
fn expand_to_some(path: &Path) -> Result<Vec<PathBuf>> {
    match expand(path)? {
        files if files.is_empty() => Err(Error::data(path, 0, "there is no file of such a name")),
        files => Ok(files),
    }
}

fn not_found(card: &TaskCard, roots: &[PathBuf], split: Split, choices: &[SplitFiles]) -> Error {
    let mut names: Vec<String> = Vec::new();
    for choice in choices {
        let list = choice.rows.as_ref().and_then(|filter| filter.list.as_ref());
        let files: Vec<_> = choice.files.iter().chain(list).map(|file| file.display().to_string()).collect();
        names.push(files.join(" with "));
    }
    let roots: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
    Error::configuration(format!(
        "found no {split} data of task `{}`: looked in {} for a folder {} that holds {}",
        card.name,
        if roots.is_empty() { "no data folder at all".to_string() } else { roots.join(", ") },
        card.folders.join(" or "),
        names.join(", or "),
    ))
}

fn read_files(
    card: &TaskCard,
    folder: &Path,
    files: &[PathBuf],
    filter: Option<&RowFilter>,
    purpose: Purpose,
) -> Result<Dataset> {
    let mut examples = Vec::new();
    let mut dropped = 0;
    let listed = filter.map(|filter| Listed::read(filter, folder)).transpose()?;
    for path in files {
        let file = DataFile::read(path)?;
        let before = examples.len();
        dropped += Sheet::open(card, &file)?.read(listed.as_ref(), purpose, &mut examples)?;
        if examples.len() == before {
            return Err(Error::data(path, 0, "has no examples"));
        }
    }
    let path = files.first().cloned().unwrap_or_default();
    Ok(Dataset { examples, dropped, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAIN: &str = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n";
    const MICROSOFT: &str = "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n\
        1\t10\t11\ta\tb\n0\t20\t21\tc\td\n1\t10\t21\te\tf\n";

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
    }

    fn firsts(dataset: &Dataset) -> Vec<&str> {
        dataset.examples.iter().map(|example| example.first.as_str()).collect()
    }

    fn card(name: &str) -> TaskCard {
        TaskCard::builtin(name).unwrap()
    }

    #[test]
    fn roots_are_searched_in_order_under_every_folder_name() {
        let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let roots = [near.path().to_path_buf(), far.path().to_path_buf()];
        write(far.path(), &[("RTE/train.tsv", TRAIN)]);
        let found = read_split(&card("rte"), &roots, Split::Train).unwrap();
        assert_eq!(found.path, far.path().join("RTE/train.tsv"));
        assert_eq!(firsts(&found), ["a", "c"]);
        assert_eq!(found.examples[1].label, Some(Label::Class(1)));
        write(near.path(), &[("rte/train.tsv", TRAIN)]);
        let found = read_split(&card("rte"), &roots, Split::Train).unwrap();
        assert_eq!(found.path, near.path().join("rte/train.tsv"));
    }

    #[test]
    fn a_split_that_is_nowhere_is_reported_with_places_and_names() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), &[("MRPC/msr_paraphrase_train.txt", MICROSOFT)]);
        let error = read_split(&card("mrpc"), &[root.path().into()], Split::Dev).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        for part in [
            "found no dev data of task `mrpc`",
            &root.path().display().to_string(),
            "a folder MRPC or mrpc",
            "dev.tsv",
            "msr_paraphrase_train.txt with dev_ids.tsv",
        ] {
            assert!(message.contains(part), "{part}: {message}");
        }
        let message = read_split(&card("rte"), &[], Split::Dev).unwrap_err().to_string();
        assert!(message.contains("no data folder at all"), "{message}");
    }

    #[test]
    fn microsofts_file_is_split_by_pairs_of_ids() {
        let root = tempfile::tempdir().unwrap();
        let ids = ("MRPC/dev_ids.tsv", "10\t11\n20\t99\n");
        write(root.path(), &[("MRPC/msr_paraphrase_train.txt", MICROSOFT), ids]);
        let roots = [root.path().to_path_buf()];
        let train = read_split(&card("mrpc"), &roots, Split::Train).unwrap();
        let dev = read_split(&card("mrpc"), &roots, Split::Dev).unwrap();
        assert_eq!(firsts(&train), ["c", "e"]);
        assert_eq!(firsts(&dev), ["a"]);

        // Ids that match no row would put dev among train.
        let refusal = |name: &str, text: &str| {
            write(root.path(), &[(name, text)]);
            read_split(&card("mrpc"), &roots, Split::Train).unwrap_err().to_string()
        };
        let message = refusal("MRPC/dev_ids.tsv", "10\t11\n20\t99\tx\n");
        assert!(
            message.ends_with("dev_ids.tsv:2: has 3 cells, not the 2 by which rows are listed"),
            "{message}"
        );
        write(root.path(), &[ids]);
        let twice = MICROSOFT.replacen("#2 ID", "#1 ID", 1);
        let message = refusal("MRPC/msr_paraphrase_train.txt", &twice);
        assert!(message.ends_with(":1: has more than one column called `#1 ID`"), "{message}");
    }

    #[test]
    fn a_split_of_two_files_is_read_in_order_and_hashed_as_one() {
        let row = |text: &str| format!("gj04\t1\t\t{text}\n");
        let (inner, outer) = (row("in"), row("out"));
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            &[
                ("cola/original/raw/in_domain_dev.tsv", &inner),
                ("cola/original/raw/out_of_domain_dev.tsv", &outer),
            ],
        );
        let two = read_split(&card("cola"), &[root.path().into()], Split::Dev).unwrap();
        assert_eq!(firsts(&two), ["in", "out"]);
        write(root.path(), &[("CoLA/dev.tsv", &(inner + &outer))]);
        let one = read_split(&card("cola"), &[root.path().into()], Split::Dev).unwrap();
        assert_eq!(one.examples_sha256(), two.examples_sha256());
    }

    #[test]
    fn only_test_and_prediction_files_may_lack_labels() {
        let root = tempfile::tempdir().unwrap();
        let unlabelled = "index\tsentence1\tsentence2\n0\ta\tb\n";
        write(root.path(), &[("RTE/test.tsv", unlabelled), ("RTE/dev.tsv", unlabelled)]);
        let roots = [root.path().to_path_buf()];
        let test = read_split(&card("rte"), &roots, Split::Test).unwrap();
        assert_eq!(test.examples[0].label, None);
        assert_eq!(read_file(&card("rte"), &test.path).unwrap().examples, test.examples);
        let message = read_split(&card("rte"), &roots, Split::Dev).unwrap_err().to_string();
        assert!(message.contains("dev.tsv:1: has no label column; expected one named `label`"), "{message}");
    }

    #[test]
    fn files_without_examples_and_folders_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for content in ["", "\n\n", "\u{feff}", "index\tsentence1\tsentence2\tlabel\n"] {
            write(root.path(), &[("RTE/train.tsv", content)]);
            let error = read_split(&card("rte"), &[root.path().into()], Split::Train).unwrap_err();
            assert!(error.to_string().ends_with("train.tsv: has no examples"), "{content:?}: {error}");
        }
        std::fs::create_dir(root.path().join("RTE/dev.tsv")).unwrap();
        let error = read_split(&card("rte"), &[root.path().into()], Split::Dev).unwrap_err();
        assert!(error.to_string().contains("is a folder"), "{error}");
        let error = read_file(&card("rte"), &root.path().join("none.tsv")).unwrap_err();
        assert!(error.to_string().contains("there is no such file"), "{error}");
    }
}

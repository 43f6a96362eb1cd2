//! What the splits of a task hold: counts, labels, repeated and empty texts, lengths, and what train and the others have in
//! common.

use std::collections::HashMap;
use std::path::PathBuf;

use super::encode::TokenEncoder;
use super::label::Label;
use super::reader::{Dataset, read_if_there, roots_of_training};
use super::sheet::Example;
use super::task::{Split, TaskCard};
use crate::error::Result;

/// How many examples are tokenised at once; only their lengths are kept.
const CHUNK: usize = 4096;

/// What one split holds.
#[derive(Clone, Debug, PartialEq)]
pub struct SplitCheck {
    /// The split.
    pub split: Split,
    /// The file, or the first of several.
    pub path: PathBuf,
    /// Its rows.
    pub rows: usize,
    /// How many rows were published; `None` where the card does not say.
    pub published: Option<usize>,
    /// How many rows have each label, in id order; empty for regression.
    pub labels: Vec<(String, usize)>,
    /// What the scores of a regression are like; `None` where there are none.
    pub scores: Option<Scores>,
    /// Rows without a label.
    pub unlabelled: usize,
    /// Rows that have the same text, or the same two texts, as a row before them.
    pub duplicates: usize,
    /// Different texts that occur with more than one label.
    pub contradictions: usize,
    /// Rows with a text that holds nothing but white space.
    pub empty: usize,
    /// Rows of more words than the longest example may have tokens: these are certainly cut.
    pub long: usize,
    /// Words of a row, both texts together; a word is what stands between white space.
    pub words: Lengths,
    /// Tokens of a row, if a tokenizer was given.
    pub tokens: Option<TokenLengths>,
    /// What this split has in common with train; `None` for train itself, or if there is no train.
    pub in_train: Option<InTrain>,
}

/// The lengths of the rows of a split.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    /// Their mean.
    pub mean: f64,
    /// The least length that half of the rows do not exceed.
    pub median: usize,
    /// The least length that 95 % of the rows do not exceed.
    pub percentile_95: usize,
    /// The greatest length.
    pub longest: usize,
}

/// The lengths of the rows of a split in tokens, special tokens included.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLengths {
    /// The lengths before anything is cut.
    pub lengths: Lengths,
    /// Rows that are longer than the longest example may be.
    pub cut: usize,
}

/// The scores of a regression.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Their mean.
    pub mean: f64,
    /// The least one.
    pub least: f32,
    /// The greatest one.
    pub greatest: f32,
}

/// What a split has in common with train.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InTrain {
    /// Rows whose text, or both texts, stand in train exactly so.
    pub rows: usize,
    /// Those among them whose label differs from every label of the same text in train.
    pub other_label: usize,
}

/// The text or the texts of an example, as a key.
type Texts<'a> = (&'a str, Option<&'a str>);

/// The different labels of each text of a split.
type LabelsByText<'a> = HashMap<Texts<'a>, Vec<Label>>;

/// Reads the splits of a task that are somewhere in `roots`, train and dev data from where a run would take them.
///
/// # Errors
///
/// As for [`roots_of_training`], and if a file that is there cannot be read as the task.
pub fn read_present(card: &TaskCard, roots: &[PathBuf]) -> Result<Vec<(Split, Dataset)>> {
    let mut present = Vec::new();
    let of_training = roots_of_training(card, roots)?;
    for split in Split::ALL {
        let roots = if split == Split::Test { roots } else { &of_training };
        present.extend(read_if_there(card, roots, split)?.map(|dataset| (split, dataset)));
    }
    Ok(present)
}

/// Looks through the splits of a task; `max_length` is the longest example in tokens.
///
/// # Errors
///
/// Fails if the tokenizer does.
pub fn check_splits(
    card: &TaskCard,
    splits: &[(Split, Dataset)],
    max_length: usize,
    encoder: Option<&TokenEncoder>,
) -> Result<Vec<SplitCheck>> {
    let train = splits.iter().find(|(split, _)| *split == Split::Train);
    let train = train.map(|(_, dataset)| labels_by_text(&dataset.examples));
    splits
        .iter()
        .map(|(split, dataset)| {
            let own;
            let by_text = match (&train, split) {
                (Some(train), Split::Train) => train,
                _ => {
                    own = labels_by_text(&dataset.examples);
                    &own
                }
            };
            let examples = &dataset.examples;
            let words: Vec<usize> = examples.iter().map(words).collect();
            let other_train = train.as_ref().filter(|_| *split != Split::Train);
            Ok(SplitCheck {
                split: *split,
                path: dataset.path.clone(),
                rows: examples.len(),
                published: card.published.get(split).copied(),
                labels: count_labels(card, examples),
                scores: scores(examples),
                unlabelled: examples.iter().filter(|example| example.label.is_none()).count(),
                duplicates: examples.len() - by_text.len(),
                contradictions: by_text.values().filter(|labels| labels.len() > 1).count(),
                empty: examples.iter().filter(|example| has_empty_text(example)).count(),
                long: words.iter().filter(|words| **words > max_length).count(),
                words: lengths(words),
                tokens: encoder.map(|encoder| token_lengths(encoder, examples, max_length)).transpose()?,
                in_train: other_train.map(|train| in_train(train, examples)),
            })
        })
        .collect()
}

fn texts(example: &Example) -> Texts<'_> {
    (&example.first, example.second.as_deref())
}

fn labels_by_text(examples: &[Example]) -> LabelsByText<'_> {
    let mut by_text = LabelsByText::with_capacity(examples.len());
    for example in examples {
        let labels = by_text.entry(texts(example)).or_default();
        labels.extend(example.label.filter(|label| !labels.contains(label)));
    }
    by_text
}

fn in_train(train: &LabelsByText, examples: &[Example]) -> InTrain {
    let mut common = InTrain { rows: 0, other_label: 0 };
    for example in examples {
        if let Some(labels) = train.get(&texts(example)) {
            common.rows += 1;
            common.other_label += usize::from(example.label.is_some_and(|label| !labels.contains(&label)));
        }
    }
    common
}

fn count_labels(card: &TaskCard, examples: &[Example]) -> Vec<(String, usize)> {
    let mut counts: Vec<_> = card.labels().iter().map(|label| (label.clone(), 0)).collect();
    for example in examples {
        if let Some(Label::Class(id)) = example.label {
            counts[id].1 += 1;
        }
    }
    counts
}

fn scores(examples: &[Example]) -> Option<Scores> {
    let scores = examples.iter().filter_map(|example| match example.label {
        Some(Label::Score(score)) => Some(score),
        _ => None,
    });
    let scores: Vec<f32> = scores.collect();
    Some(Scores {
        mean: scores.iter().map(|score| f64::from(*score)).sum::<f64>() / scores.len() as f64,
        least: scores.iter().copied().min_by(f32::total_cmp)?,
        greatest: scores.iter().copied().max_by(f32::total_cmp)?,
    })
}

fn both(example: &Example) -> impl Iterator<Item = &str> {
    [Some(example.first.as_str()), example.second.as_deref()].into_iter().flatten()
}

fn has_empty_text(example: &Example) -> bool {
    both(example).any(|text| text.trim().is_empty())
}

fn words(example: &Example) -> usize {
    both(example).map(|text| text.split_whitespace().count()).sum()
}

fn token_lengths(encoder: &TokenEncoder, examples: &[Example], max_length: usize) -> Result<TokenLengths> {
    let mut tokens = Vec::with_capacity(examples.len());
    for chunk in examples.chunks(CHUNK) {
        tokens.extend(encoder.encode_dataset(chunk, usize::MAX)?.iter().map(|encoded| encoded.ids.len()));
    }
    let cut = tokens.iter().filter(|tokens| **tokens > max_length).count();
    Ok(TokenLengths { lengths: lengths(tokens), cut })
}

/// Summarises lengths; the quantiles are those of `numpy.quantile(method="inverted_cdf")`.
fn lengths(mut lengths: Vec<usize>) -> Lengths {
    lengths.sort_unstable();
    let count = lengths.len();
    let percentile = |percent: usize| {
        let place = (count * percent).div_ceil(100).max(1) - 1;
        lengths.get(place).copied().unwrap_or(0)
    };
    Lengths {
        mean: lengths.iter().sum::<usize>() as f64 / count.max(1) as f64,
        median: percentile(50),
        percentile_95: percentile(95),
        longest: percentile(100),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(first: &str, second: Option<&str>, label: Option<Label>) -> Example {
        Example { first: first.into(), second: second.map(str::to_owned), label }
    }

    fn dataset(examples: Vec<Example>) -> Dataset {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("CoLA/train.tsv");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "s\t1\t\tx\n").unwrap();
        let read =
            crate::data::read_split(&TaskCard::builtin("cola").unwrap(), &[base.path().into()], Split::Train)
                .unwrap();
        Dataset { examples, ..read }
    }

    fn class(id: usize) -> Option<Label> {
        Some(Label::Class(id))
    }

    #[test]
    fn repeated_contradictory_and_shared_rows_are_counted() {
        let card = TaskCard::builtin("rte").unwrap();
        let train = vec![
            example("a", Some("b"), class(0)),
            example("a", Some("b"), class(0)),
            example("a", Some("b"), class(1)),
            // The same words, but another cut between the texts, or another case.
            example("a b", Some(""), class(0)),
            example("A", Some("b"), class(1)),
            example("c", Some("d"), class(1)),
        ];
        let dev = vec![
            example("c", Some("d"), class(0)),
            example("c", Some("d"), class(1)),
            example("a", Some("b"), class(1)),
            example("x", Some(" \t"), class(1)),
        ];
        let test = vec![example("c", Some("d"), None), example("y", Some("z"), None)];
        let splits =
            [(Split::Train, dataset(train)), (Split::Dev, dataset(dev)), (Split::Test, dataset(test))];
        let checks = check_splits(&card, &splits, 128, None).unwrap();
        let [train, dev, test] = &checks[..] else { panic!("{checks:?}") };
        assert_eq!((train.rows, train.published, train.unlabelled), (6, Some(2490), 0));
        assert_eq!((train.duplicates, train.contradictions, train.empty), (2, 1, 1));
        assert_eq!(train.labels, [("entailment".to_owned(), 3), ("not_entailment".to_owned(), 3)]);
        assert_eq!((train.in_train, train.scores, train.tokens), (None, None, None));
        assert_eq!((dev.duplicates, dev.contradictions, dev.empty), (1, 1, 1));
        assert_eq!(dev.in_train, Some(InTrain { rows: 3, other_label: 1 }));
        assert_eq!(test.in_train, Some(InTrain { rows: 1, other_label: 0 }));
        assert_eq!((test.unlabelled, test.contradictions), (2, 0));
        let alone = check_splits(&card, &splits[1..2], 128, None).unwrap();
        assert_eq!(alone[0].in_train, None);
    }

    #[test]
    fn scores_of_a_regression_are_summarised() {
        let card = TaskCard::builtin("stsb").unwrap();
        let score = |score| Some(Label::Score(score));
        let rows = vec![
            example("a", Some("b"), score(1.0)),
            example("a", Some("b"), score(4.5)),
            example("c", Some("d"), None),
        ];
        let checks = check_splits(&card, &[(Split::Test, dataset(rows))], 128, None).unwrap();
        assert_eq!(checks[0].scores, Some(Scores { mean: 2.75, least: 1.0, greatest: 4.5 }));
        assert_eq!((checks[0].contradictions, checks[0].unlabelled, checks[0].labels.len()), (1, 1, 0));
    }

    /// `numpy.quantile(range(1, n + 1), [0.5, 0.95, 1], method="inverted_cdf")`.
    #[test]
    fn quantiles_are_those_of_numpy() {
        for (count, expected) in [(1, [1, 1, 1]), (2, [1, 2, 2]), (20, [10, 19, 20]), (101, [51, 96, 101])] {
            let found = lengths((1..=count).rev().collect());
            assert_eq!([found.median, found.percentile_95, found.longest], expected, "{count}");
            assert_eq!(found.mean, (count + 1) as f64 / 2.0);
        }
    }

    #[test]
    fn lengths_are_those_before_the_cut_with_special_tokens() {
        let card = TaskCard::builtin("rte").unwrap();
        let model = tempfile::tempdir().unwrap();
        std::fs::write(model.path().join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\ncat\n##s\n")
            .unwrap();
        let encoder = TokenEncoder::from_folder(model.path()).unwrap();
        let long = "the ".repeat(40);
        let rows = vec![example("the cats", Some("cat"), class(0)), example(&long, Some("cats"), class(1))];
        let checks = check_splits(&card, &[(Split::Dev, dataset(rows))], 40, Some(&encoder)).unwrap();
        assert_eq!(checks[0].words, Lengths { mean: 22.0, median: 3, percentile_95: 41, longest: 41 });
        assert_eq!(checks[0].long, 1);
        let expected = Lengths { mean: 26.0, median: 7, percentile_95: 45, longest: 45 };
        assert_eq!(checks[0].tokens, Some(TokenLengths { lengths: expected, cut: 1 }));
    }

    #[test]
    fn only_what_is_there_is_read_and_faults_are_not_hidden() {
        let root = tempfile::tempdir().unwrap();
        let roots = [root.path().to_path_buf()];
        let card = TaskCard::builtin("rte").unwrap();
        assert!(read_present(&card, &roots).unwrap().is_empty());
        std::fs::create_dir(root.path().join("RTE")).unwrap();
        let rows = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n";
        std::fs::write(root.path().join("RTE/dev.tsv"), rows).unwrap();
        let present = read_present(&card, &roots).unwrap();
        assert_eq!(present.iter().map(|(split, _)| *split).collect::<Vec<_>>(), [Split::Dev]);
        std::fs::write(root.path().join("RTE/test.tsv"), "no table").unwrap();
        assert!(read_present(&card, &roots).unwrap_err().to_string().contains("test.tsv:1: "));
    }
}

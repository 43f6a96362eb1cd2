//! The readers against whole data sets: the miniature ones in `data/` and, where they lie beside
//! the project in `../shared/data`, the real ones, whose counts and checksums are published.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use child_tuning::data::{Dataset, Example, Label, Split, TaskCard, read_file, read_split};

fn project() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the folder of the real data sets, or says why a test has nothing to do.
fn real_data() -> Option<PathBuf> {
    let folder = project().join("../shared/data");
    if !folder.is_dir() {
        println!("skipped: the real data sets are not in {}", folder.display());
        return None;
    }
    Some(folder)
}

fn card(name: &str) -> TaskCard {
    TaskCard::builtin(name).unwrap()
}

/// Counts the labels of a classification: how often each id occurs, and how often none.
fn label_counts(dataset: &Dataset) -> (Vec<usize>, usize) {
    let mut counts = vec![0; 2];
    let mut none = 0;
    for example in &dataset.examples {
        match example.label {
            Some(Label::Class(id)) => counts[id] += 1,
            Some(Label::Score(_)) => panic!("a score in a classification"),
            None => none += 1,
        }
    }
    (counts, none)
}

fn scores(dataset: &Dataset) -> Vec<f32> {
    let score = |example: &Example| match example.label {
        Some(Label::Score(score)) => score,
        other => panic!("not a score: {other:?}"),
    };
    dataset.examples.iter().map(score).collect()
}

fn texts(dataset: &Dataset) -> Vec<(&str, Option<&str>)> {
    dataset.examples.iter().map(|example| (example.first.as_str(), example.second.as_deref())).collect()
}

/// What is known of a split: class counts, unlabelled rows, beginnings of the first and the last
/// example, and the checksum of the file.
struct Known {
    task: &'static str,
    split: Split,
    classes: [usize; 2],
    unlabelled: usize,
    first: &'static str,
    last: &'static str,
    sha256: &'static str,
}

#[rustfmt::skip]
const KNOWN: [Known; 9] = [
    Known { task: "cola", split: Split::Train, classes: [2528, 6023], unlabelled: 0, first: "Our friends won't", last: "What all did",
        sha256: "cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624" },
    Known { task: "cola", split: Split::Dev, classes: [322, 721], unlabelled: 0, first: "The sailors rode", last: "John talked to",
        sha256: "8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd" },
    Known { task: "cola", split: Split::Test, classes: [0, 0], unlabelled: 1063, first: "Bill whistled past", last: "A picture of",
        sha256: "3b4df85f7a9a0633574b38d181e18090ac961a24b18fb6bcd74999ddea8ad0b8" },
    Known { task: "rte", split: Split::Train, classes: [1249, 1241], unlabelled: 0, first: "No Weapons of", last: "Turkey is unlikely",
        sha256: "41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c" },
    Known { task: "rte", split: Split::Dev, classes: [146, 131], unlabelled: 0, first: "Dana Reeve, the", last: "Danny Kennedy, Greenpeace",
        sha256: "80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb" },
    Known { task: "rte", split: Split::Test, classes: [0, 0], unlabelled: 3000, first: "Mangla was summoned", last: "A Helios airliner",
        sha256: "6e33f09b5c2bfd5fd5fde217070f3dd49e484e33b9752b5864cf36fc421a213f" },
    Known { task: "mrpc", split: Split::Train, classes: [1194, 2474], unlabelled: 0, first: "Amrozi accused his", last: "The 30-year bond",
        sha256: "122becc469405bc16f9defcb8715d2a4b7ce600e9d9381e6dc42bfdd1494c51d" },
    Known { task: "mrpc", split: Split::Dev, classes: [129, 279], unlabelled: 0, first: "He said the", last: "Ex-KGB agent Putin",
        sha256: "81c8a1a9e1dfe461dd2c1a4f98f43fe18bece44d2bf9e3d0b245b88e5aa5eaf7" },
    Known { task: "mrpc", split: Split::Test, classes: [578, 1147], unlabelled: 0, first: "PCCW's chief operating", last: "Sobig.F spreads when",
        sha256: "0360d0d3427a0ae14882e2b3a799df0fab6cb5203d5e8ee481949283da62acb6" },
];

#[test]
fn real_classification_sets_have_their_published_rows() {
    let Some(root) = real_data() else { return };
    for known in KNOWN {
        let dataset = read_split(&card(known.task), std::slice::from_ref(&root), known.split).unwrap();
        let place = format!("{} {}", known.task, known.split);
        assert_eq!(label_counts(&dataset), (known.classes.to_vec(), known.unlabelled), "{place}");
        assert_eq!(dataset.sha256, known.sha256, "{place}");
        let (first, last) = (&dataset.examples[0].first, &dataset.examples.last().unwrap().first);
        assert!(first.starts_with(known.first), "{place}: {first}");
        assert!(last.starts_with(known.last), "{place}: {last}");
        let is_pair = card(known.task).is_pair();
        assert!(dataset.examples.iter().all(|example| example.second.is_some() == is_pair), "{place}");
    }
}

#[test]
fn real_similarity_scores_are_the_same_in_both_layouts() {
    let Some(root) = real_data() else { return };
    let read = |file: &str| read_file(&card("stsb"), &root.join("STS-B").join(file)).unwrap();
    for (glue, original, rows, spaced) in
        [("train.tsv", "sts-train.csv", 5749, 311), ("dev.tsv", "sts-dev.csv", 1500, 0)]
    {
        let (glue, original) = (read(glue), read(&format!("original/{original}")));
        assert_eq!((glue.examples.len(), original.examples.len()), (rows, rows));
        assert_eq!(scores(&glue), scores(&original));
        let pairs = || texts(&glue).into_iter().zip(texts(&original));
        assert_eq!(pairs().filter(|(trimmed, kept)| trimmed != kept).count(), spaced);
        assert!(
            pairs()
                .all(|(trimmed, kept)| { trimmed.0 == kept.0.trim() && trimmed.1 == kept.1.map(str::trim) })
        );
    }
    let train = scores(&read("train.tsv"));
    assert_eq!((train[0], train[1], train[5748]), (5.0, 3.8, 0.0));
    let mean = train.iter().map(|score| f64::from(*score)).sum::<f64>() / 5749.0;
    assert!((mean - 2.700_999).abs() < 1e-6, "{mean}");

    let test = read_split(&card("stsb"), std::slice::from_ref(&root), Split::Test).unwrap();
    assert_eq!((scores(&test).len(), scores(&test)[0]), (1379, 2.5));
    let unlabelled = read("test.tsv");
    assert_eq!(unlabelled.examples.len(), 1379);
    assert!(unlabelled.examples.iter().all(|example| example.label.is_none()));
}

#[test]
fn the_published_id_list_splits_microsofts_file_into_the_glue_files() {
    let Some(root) = real_data() else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("mrpc")).unwrap();
    for file in ["msr_paraphrase_train.txt", "dev_ids.tsv"] {
        std::fs::copy(root.join("MRPC").join(file), folder.path().join("mrpc").join(file)).unwrap();
    }
    for split in [Split::Train, Split::Dev] {
        let made = read_split(&card("mrpc"), &[folder.path().into()], split).unwrap();
        let given = read_split(&card("mrpc"), std::slice::from_ref(&root), split).unwrap();
        assert_eq!(made.examples, given.examples, "{split}");
    }
    let unlabelled = read_file(&card("mrpc"), &root.join("MRPC/test.tsv")).unwrap();
    let labelled = read_split(&card("mrpc"), &[root], Split::Test).unwrap();
    assert_eq!(texts(&unlabelled), texts(&labelled));
}

#[test]
fn the_original_acceptability_files_equal_the_glue_files() {
    let Some(root) = real_data() else { return };
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("cola_public/raw")).unwrap();
    for file in ["in_domain_train.tsv", "in_domain_dev.tsv", "out_of_domain_dev.tsv"] {
        let source = root.join("CoLA/original/raw").join(file);
        std::fs::copy(source, folder.path().join("cola_public/raw").join(file)).unwrap();
    }
    for split in [Split::Train, Split::Dev] {
        let original = read_split(&card("cola"), &[folder.path().into()], split).unwrap();
        let glue = read_split(&card("cola"), std::slice::from_ref(&root), split).unwrap();
        assert_eq!(original.examples, glue.examples, "{split}");
    }
}

#[test]
fn miniature_sets_are_complete_and_share_no_example() {
    let root = project().join("data");
    for name in TaskCard::builtin_names() {
        let card = card(name);
        let mut seen = HashSet::new();
        for (split, size) in [(Split::Train, 320), (Split::Dev, 120), (Split::Test, 40)] {
            let dataset = read_split(&card, std::slice::from_ref(&root), split).unwrap();
            assert_eq!(dataset.examples.len(), size, "{name} {split}");
            for (first, second) in texts(&dataset) {
                let key = format!("{first}\t{}", second.unwrap_or_default());
                assert!(seen.insert(key), "{name} {split}: {first}");
            }
            let labelled = dataset.examples.iter().filter(|example| example.label.is_some()).count();
            assert_eq!(labelled, if split == Split::Test { 0 } else { size }, "{name} {split}");
            if split != Split::Test && card.label_count() == 2 {
                let (classes, _) = label_counts(&dataset);
                assert!(classes.iter().all(|count| count * 10 >= size * 3), "{name} {split}: {classes:?}");
            }
        }
    }
}

#[test]
fn miniature_sets_have_the_quirks_of_the_real_files() {
    let bytes = |file: &str| std::fs::read(project().join("data").join(Path::new(file))).unwrap();
    assert!(bytes("MRPC/train.tsv").starts_with("\u{feff}Quality".as_bytes()));
    assert!(!bytes("CoLA/train.tsv").starts_with(b"index") && !bytes("CoLA/dev.tsv").ends_with(b"\n"));
    for file in ["CoLA/train.tsv", "RTE/train.tsv", "MRPC/train.tsv", "STS-B/train.tsv"] {
        let text = String::from_utf8(bytes(file)).unwrap();
        assert!(text.contains('"') && text.contains('\'') && text.contains(", "), "{file}");
        assert!(!text.trim_start_matches('\u{feff}').is_ascii(), "{file}");
        assert!(text.lines().any(|line| line.matches('"').count() % 2 == 1), "{file}: an odd quote");
    }
}

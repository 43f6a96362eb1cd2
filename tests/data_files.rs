//! The readers against whole data sets: the miniature ones in `data/` and, where they lie beside
//! the project in `../shared/data`, the real ones, whose counts and checksums are published.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use child_tuning::data::{Dataset, Example, Label, Split, TaskCard, read_file, read_split};
use child_tuning::values::hexadecimal;
use sha2::{Digest, Sha256};

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
fn label_counts(dataset: &Dataset, classes: usize) -> (Vec<usize>, usize) {
    let mut counts = vec![0; classes];
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
    classes: &'static [usize],
    unlabelled: usize,
    first: &'static str,
    last: &'static str,
    sha256: &'static str,
}

#[rustfmt::skip]
const KNOWN: [Known; 27] = [
    Known { task: "cola", split: Split::Train, classes: &[2528, 6023], unlabelled: 0, first: "Our friends won't", last: "What all did",
        sha256: "cb368ebeb9f27d7ad03720d27ddc95687a311bdb100781a2fe59a5f5b1bc0624" },
    Known { task: "cola", split: Split::Dev, classes: &[322, 721], unlabelled: 0, first: "The sailors rode", last: "John talked to",
        sha256: "8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd" },
    Known { task: "cola", split: Split::Test, classes: &[0, 0], unlabelled: 1063, first: "Bill whistled past", last: "A picture of",
        sha256: "3b4df85f7a9a0633574b38d181e18090ac961a24b18fb6bcd74999ddea8ad0b8" },
    Known { task: "rte", split: Split::Train, classes: &[1249, 1241], unlabelled: 0, first: "No Weapons of", last: "Turkey is unlikely",
        sha256: "41e3a9b063433392343fad9e962cf2f58b681c78d8f71592f4186f0837246c5c" },
    Known { task: "rte", split: Split::Dev, classes: &[146, 131], unlabelled: 0, first: "Dana Reeve, the", last: "Danny Kennedy, Greenpeace",
        sha256: "80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb" },
    Known { task: "rte", split: Split::Test, classes: &[0, 0], unlabelled: 3000, first: "Mangla was summoned", last: "A Helios airliner",
        sha256: "6e33f09b5c2bfd5fd5fde217070f3dd49e484e33b9752b5864cf36fc421a213f" },
    Known { task: "mrpc", split: Split::Train, classes: &[1194, 2474], unlabelled: 0, first: "Amrozi accused his", last: "The 30-year bond",
        sha256: "122becc469405bc16f9defcb8715d2a4b7ce600e9d9381e6dc42bfdd1494c51d" },
    Known { task: "mrpc", split: Split::Dev, classes: &[129, 279], unlabelled: 0, first: "He said the", last: "Ex-KGB agent Putin",
        sha256: "81c8a1a9e1dfe461dd2c1a4f98f43fe18bece44d2bf9e3d0b245b88e5aa5eaf7" },
    Known { task: "mrpc", split: Split::Test, classes: &[578, 1147], unlabelled: 0, first: "PCCW's chief operating", last: "Sobig.F spreads when",
        sha256: "0360d0d3427a0ae14882e2b3a799df0fab6cb5203d5e8ee481949283da62acb6" },
    Known { task: "sst2", split: Split::Train, classes: &[29780, 37569], unlabelled: 0, first: "hide new secretions", last: "this new jangle",
        sha256: "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1" },
    Known { task: "sst2", split: Split::Dev, classes: &[428, 444], unlabelled: 0, first: "it 's a", last: "looking aristocratic ,",
        sha256: "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0" },
    Known { task: "sst2", split: Split::Test, classes: &[0, 0], unlabelled: 1821, first: "uneasy mishmash of", last: "dazzling and sugar-sweet",
        sha256: "69a938605609b3e6663b4487918fe1565eb293734e6e520d0366d1d412fd2a13" },
    Known { task: "qnli", split: Split::Dev, classes: &[2702, 2761], unlabelled: 0, first: "What came into", last: "Who discovered this",
        sha256: "ac19409dcb04631eaaa094bdebdcf621086bc352503dfb6a1a648b614986f4fd" },
    Known { task: "qnli", split: Split::Test, classes: &[0, 0], unlabelled: 5463, first: "What organization is", last: "Who fought in",
        sha256: "6d856264e292fa7a7bc7b8e182efa1454ffd9532733c12ad813017dd5b377a5a" },
    Known { task: "wnli", split: Split::Train, classes: &[323, 312], unlabelled: 0, first: "I stuck a", last: "Although they ran",
        sha256: "9a88e9d54b6861cc796a088e9acf4f5f65064a9ef65ae6fa7a688b28391e5c9a" },
    Known { task: "wnli", split: Split::Dev, classes: &[40, 31], unlabelled: 0, first: "The drain is", last: "George got free",
        sha256: "cba00490596dd14be8cf53b4f53bb744abe3a7b89f81ab210528d80225338ed5" },
    Known { task: "wnli", split: Split::Test, classes: &[0, 0], unlabelled: 146, first: "Maude and Dora", last: "Edward dropped adhesive",
        sha256: "ff0296817e235bf6f7a230c5f6781bd6ee228a45445f6510831fdef6f2a04766" },
    Known { task: "ax", split: Split::Test, classes: &[0, 0, 0], unlabelled: 1104, first: "The cat sat", last: "The new general",
        sha256: "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd" },
    Known { task: "mnli", split: Split::Dev, classes: &[3479, 3123, 3213], unlabelled: 0, first: "The new rights", last: "i'll listen ",
        sha256: "081af9b80f4fe75aba97d034c0ff21a8017c4d18e3b5b2b0b7612ab2cc3c7bf2" },
    Known { task: "snli", split: Split::Train, classes: &[6015, 5899, 6086], unlabelled: 0, first: "An older gentleman", last: "A man wearing",
        sha256: "f1bca476f3011e031e634862b2a42294a1e5bcd6187daae82b1187f529d60613" },
    Known { task: "snli", split: Split::Dev, classes: &[3329, 3235, 3278], unlabelled: 0, first: "Two women are", last: "A young girl",
        sha256: "4610d85664b3fa453c33fbbbc006ac870aaa1435ad1583b944af027673f5c3d4" },
    Known { task: "snli", split: Split::Test, classes: &[3368, 3219, 3237], unlabelled: 0, first: "This church choir", last: "A man in",
        sha256: "c56822451475e7dccf12cd2e68676fa1ccb0ac8c8d9b751c01915003712bb202" },
    Known { task: "scitail", split: Split::Dev, classes: &[657, 647], unlabelled: 0, first: "An introduction to", last: "A lunar eclipse",
        sha256: "ad2f794fa600b519d94cb85ae6b418f8e45739ccc374af825027eef98b985a51" },
    Known { task: "scitail", split: Split::Test, classes: &[842, 1284], unlabelled: 0, first: "Based on the", last: "Inorganic, Bioinorganic, and",
        sha256: "c015f8eb169ccc85d587efd8d06db87bee13ca24f75309c0388e01632ad19c34" },
    Known { task: "sick", split: Split::Train, classes: &[1274, 2524, 641], unlabelled: 0, first: "A group of", last: "Three dogs are",
        sha256: "1539c2d059809b5bd40694e26d8121cc85b6b496f91c7b40f2fc83bbd7dcd957" },
    Known { task: "sick", split: Split::Dev, classes: &[143, 281, 71], unlabelled: 0, first: "The young boys", last: "A young man",
        sha256: "1539c2d059809b5bd40694e26d8121cc85b6b496f91c7b40f2fc83bbd7dcd957" },
    Known { task: "sick", split: Split::Test, classes: &[1404, 2790, 712], unlabelled: 0, first: "There is no", last: "A man is",
        sha256: "1539c2d059809b5bd40694e26d8121cc85b6b496f91c7b40f2fc83bbd7dcd957" },
];

#[test]
fn real_classification_sets_have_their_published_rows() {
    let Some(root) = real_data() else { return };
    for known in KNOWN {
        let dataset = read_split(&card(known.task), std::slice::from_ref(&root), known.split).unwrap();
        let place = format!("{} {}", known.task, known.split);
        let counts = label_counts(&dataset, known.classes.len());
        assert_eq!((counts, dataset.dropped), ((known.classes.to_vec(), known.unlabelled), 0), "{place}");
        // Of SNLI there is a part of the training set only.
        let published = card(known.task).published[&known.split];
        let expected = if place == "snli train" { 18000 } else { published };
        assert_eq!(dataset.examples.len(), expected, "{place}");
        let file = std::fs::read(&dataset.path).unwrap();
        assert_eq!(hexadecimal(&Sha256::digest(file)), known.sha256, "{place}");
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

/// What is known of a file that is in no split: its place, and the counts of its classes.
const FILES: [(&str, &str, &[usize]); 14] = [
    ("snli", "SNLI/quoted_tsv/validation.tsv", &[3329, 3235, 3278]),
    ("snli", "SNLI/train_subset/test.csv", &[652, 663, 685]),
    ("snli", "SNLI/counterfactual/original/train.tsv", &[562, 554, 550]),
    ("snli", "SNLI/counterfactual/original/dev.tsv", &[74, 75, 51]),
    ("snli", "SNLI/counterfactual/original/test.tsv", &[146, 123, 131]),
    ("snli", "SNLI/counterfactual/all_combined/train.tsv", &[2770, 2778, 2782]),
    ("snli", "SNLI/counterfactual/all_combined/dev.tsv", &[326, 325, 349]),
    ("snli", "SNLI/counterfactual/all_combined/test.tsv", &[654, 677, 669]),
    ("scitail", "SciTail/tokenised/test.txt", &[842, 1284]),
    ("sick", "SICK/semeval2014/SICK_train.txt", &[1299, 2536, 665]),
    ("sick", "SICK/semeval2014/SICK_trial.txt", &[144, 282, 74]),
    ("sick", "SICK/semeval2014/SICK_test_annotated.txt", &[1414, 2793, 720]),
    ("mrpc", "MRPC/senteval/msr_paraphrase_train.txt", &[1323, 2753]),
    ("mrpc", "MRPC/senteval/msr_paraphrase_test.txt", &[578, 1147]),
];

#[test]
fn real_files_of_other_forms_have_their_counted_labels() {
    let Some(root) = real_data() else { return };
    for (task, file, classes) in FILES {
        let dataset = read_file(&card(task), &root.join(file)).unwrap();
        assert_eq!(label_counts(&dataset, classes.len()), (classes.to_vec(), 0), "{file}");
    }
}

#[test]
fn the_quoted_copy_of_the_captions_equals_the_raw_one() {
    let Some(root) = real_data() else { return };
    let read = |file: &str| read_file(&card("snli"), &root.join("SNLI").join(file)).unwrap();
    assert_eq!(read("quoted_tsv/validation.tsv").examples, read("raw_text/dev.jsonl").examples);
    for split in ["dev", "test"] {
        let sample = |form: &str| read(&format!("official_format_sample/snli_1.0_{split}.{form}"));
        let (lines, objects) = (sample("txt"), sample("jsonl"));
        assert_eq!((lines.examples.len(), &lines.examples), (10, &objects.examples), "{split}");
    }
    let sample = read("official_format_sample/snli_1.0_dev.txt");
    assert_eq!(sample.examples, read("raw_text/dev.jsonl").examples[..10]);
    assert_eq!(read("official_format_sample/snli_1.0_train.jsonl").examples.len(), 10);
}

#[test]
fn real_relatedness_scores_have_their_published_rows() {
    let Some(root) = real_data() else { return };
    let known = [
        (Split::Train, 4439, 4.5, 3.515_799_7),
        (Split::Dev, 495, 3.6, 3.591_333_3),
        (Split::Test, 4906, 3.3, 3.527_907_7),
    ];
    for (split, rows, first, mean) in known {
        let scores = scores(&read_split(&card("sick_r"), std::slice::from_ref(&root), split).unwrap());
        assert_eq!((scores.len(), scores[0], *scores.last().unwrap()), (rows, first, 1.0), "{split}");
        let found = scores.iter().map(|score| f64::from(*score)).sum::<f64>() / rows as f64;
        assert!((found - mean).abs() < 1e-6, "{split}: {found}");
    }
    let old = read_file(&card("sick_r"), &root.join("SICK/semeval2014/SICK_test_annotated.txt")).unwrap();
    assert_eq!((scores(&old).len(), scores(&old)[0]), (4927, 3.3));
}

#[test]
fn miniature_sets_are_complete_and_share_no_example() {
    let root = project().join("data");
    for name in TaskCard::builtin_names() {
        let card = card(name);
        let mut seen = HashSet::new();
        for (split, size) in [(Split::Train, 320), (Split::Dev, 120), (Split::Test, 40)] {
            if !card.splits.contains_key(&split) {
                continue;
            }
            let dataset = read_split(&card, std::slice::from_ref(&root), split).unwrap();
            assert_eq!(dataset.examples.len(), size, "{name} {split}");
            for (first, second) in texts(&dataset) {
                let key = format!("{first}\t{}", second.unwrap_or_default());
                assert!(seen.insert(key), "{name} {split}: {first}");
            }
            let labelled = dataset.examples.iter().filter(|example| example.label.is_some()).count();
            let is_withheld = split == Split::Test && !["snli", "scitail", "sick", "sick_r"].contains(&name);
            assert_eq!(labelled, if is_withheld { 0 } else { size }, "{name} {split}");
            let count = card.labels().len();
            if labelled > 0 && count > 0 {
                let (classes, _) = label_counts(&dataset, count);
                let least = size * 6 / (10 * count);
                assert!(classes.iter().all(|found| *found >= least), "{name} {split}: {classes:?}");
            }
        }
    }
}

#[test]
fn miniature_sets_have_the_quirks_of_the_real_files() {
    let bytes = |file: &str| std::fs::read(project().join("data").join(Path::new(file))).unwrap();
    assert!(bytes("MRPC/train.tsv").starts_with("\u{feff}Quality".as_bytes()));
    assert!(!bytes("CoLA/train.tsv").starts_with(b"index") && !bytes("CoLA/dev.tsv").ends_with(b"\n"));
    assert!(!bytes("AX/diagnostic.tsv").ends_with(b"\n"));
    let sick = String::from_utf8(bytes("SICK/SICK.txt")).unwrap();
    assert!(sick.lines().count() == 481 && sick.matches("\r\n").count() == 480 && !sick.ends_with('\n'));
    for (task, split, dropped) in
        [("qqp", Split::Train, 2), ("snli", Split::Train, 8), ("snli", Split::Test, 1)]
    {
        let dataset = read_split(&card(task), &[project().join("data")], split).unwrap();
        assert_eq!(dataset.dropped, dropped, "{task} {split}");
    }
    let files = [
        "CoLA/train.tsv",
        "RTE/train.tsv",
        "MRPC/train.tsv",
        "STS-B/train.tsv",
        "SST-2/train.tsv",
        "QQP/train.tsv",
        "MNLI/train.tsv",
        "QNLI/train.tsv",
    ];
    for file in files {
        let text = String::from_utf8(bytes(file)).unwrap();
        assert!(text.contains('"') && text.contains('\'') && text.contains(", "), "{file}");
        assert!(!text.trim_start_matches('\u{feff}').is_ascii(), "{file}");
        assert!(text.lines().any(|line| line.matches('"').count() % 2 == 1), "{file}: an odd quote");
    }
}

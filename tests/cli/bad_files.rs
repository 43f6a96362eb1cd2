//! Files that are missing, damaged or foreign are refused by name, and stay as they are.

use std::fs;
use std::io::Write;

use safetensors::SafeTensors;

use crate::support::{Answer, Workplace};

/// Runs the default experiment with a model folder that was damaged first.
fn with_model(damage: impl FnOnce(&Workplace)) -> Answer {
    let workplace = Workplace::new();
    damage(&workplace);
    workplace.experiment("");
    let answer = workplace.run(&[]);
    assert!(!workplace.path("results.csv").exists() || workplace.rows("results.csv").is_empty());
    answer
}

const WEIGHTS: &str = "bert_pair/model.safetensors";
const CONFIG: &str = "bert_pair/config.json";

#[test]
fn token_types_that_the_model_has_no_embeddings_for_are_found_first() {
    let answer =
        with_model(|workplace| workplace.edit(CONFIG, "\"type_vocab_size\": 2", "\"type_vocab_size\": 1"));
    answer.refused(
        2,
        &["config.json: `type_vocab_size` is 1, but the folder's tokenizer makes token types up to 1"],
    );
}

#[test]
fn a_missing_model_or_part_of_it_is_named() {
    let answer = with_model(|workplace| fs::remove_dir_all(workplace.path("bert_pair")).unwrap());
    answer.refused(2, &["bert_pair: no such model folder", "Hugging Face folder"]);
    let answer = with_model(|workplace| fs::remove_file(workplace.path(WEIGHTS)).unwrap());
    answer.refused(
        2,
        &[
            "bert_pair: has no weights: looked for model.safetensors, ",
            "pytorch_model.bin",
            "save_pretrained",
        ],
    );
    let answer = with_model(|workplace| fs::remove_file(workplace.path(CONFIG)).unwrap());
    answer.refused(2, &["bert_pair: ", "no readable config.json", "save_pretrained"]);
    let answer = with_model(|workplace| {
        for file in ["bert_pair/tokenizer.json", "bert_pair/vocab.txt"] {
            fs::remove_file(workplace.path(file)).unwrap();
        }
    });
    answer.refused(2, &["bert_pair: has neither tokenizer.json nor vocab.txt", "save_pretrained"]);
}

#[test]
fn a_pickle_that_asks_for_code_is_refused() {
    let answer = with_model(|workplace| {
        fs::remove_file(workplace.path(WEIGHTS)).unwrap();
        let mut zip =
            zip::ZipWriter::new(fs::File::create(workplace.path("bert_pair/pytorch_model.bin")).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file("a/data.pkl", options.compression_method(zip::CompressionMethod::Stored)).unwrap();
        zip.write_all(b"cos\nsystem\nX\x0e\0\0\0touch executed\x85R.").unwrap();
        zip.finish().unwrap();
    });
    answer
        .refused(2, &["bert_pair/pytorch_model.bin: ", "asks for `os.system`", "nothing of it was executed"]);
}

#[test]
fn a_cut_off_weights_file_is_refused() {
    let answer = with_model(|workplace| {
        let bytes = fs::read(workplace.path(WEIGHTS)).unwrap();
        workplace.write(WEIGHTS, &bytes[..bytes.len() / 2]);
    });
    answer.refused(
        2,
        &["bert_pair/model.safetensors: ", "not a complete safetensors file", "download or save it again"],
    );
}

#[test]
fn a_config_that_is_no_json_is_refused() {
    let answer = with_model(|workplace| workplace.write(CONFIG, "{\"model_type\": "));
    answer.refused(2, &["bert_pair/config.json: ", "not valid JSON", "line 1"]);
}

#[test]
fn a_family_that_does_not_run_is_refused() {
    let answer = with_model(|workplace| {
        workplace.edit(CONFIG, "\"model_type\": \"bert\"", "\"model_type\": \"gpt2\"")
    });
    answer.refused(2, &["bert_pair/config.json: ", "model_type `gpt2`", "bert"]);
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let answer = with_model(|workplace| {
        fs::remove_file(workplace.path("bert_pair/tokenizer.json")).unwrap();
        workplace.edit("bert_pair/vocab.txt", "?\n", "?\nzebra\n");
    });
    answer.refused(2, &["bert_pair/config.json: ", "`vocab_size` is 98", "ids up to 98"]);
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let answer = with_model(|workplace| {
        workplace.edit(CONFIG, "\"intermediate_size\": 48", "\"intermediate_size\": 64")
    });
    let shape = "bert.encoder.layer.0.intermediate.dense.weight is [48, 32], config.json makes it [64, 32]";
    answer.refused(2, &["bert_pair/model.safetensors: ", shape]);

    let name = "bert.encoder.layer.1.output.dense.weight";
    let misnamed = name.replace("dense", "danse");
    let answer = with_model(|workplace| {
        let mut bytes = fs::read(workplace.path(WEIGHTS)).unwrap();
        let start = bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
        bytes[start..start + name.len()].copy_from_slice(misnamed.as_bytes());
        workplace.write(WEIGHTS, bytes);
    });
    let (missing, unexpected) = (format!("1 missing: {name}"), format!("1 unexpected: {misnamed}"));
    answer.refused(2, &["bert_pair/model.safetensors: ", &missing, &unexpected]);
}

#[test]
fn a_weight_that_is_no_number_is_refused() {
    let name = "bert.encoder.layer.0.output.dense.weight";
    let answer = with_model(|workplace| {
        let mut bytes = fs::read(workplace.path(WEIGHTS)).unwrap();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let start = 8 + header + metadata.info(name).unwrap().data_offsets.0;
        bytes[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        workplace.write(WEIGHTS, bytes);
    });
    answer.refused(2, &["bert_pair/model.safetensors: ", name, "NaN", "damaged"]);
}

#[test]
fn inputs_longer_than_the_model_are_refused() {
    let workplace = Workplace::new();
    workplace.experiment("train: {max_length: 41}");
    workplace.run(&[]).refused(2, &["max_length is 41", "positions for 40 tokens", "`train.max_length`"]);
    workplace.experiment("train: {max_length: 3}");
    workplace.run(&[]).refused(2, &["max_length 3", "no room for text"]);
    // Also where it is not the first length of the grid.
    workplace.experiment("train: {max_length: [32, 41]}");
    workplace.run(&[]).refused(2, &["max_length is 41", "positions for 40 tokens"]);
    assert!(!workplace.path("results.csv").exists());
}

/// Runs the default experiment on RTE files of which one was changed.
fn with_data(file: &str, change: impl FnOnce(&str) -> String) -> Answer {
    let workplace = Workplace::new();
    workplace.copy_data("RTE");
    let name = format!("own/RTE/{file}");
    workplace.write(&name, change(&workplace.read(&name)));
    workplace.experiment("");
    let answer = workplace.run(&[]);
    assert_eq!(workplace.files("."), ["bert_pair", "experiment.yaml", "own"]);
    answer
}

/// Changes one line of a text; lines count from 1.
fn line(text: &str, number: usize, change: fn(&str) -> String) -> String {
    let lines = text.split_inclusive('\n').enumerate();
    lines.map(|(index, line)| if index + 1 == number { change(line) } else { line.to_owned() }).collect()
}

#[test]
fn rows_that_are_no_examples_are_refused_with_their_line() {
    let ragged = with_data("train.tsv", |text| line(text, 5, |line| line.replacen('\t', " ", 1)));
    ragged.refused(2, &["own/RTE/train.tsv:5: ", "expected 4 columns, found 3"]);
    let label = with_data("dev.tsv", |text| {
        line(text, 7, |line| format!("{}\tmaybe\n", line.rsplit_once('\t').unwrap().0))
    });
    label.refused(2, &["own/RTE/dev.tsv:7: ", "unknown label `maybe`", "entailment, not_entailment"]);
    let text = with_data("train.tsv", |text| line(text, 3, |_| "1\t \tb\tentailment\n".into()));
    text.refused(2, &["own/RTE/train.tsv:3: ", "column `sentence1` is empty"]);
}

#[test]
fn a_split_without_examples_is_refused() {
    let only_header = with_data("dev.tsv", |text| text.lines().next().unwrap().to_owned() + "\n");
    only_header.refused(2, &["own/RTE/dev.tsv: ", "no examples"]);
    let empty = with_data("train.tsv", |_| String::new());
    empty.refused(2, &["own/RTE/train.tsv: ", "no examples"]);
}

#[test]
fn data_that_are_nowhere_are_described() {
    let workplace = Workplace::new();
    workplace.experiment("data: [bert_pair]");
    workplace
        .run(&[])
        .refused(2, &["train data of task `rte`", "bert_pair, data", "RTE or rte", "train.tsv"]);
    // A folder that is not there is no folder without data: other data must not take its place.
    workplace.experiment("data: [nowhere]");
    workplace.run(&[]).refused(2, &["there is no folder nowhere with data sets"]);
    workplace.experiment("");
    workplace.run(&["--data", "nowhere"]).refused(2, &["there is no folder nowhere with data sets"]);
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_training() {
    let below_a_file = |key: &str| {
        let workplace = Workplace::new();
        workplace.experiment(&format!("{key}: experiment.yaml/out\nmethod: child_tuning_d"));
        let answer = workplace.run(&[]);
        assert!(!workplace.path("results.csv").exists() || workplace.rows("results.csv").is_empty());
        answer
    };
    below_a_file("results").refused(3, &["experiment.yaml", "`results:`"]);
    below_a_file("save").refused(3, &["experiment.yaml/out", "`save:`"]);
    below_a_file("masks").refused(3, &["experiment.yaml/out", "`masks:`"]);
    let workplace = Workplace::new();
    workplace.experiment("results: bert_pair");
    workplace.run(&[]).refused(2, &["results: bert_pair is a folder; name a file"]);
}

#[test]
fn a_foreign_results_file_is_refused_and_left_alone() {
    let workplace = Workplace::new();
    workplace.experiment("");
    let foreign = "index,prediction\n0,yes\n";
    workplace.write("results.csv", foreign);
    workplace
        .run(&[])
        .refused(2, &["results.csv: is not a results file", "column 1 is `index`", "`results:`"]);
    workplace
        .call(&["compare", "results.csv"])
        .refused(2, &["results.csv:1: is not a results file", "`task`"]);
    assert_eq!(workplace.read("results.csv"), foreign);
    workplace.experiment("task: rte\n");
    workplace.run(&["--set", "results=own.csv"]).with_code(0);
    let row = workplace.row("own.csv");
    workplace.edit("own.csv", &format!(",{},", row["score"]), ",inf,");
    let message = ["own.csv:2: the score of run `", "is infinite"];
    workplace.call(&["compare", "own.csv"]).refused(2, &message);
    // What a spreadsheet makes of an id that looks like a number.
    workplace.edit("own.csv", ",inf,", ",0.5,");
    workplace.edit("own.csv", &row["run"], "1.23E+15");
    let message = ["own.csv:2: column `run`: `1.23E+15` is no id of a run", "a spreadsheet"];
    workplace.call(&["compare", "own.csv"]).refused(2, &message);
    workplace.edit("own.csv", "1.23E+15", &row["run"]);
    let seed = format!(",{},", row["seed"]);
    let line = workplace.read("own.csv").lines().nth(1).unwrap().replacen(&seed, ",4321,", 1);
    workplace.write("twice.csv", workplace.read("own.csv") + &line + "\n");
    let message = ["twice.csv:3: column `run`: ", "is the id of another run"];
    workplace.call(&["compare", "twice.csv"]).refused(2, &message);
    let lacking = workplace.read("own.csv").replacen("started_at", "began_at", 1);
    workplace.write("lacking.csv", lacking);
    workplace.call(&["compare", "lacking.csv"]).refused(2, &["lacking.csv:1: has no column `started_at`"]);
    workplace.call(&["compare", "absent.csv"]).refused(2, &["cannot read absent.csv", "No such file"]);
}

#[test]
fn results_of_another_version_are_refused_and_left_alone() {
    let workplace = Workplace::new();
    workplace.experiment("");
    workplace.run(&[]).with_code(0);
    let newer = workplace.read("results.csv").replace("\n6,", "\n7,");
    workplace.write("results.csv", &newer);
    for answer in [workplace.run(&[]), workplace.call(&["compare", "results.csv"])] {
        answer.refused(2, &["results.csv:2: ", "schema version `7`", "knows 6"]);
    }
    assert_eq!(workplace.read("results.csv"), newer);
}

#[test]
fn a_cut_off_last_row_is_removed_with_a_note_and_done_again() {
    let workplace = Workplace::new();
    workplace.experiment("seeds: [1, 2]");
    workplace.run(&[]).with_code(0);
    let whole = workplace.read("results.csv");
    let kept = whole.lines().take(2).map(|line| line.to_owned() + "\n").collect::<String>();
    workplace.write("results.csv", &whole[..kept.len() + 60]);
    // Who only reads leaves it out.
    assert!(workplace.call(&["plan", "experiment.yaml"]).with_code(0).stdout.contains("1 finished, 1 to do"));
    workplace.call(&["compare", "results.csv"]).with_code(0);
    let answer = workplace.run(&[]).with_code(0);
    assert!(answer.stderr.starts_with("note: "), "{}", answer.stderr);
    assert!(answer.stderr.contains("results.csv: removed a last row that was cut off"), "{}", answer.stderr);
    assert!(answer.stdout.contains("1 runs done, 1 were there already"), "{}", answer.stdout);
    assert!(workplace.read("results.csv").starts_with(&kept));
    assert_eq!(workplace.column("results.csv", "seed"), ["1", "2"]);
}

#[test]
fn lines_that_end_as_on_an_old_mac_are_refused_and_nothing_is_lost() {
    let workplace = Workplace::new();
    workplace.experiment("seeds: [1, 2]");
    workplace.run(&[]).with_code(0);
    let old = workplace.read("results.csv").replace('\n', "\r");
    workplace.write("results.csv", &old);
    workplace.run(&[]).refused(2, &["results.csv: ", "old Mac"]);
    assert_eq!(workplace.read("results.csv"), old);
    // A Windows file whose last line end lost its second half.
    let windows = old.trim_end_matches('\r').replace('\r', "\r\n") + "\r";
    workplace.write("results.csv", &windows);
    assert!(workplace.run(&[]).with_code(0).stdout.contains("2 were there already"));
    assert_eq!(workplace.column("results.csv", "seed"), ["1", "2"]);
}

#[test]
fn an_empty_results_file_is_begun() {
    let workplace = Workplace::new();
    workplace.experiment("");
    workplace.write("results.csv", "");
    assert!(workplace.call(&["plan", "experiment.yaml"]).with_code(0).stdout.contains("1 to do"));
    workplace.run(&[]).with_code(0);
    assert_eq!(workplace.rows("results.csv").len(), 1);
}

#[test]
fn a_model_whose_outputs_are_no_numbers_neither_predicts_nor_scores() {
    let workplace = Workplace::with_models(&["bert_single"]);
    let name = "bert_single/model.safetensors";
    let mut bytes = fs::read(workplace.path(name)).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let (start, _) = metadata.info("classifier.weight").unwrap().data_offsets;
    let place = 8 + header + start;
    bytes[place..place + 4].copy_from_slice(&f32::MAX.to_le_bytes());
    bytes[place + 4..place + 8].copy_from_slice(&f32::MAX.to_le_bytes());
    workplace.write(name, &bytes);
    workplace.write("in.tsv", "index\tsentence\n0\tthe cat sits\n");
    let predict =
        ["predict", "--model", "bert_single", "--task", "cola", "--input", "in.tsv", "--output", "out.csv"];
    let length = ["--max-length", "32"];
    let answer = workplace.call(&[&predict[..], &length].concat());
    answer.refused(1, &["bert_single: ", "no finite numbers"]);
    assert!(!workplace.path("out.csv").exists());
    workplace.copy_data("CoLA");
    let evaluate = ["evaluate", "--model", "bert_single", "--task", "cola", "--data", "own"];
    for key in ["id2label", "label2id"] {
        workplace.edit("bert_single/config.json", key, "unheard_of");
    }
    let note = "note: bert_single: has a head without names, which is taken to predict unacceptable, acceptable, in this order";
    let answer = workplace.call(&[&evaluate[..], &length].concat());
    assert!(answer.stderr.starts_with(note), "{answer:?}");
    fs::copy(
        crate::support::project("tests/fixtures/bert_single/config.json"),
        workplace.path("bert_single/config.json"),
    )
    .unwrap();
    workplace.call(&[&evaluate[..], &length].concat()).refused(1, &["bert_single: its loss on cola"]);
}

//! Masks on disk: written by runs, computed without training, inspected and compared.

use crate::support::{Row, Workplace};

/// Runs Child-Tuning_D on two seeds with its masks kept in `masks/`, next to methods without a fixed mask.
fn with_masks() -> (Workplace, Vec<Row>) {
    let workplace = Workplace::with_models(&["bert_pair", "bert_single"]);
    workplace.experiment(
        "method: [vanilla, {child_tuning_f: {p: 0.2}}, {child_tuning_d: {p: 0.2}}]\nseeds: [1, 2]\nmasks: masks",
    );
    workplace.run(&[]).with_code(0);
    let rows = workplace.rows("results.csv");
    (workplace, rows.into_iter().filter(|row| row["method"] == "child_tuning_d").collect())
}

fn mask(folder: &str, row: &Row) -> String {
    format!("{folder}/{}.safetensors", row["run"])
}

/// The words of the line of a text that begins with a word.
fn words<'a>(text: &'a str, first: &str) -> Vec<&'a str> {
    let mut lines = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines
        .find(|words| words.first() == Some(&first))
        .unwrap_or_else(|| panic!("no line `{first}` in\n{text}"))
}

fn inspect(workplace: &Workplace, mask: &str) -> String {
    workplace.call(&["child", "inspect", mask]).with_code(0).stdout
}

#[test]
fn runs_keep_their_masks_with_exactly_the_asked_share() {
    let (workplace, rows) = with_masks();
    let mut expected: Vec<String> = rows.iter().map(|row| format!("{}.safetensors", row["run"])).collect();
    expected.sort();
    assert_eq!(workplace.files("masks"), expected);
    for row in &rows {
        let text = inspect(&workplace, &mask("masks", row));
        for (key, column) in [("run", "run"), ("seed", "seed"), ("model_sha256", "model_sha256")] {
            assert_eq!(words(&text, key)[1], row[column]);
        }
        assert_eq!(words(&text, "sha256")[1], row["mask_sha256"]);
        let [_, all, kept, share, ..] = words(&text, "all")[..] else { panic!("{text}") };
        let all: usize = all.parse().unwrap();
        assert_eq!(kept, row["child_parameters"]);
        assert_eq!(kept.parse::<f64>().unwrap(), (0.2 * all as f64).round());
        assert_eq!(share, "20.00");
    }
    let tensors =
        workplace.call(&["child", "inspect", "--tensors", &mask("masks", &rows[0])]).with_code(0).stdout;
    assert_eq!(words(&tensors, "bert.pooler.dense.weight")[1], "1024");
    let parts: usize = tensors
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.first().is_some_and(|name| name.starts_with("bert.")))
        .map(|words| words[2].parse::<usize>().unwrap())
        .sum();
    assert_eq!(parts.to_string(), rows[0]["child_parameters"]);
}

#[test]
fn computing_a_mask_without_training_gives_the_same_one() {
    let (workplace, rows) = with_masks();
    let results = workplace.read("results.csv");
    let compute = ["child", "compute", "experiment.yaml", "--threads", "1", "--output", "computed"];
    let answer = workplace.call(&compute).with_code(0);
    assert_eq!(
        answer.stdout.lines().collect::<Vec<_>>(),
        [mask("computed", &rows[0]), mask("computed", &rows[1])]
    );
    for row in &rows {
        assert_eq!(words(&inspect(&workplace, &mask("computed", row)), "sha256")[1], row["mask_sha256"]);
    }
    assert_eq!(workplace.read("results.csv"), results);
}

#[test]
fn overlaps_are_a_matrix_and_a_tidy_csv() {
    let (workplace, rows) = with_masks();
    let (first, second) = (mask("masks", &rows[0]), mask("masks", &rows[1]));
    let overlap = ["child", "overlap", &first, &second];
    let text = workplace.call(&[&overlap[..], &["--output", "matrix.csv"]].concat()).with_code(0).stdout;
    for title in ["overlap: both / either", "by chance", "both / row's"] {
        assert!(text.lines().any(|line| line.trim().starts_with(title) && line.contains("rte 1")), "{text}");
    }
    let pairs = workplace.rows("matrix.csv");
    let number = |row: &Row, column: &str| row[column].parse::<f64>().unwrap();
    let whole: Vec<&Row> = pairs.iter().filter(|row| row["part"] == "all").collect();
    let names: Vec<_> = whole.iter().map(|row| (&*row["first"], &*row["second"])).collect();
    assert_eq!(names, [("rte 1", "rte 1"), ("rte 1", "rte 2"), ("rte 2", "rte 1"), ("rte 2", "rte 2")]);
    assert_eq!((number(whole[0], "overlap"), number(whole[3], "intersection_share")), (1.0, 1.0));
    // By chance two masks of a fifth share 0.04 of 0.36.
    let (found, chance) = (number(whole[1], "overlap"), number(whole[1], "chance"));
    assert!((chance - 0.04 / 0.36).abs() < 1e-3 && found > chance && found < 1.0, "{found} {chance}");
    assert_eq!(found, number(whole[2], "overlap"));
    assert!(text.contains(&format!("{:.2} %", 100.0 * found)), "{text}");
    assert_eq!(whole[0]["first_kept"], rows[0]["child_parameters"]);
    // The parts of one pair add up to the whole.
    let parts: Vec<&Row> = pairs.iter().take_while(|row| row["second"] == "rte 1").collect();
    let names: Vec<_> = parts.iter().map(|row| &*row["part"]).collect();
    assert_eq!((names[..3].to_vec(), names.last()), (vec!["all", "embeddings", "layer 0"], Some(&"pooler")));
    let kept = |row: &&Row| row["first_kept"].parse::<usize>().unwrap();
    assert_eq!(parts[1..].iter().map(kept).sum::<usize>(), kept(&parts[0]));

    workplace.call(&[&overlap[..], &["--output", "matrix.csv", "--by", "all"]].concat()).with_code(0);
    assert_eq!(workplace.rows("matrix.csv").len(), 4);
    let none = ["child", "overlap", &first, &second, "--by", "tensor"];
    assert!(workplace.call(&none).with_code(2).stderr.contains("--output"));
    workplace.call(&["child", "overlap", &first, &first]).refused(2, &[&first, "is named twice"]);
    let results = workplace.read("results.csv");
    let over = [&overlap[..], &["--output", "results.csv"]].concat();
    workplace.call(&over).refused(2, &["--output results.csv holds the results of runs; name another file"]);
    assert_eq!(workplace.read("results.csv"), results);
}

/// One run of Child-Tuning_D with the mask of another's, or what that is refused with.
fn with_file(workplace: &Workplace, model: &str, file: &str, further: &str) -> crate::support::Answer {
    workplace.experiment(&format!(
        "model: {model}\nmethod: [{{child_tuning_d: {{mask: {{file: {file}}}{further}}}}}]\nresults: second.csv"
    ));
    workplace.run(&[])
}

#[test]
fn a_saved_mask_serves_another_run() {
    let (workplace, rows) = with_masks();
    let file = mask("masks", &rows[0]);
    with_file(&workplace, "bert_pair", &file, "").with_code(0);
    let row = workplace.row("second.csv");
    assert_eq!(row["mask_sha256"], rows[0]["mask_sha256"]);
    assert_eq!(row["child_share"], rows[0]["child_share"]);
    assert!(row["method_config"].starts_with(&format!("mask={} ", rows[0]["mask_sha256"])));
    // It is the same training, whatever the mask came from.
    assert_eq!((&row["score"], &row["loss"]), (&rows[0]["score"], &rows[0]["loss"]));
    // Identity follows the contents, not the name.
    std::fs::rename(workplace.path(&file), workplace.path("moved.safetensors")).unwrap();
    with_file(&workplace, "bert_pair", "moved.safetensors", "").with_code(0);
    assert_eq!(workplace.rows("second.csv").len(), 1);
}

#[test]
fn a_mask_that_does_not_fit_is_refused_before_anything_trains() {
    let (workplace, rows) = with_masks();
    let file = mask("masks", &rows[0]);
    with_file(&workplace, "bert_single", &file, "").refused(2, &[&file, "is a mask of another model"]);
    let absent = ["experiment.yaml: ", "mask.file: ", "cannot read absent.safetensors"];
    with_file(&workplace, "bert_pair", "absent.safetensors", "").refused(2, &absent);
    let beside = ["`mask.file` is a finished mask", "remove `p`, `fisher`"];
    with_file(&workplace, "bert_pair", &file, ", p: 0.2, fisher: {dropout: true}").refused(2, &beside);
    let mut bytes = std::fs::read(workplace.path(&file)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    workplace.write(&file, &bytes);
    with_file(&workplace, "bert_pair", &file, "").refused(2, &[&file, "is damaged"]);
    assert!(!workplace.path("second.csv").exists());
    workplace.call(&["child", "inspect", &file]).refused(2, &[&file, "is damaged"]);
}

#[test]
fn a_mask_from_few_examples_tells_how_uncertain_it_is() {
    let workplace = Workplace::new();
    workplace.experiment(
        "method:\n  - child_tuning_d\n  - child_tuning_d: {fisher: {estimator: expected, examples: 20, precision: bf16}}",
    );
    let compute = ["child", "compute", "experiment.yaml", "--threads", "1", "--output", "m"];
    let text = workplace.call(&compute).with_code(0).stdout;
    let [_, second, line] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
    assert!(line.trim().starts_with("from 20 of ") && line.contains("of the weights within"), "{line}");
    let about = inspect(&workplace, second);
    assert!(about.contains("fisher=expected fisher.dropout=false fisher.precision=bf16 fisher.examples=20 "));
}

#[test]
fn a_mask_does_not_depend_on_what_else_decides_which_weights_train() {
    let workplace = Workplace::new();
    workplace.experiment("method: [lt_sft, [lt_sft, bitfit], [lt_sft, top_layers: {k: 1}]]");
    let compute = ["child", "compute", "experiment.yaml", "--threads", "1", "--output", "m"];
    let text = workplace.call(&compute).with_code(0).stdout;
    let sums: Vec<String> =
        text.lines().map(|mask| words(&inspect(&workplace, mask), "sha256")[1].to_owned()).collect();
    assert_eq!((sums.len(), &sums[1], &sums[2]), (3, &sums[0], &sums[0]));
}

#[test]
fn random_and_lowest_masks_can_be_computed() {
    let workplace = Workplace::new();
    workplace.experiment(
        "method:\n  - child_tuning_d\n  - child_tuning_d: {mask: {choose: lowest}}\n  - child_tuning_d: {mask: {choose: random}}",
    );
    let compute = ["child", "compute", "experiment.yaml", "--threads", "1", "--output", "m"];
    let files: Vec<String> =
        workplace.call(&compute).with_code(0).stdout.lines().map(str::to_owned).collect();
    let [highest, lowest, random] = &files[..] else { panic!("{files:?}") };
    workplace
        .call(&["child", "overlap", highest, lowest, random, "--output", "o.csv", "--by", "all"])
        .with_code(0);
    let pairs = workplace.rows("o.csv");
    assert_eq!((&*pairs[0]["overlap"], &*pairs[1]["overlap"]), ("1.0", "0.0"));
    // Names are the files' where task and seed do not tell masks apart.
    assert_eq!(&pairs[2]["second"], random);
    let ratio = pairs[2]["overlap"].parse::<f64>().unwrap() / pairs[2]["chance"].parse::<f64>().unwrap();
    assert!((ratio - 1.0).abs() < 0.1, "{ratio}");
}

#[test]
fn theorem_1_is_measured_for_the_runs_that_it_is_about() {
    let workplace = Workplace::new();
    workplace.experiment(
        "method: [vanilla, {vanilla: {learning_rate_factor: 0.5}}, {child_tuning_f: {p: [0.2, 0.5]}}, child_tuning_d]\n\
         train: {optimizer: [sgd, adamw], batch_size: 16, examples: 32, max_length: 32, learning_rate: 0.01}",
    );
    let variance = ["child", "variance", "experiment.yaml", "--threads", "1", "--draws", "50"];
    let measure = [&variance[..], &["--output", "v.csv"]].concat();
    let answer = workplace.call(&measure).with_code(0);
    assert_eq!(answer.stdout.lines().count(), 4);
    let rows = workplace.rows("v.csv");
    let column = |name: &str| rows.iter().map(|row| &*row[name]).collect::<Vec<_>>();
    assert_eq!(column("method"), ["vanilla", "vanilla", "child_tuning_f", "child_tuning_f"]);
    assert_eq!(column("p"), ["1.0", "1.0", "0.2", "0.5"]);
    assert_eq!(column("learning_rate"), ["0.01", "0.005", "0.01", "0.01"]);
    assert_eq!((&*rows[0]["examples"], &*rows[0]["batch_size"], &*rows[0]["draws"]), ("32", "16", "50"));
    for row in &rows {
        let number = |name: &str| row[name].parse::<f64>().unwrap();
        assert!((number("ratio") - 1.0).abs() < 5.0 * number("standard_error_of_ratio"), "{row:?}");
    }
    assert!(!workplace.path("results.csv").exists());

    workplace.experiment("method: [child_tuning_d, vanilla]");
    workplace.call(&measure).refused(2, &["no run is vanilla or child_tuning_f with `train.optimizer: sgd`"]);
}

#[test]
fn masks_that_cannot_be_compared_are_refused() {
    let (workplace, rows) = with_masks();
    let computed = |set: &str| {
        let only = ["--only", "method=child_tuning_d,seed=1", "--set", set];
        let compute = ["child", "compute", "experiment.yaml", "--threads", "1", "--output", "other"];
        workplace.call(&[&compute[..], &only].concat()).with_code(0).stdout.trim().to_owned()
    };
    let own = mask("masks", &rows[0]);
    for other in
        [computed("model=bert_single"), computed("method.2.child_tuning_d.mask.scope=encoder_layers")]
    {
        let answer = workplace.call(&["child", "overlap", &own, &other]);
        answer.refused(2, &[&own, &other, "different models or scopes"]);
    }
    let weights = "bert_pair/model.safetensors";
    workplace.call(&["child", "overlap", &own, weights]).refused(2, &[weights, "is not a mask"]);
    workplace
        .call(&["child", "inspect", "absent.safetensors"])
        .refused(2, &["cannot read absent.safetensors"]);
    let bytes = std::fs::read(workplace.path(&own)).unwrap();
    workplace.write("cut.safetensors", &bytes[..bytes.len() - 100]);
    workplace
        .call(&["child", "inspect", "cut.safetensors"])
        .refused(2, &["cut.safetensors", "is not a mask"]);
}

#[test]
fn inputs_are_not_written_over() {
    let (workplace, rows) = with_masks();
    let file = mask("masks", &rows[0]);
    let before = std::fs::read(workplace.path(&file)).unwrap();
    let overlap = ["child", "overlap", &file, &file, "--output"];
    workplace.call(&[&overlap[..], &[&file]].concat()).refused(2, &["--output", &file, "name another file"]);
    workplace.call(&[&overlap[..], &["absent/o.csv"]].concat()).refused(3, &["no folder absent"]);
    assert_eq!(std::fs::read(workplace.path(&file)).unwrap(), before);
    let variance = ["child", "variance", "experiment.yaml", "--output", "./experiment.yaml"];
    workplace.call(&variance).refused(2, &["experiment.yaml", "name another file"]);
}

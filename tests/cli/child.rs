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
fn overlap_is_whole_with_itself_and_partial_with_another_seed() {
    let (workplace, rows) = with_masks();
    let overlap = |left: &str, right: &str| {
        let text = workplace.call(&["child", "overlap", left, right]).with_code(0).stdout;
        let words = words(&text, "rte");
        let percents: Vec<f64> = words.iter().filter_map(|word| word.parse().ok()).collect();
        (percents[0], percents[1])
    };
    let (first, second) = (mask("masks", &rows[0]), mask("masks", &rows[1]));
    // By chance two masks of a fifth share 0.04 of 0.36.
    assert_eq!(overlap(&first, &first), (100.0, 11.11));
    let (found, chance) = overlap(&first, &second);
    assert!(found > chance && found < 100.0, "{found} {chance}");
    assert_eq!(overlap(&second, &first), (found, chance));
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
        .refused(3, &["cannot read absent.safetensors"]);
    let bytes = std::fs::read(workplace.path(&own)).unwrap();
    workplace.write("cut.safetensors", &bytes[..bytes.len() - 100]);
    workplace
        .call(&["child", "inspect", "cut.safetensors"])
        .refused(2, &["cut.safetensors", "is not a mask"]);
}

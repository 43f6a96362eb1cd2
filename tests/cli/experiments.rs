//! Every experiment in `experiments/`, in its tiny version: it runs, and has the columns that its table needs.

use std::collections::BTreeSet;
use std::fs;

use crate::support::{Row, Workplace, project};

/// A folder with the tiny encoder and the miniature data where the tiny profile looks for them.
fn workplace() -> Workplace {
    let workplace = Workplace::with_models(&[]);
    workplace.copy_model("bert_pair", "models/tiny");
    std::os::unix::fs::symlink(project("data"), workplace.path("data")).unwrap();
    workplace
}

fn distinct<'r>(rows: &'r [Row], column: &str) -> BTreeSet<&'r str> {
    rows.iter().map(|row| row[column].as_str()).collect()
}

/// Runs the tiny version of an experiment and returns its rows, all of which must be whole.
fn tiny(name: &str, further: &[&str]) -> Vec<Row> {
    let workplace = workplace();
    let file = project("experiments").join(format!("{name}.yaml"));
    let call = ["run", file.to_str().unwrap(), "--set", "profile=tiny", "--threads", "1"];
    workplace.call(&[&call[..], further].concat()).with_code(0);
    let rows = workplace.rows(&format!("results/tiny/{name}.csv"));
    for row in &rows {
        assert_eq!(row["status"], "ok", "{name}: {}", row["reason"]);
        assert!(!row["loss"].is_empty() && !row["headline"].is_empty(), "{name}");
    }
    rows
}

const METHODS: [&str; 3] = ["child_tuning_d", "child_tuning_f", "vanilla"];

#[test]
fn glue_and_quickstart() {
    let rows = tiny("glue", &[]);
    assert_eq!(rows.len(), 4 * 3 * 2);
    assert_eq!(distinct(&rows, "method"), METHODS.into());
    assert_eq!(distinct(&rows, "task"), ["cola", "mrpc", "rte", "stsb"].into());
    assert_eq!(tiny("quickstart", &[]).len(), 2 * 3 * 2);
    assert_eq!(tiny("glue_minilm", &["--only", "seed=42"]).len(), 3 * 3);
}

#[test]
fn domain_transfer() {
    let rows = tiny("domain_transfer", &["--only", "seed=42"]);
    let own =
        |task: &str| rows.iter().filter(|row| row["task"] == task && row["evaluated_on"] == task).count();
    assert_eq!((rows.len(), own("mnli"), own("snli")), (2 * 4 * 5, 4, 4));
    assert_eq!(distinct(&rows, "evaluated_on"), ["mnli", "mnli_mm", "scitail", "sick", "snli"].into());
    assert_eq!(distinct(&rows, "examples_train"), ["200"].into());
}

#[test]
fn task_transfer() {
    let rows = tiny("task_transfer", &["--only", "seed=42"]);
    let targets: Vec<Row> = rows.iter().filter(|row| row["freeze"] == "encoder").cloned().collect();
    assert_eq!((rows.len(), targets.len()), (3 * 5, 3 * 4));
    assert_eq!(distinct(&targets, "source_method"), METHODS.into());
    assert_eq!(distinct(&targets, "task"), ["cola", "qnli", "qqp", "stsb"].into());
    assert_eq!(distinct(&targets, "learning_rate"), ["0.001"].into());
}

#[test]
fn low_resource_and_label_noise() {
    let rows = tiny("low_resource", &["--only", "seed=42,task=rte"]);
    assert_eq!(distinct(&rows, "examples_train"), ["20", "40", "80"].into());
    let rows = tiny("label_noise", &["--only", "seed=42,task=rte"]);
    assert_eq!(distinct(&rows, "label_noise"), ["0.0", "0.1", "0.2", "0.3"].into());
}

#[test]
fn child_ablation_and_controls() {
    let rows = tiny("child_ablation", &["--only", "seed=42,task=mrpc"]);
    assert_eq!(distinct(&rows, "method_config").len(), 5);
    for row in rows.iter().filter(|row| row["method"] != "vanilla") {
        let share: f64 = row["child_share"].parse().unwrap();
        assert!((share - 0.3).abs() < 1e-4, "{}: {share}", row["method_config"]);
    }
    let rows = tiny("controls", &["--only", "seed=42,task=mrpc"]);
    assert_eq!(distinct(&rows, "method_config").len(), 8);
}

#[test]
fn p_sweep_and_theorem1() {
    let rows = tiny("p_sweep", &["--only", "seed=42,task=rte"]);
    assert_eq!(rows.len(), 1 + 7 + 2 * 8);
    // At p = 1 both methods are vanilla bit for bit, so that even the loss is the same text.
    let is_vanilla = |row: &Row| row["method"] == "vanilla" && row["method_config"].is_empty();
    let whole: Vec<&Row> = rows.iter().filter(|row| is_vanilla(row) || row["child_share"] == "1.0").collect();
    assert_eq!(whole.len(), 3);
    assert!(whole.iter().all(|row| row["loss"] == whole[0]["loss"]));
    assert_eq!(distinct(&tiny("theorem1", &["--only", "seed=42"]), "optimizer"), ["sgd"].into());
}

#[test]
fn tuning() {
    let rows = tiny("glue_tuned", &["--only", "task=rte"]);
    let purposes = |purpose: &str| rows.iter().filter(|row| row["purpose"] == purpose).count();
    assert_eq!((purposes("selection"), purposes("tuned")), (7 * 4 * 2, 3 * 2));
}

#[test]
fn prior_and_modern_methods() {
    let workplace = workplace();
    let file = project("experiments/prior_methods.yaml");
    let plan = ["plan", file.to_str().unwrap(), "--set", "profile=tiny"];
    let plan = workplace.call(&plan).with_code(0).stdout;
    assert!(plan.contains("left out, for a model with more layers: top_layers k=6"), "{plan}");
    // Two learning rates and two seeds.
    for (method, settings) in [("recadam", 5 * 4), ("mixout", 8), ("r3f", 2 * 4), ("prior_weight_decay", 6)] {
        let rows = tiny("prior_methods", &["--only", &format!("task=rte,method={method}")]);
        let purposes = |purpose: &str| rows.iter().filter(|row| row["purpose"] == purpose).count();
        assert_eq!((purposes("selection"), purposes("tuned")), (settings * 2 * 2, 2), "{method}");
    }
    let rows = tiny("combinations", &["--only", "seed=42,task=rte"]);
    let names = distinct(&rows, "method");
    assert_eq!((rows.len(), names.len()), (18, 18));
    for regulariser in ["prior_weight_decay", "mixout", "r3f", "r_drop", "hype"] {
        for child in ["child_tuning_d", "child_tuning_f"] {
            let mut parts = [regulariser, child];
            parts.sort();
            assert!(names.contains(regulariser) && names.contains(parts.join("+").as_str()), "{parts:?}");
        }
    }
    let rows = tiny("modern_baselines", &["--only", "seed=42,task=rte"]);
    assert_eq!((rows.len(), distinct(&rows, "method_config").len()), (20, 20));
    let rows = tiny("methods_minilm", &["--only", "seed=42"]);
    assert_eq!(rows.len(), 2 * 21);
    assert_eq!(tiny("hype_minilm", &["--only", "seed=42"]).len(), 2 * 2);
    for row in rows {
        let doubled = ["r_drop", "r3f"].iter().any(|name| row["method"].contains(name));
        let passes = if row["method"] == "smart" {
            "3"
        } else if doubled {
            "2"
        } else {
            "1"
        };
        assert_eq!(row["passes_per_step"], passes, "{}", row["method"]);
    }
}

#[test]
fn child_overlap_and_step_variance() {
    let workplace = workplace();
    let experiment = |name: &str| project("experiments").join(name).to_str().unwrap().to_owned();
    let (overlap, theorem) = (experiment("child_overlap.yaml"), experiment("theorem1.yaml"));
    let tiny = ["--set", "profile=tiny", "--threads", "1"];
    let masks = workplace.call(&[&["child", "compute", &overlap, "--output", "masks"][..], &tiny].concat());
    let masks: Vec<String> = masks.with_code(0).stdout.lines().map(str::to_owned).collect();
    assert_eq!(masks.len(), 8 * 2);
    let masks: Vec<&str> = masks.iter().map(String::as_str).collect();
    workplace
        .call(&[&["child", "overlap", "--output", "overlap.csv", "--by", "layer"][..], &masks].concat())
        .with_code(0);
    let rows = workplace.rows("overlap.csv");
    assert_eq!(rows.iter().filter(|row| row["part"] == "all").count(), 16 * 16);

    let output = ["--draws", "50", "--output", "theorem1.csv", "--only", "seed=42"];
    workplace.call(&[&["child", "variance", &theorem][..], &output, &tiny].concat()).with_code(0);
    let rows = workplace.rows("theorem1.csv");
    assert_eq!(distinct(&rows, "p"), ["0.1", "0.3", "0.5", "1.0"].into());
}

#[test]
fn every_experiment_is_tried_here() {
    let tried = include_str!("experiments.rs");
    for entry in fs::read_dir(project("experiments")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            tried.contains(&format!("\"{name}\"")) || tried.contains(&format!("\"{name}.yaml\"")),
            "{name}"
        );
    }
}

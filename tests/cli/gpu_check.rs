//! `gpu-check` on the CPU: the whole suite at small sizes, and what it writes.

use serde_json::Value;

use crate::support::Workplace;

#[test]
fn the_suite_passes_on_the_cpu_and_is_written_down() {
    let workplace = Workplace::with_models(&[]);
    let answer =
        workplace.call(&["gpu-check", "--device", "cpu", "--quick", "--output", "new/out"]).with_code(0);
    let report: Value = serde_json::from_str(&workplace.read("new/out/gpu_check.json")).unwrap();
    let list = |key: &str| report[key].as_array().unwrap().clone();
    let checks = list("checks");
    for check in &checks {
        // What a CPU does not have.
        let absent = ["attention", "memory", "CUDA graphs"].iter().any(|topic| check["topic"] == *topic);
        let expected = if absent { "skipped" } else { "passed" };
        assert_eq!(check["outcome"], expected, "{check}");
    }
    for topic in [
        "passes",
        "steps",
        "predictions",
        "thresholds",
        "masks",
        "Fisher",
        "attention",
        "memory",
        "CUDA graphs",
    ] {
        assert!(checks.iter().any(|check| check["topic"] == topic), "{topic}");
    }
    let measured = |part: &str| {
        let found = checks.iter().filter(|check| check["name"].as_str().unwrap().contains(part));
        found.map(|check| check["measured"].as_f64().unwrap()).collect::<Vec<_>>()
    };
    assert!(measured("logits in bf16").iter().all(|&difference| difference > 0.0), "another arithmetic");
    assert!(measured("in tf32").iter().all(|&difference| difference == 0.0), "float32 on the CPU");
    let methods: Vec<Value> = list("speeds").iter().map(|row| row["method"].clone()).collect();
    assert_eq!(methods, ["vanilla", "child_tuning_f", "child_tuning_d"]);
    for row in list("speeds") {
        let [speed, step] = ["outcome", "profile"].map(|part| &row[part]["measured"]);
        assert!(speed["tokens_per_second"].as_f64().unwrap() > 0.0, "{row}");
        assert!(step["operators_per_step"].as_u64().unwrap() > 100, "{row}");
        assert!(step["longest"].as_array().unwrap().len() > 5, "{row}");
    }
    assert_eq!(list("peer")[0]["outcome"]["not_measured"], "not part of a quick run");
    let fisher = list("fisher");
    assert_eq!(
        fisher.iter().map(|row| &row["measured"]["precision"]).collect::<Vec<_>>(),
        ["float32", "bf16"]
    );
    assert!(fisher.iter().all(|row| row["measured"]["exact"].as_f64().unwrap() > 0.0));
    let rates = list("matrix_rates");
    assert_eq!(rates.len(), 3);
    assert!(rates.iter().all(|rate| rate["operations_per_second"].as_f64().unwrap() > 0.0));
    let markdown = workplace.read("new/out/gpu_check.md");
    for part in ["## Speed", "## Fisher", "not part of a quick run", "| Fisher | tiny: ", " 0 failed, "] {
        assert!(markdown.contains(part), "{part} is not in\n{markdown}");
    }
    assert!(answer.stdout.contains("passed   masks: tiny: fixed mask, the same bits"), "{}", answer.stdout);
}

#[test]
fn one_part_alone_does_no_other() {
    let workplace = Workplace::with_models(&[]);
    let arguments = ["gpu-check", "--device", "cpu", "--quick", "--only", "peer", "--output", "out"];
    workplace.call(&arguments).with_code(0);
    let report: Value = serde_json::from_str(&workplace.read("out/gpu_check.json")).unwrap();
    let counts = ["checks", "speeds", "fisher", "peer"].map(|part| report[part].as_array().unwrap().len());
    assert_eq!(counts, [0, 0, 0, 3]);
}

#[test]
fn without_a_gpu_it_says_so() {
    let workplace = Workplace::with_models(&[]);
    let mut command = workplace.command(&["gpu-check"]);
    command.env("CUDA_VISIBLE_DEVICES", "");
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 0), "{text}");
    assert!(text.contains("needs a CUDA device") && text.contains("--device cpu --quick"), "{text}");
    assert!(workplace.files("").is_empty(), "nothing is written");
}

//! `doctor`: what is here, what is not usable and why.

use crate::support::{Workplace, project};

#[test]
fn doctor_lists_data_and_models_and_says_what_is_wrong_with_them() {
    let workplace = Workplace::with_models(&[]);
    workplace.copy_model("bert_single", "models/whole");
    workplace.copy_model("bert_pair", "models/damaged");
    workplace.write("models/damaged/model.safetensors", "no tensors");
    let answer = workplace.call(&["doctor", "--data", project("data").to_str().unwrap()]).with_code(0);
    let line = |start: &str| {
        let found = answer.stdout.lines().map(str::trim_start).find(|line| line.starts_with(start));
        found.unwrap_or_else(|| panic!("no line `{start}` in\n{}", answer.stdout))
    };
    assert!(line("libtorch").contains(" 2."));
    assert!(line("CUDA").len() > "CUDA".len());
    assert!(line("ax").contains("40 test, in "), "{}", line("ax"));
    for task in ["cola", "rte", "mrpc", "stsb", "qqp", "mnli_mm", "snli", "scitail", "sick_r"] {
        assert!(line(task).contains("320 train, 120 dev"), "{}", line(task));
    }
    assert!(line("whole").contains("bert, 2 layers, hidden 24"), "{}", line("whole"));
    assert!(
        line("damaged").contains("not usable: models/damaged/model.safetensors: "),
        "{}",
        line("damaged")
    );
}

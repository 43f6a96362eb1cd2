//! Methods whose passes use functions of the weights that train: Mixout and LoRA.

use std::sync::atomic::AtomicBool;

use child_tuning::data::{EncodedDataset, LabelMap, TaskCard, TokenEncoder};
use child_tuning::model::{
    Classifier, HeadStart, Labels, ModelFolder, Parameter, ParameterKind, ParameterPlace, Precision,
};
use child_tuning::train::{
    Checkpoint, Control, Hyperparameters, MicroBatch, Scored, Trained, evaluate, predict, train,
};
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, path, tensors};
use crate::optimizer::hyperparameters;
use crate::training::{method, run};

fn data() -> EncodedDataset {
    dataset(&tensors("bert_pair/reference.safetensors"))
}

/// Six steps with the model's dropout, where the method leaves it on.
fn settings() -> Hyperparameters {
    Hyperparameters {
        epochs: 2.0,
        batch_size: 2,
        micro_batch: MicroBatch::Examples(2),
        weight_decay: 0.01,
        ..hyperparameters()
    }
}

/// One step without clipping, which would mix the gradients of all parameters, and without decay.
fn one_step() -> Hyperparameters {
    Hyperparameters {
        epochs: 1.0,
        batch_size: 5,
        micro_batch: MicroBatch::Examples(5),
        max_gradient_norm: None,
        weight_decay: 0.0,
        ..hyperparameters()
    }
}

fn trained_from(mut start: Classifier, text: &str, settings: &Hyperparameters) -> (Classifier, Trained) {
    let trained = run(&mut start, &data(), method(text).as_ref(), settings, 3);
    (start, trained)
}

fn trained(text: &str, settings: &Hyperparameters) -> Classifier {
    trained_from(classifier("bert_pair"), text, settings).0
}

fn values(classifier: &Classifier) -> &Tensor {
    classifier.parameters.values()
}

fn logits(classifier: &Classifier, data: &EncodedDataset) -> Tensor {
    predict(classifier, &data.inputs, Precision::Float32, |_| Ok(())).unwrap()
}

/// Whether LoRA changes a matrix of a BERT.
fn is_target(parameter: &Parameter) -> bool {
    ["query.weight", "value.weight"].iter().any(|end| parameter.name.ends_with(end))
}

#[test]
fn mixout_of_no_weights_is_plain_fine_tuning_bit_for_bit() {
    let vanilla = trained("vanilla", &settings());
    for mask in ["input_neuron", "weight"] {
        let found = trained(&format!("mixout: {{q: 0, mask: {mask}, dropout: true}}"), &settings());
        assert_eq!(values(&found), values(&vanilla), "{mask}");
    }
    assert_ne!(values(&trained("mixout: {q: 0}", &settings())), values(&vanilla), "without dropout");
    assert_ne!(values(&trained("mixout: {dropout: true}", &settings())), values(&vanilla));
}

/// What is mixed is W₀ at the first step: those that were not put back move as in plain fine-tuning, the others do not.
#[test]
fn mixout_holds_the_weights_that_it_puts_back_and_no_other() {
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    let vanilla = trained("vanilla", &one_step());
    let found = trained("mixout: {q: 0.3, dropout: true}", &one_step());
    let (mut held, mut columns) = (0, 0);
    for (_, parameter) in found.parameters.iter() {
        let [found, start, vanilla] =
            [&found, &start, &vanilla].map(|model| part(&model.parameters, values(model), &parameter.name));
        if parameter.kind != ParameterKind::Weight {
            assert_eq!(found, vanilla, "{}", parameter.name);
            continue;
        }
        for column in 0..parameter.shape[1] {
            let [found, start, vanilla] = [&found, &start, &vanilla].map(|values| values.select(1, column));
            assert!(found == start || found == vanilla, "{} column {column}", parameter.name);
            held += i64::from(found == start && found != vanilla);
        }
        columns += parameter.shape[1];
    }
    let share = held as f64 / columns as f64;
    assert!((share - 0.3).abs() < 5.0 * (0.3 * 0.7 / columns as f64).sqrt(), "{share} of {columns}");
}

/// A new head is mixed with what it was drawn as, and not with what the checkpoint lacks.
#[test]
fn mixout_of_a_new_head_puts_back_what_it_started_from() {
    let fresh = || {
        let folder = ModelFolder::open(&path("bert_pair")).unwrap();
        let labels = Labels::Classes(["a", "b", "c"].map(str::to_owned).to_vec());
        Classifier::load(&folder, labels, HeadStart::Fresh, Device::Cpu).unwrap()
    };
    let settings = one_step();
    let (vanilla, _) = trained_from(fresh(), "vanilla", &settings);
    let (found, _) = trained_from(fresh(), "mixout: {q: 0.3, dropout: true}", &settings);
    // As no gradient is shared by columns of the head, those that were mixed in have that of plain fine-tuning.
    let [found, vanilla] =
        [&found, &vanilla].map(|model| part(&model.parameters, values(model), "classifier.weight"));
    let same = (0..found.size()[1]).filter(|&column| found.select(1, column) == vanilla.select(1, column));
    let same = same.count() as i64;
    assert!(0 < same && same < found.size()[1], "{same}");
}

#[test]
fn lora_trains_its_factors_and_the_head_alone() {
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    for checkpointing in [false, true] {
        let settings = Hyperparameters { gradient_checkpointing: checkpointing, ..settings() };
        let (found, trained) = trained_from(classifier("bert_pair"), "lora: {rank: 3}", &settings);
        let mut count = 0;
        for (_, parameter) in found.parameters.iter() {
            let [new, old] =
                [&found, &start].map(|model| part(&model.parameters, values(model), &parameter.name));
            let is_head = parameter.place == ParameterPlace::Head;
            assert_eq!(new != old, is_head || is_target(parameter), "{}", parameter.name);
            count += match is_target(parameter) {
                true => 3 * parameter.shape.iter().sum::<i64>() as usize,
                false if is_head => parameter.count(),
                false => 0,
            };
        }
        assert_eq!(trained.trainable, count);
        // Two moments in float32, with the gaps of the buffer or without.
        assert!((8 * count..16 * count).contains(&trained.optimizer_bytes), "{}", trained.optimizer_bytes);
    }
}

#[test]
fn what_lora_leaves_is_a_plain_model() {
    let (found, _) = trained_from(classifier("bert_pair"), "lora: {alpha: 16}", &settings());
    let plain = classifier("bert_pair");
    assert_eq!(found.parameters.count(), plain.parameters.count());
    assert_eq!(found.parameters.buffer_len(), plain.parameters.buffer_len());
    let folder = tempfile::tempdir().unwrap();
    let encoder = TokenEncoder::from_folder(&path("bert_single")).unwrap();
    found.save(folder.path(), &encoder).unwrap();
    let opened = ModelFolder::open(folder.path()).unwrap();
    let again = Classifier::load(&opened, found.labels().clone(), HeadStart::Keep, Device::Cpu).unwrap();
    assert!(
        again.report.fresh.is_empty()
            && again.report.unexpected.is_empty()
            && again.report.ignored.is_empty()
    );
    assert_close("logits", &logits(&again, &data()), &logits(&found, &data()), 1e-6, true);
    assert_eq!(values(&again), values(&found));
}

/// The weights after ten steps, merged, are those of the reference.
#[test]
fn lora_merges_what_it_has_learnt() {
    let reference = tensors("methods/lora.safetensors");
    let mut folder = ModelFolder::open(&path("bert_pair")).unwrap();
    let overrides = serde_json::json!({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0});
    folder.config = folder.config.with_overrides(overrides.as_object().unwrap()).unwrap();
    let labels = Labels::Classes(folder.config.labels().unwrap().unwrap());
    let model = Classifier::load(&folder, labels, HeadStart::Keep, Device::Cpu).unwrap();
    let settings = Hyperparameters {
        epochs: 10.0,
        batch_size: 5,
        micro_batch: MicroBatch::Examples(5),
        epsilon: 1e-4,
        weight_decay: 0.01,
        max_gradient_norm: Some(1.0),
        ..hyperparameters()
    };
    let (found, _) = trained_from(model, "lora: {rank: 3, alpha: 6, targets: [value, query]}", &settings);
    let mut compared = 0;
    for (name, expected) in &reference {
        let Some(name) = name.strip_prefix("step10.").filter(|name| !name.contains(".lora_")) else {
            continue;
        };
        let found = part(&found.parameters, values(&found), name);
        assert_close(name, &found, expected, 1e-6, true);
        compared += 1;
    }
    assert_eq!(compared, 4);
}

#[test]
fn a_run_after_lora_has_the_bits_of_a_fresh_start() {
    let fresh = trained("child_tuning_f", &settings());
    for before in ["lora", "[lora, mixout]"] {
        let (used, _) = trained_from(classifier("bert_pair"), before, &settings());
        let (again, _) = trained_from(used, "child_tuning_f", &settings());
        assert_eq!(values(&again), values(&fresh), "{before}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bits() {
    for text in
        ["mixout", "mixout: {mask: weight}", "lora", "[lora, mixout, l2_sp, {child_tuning_f: {p: 0.5}}]"]
    {
        let first = trained(text, &settings());
        assert_eq!(values(&trained(text, &settings())), values(&first), "{text}");
        let checkpointing = Hyperparameters { gradient_checkpointing: true, ..settings() };
        assert_close(text, values(&trained(text, &checkpointing)), values(&first), 5e-6, true);
        let mut other = classifier("bert_pair");
        run(&mut other, &data(), method(text).as_ref(), &settings(), 4);
        assert_ne!(values(&other), values(&first), "{text}");
    }
}

#[test]
fn parameters_may_be_updated_within_backward() {
    for text in ["mixout", "lora"] {
        let settings = one_step();
        let released = Hyperparameters { release_gradients: true, ..settings.clone() };
        assert_eq!(values(&trained(text, &released)), values(&trained(text, &settings)), "{text}");
    }
}

#[test]
fn scores_between_epochs_are_of_the_settled_weights_and_change_nothing() {
    let card = TaskCard::builtin("mnli").unwrap();
    let (labels, data) = (LabelMap::identity(3), data());
    let dev = Scored { data: &data, card: &card, labels: &labels };
    for text in ["mixout", "lora: {alpha: 64}"] {
        let settings = Hyperparameters { epochs: 4.0, learning_rate: 1e-2, ..settings() };
        let score = |checkpoint| {
            let mut model = classifier("bert_pair");
            model.reset(3).unwrap();
            let settings = Hyperparameters { checkpoint, ..settings.clone() };
            let (interrupted, mut scores) = (AtomicBool::new(false), Vec::new());
            let mut control = Control {
                interrupted: &interrupted,
                report: &mut |event| {
                    if let child_tuning::train::Event::Epoch { headline, .. } = event {
                        scores.push(headline);
                    }
                },
            };
            train(&mut model, &data, Some(dev), method(text).as_ref(), &settings, 3, &mut control).unwrap();
            let own = evaluate(&model, dev, Precision::Float32, |_| Ok(())).unwrap().headline;
            (model, scores, own)
        };
        let (last, scores, own) = score(Checkpoint::Last);
        assert_eq!((scores.len(), scores.last()), (4, Some(&own)), "{text}");
        assert_eq!(values(&last), values(&trained(text, &settings)), "{text}");
        let (best, scores, own) = score(Checkpoint::Best);
        assert_eq!(scores.iter().copied().reduce(f64::max), Some(own), "{text}");
        assert_eq!(best.parameters.buffer_len(), classifier("bert_pair").parameters.buffer_len());
    }
}

#[test]
fn bf16_trains_to_nearly_the_same_place() {
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    for text in ["mixout", "mixout: {mask: weight}", "lora"] {
        let settings = Hyperparameters { epochs: 4.0, ..settings() };
        let half = Hyperparameters { precision: Precision::Bf16, ..settings.clone() };
        let (half, float) = (trained(text, &half), trained(text, &settings));
        let away = |model: &Classifier, from: &Classifier| {
            (values(model) - values(from)).to_kind(Kind::Double).norm().double_value(&[])
        };
        let (apart, way) = (away(&half, &float), away(&float, &start));
        assert!(apart > 0.0 && apart < 0.3 * way, "{text}: {apart} of {way}");
    }
}

#[test]
fn lora_lets_what_others_leave_it_train() {
    let top = trained("[lora, top_layers: {k: 1}]", &settings());
    let mut start = classifier("bert_pair");
    start.reset(3).unwrap();
    for (_, parameter) in top.parameters.iter().filter(|(_, own)| is_target(own)) {
        let [new, old] = [&top, &start].map(|model| part(&model.parameters, values(model), &parameter.name));
        assert_eq!(new != old, parameter.place == ParameterPlace::EncoderLayer(2), "{}", parameter.name);
    }
    let error = method("[lora, bitfit]").check(start.parameters.declared()).unwrap_err().to_string();
    assert!(error.contains("bitfit+lora"), "{error}");
    let error =
        method("[lora, reinitialised_layers]").check(start.parameters.declared()).unwrap_err().to_string();
    assert!(error.contains("one draws") && error.contains("anew"), "{error}");
    method("[lora, child_tuning_f]").check(start.parameters.declared()).unwrap();
}

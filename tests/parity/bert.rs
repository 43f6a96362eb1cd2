//! BERT against transformers: logits, loss and every gradient.

use child_tuning::child::GradientHooks;
use child_tuning::data::EncodedDataset;
use child_tuning::model::{Classifier, HeadStart, ModelFolder, Pass, loss};
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, classifier, dataset, part, path, tensors};

const MODELS: [&str; 3] = ["bert_single", "bert_pair", "bert_regression"];

fn logits(classifier: &Classifier, data: &EncodedDataset, numbers: &[usize]) -> Tensor {
    let (batch, _) = data.batch(numbers, 0, Device::Cpu).unwrap();
    let weights = classifier.parameters.compute_weights(Kind::Float).unwrap();
    tch::no_grad(|| classifier.logits(&Pass::new(&weights, &batch, None)).unwrap())
}

#[test]
fn logits_loss_and_gradients_agree_with_transformers() {
    for name in MODELS {
        let reference = tensors(&format!("{name}/reference.safetensors"));
        let (data, classifier) = (dataset(&reference), classifier(name));
        let all: Vec<usize> = (0..data.len()).collect();
        let (batch, targets) = data.batch(&all, 0, Device::Cpu).unwrap();
        let weights = classifier.parameters.compute_weights(Kind::Float).unwrap();
        let _hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None).unwrap();
        let logits = classifier.logits(&Pass::new(&weights, &batch, None)).unwrap();
        assert_close(name, &logits, &reference["logits"], 1e-5, true);
        let loss = loss(&logits, &targets, data.len()).unwrap();
        assert_close(name, &loss.reshape([1]), &reference["loss"], 1e-5, true);
        loss.backward();
        for (_, parameter) in classifier.parameters.iter() {
            let gradient =
                part(&classifier.parameters, classifier.parameters.gradients().unwrap(), &parameter.name);
            let expected = &reference[&format!("gradient/{}", parameter.name)];
            assert_close(&format!("{name} {}", parameter.name), &gradient, expected, 1e-5, true);
        }
    }
}

#[test]
fn an_example_gets_the_same_logits_in_any_company() {
    for name in MODELS {
        let reference = tensors(&format!("{name}/reference.safetensors"));
        let (data, classifier) = (dataset(&reference), classifier(name));
        let backwards: Vec<usize> = (0..data.len()).rev().collect();
        assert_close(
            name,
            &logits(&classifier, &data, &backwards).flip([0]),
            &reference["logits"],
            1e-5,
            true,
        );
        for number in 0..data.len() {
            let expected = reference["logits"].narrow(0, number as i64, 1);
            assert_close(name, &logits(&classifier, &data, &[number]), &expected, 1e-5, true);
        }
    }
}

#[test]
fn bf16_stays_near_float32() {
    let reference = tensors("bert_pair/reference.safetensors");
    let (data, classifier) = (dataset(&reference), classifier("bert_pair"));
    let all: Vec<usize> = (0..data.len()).collect();
    let (batch, _) = data.batch(&all, 0, Device::Cpu).unwrap();
    let weights = classifier.parameters.compute_weights(Kind::BFloat16).unwrap();
    let logits = classifier.logits(&Pass::new(&weights, &batch, None)).unwrap();
    assert_eq!(logits.kind(), Kind::Float);
    // Eight bits of mantissa through three layers.
    assert_close("bf16", &logits, &reference["logits"], 0.05, true);
}

#[test]
fn a_saved_model_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let reference = tensors(&format!("{name}/reference.safetensors"));
        let (data, classifier) = (dataset(&reference), classifier(name));
        let encoder = child_tuning::data::TokenEncoder::from_folder(&path(name)).unwrap();
        let target = folder.path().join(name);
        classifier.save(&target, &encoder).unwrap();
        let opened = ModelFolder::open(&target).unwrap();
        let labels = classifier.labels().clone();
        let again = Classifier::load(&opened, labels, HeadStart::Keep, Device::Cpu).unwrap();
        assert!(again.report.fresh.is_empty(), "{:?}", again.report);
        assert_eq!(again.parameters.values(), classifier.parameters.values());
        let all: Vec<usize> = (0..data.len()).collect();
        assert_eq!(logits(&again, &data, &all), logits(&classifier, &data, &all));
    }
}

/// The oldest checkpoints have bare names, TensorFlow's names for normalisations, and a pretraining head.
#[test]
fn old_names_load_as_new_ones() {
    let bytes = std::fs::read(path("bert_pair/model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let old = |name: &str| {
        let name = name.strip_prefix("bert.").unwrap_or(name);
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    };
    let mut tensors: Vec<_> = file.iter().map(|(name, view)| (old(name), view)).collect();
    tensors.push(("cls.predictions.bias".into(), file.tensor("classifier.bias").unwrap()));

    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(path("bert_pair/config.json"), folder.path().join("config.json")).unwrap();
    safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
    let opened = ModelFolder::open(folder.path()).unwrap();
    let expected = classifier("bert_pair");
    let found = Classifier::load(&opened, expected.labels().clone(), HeadStart::Keep, Device::Cpu).unwrap();
    assert_eq!(found.parameters.values(), expected.parameters.values());
    assert_eq!(found.report.ignored, ["cls.predictions.bias"]);
    assert!(found.report.fresh.is_empty() && found.report.unexpected.is_empty(), "{:?}", found.report);
}

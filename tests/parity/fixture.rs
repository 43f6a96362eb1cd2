//! Reading fixtures, and comparing tensors with them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use child_tuning::data::{Encoded, EncodedDataset, Targets};
use child_tuning::model::{Classifier, HeadStart, Labels, ModelFolder, Parameters};
use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Reads all tensors of a file.
pub fn tensors(name: &str) -> HashMap<String, Tensor> {
    let bytes = std::fs::read(path(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let kind = match view.dtype() {
                Dtype::F32 => Kind::Float,
                Dtype::F64 => Kind::Double,
                Dtype::I64 => Kind::Int64,
                Dtype::U8 => Kind::Uint8,
                other => panic!("{name} has type {other:?}"),
            };
            let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
            (name.to_owned(), Tensor::from_data_size(view.data(), &shape, kind))
        })
        .collect()
}

/// Turns the padded inputs of a reference into a data set.
pub fn dataset(reference: &HashMap<String, Tensor>) -> EncodedDataset {
    let rows = |name: &str| -> Vec<Vec<i64>> { Vec::try_from(&reference[name]).unwrap() };
    let inputs = rows("input_ids")
        .into_iter()
        .zip(rows("token_type_ids"))
        .zip(rows("attention_mask"))
        .map(|((ids, token_types), mask)| {
            let real = |values: Vec<i64>| {
                let kept = values.into_iter().zip(&mask).filter(|(_, mask)| **mask == 1);
                kept.map(|(value, _)| value as u32).collect()
            };
            Encoded { ids: real(ids), token_types: real(token_types) }
        })
        .collect();
    let labels = &reference["labels"];
    let targets = match labels.kind() {
        Kind::Int64 => Targets::Classes(Vec::try_from(labels).unwrap()),
        _ => Targets::Scores(Vec::try_from(labels).unwrap()),
    };
    EncodedDataset { inputs, targets, features: None }
}

/// Loads a fixture's model with its own head.
pub fn classifier(name: &str) -> Classifier {
    let folder = ModelFolder::open(&path(name)).unwrap();
    let labels = match folder.config.labels().unwrap().unwrap() {
        names if names.len() == 1 => Labels::Score,
        names => Labels::Classes(names),
    };
    let classifier = Classifier::load(&folder, labels, HeadStart::Keep, Device::Cpu).unwrap();
    assert!(classifier.report.fresh.is_empty() && classifier.report.unexpected.is_empty());
    classifier
}

/// The part of a flat buffer that belongs to a parameter, in its shape.
pub fn part(parameters: &Parameters, flat: &Tensor, name: &str) -> Tensor {
    let parameter = parameters.get(parameters.find(name).unwrap());
    flat.narrow(0, parameter.range.start as i64, parameter.count() as i64).view(parameter.shape.as_slice())
}

/// Asserts that two tensors agree to `tolerance`, relative to the largest magnitude of the expected one (at least 1 if
/// `absolute`).
pub fn assert_close(what: &str, found: &Tensor, expected: &Tensor, tolerance: f64, absolute: bool) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let scale = expected.abs().max().double_value(&[]);
    let scale = if absolute { scale.max(1.0) } else { scale };
    let difference = (found - expected).abs().max().double_value(&[]);
    assert!(difference <= tolerance * scale, "{what}: off by {difference:e}, largest {scale:e}");
}

//! Every family against transformers: logits, loss, gradients, and squared gradients of single examples.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use child_tuning::child::{
    Estimator, FisherBatch, FisherOptions, GradientHooks, MaskScope, fisher_information,
};
use child_tuning::data::{EncodedDataset, TokenEncoder};
use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::{
    Classifier, Dropout, FAMILIES, HeadStart, Labels, ModelFolder, Parameter, ParameterKind, ParameterPlace,
    Pass, Precision, loss,
};
use child_tuning::random::Purpose;
use child_tuning::train::{Hyperparameters, MicroBatch};
use tch::{Device, Kind, Tensor};

use crate::fixture::{assert_close, dataset, part, path, tensors};
use crate::interpreter::python_with;
use crate::optimizer::hyperparameters;
use crate::training::{method, run};

/// Where the reference itself adds up in another order, numbers differ by so much of the largest.
const TOLERANCE: f64 = 1e-5;

struct Fixture {
    name: String,
    folder: PathBuf,
    reference: HashMap<String, Tensor>,
    data: EncodedDataset,
    model: Classifier,
}

fn fixtures() -> impl Iterator<Item = Fixture> {
    let mut folders: Vec<PathBuf> =
        path("families").read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders.into_iter().map(|folder| {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let reference = tensors(&format!("families/{name}/reference.safetensors"));
        let model = load(&folder, reference["logits"].size()[1]);
        Fixture { data: dataset(&reference), name, folder, reference, model }
    })
}

fn load(folder: &Path, outputs: i64) -> Classifier {
    let opened = ModelFolder::open(folder).unwrap();
    let labels = match outputs {
        1 => Labels::Score,
        _ => Labels::Classes((0..outputs).map(|label| format!("LABEL_{label}")).collect()),
    };
    let named = opened.config.labels().unwrap().filter(|names| names.len() > 1).map(Labels::Classes);
    let model = Classifier::load(&opened, named.unwrap_or(labels), HeadStart::Keep, Device::Cpu).unwrap();
    assert!(model.report.fresh.is_empty() && model.report.unexpected.is_empty(), "{:?}", model.report);
    model
}

impl Fixture {
    fn all(&self) -> Vec<usize> {
        (0..self.data.len()).collect()
    }

    fn logits(&self, model: &Classifier, numbers: &[usize]) -> Tensor {
        let (batch, _) = self.data.batch(numbers, 0, Device::Cpu).unwrap();
        let weights = model.parameters.compute_weights(Kind::Float).unwrap();
        tch::no_grad(|| model.logits(&Pass::new(&weights, &batch, None)).unwrap())
    }
}

#[test]
fn logits_loss_and_gradients_agree_with_transformers() {
    for fixture in fixtures() {
        let Fixture { name, reference, data, model, .. } = &fixture;
        let (batch, targets) = data.batch(&fixture.all(), 0, Device::Cpu).unwrap();
        let weights = model.parameters.compute_weights(Kind::Float).unwrap();
        let _hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None).unwrap();
        let logits = model.logits(&Pass::new(&weights, &batch, None)).unwrap();
        assert_close(name, &logits, &reference["logits"], TOLERANCE, true);
        let loss = loss(&logits, &targets, data.len()).unwrap();
        assert_close(name, &loss.reshape([1]), &reference["loss"], TOLERANCE, true);
        loss.backward();
        for (_, parameter) in model.parameters.iter() {
            let gradient = part(&model.parameters, model.parameters.gradients().unwrap(), &parameter.name);
            let expected = &reference[&format!("gradient/{}", parameter.name)];
            assert_close(&format!("{name} {}", parameter.name), &gradient, expected, TOLERANCE, true);
        }
        let known = reference.keys().filter(|key| key.starts_with("gradient/")).count();
        assert_eq!(model.parameters.iter().count(), known, "{name}");
    }
}

#[test]
fn an_example_gets_the_same_logits_in_any_company() {
    for fixture in fixtures() {
        let Fixture { name, reference, data, model, .. } = &fixture;
        let backwards: Vec<usize> = (0..data.len()).rev().collect();
        let found = fixture.logits(model, &backwards).flip([0]);
        assert_close(name, &found, &reference["logits"], TOLERANCE, true);
        for number in 0..data.len() {
            let expected = reference["logits"].narrow(0, number as i64, 1);
            assert_close(name, &fixture.logits(model, &[number]), &expected, TOLERANCE, true);
        }
    }
}

#[test]
fn one_pass_squares_of_single_examples_equal_a_batch_of_one_loop() {
    for mut fixture in fixtures() {
        let numbers = fixture.all();
        for batch_size in [1, 2, numbers.len()] {
            let batches = numbers
                .chunks(batch_size)
                .map(|numbers| FisherBatch::plain(&fixture.data, numbers, Device::Cpu));
            let options = FisherOptions::of(Estimator::PerExample);
            let model = &mut fixture.model;
            let found = fisher_information(model, batches, &options, MaskScope::All, |_| Ok(())).unwrap();
            for (_, parameter) in model.parameters.iter() {
                let what = format!("{} {}, batches of {batch_size}", fixture.name, parameter.name);
                let expected = &fixture.reference[&format!("per_example/{}", parameter.name)];
                let found = part(&model.parameters, &found.values, &parameter.name);
                // Where softmax makes a gradient zero, both are squares of rounding errors.
                if expected.max().double_value(&[]) < 1e-9 {
                    assert!(found.max().double_value(&[]) < 1e-9, "{what}");
                } else {
                    assert_close(&what, &found, expected, 5.0 * TOLERANCE, false);
                }
            }
        }
    }
}

/// The gradient of a checkpointed pass with dropout is that of a plain one, bit for bit.
#[test]
fn segments_run_again_with_the_same_dropout() {
    for fixture in fixtures() {
        let Fixture { name, data, model, .. } = &fixture;
        let gradient = |checkpointed: bool| {
            let (batch, targets) = data.batch(&fixture.all(), 0, Device::Cpu).unwrap();
            let weights = model.parameters.compute_weights(Kind::Float).unwrap();
            let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None).unwrap();
            hooks.begin_step();
            let dropout = Dropout::new(1, Purpose::Dropout, 0, 0, Device::Cpu).unwrap();
            let mut pass = Pass::new(&weights, &batch, Some(dropout));
            if checkpointed {
                pass = pass.checkpointed();
            }
            let loss = loss(&model.logits(&pass).unwrap(), &targets, data.len()).unwrap();
            pass.backward(&loss).unwrap();
            hooks.end_step().unwrap();
            model.parameters.gradients().unwrap().copy()
        };
        let (plain, again) = (gradient(false), gradient(true));
        assert!(f64::try_from(plain.abs().max()).unwrap() > 0.0, "{name}");
        assert_close(name, &again, &plain, 1e-6, true);
    }
}

/// What dropout draws for an example depends on neither its company nor its place in it.
#[test]
fn gradients_of_micro_batches_with_dropout_add_up() {
    for fixture in fixtures() {
        let Fixture { name, data, model, .. } = &fixture;
        let gradient = |size: usize| {
            let weights = model.parameters.compute_weights(Kind::Float).unwrap();
            let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None).unwrap();
            hooks.begin_step();
            for (part, numbers) in fixture.all().chunks(size).enumerate() {
                let (batch, targets) = data.batch(numbers, part * size, Device::Cpu).unwrap();
                let dropout = Dropout::new(1, Purpose::Dropout, 0, part * size, Device::Cpu).unwrap();
                let pass = Pass::new(&weights, &batch, Some(dropout));
                loss(&model.logits(&pass).unwrap(), &targets, data.len()).unwrap().backward();
            }
            hooks.end_step().unwrap();
            model.parameters.gradients().unwrap().copy()
        };
        let whole = gradient(data.len());
        for size in [1, 2] {
            assert_close(name, &gradient(size), &whole, TOLERANCE, true);
        }
    }
}

#[test]
fn bf16_stays_near_float32() {
    // Relative to the norm of all; the models are narrow and their weights large.
    let assert_near = |what: &str, found: &Tensor, expected: &Tensor| {
        let difference = ((found - expected).norm() / expected.norm()).double_value(&[]);
        assert!(difference > 0.0 && difference < 0.1, "{what}: off by {difference}");
    };
    for mut fixture in fixtures() {
        let numbers = fixture.all();
        let gradient = |kind: Kind| {
            let Fixture { data, model, .. } = &fixture;
            let (batch, targets) = data.batch(&numbers, 0, Device::Cpu).unwrap();
            let weights = model.parameters.compute_weights(kind).unwrap();
            let hooks = GradientHooks::collect(&model.parameters, &weights, |_| true, None).unwrap();
            hooks.begin_step();
            let dropout = Dropout::new(1, Purpose::Dropout, 0, 0, Device::Cpu).unwrap();
            let pass = Pass::new(&weights, &batch, Some(dropout));
            loss(&model.logits(&pass).unwrap(), &targets, data.len()).unwrap().backward();
            hooks.end_step().unwrap();
            model.parameters.gradients().unwrap().copy()
        };
        let (half, float) = (gradient(Kind::BFloat16), gradient(Kind::Float));
        assert_near(&format!("{} gradient", fixture.name), &half, &float);
        let mut squares = |precision: Precision| {
            let batch = FisherBatch::plain(&fixture.data, &numbers, Device::Cpu);
            let options = FisherOptions { precision, ..FisherOptions::of(Estimator::PerExample) };
            let batches = std::iter::once(batch);
            let model = &mut fixture.model;
            fisher_information(model, batches, &options, MaskScope::All, |_| Ok(())).unwrap().values
        };
        let (half, float) = (squares(Precision::Bf16), squares(Precision::Float32));
        assert_near(&format!("{} squares", fixture.name), &half, &float);
    }
}

/// A step of LoRA changes matrices that it is for, and one of Mixout any, in every family.
#[test]
fn transformed_weights_train() {
    for Fixture { name, data, mut model, .. } in fixtures() {
        for text in ["lora", "mixout: {q: 0.3}", "mixout: {q: 0.3, mask: weight}"] {
            let spec: MethodSpec = serde_yaml::from_str(text).unwrap();
            let method = spec.resolve(Preset::Paper).unwrap().remove(0);
            method.check(model.parameters.declared()).unwrap();
            let further = method.further_weights(model.parameters.declared());
            let factors: Vec<&str> = further.iter().map(|own| own.name.as_str()).collect();
            let settings = Hyperparameters { batch_size: data.len(), ..hyperparameters() };
            let trained = run(&mut model, &data, method.as_ref(), &settings, 3);
            let after = model.parameters.values_copy().unwrap();
            assert!(after.isfinite().all().int64_value(&[]) == 1, "{name} {text}");
            model.reset(3).unwrap();
            let (mut changed, mut trainable) = (0, further.iter().map(Parameter::count).sum::<usize>());
            for (id, parameter) in model.parameters.iter() {
                let [new, old] = [&after, model.parameters.values()]
                    .map(|values| model.parameters.part(values, id).unwrap());
                let factor = format!("{}.lora_A", parameter.name.trim_end_matches(".weight"));
                let may = text != "lora"
                    || parameter.place == ParameterPlace::Head
                    || factors.contains(&factor.as_str());
                assert!(may || new == old, "{name} {text} {}", parameter.name);
                if parameter.kind == ParameterKind::Weight && parameter.place != ParameterPlace::Head {
                    changed += usize::from(new != old);
                }
                if text != "lora" || parameter.place == ParameterPlace::Head {
                    trainable += parameter.count();
                }
            }
            match text {
                // In one direction the first token attends to itself alone, whatever query and key are.
                "lora" if name == "xlnet_uni" => assert!(changed > 0),
                "lora" => assert_eq!(changed, factors.len() / 2, "{name}: all matrices that it is for"),
                _ => assert!(changed > 0, "{name} {text}"),
            }
            assert_eq!(trained.trainable, trainable, "{name} {text}");
        }
    }
}

/// What stands above the layers trains, at the full rate; BitFit says so where it would train the head alone.
#[test]
fn methods_reach_the_parameters_of_every_family_by_their_place() {
    let method = |text: &str| {
        serde_yaml::from_str::<MethodSpec>(text).unwrap().resolve(Preset::Paper).unwrap().remove(0)
    };
    let [bitfit, top, rates] = ["bitfit", "top_layers: {k: 1}", "layer_wise_rates: {decay: 0.5}"].map(method);
    for Fixture { name, model, .. } in fixtures() {
        let (declared, layers) = (model.parameters.declared(), model.parameters.layers());
        let has_biases =
            declared.iter().any(|own| own.name.ends_with("bias") && own.place != ParameterPlace::Head);
        assert_eq!(bitfit.check(declared).is_ok(), has_biases, "{name}");
        for own in declared {
            let above = [
                "final_norm",
                "pooler",
                "head.",
                "pre_classifier",
                "classifier",
                "sequence_summary",
                "logits_proj",
            ];
            let is_above = above.iter().any(|part| own.name.contains(part)) && own.layer() == 0;
            let is_last = own.layer() == layers;
            assert_eq!(top.trains(own, layers), is_above || is_last, "{name} {}", own.name);
            let expected = match (is_above, own.layer()) {
                (true, _) => 0,
                (_, 0) => layers + 2,
                (_, layer) => layers + 2 - layer,
            };
            assert_eq!(rates.rate(own, layers), 0.5f64.powi(expected as i32), "{name} {}", own.name);
        }
    }
}

/// The released code masks the tensors with `layer` in their names.
#[test]
fn encoder_layers_are_what_the_released_rule_selects() {
    for Fixture { name, model, .. } in fixtures() {
        for (_, parameter) in model.parameters.iter() {
            let is_in_layer = matches!(parameter.place, ParameterPlace::EncoderLayer(_));
            assert_eq!(parameter.name.contains("layer"), is_in_layer, "{name} {}", parameter.name);
        }
    }
}

/// The head of masked language models has the names of the first layer of ModernBERT's classification head.
#[test]
fn what_pretraining_made_of_a_head_is_kept_and_the_rest_starts_anew() {
    let folder = path("families/modernbert_regression");
    let mut stored = tensors("families/modernbert_regression/model.safetensors");
    stored.retain(|name, _| !name.starts_with("classifier."));
    stored.insert("decoder.bias".into(), Tensor::zeros([40], (Kind::Float, Device::Cpu)));
    let written = tempfile::tempdir().unwrap();
    let write = |stored: &HashMap<String, Tensor>| {
        std::fs::copy(folder.join("config.json"), written.path().join("config.json")).unwrap();
        let all: Vec<_> = stored.iter().collect();
        Tensor::write_safetensors(&all, written.path().join("model.safetensors")).unwrap();
        let opened = ModelFolder::open(written.path()).unwrap();
        Classifier::load(&opened, Labels::Score, HeadStart::Fresh, Device::Cpu)
    };
    let model = write(&stored).unwrap();
    assert_eq!(model.report.fresh, ["classifier.weight", "classifier.bias"]);
    assert_eq!(model.report.ignored, ["decoder.bias"]);
    let dense = part(&model.parameters, model.parameters.values(), "head.dense.weight");
    assert_eq!(dense.view_as(&stored["head.dense.weight"]), stored["head.dense.weight"]);
    stored.remove("head.dense.weight");
    assert_eq!(write(&stored).unwrap().report.fresh.len(), 3);
    stored.remove("model.final_norm.weight");
    let error = write(&stored).err().unwrap().to_string();
    assert!(error.contains("1 missing: model.final_norm.weight"), "{error}");
}

#[test]
fn every_family_has_fixtures() {
    let covered: Vec<String> = fixtures().map(|fixture| fixture.name).collect();
    for (family, _) in FAMILIES.iter().filter(|(family, _)| *family != "bert") {
        let start = format!("{}_", family.replace('-', "_"));
        assert!(covered.iter().filter(|name| name.starts_with(&start)).count() >= 3, "{family}: {covered:?}");
    }
}

/// Loads each saved folder and the one that it came from, computes the logits of the examples one by one, and prints what did
/// not fit, and by how much logits differ.
const ROUND_TRIP: &str = "
import inspect, sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
load = AutoModelForSequenceClassification.from_pretrained
for saved, original in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = load(saved, output_loading_info=True, attn_implementation='eager')
    start = load(original, attn_implementation='eager')
    reference = load_file(original + '/reference.safetensors')
    names = {'input_ids', 'attention_mask', 'token_type_ids'} & set(inspect.signature(model.forward).parameters)
    difference = 0.0
    for row, mask in enumerate(reference['attention_mask'].bool()):
        inputs = {name: reference[name][row : row + 1, mask] for name in names}
        with torch.no_grad():
            logits = [own.eval()(**inputs).logits for own in (model, start)]
        difference = max(difference, (logits[0] - logits[1]).abs().max().item())
    bad = sum((sorted(map(str, info[kind])) for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), [])
    print(f'{saved} {difference} {bad}')
";

#[test]
fn transformers_loads_what_is_saved() {
    let Some(mut command) = python_with("transformers") else { return };
    let saved = tempfile::tempdir().unwrap();
    // No test of these folders needs a tokenizer, but a saved model has one.
    let encoder = TokenEncoder::from_folder(&path("bert_single")).unwrap();
    command.args(["-c", ROUND_TRIP]).env("HF_HUB_OFFLINE", "1");
    let mut count = 0;
    for Fixture { name, folder, reference, model, .. } in fixtures() {
        let target = saved.path().join(&name);
        model.save(&target, &encoder).unwrap();
        let again = load(&target, reference["logits"].size()[1]);
        assert_eq!(again.parameters.values(), model.parameters.values());
        command.arg(target).arg(folder);
        count += 1;
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(" [")).collect();
    assert_eq!(lines.len(), count, "{text}");
    for line in lines {
        let mut parts = line.splitn(3, ' ').skip(1);
        let difference: f64 = parts.next().unwrap().parse().unwrap();
        assert!(difference <= 1e-6 && parts.next() == Some("[]"), "{line}");
    }
}

/// Further passes and noise reach every family, and are an example's own.
#[test]
fn further_passes_of_micro_batches_add_up() {
    let smart = "smart: {step_size: 0.1, noise: 0.01, radius: 0.05}";
    let composed = "[r3f: {epsilon: 0.05, regression: mse}, r_drop: {}, hype: {scale: 0.05}]";
    for fixture in fixtures() {
        let gradient = |text: &str, micro_batch: usize| {
            let settings = Hyperparameters {
                batch_size: fixture.data.len(),
                micro_batch: MicroBatch::Examples(micro_batch),
                ..hyperparameters()
            };
            let mut model = load(&fixture.folder, fixture.reference["logits"].size()[1]);
            let before = model.parameters.values_copy().unwrap();
            assert_eq!(run(&mut model, &fixture.data, method(text).as_ref(), &settings, 3).step, 1);
            assert_ne!(model.parameters.values(), &before);
            model.parameters.gradients().unwrap().copy()
        };
        let vanilla = gradient("vanilla", fixture.data.len());
        // SMART's ascent enlarges what is rounded.
        for (text, tolerance) in [(smart, 10.0 * TOLERANCE), (composed, TOLERANCE)] {
            let what = format!("{} {text}", fixture.name);
            let whole = gradient(text, fixture.data.len());
            assert!(whole.isfinite().all().double_value(&[]) == 1.0, "{what}");
            assert!((&whole - &vanilla).norm().double_value(&[]) > 0.01, "{what}");
            assert_close(&what, &gradient(text, 1), &whole, tolerance, true);
        }
    }
}

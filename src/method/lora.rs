//! LoRA (Hu et al., 2022): matrices change by products of two low-rank factors, which train in their place.
//!
//! W = W₀ + (α / r) B A with A `[r, in]` and B `[out, r]`. As in PEFT, A starts uniform in (−1, 1) / √in (Kaiming's with
//! a = √5) and B with zeros; the head trains too, all else keeps every bit. The factors are parameters of the run only: the
//! model is scored and kept with W.

use std::sync::Arc;

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::registry::MethodOptions;
use super::{Method, Parts, Preset, TrainingPoint, WeightTransform, WeightsInUse, weights_of};
use crate::error::{Error, Result};
use crate::model::{
    Classifier, Parameter, ParameterId, ParameterKind, ParameterPlace, ParameterTable, Parameters,
    uniform_numbers,
};
use crate::random::{Key, Purpose};
use crate::values::{Count, OneOrMany, Positive, axis};

/// The matrices that PEFT changes if it is not told which, by the names that families have for them; and for families that PEFT
/// has no default for (DistilBERT, ModernBERT, XLNet), those that correspond.
const DEFAULT_TARGETS: &[&[&str]] =
    &[&["query", "value"], &["query_proj", "value_proj"], &["q_lin", "v_lin"], &["Wqkv"], &["q", "v"]];

/// The row of random numbers that A starts from.
const ROW: [u32; 3] = [3, 0, 0];

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    rank: Option<OneOrMany<Count>>,
    alpha: Option<Positive>,
    targets: Option<Vec<String>>,
}

/// LoRA.
#[derive(Clone)]
struct Lora {
    rank: usize,
    alpha: f64,
    /// The last parts of the names of matrices; nothing for [`DEFAULT_TARGETS`].
    targets: Option<Vec<String>>,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        if self.targets.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::configuration("lora: `targets` names no matrix"));
        }
        let alpha = self.alpha.map_or(8.0, |alpha| alpha.0);
        let targets = self.targets.clone().map(|mut targets| {
            targets.sort();
            targets.dedup();
            targets
        });
        let ranks = axis(&self.rank, Count(8));
        let method = |rank: &Count| {
            Arc::new(Lora { rank: rank.0, alpha, targets: targets.clone() }) as Arc<dyn Method>
        };
        Ok(ranks.iter().map(method).collect())
    }
}

impl Method for Lora {
    fn name(&self) -> &str {
        "lora"
    }

    fn options(&self) -> String {
        let targets = self.targets.as_ref().map(|targets| format!(" targets={}", targets.join(",")));
        format!("rank={} alpha={}{}", self.rank, self.alpha, targets.unwrap_or_default())
    }

    fn trains(&self, parameter: &Parameter, _layers: usize) -> bool {
        parameter.kind == ParameterKind::LowRank || parameter.place == ParameterPlace::Head
    }

    fn adds_weights(&self) -> bool {
        true
    }

    fn further_weights(&self, declared: &[Parameter]) -> ParameterTable {
        let mut table = ParameterTable::default();
        let targets = self.targets(declared);
        let is_target = |own: &&Parameter| target(own).is_some_and(|part| targets.contains(&part));
        for matrix in declared.iter().filter(is_target) {
            let [input, output] = sizes(matrix);
            let rank = self.rank as i64;
            for (name, shape) in factor_names(matrix).iter().zip([[rank, input], [output, rank]]) {
                table.declare(name, &shape, ParameterKind::LowRank, matrix.place);
            }
        }
        table
    }

    fn parts(&self) -> Parts {
        Parts { weights: vec![Box::new(LowRankUpdates(self.alpha / self.rank as f64))], ..Parts::default() }
    }

    fn state_bytes(&self, WeightsInUse { declared, number, .. }: WeightsInUse) -> usize {
        // In a step, the sums W that passes use and their gradients.
        let targets = self.targets(declared);
        2 * number * weights_of(declared, |own| target(own).is_some_and(|part| targets.contains(&part)))
    }

    fn check(&self, declared: &[Parameter]) -> Result<()> {
        let mut found: Vec<&str> = declared.iter().filter_map(target).collect();
        found.sort_unstable();
        found.dedup();
        let what = match &self.targets {
            Some(targets) => targets.iter().find(|typed| !found.contains(&typed.as_str())),
            None => None,
        };
        let what = match what {
            Some(typed) => format!("names `{typed}`, but no matrix of the model is called so"),
            None if self.targets(declared).is_empty() => {
                "is missing, and the matrices that it stands for are not in the model".into()
            }
            None => return self.check_rank(declared),
        };
        Err(Error::configuration(format!("lora: `targets` {what}; there are {}", found.join(", "))))
    }

    fn begin(&self, classifier: &mut Classifier, seed: u64) -> Result<()> {
        let further = self.further_weights(classifier.parameters.declared());
        classifier.extend(further)?;
        let parameters = &mut classifier.parameters;
        for Factors { matrix, a, .. } in low_rank_factors(parameters) {
            let key = Key::derive(seed, Purpose::Initialisation, 0).of_part(matrix.index() as u64);
            let shape = parameters.get(a).shape.clone();
            let bound = 1.0 / (shape[1] as f64).sqrt();
            let drawn = uniform_numbers(key, ROW, shape[0] * shape[1], bound)?;
            parameters.set(a, &drawn.f_view(shape.as_slice())?)?;
        }
        Ok(())
    }
}

impl Lora {
    /// Refuses a rank above that of every matrix that changes.
    fn check_rank(&self, declared: &[Parameter]) -> Result<()> {
        let targets = self.targets(declared);
        let of_targets =
            declared.iter().filter(|own| target(own).is_some_and(|part| targets.contains(&part)));
        let most = of_targets.map(|own| sizes(own)[0].min(sizes(own)[1])).max().unwrap_or(0) as usize;
        if self.rank <= most {
            return Ok(());
        }
        Err(Error::configuration(format!(
            "lora: `rank` is {}, but the matrices that change have rank {most} at most",
            self.rank
        )))
    }

    /// Returns the last parts of the names of the matrices that change; nothing if the model has none by default.
    fn targets(&self, declared: &[Parameter]) -> Vec<&str> {
        let has = |part: &&str| declared.iter().any(|own| target(own) == Some(part));
        match &self.targets {
            Some(targets) => targets.iter().map(String::as_str).collect(),
            None => DEFAULT_TARGETS
                .iter()
                .find(|parts| parts.iter().all(&has))
                .map_or(Vec::new(), |parts| parts.to_vec()),
        }
    }
}

/// W + factor · B A for every matrix that has factors.
struct LowRankUpdates(f64);

impl LowRankUpdates {
    fn update(&self, a: &Tensor, b: &Tensor, matrix: &Parameter) -> Result<Tensor> {
        let b = b.f_mul_scalar(self.0)?;
        let product = match matrix.input_first {
            true => a.f_transpose(0, 1)?.f_matmul(&b.f_transpose(0, 1)?)?,
            false => b.f_matmul(a)?,
        };
        Ok(product.f_view(matrix.shape.as_slice())?)
    }
}

impl WeightTransform for LowRankUpdates {
    fn apply(&self, weights: &mut [Tensor], at: &TrainingPoint) -> Result<()> {
        for Factors { matrix, a, b } in low_rank_factors(at.parameters) {
            let float = |id: ParameterId| weights[id.index()].f_to_kind(Kind::Float);
            let update = self.update(&float(a)?, &float(b)?, at.parameters.get(matrix))?;
            // In bf16 the sum is rounded, and not the matrix and its small change each.
            let sum = at.parameters.leaf(matrix).f_detach()?.f_add(&update)?;
            weights[matrix.index()] = sum.f_to_kind(weights[matrix.index()].kind())?;
        }
        Ok(())
    }

    fn settles(&self) -> bool {
        true
    }

    fn settle(&self, parameters: &Parameters, _start: &Tensor) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let values = parameters.values_to_change();
        for Factors { matrix, a, b } in low_rank_factors(parameters) {
            let update = self.update(parameters.leaf(a), parameters.leaf(b), parameters.get(matrix))?;
            let _ = parameters.part(&values, matrix)?.f_add_(&update.f_flatten(0, -1)?)?;
        }
        Ok(())
    }
}

/// A matrix and the factors of its update.
struct Factors {
    matrix: ParameterId,
    a: ParameterId,
    b: ParameterId,
}

/// Returns the factors that a model was extended by.
fn low_rank_factors(parameters: &Parameters) -> Vec<Factors> {
    let of = |(matrix, own): (ParameterId, &Parameter)| {
        let [a, b] = factor_names(own).map(|name| parameters.find(&name));
        Some(Factors { matrix, a: a?, b: b? })
    };
    parameters.iter().filter_map(of).collect()
}

/// Returns the last part of the name of a matrix, without `.weight`; nothing of the head, which trains as it is, and of what is
/// no matrix.
fn target(parameter: &Parameter) -> Option<&str> {
    let is_body = parameter.kind == ParameterKind::Weight && parameter.place != ParameterPlace::Head;
    is_body.then(|| module(parameter).rsplit('.').next()).flatten()
}

/// Returns the name of the layer that a matrix belongs to; XLNet has matrices that are a layer of their own.
fn module(matrix: &Parameter) -> &str {
    matrix.name.strip_suffix(".weight").unwrap_or(&matrix.name)
}

/// Returns the names of A and B.
fn factor_names(matrix: &Parameter) -> [String; 2] {
    ["lora_A", "lora_B"].map(|factor| format!("{}.{factor}", module(matrix)))
}

/// Returns the numbers of inputs and outputs of a matrix.
fn sizes(matrix: &Parameter) -> [i64; 2] {
    let (first, others) = (matrix.shape[0], matrix.shape[1..].iter().product());
    if matrix.input_first { [first, others] } else { [others, first] }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn method(options: &str) -> Result<Arc<dyn Method>> {
        let options: Options = serde_yaml::from_str(options).unwrap();
        Ok(options.resolve(Preset::Paper)?.remove(0))
    }

    fn model(names: &[&str]) -> Parameters {
        let mut table = ParameterTable::default();
        for name in names {
            table.declare(*name, &[5, 3], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        }
        table.declare("bias", &[5], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    #[test]
    fn the_default_targets_are_those_of_the_family() {
        for (names, expected) in [
            (["layer.query.weight", "layer.value.weight"], 2),
            (["layer.q_lin.weight", "layer.dense.weight"], 0),
            (["layer.Wqkv.weight", "layer.query.weight"], 1),
            (["layer.q", "layer.v"], 2),
        ] {
            let parameters = model(&names);
            let method = method("{rank: 2}").unwrap();
            let further = method.further_weights(parameters.declared());
            let shapes: Vec<_> = further.iter().map(|own| own.shape.clone()).collect();
            assert_eq!(shapes, [[2, 3], [5, 2]].repeat(expected), "{names:?}");
            assert_eq!(method.check(parameters.declared()).is_ok(), expected > 0);
        }
    }

    #[test]
    fn a_matrix_that_is_stored_with_its_inputs_first_changes_by_the_transpose() {
        let mut table = ParameterTable::default();
        table.declare("q.weight", &[4, 3], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        let heads = table.declare("q", &[3, 2, 2], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.store_input_first(heads);
        let [a, b] = [[2, 3], [4, 2]].map(|shape| Tensor::randn(shape, (tch::Kind::Float, Device::Cpu)));
        let [plain, heads] =
            [0, 1].map(|place| LowRankUpdates(0.5).update(&a, &b, &table.as_slice()[place]).unwrap());
        assert_eq!(table.as_slice().iter().map(sizes).collect::<Vec<_>>(), [[3, 4]; 2]);
        assert!(heads.view([3, 4]).transpose(0, 1).allclose(&plain, 1e-6, 1e-6, false));
        assert!(plain.allclose(&(b.matmul(&a) * 0.5), 1e-6, 1e-6, false));
    }

    #[test]
    fn in_bfloat16_only_the_sum_is_rounded() {
        let mut model = model(&["q.query.weight", "q.value.weight"]);
        let further = method("{rank: 2}").unwrap().further_weights(model.declared());
        let mut table = ParameterTable::default();
        for own in model.declared().iter().chain(further.iter()) {
            table.declare(&own.name, &own.shape, own.kind, own.place);
        }
        model = Parameters::allocate(table, Device::Cpu).unwrap();
        tch::manual_seed(1);
        let scale = |own: &Parameter| if own.kind == ParameterKind::LowRank { 0.05 } else { 1.0 };
        for (id, own) in model.iter().map(|(id, own)| (id, own.clone())).collect::<Vec<_>>() {
            model.set(id, &(Tensor::randn(&*own.shape, (Kind::Float, Device::Cpu)) * scale(&own))).unwrap();
        }
        let mut weights = model.compute_weights(Kind::BFloat16).unwrap();
        let point = TrainingPoint {
            parameters: &model,
            start: model.values(),
            output: model.find("q.query.weight").unwrap(),
            seed: 1,
            step: 0,
            mask: None,
        };
        LowRankUpdates(4.0).apply(&mut weights, &point).unwrap();
        for Factors { matrix, a, b } in low_rank_factors(&model) {
            let [a, b] =
                [a, b].map(|id| model.leaf(id).detach().to_kind(Kind::BFloat16).to_kind(Kind::Double));
            let exact = model.leaf(matrix).detach().to_kind(Kind::Double) + b.matmul(&a) * 4.0;
            let found = &weights[matrix.index()];
            assert_eq!(found.kind(), Kind::BFloat16);
            assert_eq!(*found, exact.to_kind(Kind::Float).to_kind(Kind::BFloat16));
        }
    }

    #[test]
    fn targets_that_are_not_there_are_refused_by_name() {
        let parameters = model(&["a.query.weight", "a.value.weight", "b.value.weight"]);
        let error =
            method("{targets: [value, bias]}").unwrap().check(parameters.declared()).unwrap_err().to_string();
        assert!(error.contains("`targets` names `bias`") && error.contains("query, value"), "{error}");
        let error =
            method("{}").unwrap().check(model(&["a.dense.weight"]).declared()).unwrap_err().to_string();
        assert!(error.contains("`targets` is missing") && error.contains("there are dense"), "{error}");
        assert!(method("{targets: []}").err().unwrap().to_string().contains("`targets`"));
    }
}

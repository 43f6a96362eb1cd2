//! Several methods at once, such as a child network of the biases alone.
//!
//! What each of them changes is changed: a weight trains if all let it train, factors on the learning rate multiply, terms of the
//! loss add up, and the one that has a mask gives it. Methods of which both have a mask do not go together.

use std::sync::Arc;

use super::registry::{MethodOptions, MethodSpec};
use super::{MaskKind, Method, Parts, Preparation, Prepared, Preset, WeightsInUse};
use crate::child::MaskScope;
use crate::error::{Error, Result};
use crate::model::{Classifier, Parameter, ParameterTable, layers_of};

/// The methods as typed: a list within the list of methods.
#[derive(Debug)]
pub struct Options(pub Vec<MethodSpec>);

/// Methods that train together, in the order of their names.
struct Composed {
    name: String,
    parts: Vec<Arc<dyn Method>>,
}

impl MethodOptions for Options {
    fn resolve(&self, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let mut grid: Vec<Vec<Arc<dyn Method>>> = vec![Vec::new()];
        for spec in &self.0 {
            let points = spec.resolve(preset)?;
            let with = |own: &Vec<Arc<dyn Method>>| {
                points.iter().map(|point| [own.clone(), vec![point.clone()]].concat()).collect::<Vec<_>>()
            };
            grid = grid.iter().flat_map(with).collect();
        }
        grid.into_iter().map(together).collect()
    }
}

/// Puts methods together. Vanilla as it is adds nothing to the others, and one method alone is that method.
fn together(mut parts: Vec<Arc<dyn Method>>) -> Result<Arc<dyn Method>> {
    let is_plain = |part: &Arc<dyn Method>| part.is_vanilla() && part.options().is_empty();
    if !parts.iter().all(is_plain) {
        parts.retain(|part| !is_plain(part));
    }
    parts.dedup_by(|one, other| is_plain(one) && is_plain(other));
    match parts.len() {
        1 => Ok(parts.remove(0)),
        _ => Ok(Arc::new(Composed::new(parts)?)),
    }
}

/// Splits the text of a method's options ([`Method::options`]) into names and values; those of a composed method's parts go by
/// `part.name`.
pub fn option_list(options: &str) -> Vec<(String, String)> {
    let (mut list, mut part) = (Vec::new(), String::new());
    for word in options.split(' ') {
        let own = match word.split_once('(') {
            Some((name, rest)) if !name.contains('=') => {
                part = format!("{name}.");
                rest
            }
            _ => word,
        };
        let (own, ends) = match own.strip_suffix(')').filter(|_| !part.is_empty()) {
            Some(own) => (own, true),
            None => (own, false),
        };
        if !own.is_empty() {
            let (name, value) = own.split_once('=').unwrap_or((own, "true"));
            list.push((format!("{part}{name}"), value.to_owned()));
        }
        if ends {
            part.clear();
        }
    }
    list
}

impl Composed {
    /// Puts methods together; their order makes no difference, so that it makes no other run either.
    fn new(mut parts: Vec<Arc<dyn Method>>) -> Result<Self> {
        parts.sort_by(|left, right| left.name().cmp(right.name()));
        let refuse = |left: &dyn Method, right: &dyn Method, why: &str| {
            let (left, right) = (left.name(), right.name());
            Err(Error::configuration(format!("method: {left} and {right} cannot be combined: {why}")))
        };
        let twice = parts.iter().zip(parts.iter().skip(1)).find(|(left, right)| left.name() == right.name());
        if let Some((left, right)) = twice {
            return refuse(left.as_ref(), right.as_ref(), "they are one method; remove one of them");
        }
        let masked: Vec<_> = parts.iter().filter(|part| part.mask().is_some()).collect();
        if let [left, right, ..] = masked[..] {
            return refuse(
                left.as_ref(),
                right.as_ref(),
                "both have a mask on the gradients; keep one of them",
            );
        }
        let fixed = parts.iter().find(|part| part.mask() == Some(MaskKind::Fixed));
        if let (Some(fixed), Some(adding)) = (fixed, parts.iter().find(|part| part.adds_weights())) {
            return refuse(
                fixed.as_ref(),
                adding.as_ref(),
                "a fixed mask chooses among the model's own weights, and the other trains weights that it adds",
            );
        }
        let pulls = |part: &&Arc<dyn Method>| !part.parts().pulls.is_empty();
        if let (Some(pruning), Some(pulling)) =
            (parts.iter().find(|part| part.prunes()), parts.iter().find(pulls))
        {
            return refuse(
                pruning.as_ref(),
                pulling.as_ref(),
                "`outside: prune` sets weights to zero that the other pulls back",
            );
        }
        for (left, right) in parts.iter().flat_map(|left| parts.iter().map(move |right| (left, right))) {
            if let Some(why) = left.conflict(right.as_ref()) {
                return refuse(left.as_ref(), right.as_ref(), why);
            }
        }
        // Vanilla changes the learning rate at most: the name is that of what it goes with.
        let others: Vec<_> = parts.iter().filter(|part| !part.is_vanilla()).map(|part| part.name()).collect();
        Ok(Self { name: others.join("+"), parts })
    }
}

impl Method for Composed {
    fn name(&self) -> &str {
        &self.name
    }

    fn options(&self) -> String {
        let text = |part: &Arc<dyn Method>| format!("{}({})", part.name(), part.options());
        self.parts.iter().map(text).collect::<Vec<_>>().join(" ")
    }

    fn is_child_tuning(&self) -> bool {
        self.parts.iter().any(|part| part.is_child_tuning())
    }

    fn examples_passed(&self, available: usize) -> usize {
        self.parts.iter().map(|part| part.examples_passed(available)).sum()
    }

    fn fine_tunes_first(&self) -> bool {
        self.parts.iter().any(|part| part.fine_tunes_first())
    }

    fn mask(&self) -> Option<MaskKind> {
        self.parts.iter().find_map(|part| part.mask())
    }

    fn fixed_share(&self, declared: &[Parameter]) -> Result<Option<(f64, MaskScope)>> {
        self.parts.iter().find_map(|part| part.fixed_share(declared).transpose()).transpose()
    }

    fn trains(&self, parameter: &Parameter, layers: usize) -> bool {
        self.parts.iter().all(|part| part.trains(parameter, layers))
    }

    fn rate(&self, parameter: &Parameter, layers: usize) -> f64 {
        self.parts.iter().map(|part| part.rate(parameter, layers)).product()
    }

    fn adds_weights(&self) -> bool {
        self.parts.iter().any(|part| part.adds_weights())
    }

    fn further_weights(&self, declared: &[Parameter]) -> ParameterTable {
        let adding = self.parts.iter().find(|part| part.adds_weights());
        adding.map_or_else(ParameterTable::default, |part| part.further_weights(declared))
    }

    fn parts(&self) -> Parts {
        self.parts.iter().fold(Parts::default(), |all, part| all.and(part.parts()))
    }

    fn needs_dropout(&self) -> bool {
        self.parts.iter().any(|part| part.needs_dropout())
    }

    fn prunes(&self) -> bool {
        self.parts.iter().any(|part| part.prunes())
    }

    fn state_bytes(&self, weights: WeightsInUse) -> usize {
        self.parts.iter().map(|part| part.state_bytes(weights)).sum()
    }

    fn draws_anew(&self, parameter: &Parameter, layers: usize) -> bool {
        self.parts.iter().any(|part| part.draws_anew(parameter, layers))
    }

    fn layers_needed(&self) -> usize {
        self.parts.iter().map(|part| part.layers_needed()).max().unwrap_or(0)
    }

    fn check(&self, declared: &[Parameter]) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.check(declared))?;
        let layers = layers_of(declared);
        let trains = |own: &Parameter| self.trains(own, layers);
        if let Some(own) = declared.iter().find(|own| self.draws_anew(own, layers) && !trains(own)) {
            return Err(Error::configuration(format!(
                "method: of {}, one draws {} anew, and another does not let it train; remove one of them",
                self.name, own.name
            )));
        }
        let further = self.further_weights(declared);
        if self.adds_weights() && !further.iter().any(trains) {
            let name = &self.name;
            return Err(Error::configuration(format!(
                "method: of {name}, one adds weights of which another lets none train; remove one of them"
            )));
        }
        Ok(())
    }

    fn begin(&self, classifier: &mut Classifier, seed: u64) -> Result<()> {
        self.parts.iter().try_for_each(|part| part.begin(classifier, seed))
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        let masked = self.parts.iter().find(|part| part.mask().is_some());
        masked.map_or(Ok(Prepared::default()), |part| part.prepare(preparation))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::METHODS;
    use super::*;
    use crate::model::ModelConfig;

    fn resolved(text: &str) -> Result<Vec<(String, String)>> {
        let spec: MethodSpec = serde_yaml::from_str(text).unwrap();
        let methods = spec.resolve(Preset::Paper)?;
        Ok(methods.iter().map(|method| (method.name().to_owned(), method.options())).collect())
    }

    #[test]
    fn a_list_is_one_method_whatever_its_order_and_a_grid_of_all_options() {
        let one = resolved("[bitfit, {child_tuning_f: {p: [0.2, 0.3]}}]").unwrap();
        assert_eq!(one, resolved("[{child_tuning_f: {p: [0.2, 0.3]}}, bitfit]").unwrap());
        let options =
            |p: &str| format!("bitfit() child_tuning_f(p={p} rescale=true scope=all clip=after_mask)");
        let name = "bitfit+child_tuning_f".to_owned();
        assert_eq!(one, [(name.clone(), options("0.2")), (name, options("0.3"))]);
    }

    #[test]
    fn options_are_told_apart_by_the_part_that_has_them() {
        let list = |options: &str| -> Vec<String> {
            option_list(options).into_iter().map(|(name, value)| format!("{name} {value}")).collect()
        };
        assert_eq!(list(""), [""; 0]);
        assert_eq!(list("p=0.3 targets=query,key"), ["p 0.3", "targets query,key"]);
        let composed = "bitfit() child_tuning_f(p=0.2 rescale=true) vanilla(learning_rate_factor=50)";
        let expected =
            ["child_tuning_f.p 0.2", "child_tuning_f.rescale true", "vanilla.learning_rate_factor 50"];
        assert_eq!(list(composed), expected);
    }

    #[test]
    fn vanilla_gives_its_learning_rate_and_not_its_name() {
        let found = resolved("[bitfit, {vanilla: {learning_rate_factor: 50}}]").unwrap();
        let options = "bitfit() vanilla(learning_rate_factor=50)".to_owned();
        assert_eq!(found, [("bitfit".to_owned(), options)]);
        for (list, alone) in
            [("[vanilla]", "vanilla"), ("[bitfit]", "bitfit"), ("[vanilla, r_drop]", "r_drop")]
        {
            assert_eq!(resolved(list).unwrap(), resolved(alone).unwrap(), "{list}");
        }
    }

    /// Each question that a method answers is asked of the composed one, too, and a part that only halves the learning rate
    /// changes no other answer.
    #[test]
    fn a_composed_method_answers_as_its_parts_do() {
        let config = json!({
            "model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": 16, "type_vocab_size": 2,
        });
        let config = ModelConfig::from_values(config.as_object().cloned().unwrap());
        let (_, table) = config.declare(2).unwrap();
        let (declared, layers) = (table.as_slice(), 4);
        for name in METHODS.iter().filter(|&&name| name != "vanilla") {
            let one = |text: &str| {
                let spec: MethodSpec = serde_yaml::from_str(text).unwrap();
                spec.resolve(Preset::Paper).unwrap().remove(0)
            };
            let text = if *name == "top_layers" { "{top_layers: {k: 2}}" } else { name };
            let (alone, composed) =
                (one(text), one(&format!("[{text}, {{vanilla: {{learning_rate_factor: 0.5}}}}]")));
            let further = |method: &dyn Method| -> Vec<String> {
                method.further_weights(declared).iter().map(|own| own.name.clone()).collect()
            };
            let of_model = |method: &dyn Method| {
                let changes = |own: &Parameter| method.trains(own, layers);
                let weights = WeightsInUse { declared, changes: &changes, number: 4 };
                let answers = (
                    (method.name().to_owned(), method.is_child_tuning(), method.mask()),
                    (method.examples_passed(100), method.fine_tunes_first(), method.adds_weights()),
                    (method.needs_dropout(), method.prunes(), method.layers_needed()),
                    (method.fixed_share(declared).ok(), method.state_bytes(weights), further(method)),
                );
                let parts = method.parts();
                let counts = [parts.penalties.len(), parts.weights.len(), parts.pulls.len()];
                let noise = (parts.hidden_noise.is_some(), parts.dropout, parts.reach_gradients());
                format!("{answers:?} {counts:?} {noise:?} {:?}", method.check(declared).is_ok())
            };
            assert_eq!(of_model(composed.as_ref()), of_model(alone.as_ref()), "{name}");
            for own in declared {
                let [of_alone, of_composed] = [&alone, &composed].map(|method| {
                    let rate = method.rate(own, layers);
                    (method.trains(own, layers), method.draws_anew(own, layers), rate)
                });
                assert_eq!(of_composed, (of_alone.0, of_alone.1, 0.5 * of_alone.2), "{name} {}", own.name);
            }
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        for (text, parts) in [
            ("[child_tuning_f, child_tuning_d]", ["child_tuning_d and child_tuning_f", "both have a mask"]),
            ("[r3f, r4f]", ["r4f and r3f", "already includes r3f's term"]),
            ("[mixout, dps: {form: mix}]", ["dps and mixout", "both mix"]),
            ("[lora, dps]", ["dps and lora", "the model's own matrices"]),
            ("[lora, child_tuning_d]", ["child_tuning_d and lora", "weights that it adds"]),
            ("[bitfit, bitfit]", ["bitfit and bitfit", "they are one method"]),
            (
                "[l2_sp, {child_tuning_d: {outside: prune}}]",
                ["child_tuning_d and l2_sp", "`outside: prune` sets weights to zero"],
            ),
        ] {
            let message = resolved(text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
        for (text, part) in
            [("[]", "names no method"), ("[[bitfit]]", "no list of methods within a composed method")]
        {
            let message = serde_yaml::from_str::<MethodSpec>(text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}

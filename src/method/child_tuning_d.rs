//! Child-Tuning_D, task-driven: the weights with the highest Fisher information train; and the
//! ablations of Table 5: the lowest, random ones, or the others pruned.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use super::criterion::{Criterion, FisherSpec, Random};
use super::registry::MethodOptions;
use super::sparse_mask::{Source, SparseMask, refuse_percentile};
use super::{ClipOrder, DecayScope, Method, Outside, Preset};
use crate::child::{Cut, Extreme, MaskScope, Threshold, read_mask};
use crate::error::{Error, Result};
use crate::values::{OneOrMany, Share, axis, yaml_name};

const NAME: &str = "child_tuning_d";

/// The options as typed in YAML.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    p: Option<OneOrMany<Share>>,
    fisher: Option<FisherSpec>,
    mask: Option<MaskSpec>,
    outside: Option<Outside>,
    decay_scope: Option<DecayScope>,
    clip: Option<ClipOrder>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct MaskSpec {
    scope: Option<MaskScope>,
    threshold: Option<Threshold>,
    choose: Option<Choose>,
    #[serde(default, deserialize_with = "named")]
    file: Option<PathBuf>,
}

/// Reads a path that is there if its key is: without one, another mask would take its place unnoticed.
fn named<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = Option::<PathBuf>::deserialize(deserializer)?.filter(|path| !path.as_os_str().is_empty());
    let missing = || D::Error::custom("`file` names no mask file; leave the key out to have a mask computed");
    path.ok_or_else(missing).map(Some)
}

/// Which weights of the scope train.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Choose {
    /// Those with the highest Fisher information, as in the paper.
    #[default]
    Highest,
    /// Those with the lowest.
    Lowest,
    /// A draw from the run's seed.
    Random,
}

impl MethodOptions for Options {
    fn resolve(&self, preset: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let paper = preset == Preset::Paper;
        let mask = self.mask.clone().unwrap_or_default();
        let sources = match &mask.file {
            Some(file) => vec![self.saved(&mask, file)?],
            None => self.chosen(&mask, preset)?,
        };
        let method = |source: Source| -> Arc<dyn Method> {
            Arc::new(SparseMask {
                name: NAME,
                source,
                outside: self.outside.unwrap_or_default(),
                decay: self.decay_scope.unwrap_or(if paper { DecayScope::Child } else { DecayScope::All }),
                clip: self.clip.unwrap_or(if paper { ClipOrder::AfterMask } else { ClipOrder::BeforeMask }),
                is_child_tuning: true,
            })
        };
        Ok(sources.into_iter().map(method).collect())
    }
}

impl Options {
    /// Reads the mask file that is named.
    fn saved(&self, mask: &MaskSpec, file: &Path) -> Result<Source> {
        let beside = [
            ("p", self.p.is_some()),
            ("fisher", self.fisher.is_some()),
            ("mask.scope", mask.scope.is_some()),
            ("mask.threshold", mask.threshold.is_some()),
            ("mask.choose", mask.choose.is_some()),
        ];
        let typed: Vec<_> =
            beside.iter().filter(|(_, typed)| *typed).map(|(key, _)| format!("`{key}`")).collect();
        if !typed.is_empty() {
            return Err(Error::configuration(format!(
                "child_tuning_d: `mask.file` is a finished mask; remove {}",
                typed.join(", ")
            )));
        }
        let mask = read_mask(file)
            .map_err(|error| Error::configuration(format!("child_tuning_d: mask.file: {error}")))?;
        let sha256 = mask.sha256()?.to_owned();
        Ok(Source::File { mask: Arc::new(mask), sha256 })
    }

    /// Settles how a child network is chosen, for each `p`.
    fn chosen(&self, mask: &MaskSpec, preset: Preset) -> Result<Vec<Source>> {
        let paper = preset == Preset::Paper;
        let choose = mask.choose.unwrap_or_default();
        if choose != Choose::Highest {
            refuse_percentile(NAME, &yaml_name(&choose), mask.threshold)?;
        }
        if choose == Choose::Random && self.fisher.is_some() {
            return Err(Error::configuration(
                "child_tuning_d: `mask.choose: random` looks at no Fisher information; remove `fisher`",
            ));
        }
        // The released percentile is a rule for the highest scores only.
        let threshold = match choose {
            Choose::Highest if !paper => Threshold::Percentile,
            _ => Threshold::Global,
        };
        let scope = if paper { MaskScope::Backbone } else { MaskScope::EncoderLayers };
        let fisher = self.fisher.clone().unwrap_or_default().resolve(preset)?;
        let criterion: Arc<dyn Criterion> = match choose {
            Choose::Random => Arc::new(Random),
            Choose::Highest | Choose::Lowest => Arc::new(fisher),
        };
        let source = |p: &Share| Source::Chosen {
            criterion: criterion.clone(),
            cut: Cut {
                p: p.0,
                scope: mask.scope.unwrap_or(scope),
                threshold: mask.threshold.unwrap_or(threshold),
                choose: if choose == Choose::Lowest { Extreme::Lowest } else { Extreme::Highest },
            },
        };
        Ok(axis(&self.p, Share(0.3)).iter().map(source).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(options: &str, preset: Preset) -> Result<Vec<String>> {
        let options: Options = serde_yaml::from_str(options).unwrap();
        Ok(options.resolve(preset)?.iter().map(|method| method.options()).collect())
    }

    /// The texts are part of the run ids: where nothing new is asked for they stay as they always were.
    #[test]
    fn equal_texts_are_equal_methods() {
        let paper = "fisher=per_example fisher.dropout=false scope=backbone";
        let end = "decay=child clip=after_mask";
        for (options, expected) in [
            ("{}", format!("p=0.3 {paper} threshold=global {end}")),
            ("{mask: {choose: highest}, outside: freeze}", format!("p=0.3 {paper} threshold=global {end}")),
            ("{mask: {choose: lowest}}", format!("p=0.3 choose=lowest {paper} threshold=global {end}")),
            (
                "{p: 0.2, mask: {choose: random, threshold: per_tensor}}",
                format!("p=0.2 choose=random scope=backbone threshold=per_tensor {end}"),
            ),
            ("{outside: prune}", format!("p=0.3 {paper} threshold=global outside=prune {end}")),
            (
                "{fisher: {estimator: expected, precision: bf16, examples: 500}}",
                format!(
                    "p=0.3 fisher=expected fisher.dropout=false fisher.precision=bf16 fisher.examples=500 \
                     scope=backbone threshold=global {end}"
                ),
            ),
        ] {
            assert_eq!(texts(options, Preset::Paper).unwrap(), [expected], "{options}");
        }
        let official = "fisher=batch fisher.dropout=true fisher.clip=1 scope=encoder_layers";
        let end = "decay=all clip=before_mask";
        for (options, expected) in [
            ("{}", format!("p=0.3 {official} threshold=percentile {end}")),
            ("{mask: {choose: lowest}}", format!("p=0.3 choose=lowest {official} threshold=global {end}")),
            (
                "{fisher: {clip: null}}",
                format!("p=0.3 {} threshold=percentile {end}", official.replace("fisher.clip=1 ", "")),
            ),
        ] {
            assert_eq!(texts(options, Preset::Official).unwrap(), [expected], "{options}");
        }
    }

    #[test]
    fn contradictions_name_both_keys() {
        for (options, keys) in [
            ("{mask: {choose: lowest, threshold: percentile}}", ["`mask.choose: lowest`", "`percentile`"]),
            ("{mask: {choose: random, threshold: percentile}}", ["`mask.choose: random`", "`percentile`"]),
            ("{mask: {choose: random}, fisher: {dropout: true}}", ["`mask.choose: random`", "`fisher`"]),
            ("{fisher: {estimator: expected, clip: 1.0}}", ["`fisher.clip`", "`fisher.estimator: batch`"]),
            ("{mask: {file: absent}, p: 0.2}", ["`mask.file`", "remove `p`"]),
            ("{mask: {file: absent, scope: all, choose: lowest}}", ["`mask.scope`", "`mask.choose`"]),
            ("{mask: {file: absent}}", ["mask.file: ", "cannot read absent"]),
        ] {
            let error = texts(options, Preset::Paper).unwrap_err();
            let message = error.to_string();
            assert!(matches!(error, Error::Configuration(_)) && keys.iter().all(|key| message.contains(key)));
        }
    }
}

//! Child-Tuning_D, task-driven: the weights with the highest Fisher information train (section 3.2 of the paper); and the
//! ablations of section 4.3: the lowest, random ones, or the others pruned.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::fisher_pass::{FisherPass, FisherSpec};
use super::registry::MethodOptions;
use super::{ClipOrder, DecayScope, Method, Outside, Preparation, Prepared, Preset};
use crate::child::{
    ChildNetwork, Choice, Cut, GradientMask, MaskFile, MaskScope, Threshold, read_mask, uncertainty,
};
use crate::error::{Error, Result};
use crate::model::Parameters;
use crate::values::{OneOrMany, Share, yaml_name};

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
    choose: Option<Choice>,
    file: Option<PathBuf>,
}

/// Child-Tuning_D.
struct ChildTuningD {
    source: Source,
    outside: Outside,
    decay: DecayScope,
    clip: ClipOrder,
}

/// Where the child network comes from.
#[derive(Clone)]
enum Source {
    /// The highest or lowest Fisher information.
    Fisher { cut: Cut, pass: FisherPass },
    /// A draw from the run's seed.
    Random(Cut),
    /// A mask file, with the hash of the mask.
    File { mask: Arc<MaskFile>, sha256: String },
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
            Arc::new(ChildTuningD {
                source,
                outside: self.outside.unwrap_or_default(),
                decay: self.decay_scope.unwrap_or(if paper { DecayScope::Child } else { DecayScope::All }),
                clip: self.clip.unwrap_or(if paper { ClipOrder::AfterMask } else { ClipOrder::BeforeMask }),
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
        let choice = mask.choose.unwrap_or_default();
        if choice != Choice::Highest && mask.threshold == Some(Threshold::Percentile) {
            return Err(Error::configuration(format!(
                "child_tuning_d: `mask.choose: {}` needs `mask.threshold: global` or `per_tensor`, not `percentile`",
                yaml_name(&choice)
            )));
        }
        if choice == Choice::Random && self.fisher.is_some() {
            return Err(Error::configuration(
                "child_tuning_d: `mask.choose: random` looks at no Fisher information; remove `fisher`",
            ));
        }
        // The released percentile is a rule for the highest scores only.
        let threshold = match choice {
            Choice::Highest if !paper => Threshold::Percentile,
            _ => Threshold::Global,
        };
        let scope = if paper { MaskScope::Backbone } else { MaskScope::EncoderLayers };
        let pass = self.fisher.clone().unwrap_or_default().resolve(preset)?;
        let source = |p: &Share| {
            let cut = Cut {
                p: p.0,
                scope: mask.scope.unwrap_or(scope),
                threshold: mask.threshold.unwrap_or(threshold),
                choose: choice,
            };
            match choice {
                Choice::Random => Source::Random(cut),
                _ => Source::Fisher { cut, pass },
            }
        };
        Ok(self.p.as_ref().map_or(&[Share(0.3)][..], |p| &p.0).iter().map(source).collect())
    }
}

impl Source {
    /// Writes what it is made of, in the order in which earlier versions wrote it.
    fn text(&self) -> String {
        let scope =
            |cut: &Cut| format!("scope={} threshold={}", yaml_name(&cut.scope), yaml_name(&cut.threshold));
        match self {
            Source::Fisher { cut, pass } => format!(
                "p={} {}{} {}",
                cut.p,
                if cut.choose == Choice::Lowest { "choose=lowest " } else { "" },
                pass.text(),
                scope(cut)
            ),
            Source::Random(cut) => format!("p={} choose=random {}", cut.p, scope(cut)),
            Source::File { sha256, .. } => format!("mask={sha256}"),
        }
    }
}

impl Method for ChildTuningD {
    fn name(&self) -> &str {
        "child_tuning_d"
    }

    fn options(&self) -> String {
        let outside = if self.outside == Outside::Prune { " outside=prune" } else { "" };
        let (decay, clip) = (yaml_name(&self.decay), yaml_name(&self.clip));
        format!("{}{outside} decay={decay} clip={clip}", self.source.text())
    }

    fn is_child_tuning(&self) -> bool {
        true
    }

    fn has_mask(&self) -> bool {
        true
    }

    fn examples_passed(&self, available: usize) -> usize {
        match &self.source {
            Source::Fisher { pass, .. } => pass.examples(available),
            Source::Random(_) | Source::File { .. } => 0,
        }
    }

    fn has_fixed_mask(&self) -> bool {
        true
    }

    fn prunes(&self) -> bool {
        self.outside == Outside::Prune
    }

    fn fixed_share(&self) -> Option<(f64, MaskScope)> {
        match &self.source {
            Source::Fisher { cut, .. } | Source::Random(cut) => Some((cut.p, cut.scope)),
            Source::File { .. } => None,
        }
    }

    fn check(&self, parameters: &Parameters) -> Result<()> {
        match &self.source {
            Source::File { mask, .. } => mask.child_network(parameters).map(|_| ()),
            Source::Fisher { .. } | Source::Random(_) => Ok(()),
        }
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        let mut fisher = None;
        let child = match &self.source {
            Source::Fisher { cut, pass } => {
                let information = pass.information(preparation, cut.scope)?;
                let parameters = &preparation.classifier.parameters;
                let child = ChildNetwork::from_scores(parameters, &information.values, cut)?;
                fisher = uncertainty(&information, &child, cut, preparation.data.len())?;
                child
            }
            Source::Random(cut) => {
                ChildNetwork::random(&preparation.classifier.parameters, cut, preparation.seed)?
            }
            Source::File { mask, .. } => mask.child_network(&preparation.classifier.parameters)?,
        };
        Ok(Prepared {
            mask: Some(Arc::new(GradientMask::Fixed(child))),
            clip: self.clip,
            decay: self.decay,
            outside: self.outside,
            fisher,
            ..Prepared::default()
        })
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

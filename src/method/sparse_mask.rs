//! Methods with a fixed mask: which weights train is settled before training, by a criterion and a cut, or by a mask file.

use std::sync::Arc;

use serde::Deserialize;

use super::criterion::Criterion;
use super::{ClipOrder, DecayScope, MaskKind, Method, Outside, Preparation, Prepared, weights_of};
use crate::child::{ChildNetwork, Cut, Extreme, GradientMask, MaskFile, MaskScope, Threshold, uncertainty};
use crate::error::{Error, Result};
use crate::model::Parameter;
use crate::values::{OneOrMany, Share, yaml_name};

/// A method whose child network is the same at every step.
pub struct SparseMask {
    /// Its name in YAML and results.
    pub name: &'static str,
    /// Where the child network comes from.
    pub source: Source,
    /// What becomes of the weights outside.
    pub outside: Outside,
    /// What weight decay touches.
    pub decay: DecayScope,
    /// Where the mask meets clipping.
    pub clip: ClipOrder,
    /// Whether it is one of the paper's.
    pub is_child_tuning: bool,
}

/// Where a child network comes from.
#[derive(Clone)]
pub enum Source {
    /// The highest or lowest scores of a criterion.
    Chosen { criterion: Arc<dyn Criterion>, cut: Cut },
    /// A mask file, with the hash of the mask.
    File { mask: Arc<MaskFile>, sha256: String },
}

impl Source {
    /// Writes what it is made of.
    fn text(&self) -> String {
        match self {
            Source::Chosen { criterion, cut } => {
                let lowest = if cut.choose == Extreme::Lowest { "choose=lowest" } else { "" };
                let parts = [
                    format!("p={}", cut.p),
                    lowest.into(),
                    criterion.text(),
                    format!("scope={} threshold={}", yaml_name(&cut.scope), yaml_name(&cut.threshold)),
                ];
                parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
            }
            Source::File { sha256, .. } => format!("mask={sha256}"),
        }
    }
}

impl Method for SparseMask {
    fn name(&self) -> &str {
        self.name
    }

    fn options(&self) -> String {
        let outside = if self.outside == Outside::Prune { " outside=prune" } else { "" };
        let (decay, clip) = (yaml_name(&self.decay), yaml_name(&self.clip));
        format!("{}{outside} decay={decay} clip={clip}", self.source.text())
    }

    fn is_child_tuning(&self) -> bool {
        self.is_child_tuning
    }

    fn mask(&self) -> Option<MaskKind> {
        Some(MaskKind::Fixed)
    }

    fn examples_passed(&self, available: usize) -> usize {
        match &self.source {
            Source::Chosen { criterion, .. } => criterion.examples(available),
            Source::File { .. } => 0,
        }
    }

    fn fine_tunes_first(&self) -> bool {
        matches!(&self.source, Source::Chosen { criterion, .. } if criterion.fine_tunes())
    }

    fn prunes(&self) -> bool {
        self.outside == Outside::Prune
    }

    fn fixed_share(&self, declared: &[Parameter]) -> Result<Option<(f64, MaskScope)>> {
        let (kept, scope) = match &self.source {
            Source::Chosen { cut, .. } => {
                let count = cut.count(declared);
                (count.map_err(|error| Error::configuration(format!("{}: {error}", self.name)))?, cut.scope)
            }
            Source::File { mask, .. } => (mask.kept(), mask.scope(declared)?),
        };
        let maskable = weights_of(declared, |parameter| scope.covers(parameter));
        Ok(Some((kept as f64 / maskable as f64, scope)))
    }

    fn check(&self, declared: &[Parameter]) -> Result<()> {
        self.fixed_share(declared)?;
        if let Source::File { mask, .. } = &self.source {
            mask.check(declared)?;
        }
        Ok(())
    }

    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared> {
        let mut fisher = None;
        let child = match &self.source {
            Source::Chosen { criterion, cut } => {
                let scores = criterion.scores(preparation, cut.scope)?;
                let parameters = &preparation.classifier.parameters;
                let child = ChildNetwork::from_scores(parameters, &scores.values, cut)?;
                let available = preparation.data.len();
                fisher = uncertainty(&scores.values, scores.spread.as_ref(), &child, cut, available)?;
                child
            }
            Source::File { mask, .. } => mask.child_network(&preparation.classifier.parameters)?,
        };
        Ok(Prepared {
            mask: Some(Arc::new(GradientMask::Fixed(Arc::new(child)))),
            clip: self.clip,
            decay: self.decay,
            outside: self.outside,
            fisher,
            ..Prepared::default()
        })
    }
}

/// Refuses to cut at a percentile, which is a rule for the highest scores, where others are chosen.
///
/// # Errors
/// Fails, naming both keys.
pub fn refuse_percentile(method: &str, choose: &str, threshold: Option<Threshold>) -> Result<()> {
    if threshold != Some(Threshold::Percentile) {
        return Ok(());
    }
    Err(Error::configuration(format!(
        "{method}: `mask.choose: {choose}` needs another `mask.threshold` than `percentile`: `global`, `per_tensor` or `budget`"
    )))
}

/// How a criterion's scores are cut, as typed in YAML.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CutSpec {
    pub scope: Option<MaskScope>,
    pub threshold: Option<Threshold>,
    pub choose: Option<Extreme>,
}

/// What may be typed of every method with a criterion; [`criterion_options`] makes it.
pub struct Typed<'a> {
    pub p: Option<&'a OneOrMany<Share>>,
    pub mask: CutSpec,
    pub outside: Option<Outside>,
    pub decay_scope: Option<DecayScope>,
    pub clip: Option<ClipOrder>,
}

impl Typed<'_> {
    /// Makes one method for each `p`; what is not typed is as in `cut`, and the weights outside keep every bit.
    ///
    /// # Errors
    /// Fails, naming the method, if options contradict each other.
    pub fn methods(
        &self,
        name: &'static str,
        criterion: impl Criterion + 'static,
        cut: Cut,
    ) -> Result<Vec<Arc<dyn Method>>> {
        let criterion: Arc<dyn Criterion> = Arc::new(criterion);
        let choose = self.mask.choose.unwrap_or(cut.choose);
        let threshold = self.mask.threshold.unwrap_or(cut.threshold);
        if choose == Extreme::Lowest {
            refuse_percentile(name, &yaml_name(&choose), Some(threshold))?;
        }
        let method = |p: &Share| -> Arc<dyn Method> {
            let scope = self.mask.scope.unwrap_or(cut.scope);
            Arc::new(SparseMask {
                name,
                source: Source::Chosen {
                    criterion: criterion.clone(),
                    cut: Cut { p: p.0, scope, threshold, choose },
                },
                outside: self.outside.unwrap_or_default(),
                decay: self.decay_scope.unwrap_or(DecayScope::Child),
                clip: self.clip.unwrap_or(ClipOrder::AfterMask),
                is_child_tuning: false,
            })
        };
        Ok(self.p.map_or(&[Share(cut.p)][..], |p| &p.0).iter().map(method).collect())
    }
}

/// Declares the `Options` of a method with a criterion: the criterion's own keys, and those of [`Typed`].
macro_rules! criterion_options {
    ($($(#[$about:meta])* $key:ident: $kind:ty),* $(,)?) => {
        /// The options as typed in YAML.
        #[derive(Clone, Debug, Default, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Options {
            $($(#[$about])* $key: Option<$kind>,)*
            p: Option<$crate::values::OneOrMany<$crate::values::Share>>,
            mask: Option<$crate::method::sparse_mask::CutSpec>,
            outside: Option<$crate::method::Outside>,
            decay_scope: Option<$crate::method::DecayScope>,
            clip: Option<$crate::method::ClipOrder>,
        }

        impl Options {
            fn typed(&self) -> $crate::method::sparse_mask::Typed<'_> {
                $crate::method::sparse_mask::Typed {
                    p: self.p.as_ref(),
                    mask: self.mask.clone().unwrap_or_default(),
                    outside: self.outside,
                    decay_scope: self.decay_scope,
                    clip: self.clip,
                }
            }
        }
    };
}
pub(super) use criterion_options;

#[cfg(test)]
mod tests {
    use super::super::registry::MethodOptions;
    use super::super::{MethodSpec, Preset, saliency_mask};
    use super::*;

    fn texts(method: &str) -> Result<Vec<String>> {
        let spec: MethodSpec = serde_yaml::from_str(method).unwrap();
        Ok(spec.resolve(Preset::Paper)?.iter().map(|method| method.options()).collect())
    }

    /// The texts are part of the run ids.
    #[test]
    fn equal_texts_are_equal_methods() {
        let end = "decay=child clip=after_mask";
        let fish = |fisher: &str| {
            format!(
                "fisher={fisher} fisher.dropout=false fisher.examples=1024 scope=backbone threshold=budget"
            )
        };
        for (method, expected) in [
            ("fish_mask", format!("p=0.005 {} {end}", fish("per_example"))),
            ("fish_mask: {estimator: expected, p: 0.1}", format!("p=0.1 {} {end}", fish("expected"))),
            (
                "sift",
                format!("p=0.008 examples=32 dropout=true scope=backbone threshold=per_tensor {end}"),
            ),
            (
                "sift: {examples: 8, dropout: false, mask: {scope: linear, threshold: percentile}}",
                format!("p=0.008 examples=8 dropout=false scope=linear threshold=percentile {end}"),
            ),
            ("magnitude_mask", format!("p=0.01 scope=backbone threshold=per_tensor {end}")),
            (
                "magnitude_mask: {mask: {choose: lowest}, outside: prune, decay_scope: all, clip: before_mask}",
                "p=0.01 choose=lowest scope=backbone threshold=per_tensor outside=prune decay=all clip=before_mask"
                    .into(),
            ),
            ("lt_sft", format!("p=0.01 scope=backbone threshold=global {end}")),
        ] {
            assert_eq!(texts(method).unwrap(), [expected], "{method}");
        }
        assert_eq!(texts("sift: {p: [0.1, 0.2]}").unwrap().len(), 2);
    }

    #[test]
    fn what_does_not_go_together_names_the_method() {
        for (method, parts) in [
            (
                "lt_sft: {mask: {choose: lowest, threshold: percentile}}",
                ["lt_sft: `mask.choose: lowest`", "`percentile`"],
            ),
            ("[sift, fish_mask]", ["fish_mask and sift", "both have a mask"]),
            ("[lt_sft, {child_tuning_d: {p: 0.1}}]", ["child_tuning_d and lt_sft", "both have a mask"]),
        ] {
            let message = texts(method).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
        assert!(serde_yaml::from_str::<MethodSpec>("magnitude_mask: {examples: 3}").is_err());
        assert!(serde_yaml::from_str::<MethodSpec>("sift: {mask: {choose: random}}").is_err());
    }

    /// The example of the docs is a file that compiles, whole and unchanged.
    #[test]
    fn the_criterion_of_the_docs_is_a_method() {
        let docs = include_str!("../../docs/methods.md");
        assert!(docs.contains(concat!("```rust\n", include_str!("saliency_mask.rs"), "```\n")));
        let options: saliency_mask::Options = serde_yaml::from_str("{p: 0.2, examples: 64}").unwrap();
        let method = options.resolve(Preset::Paper).unwrap().remove(0);
        assert_eq!(
            (method.name(), method.options().as_str(), method.examples_passed(10)),
            (
                "saliency_mask",
                "p=0.2 examples=64 scope=backbone threshold=global decay=child clip=after_mask",
                10
            )
        );
    }
}

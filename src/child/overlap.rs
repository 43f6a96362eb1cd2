//! How much child networks have in common, for every pair and part of the model.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::mask_file::MaskFile;
use crate::error::{Error, Result};
use crate::model::ParameterPlace;

/// A part of a model, in the order from the input to the output.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The whole that the masks reach.
    All,
    /// Embeddings, an encoder layer, the pooler or the head.
    Place(ParameterPlace),
    /// One tensor.
    Tensor(String),
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Part::All => formatter.write_str("all"),
            Part::Place(place) => place.fmt(formatter),
            Part::Tensor(name) => formatter.write_str(name),
        }
    }
}

/// How finely overlaps are told apart, besides that of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// Not at all.
    All,
    /// By embeddings, encoder layers, pooler and head.
    Layer,
    /// By tensors.
    Tensor,
}

/// What two child networks A and B have in common within a part of the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overlap {
    /// Name of A.
    pub first: String,
    /// Name of B.
    pub second: String,
    /// The part of the model.
    pub part: String,
    /// |A ∩ B| / |A ∪ B|; nothing where both are empty.
    pub overlap: Option<f64>,
    /// |A ∩ B| / |A|; nothing where A is empty.
    pub intersection_share: Option<f64>,
    /// The overlap that independent random masks of the same sizes have on average, to the first order.
    pub chance: Option<f64>,
    /// |A|.
    pub first_kept: usize,
    /// |B|.
    pub second_kept: usize,
    /// Weights of the part.
    pub weights: usize,
}

/// Weights of a part: in A, in B, in both, in all.
#[derive(Clone, Copy, Default)]
struct Counts {
    first: usize,
    second: usize,
    both: usize,
    weights: usize,
}

/// Returns the names that masks go by: task and seed from their metadata; the path where that is missing or not the only
/// one of its name.
fn mask_names(masks: &[MaskFile]) -> Vec<String> {
    let path = |mask: &MaskFile| mask.path.display().to_string();
    let short: Vec<String> = masks
        .iter()
        .map(|mask| match (mask.about.get("task"), mask.about.get("seed")) {
            (Some(task), Some(seed)) => format!("{task} {seed}"),
            _ => path(mask),
        })
        .collect();
    let repeated = |name: &String| short.iter().filter(|other| *other == name).count() > 1;
    let names = short.iter().zip(masks);
    names.map(|(name, mask)| if repeated(name) { path(mask) } else { name.clone() }).collect()
}

/// Computes the overlap of every ordered pair of masks, each with itself included: the whole first, then the parts.
///
/// # Errors
/// Fails, naming the files, if two masks belong to different models or scopes, or a file is named twice.
pub fn overlaps(masks: &[MaskFile], granularity: Granularity) -> Result<Vec<Overlap>> {
    let names = mask_names(masks);
    let mut found = Vec::new();
    for (first, first_name) in masks.iter().zip(&names) {
        if names.iter().filter(|name| *name == first_name).count() > 1 {
            return Err(Error::configuration(format!("{} is named twice", first.path.display())));
        }
        for (second, second_name) in masks.iter().zip(&names) {
            for (part, counts) in common(first, second, granularity)? {
                found.push(counts.overlap(first_name, second_name, &part));
            }
        }
    }
    Ok(found)
}

/// Counts what two masks have in common in each part.
fn common(first: &MaskFile, second: &MaskFile, granularity: Granularity) -> Result<BTreeMap<Part, Counts>> {
    if first.shapes() != second.shapes() {
        return Err(Error::configuration(format!(
            "{} and {} belong to different models or scopes",
            first.path.display(),
            second.path.display()
        )));
    }
    let mut found: BTreeMap<Part, Counts> = BTreeMap::new();
    for (one, other) in first.tensors.iter().zip(&second.tensors) {
        let both = one.bits.iter().zip(&other.bits);
        let counts = Counts {
            first: one.kept(),
            second: other.kept(),
            both: both.map(|(first, second)| (first & second).count_ones() as usize).sum(),
            weights: one.count,
        };
        let finer = match granularity {
            Granularity::All => None,
            Granularity::Layer => Some(Part::Place(one.place)),
            Granularity::Tensor => Some(Part::Tensor(one.name.clone())),
        };
        for part in std::iter::once(Part::All).chain(finer) {
            found.entry(part).or_default().add(counts);
        }
    }
    Ok(found)
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.first += other.first;
        self.second += other.second;
        self.both += other.both;
        self.weights += other.weights;
    }

    fn overlap(self, first: &str, second: &str, part: &Part) -> Overlap {
        let ratio = |part: f64, whole: f64| (whole > 0.0).then(|| part / whole);
        let share = |kept: usize| kept as f64 / self.weights.max(1) as f64;
        let (a, b) = (share(self.first), share(self.second));
        let either = self.first + self.second - self.both;
        Overlap {
            first: first.to_owned(),
            second: second.to_owned(),
            part: part.to_string(),
            overlap: ratio(self.both as f64, either as f64),
            intersection_share: ratio(self.both as f64, self.first as f64),
            chance: ratio(a * b, a + b - a * b),
            first_kept: self.first,
            second_kept: self.second,
            weights: self.weights,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::path::PathBuf;

    use super::super::mask_file::MaskedTensor;
    use super::*;

    fn tensor(name: &str, place: ParameterPlace, bits: u8) -> MaskedTensor {
        MaskedTensor { name: name.into(), shape: vec![8], place, count: 8, bits: vec![bits] }
    }

    /// A mask of eight weights in a layer and eight in the pooler.
    fn mask(file: &str, seed: &str, layer: u8, pooler: u8) -> MaskFile {
        let about = [("task", "rte"), ("seed", seed)];
        MaskFile {
            path: PathBuf::from(file),
            about: about.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            tensors: vec![
                tensor("bert.encoder.layer.3.output.dense.weight", ParameterPlace::EncoderLayer(3), layer),
                tensor("bert.pooler.dense.bias", ParameterPlace::Pooler, pooler),
            ],
        }
    }

    #[test]
    fn ratios_are_those_of_the_sets_in_every_part() {
        let masks = [mask("a", "1", 0b1111_0000, 0), mask("b", "2", 0b0011_1100, 0b1)];
        let found = overlaps(&masks, Granularity::Layer).unwrap();
        let pairs: Vec<_> = found.iter().step_by(3).map(|pair| (&*pair.first, &*pair.second)).collect();
        assert_eq!(pairs, [("rte 1", "rte 1"), ("rte 1", "rte 2"), ("rte 2", "rte 1"), ("rte 2", "rte 2")]);
        let [all, layer, pooler] = &found[3..6] else { panic!() };
        assert_eq!([&*all.part, &*layer.part, &*pooler.part], ["all", "layer 3", "pooler"]);
        // 2 of 7 and of A's 4; by chance (4/16 · 5/16) / (4/16 + 5/16 − 20/256).
        assert_eq!((all.overlap, all.intersection_share), (Some(2.0 / 7.0), Some(0.5)));
        assert_eq!(all.chance, Some((20.0 / 256.0) / (9.0 / 16.0 - 20.0 / 256.0)));
        assert_eq!((all.first_kept, all.second_kept, all.weights), (4, 5, 16));
        assert_eq!((layer.overlap, layer.intersection_share, layer.weights), (Some(1.0 / 3.0), Some(0.5), 8));
        assert_eq!((pooler.overlap, pooler.intersection_share, pooler.chance), (Some(0.0), None, Some(0.0)));
        // The other way round: 2 of B's 5. And an empty set has no ratio to itself.
        assert_eq!((found[6].overlap, found[6].intersection_share), (Some(2.0 / 7.0), Some(0.4)));
        assert_eq!((found[0].overlap, found[2].overlap), (Some(1.0), None));
        let tensors = overlaps(&masks, Granularity::Tensor).unwrap();
        assert_eq!(tensors[2].part, "bert.pooler.dense.bias");
        assert_eq!(overlaps(&masks, Granularity::All).unwrap().len(), 4);
    }

    #[test]
    fn names_are_short_where_they_can_be() {
        let mut masks = vec![mask("a", "1", 0, 0), mask("b", "2", 0, 0), mask("c", "1", 0, 0)];
        masks[1].about = HashMap::new();
        assert_eq!(mask_names(&masks), ["a", "b", "c"]);
        assert_eq!(mask_names(&masks[..2]), ["rte 1", "b"]);
        masks[2].path = "a".into();
        assert!(overlaps(&masks, Granularity::All).unwrap_err().to_string().contains("a is named twice"));
        masks[2] = mask("c", "3", 0, 0);
        masks[2].tensors.pop();
        assert!(
            overlaps(&masks, Granularity::All)
                .unwrap_err()
                .to_string()
                .contains("a and c belong to different")
        );
    }
}

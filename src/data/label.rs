//! Gold labels: what a cell of a label column stands for.

use std::collections::HashMap;

use super::layout::Layout;
use super::task::{Objective, TaskCard};

/// The gold answer of an example.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Label {
    /// A class id, the position of the label in the card.
    Class(usize),
    /// A finite score.
    Score(f32),
}

/// Returns whether two spellings are of one label: files, configs and cards differ in case.
pub fn same_label(left: &str, right: &str) -> bool {
    without_case(left) == without_case(right)
}

fn without_case(label: &str) -> String {
    label.to_lowercase()
}

/// What a label cell says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Gold {
    Known(Label),
    /// The -1 that the Hub's copies of GLUE give a withheld label.
    Withheld,
    /// One of the card's `drop_labels`.
    Dropped,
}

/// Reads the label cells of one file.
pub(super) struct LabelReader<'a> {
    card: &'a TaskCard,
    layout: &'a Layout,
    /// The id of every spelling as it stands and, where that is no other spelling, in lower case.
    ids: HashMap<String, usize>,
}

impl<'a> LabelReader<'a> {
    pub fn new(card: &'a TaskCard, layout: &'a Layout) -> Self {
        let mut spellings: Vec<(&String, usize)> = Vec::new();
        for names in [card.labels(), &layout.labels] {
            spellings.extend(names.iter().enumerate().map(|(id, name)| (name, id)));
        }
        spellings
            .extend(card.spellings.iter().filter_map(|(other, name)| Some((other, card.label_id(name)?))));
        let mut ids = HashMap::new();
        for (spelling, id) in &spellings {
            ids.entry(spelling.to_string()).or_insert(*id);
        }
        for (spelling, id) in &spellings {
            ids.entry(without_case(spelling)).or_insert(*id);
        }
        LabelReader { card, layout, ids }
    }

    /// Reads a cell that is not empty; the error is a fragment for a message.
    pub fn read(&self, cell: &str) -> Result<Gold, String> {
        if self.card.drops(cell) {
            return Ok(Gold::Dropped);
        }
        match &self.card.objective {
            Objective::Classification { .. } => self.class(cell),
            Objective::Regression => self.score(cell),
        }
    }

    fn class(&self, cell: &str) -> Result<Gold, String> {
        match self.ids.get(cell).or_else(|| self.ids.get(&without_case(cell))) {
            Some(id) => Ok(Gold::Known(Label::Class(*id))),
            None if cell == "-1" => Ok(Gold::Withheld),
            None => {
                let mut known = self.card.labels().join(", ");
                if !self.layout.labels.is_empty() {
                    known += &format!(", in this order also {}", self.layout.labels.join(", "));
                }
                for (other, name) in &self.card.spellings {
                    known += &format!(", for {name} also {other}");
                }
                Err(format!("unknown label `{cell}`; the labels of `{}` are {known}", self.card.name))
            }
        }
    }

    fn score(&self, cell: &str) -> Result<Gold, String> {
        let score = cell.parse::<f32>().ok().filter(|score| score.is_finite());
        let score = score.ok_or_else(|| format!("the score `{cell}` is not a finite number"))?;
        match self.card.score_range {
            Some((least, greatest)) if !(least..=greatest).contains(&f64::from(score)) => {
                if score == -1.0 {
                    return Ok(Gold::Withheld);
                }
                Err(format!("the score `{cell}` is outside the range {least} to {greatest}"))
            }
            _ => Ok(Gold::Known(Label::Score(score))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_alike_in_any_case_of_any_alphabet() {
        assert!(same_label("École", "éCOLE") && same_label("entailment", "ENTAILMENT"));
        assert!(!same_label("ecole", "école"));
    }

    #[test]
    fn a_label_is_known_by_name_number_and_other_spelling_in_any_case() {
        let card = TaskCard::builtin("scitail").unwrap();
        let layout = card.layouts.iter().find(|layout| !layout.labels.is_empty()).unwrap();
        let reader = LabelReader::new(&card, layout);
        for (cell, id) in [
            ("entails", 0),
            ("neutral", 1),
            ("NEUTRAL", 1),
            ("0", 0),
            ("1", 1),
            ("Entailment", 0),
            ("not_entailment", 1),
        ] {
            assert_eq!(reader.read(cell), Ok(Gold::Known(Label::Class(id))), "{cell}");
        }
        assert_eq!(reader.read("-1"), Ok(Gold::Withheld));
        // Contradiction counts as neutral in predictions of three labels, not as a gold label.
        let message = reader.read("contradiction").unwrap_err();
        assert!(message.contains("the labels of `scitail` are entails, neutral"), "{message}");
        assert!(message.contains("for neutral also not_entailment"), "{message}");
    }

    #[test]
    fn labels_that_differ_only_in_case_stay_apart() {
        let mut card = TaskCard::builtin("rte").unwrap();
        card.objective = Objective::Classification { labels: ["Us", "us"].map(String::from).to_vec() };
        let layout = card.layouts[0].clone();
        let reader = LabelReader::new(&card, &layout);
        assert_eq!(reader.read("Us"), Ok(Gold::Known(Label::Class(0))));
        assert_eq!(reader.read("us"), Ok(Gold::Known(Label::Class(1))));
        assert_eq!(reader.read("US"), Ok(Gold::Known(Label::Class(1))));
    }

    #[test]
    fn labels_without_consensus_are_told_from_withheld_ones() {
        let read = |task, cell| {
            let card = TaskCard::builtin(task).unwrap();
            LabelReader::new(&card, &card.layouts[0]).read(cell).unwrap()
        };
        assert_eq!((read("snli", "-"), read("snli", "-1")), (Gold::Dropped, Gold::Dropped));
        assert_eq!((read("mnli", "-"), read("mnli", "-1")), (Gold::Dropped, Gold::Withheld));
        assert_eq!(read("stsb", "-1.0"), Gold::Withheld);
    }
}

//! Random parts of a data set.

use super::label::Label;
use super::sheet::Example;
use crate::random::{self, Key};

/// Returns the numbers of `count` examples, in file order. Each class has its share to within one example, and for one
/// key a smaller subset is part of every larger one.
pub fn subset(examples: &[Example], count: usize, key: Key) -> Vec<usize> {
    let order = random::permutation(examples.len(), key);
    let class = |number: usize| match examples[number].label {
        Some(Label::Class(id)) => id,
        _ => 0,
    };
    let classes = examples.iter().enumerate().map(|(number, _)| class(number) + 1).max().unwrap_or(0);
    let mut sizes = vec![0usize; classes];
    order.iter().for_each(|&number| sizes[class(number)] += 1);
    // The k-th of n members of a class stands at (k + ½)/n: cutting anywhere leaves equal shares of all classes.
    let mut seen = vec![0usize; classes];
    let mut placed: Vec<(f64, usize)> = order
        .into_iter()
        .map(|number| {
            let class = class(number);
            seen[class] += 1;
            ((seen[class] as f64 - 0.5) / sizes[class] as f64, number)
        })
        .collect();
    placed.sort_by(|left, right| left.0.total_cmp(&right.0));
    let mut chosen: Vec<usize> = placed.into_iter().take(count).map(|(_, number)| number).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;

    fn examples(classes: &[usize]) -> Vec<Example> {
        let example = |&class| Example { first: "a".into(), second: None, label: Some(Label::Class(class)) };
        classes.iter().map(example).collect()
    }

    #[test]
    fn subsets_are_stratified_nested_and_seeded() {
        let classes: Vec<usize> = (0..300).map(|number| usize::from(number % 3 == 0)).collect();
        let examples = examples(&classes);
        let subset = |count, seed| subset(&examples, count, Key::derive(seed, Purpose::Subset, 0));
        let (small, large) = (subset(30, 1), subset(90, 1));
        assert_eq!((small.len(), large.len()), (30, 90));
        assert!(small.iter().all(|number| large.contains(number)));
        let minority = large.iter().filter(|&&number| classes[number] == 1).count();
        assert!((29..=31).contains(&minority), "{minority}");
        assert_ne!(small, subset(30, 2));
        assert_eq!(subset(300, 5), (0..300).collect::<Vec<_>>());
    }
}

//! Wrong labels on purpose: how a method bears them.

use super::encoded_dataset::Targets;
use crate::error::{Error, Result};
use crate::random::{Key, Purpose, permutation, philox};

/// Makes the labels of exactly round(share · n) examples wrong.
///
/// A class becomes one of the others, each as likely. Scores change places among the chosen examples, in one circle: each
/// gets that of another (where only one is chosen, it keeps its own).
///
/// Which examples are chosen depends on their number, the share and the seed only, and for one seed those of a smaller
/// share are among those of a larger one; a wrong class is the same for every share.
///
/// # Errors
/// Fails if labels are to change and there is only one class.
pub fn noisy_labels(targets: &Targets, classes: usize, share: f64, seed: u64) -> Result<Targets> {
    let examples = match targets {
        Targets::Classes(ids) => ids.len(),
        Targets::Scores(scores) => scores.len(),
    };
    let order = permutation(examples, Key::derive(seed, Purpose::LabelNoise, 0));
    let count = (share.clamp(0.0, 1.0) * examples as f64).round() as usize;
    let chosen = &order[..count];
    let mut noisy = targets.clone();
    match &mut noisy {
        Targets::Classes(_) if classes < 2 && count > 0 => {
            return Err(Error::configuration(
                "label noise puts other classes in place of the right ones, and this task has one class only",
            ));
        }
        Targets::Classes(ids) => {
            let key = Key::derive(seed, Purpose::LabelNoise, 1);
            for &number in chosen {
                let random = philox([number as u32, (number as u64 >> 32) as u32, 0, 0], key)[0];
                // The upper half of the product is uniform on 0..classes − 1.
                let others = (u64::from(random) * (classes as u64 - 1)) >> 32;
                ids[number] = (ids[number] + 1 + others as i64) % classes as i64;
            }
        }
        Targets::Scores(scores) => {
            for pair in chosen.windows(2) {
                scores.swap(pair[0], pair[1]);
            }
        }
    }
    Ok(noisy)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(targets: &Targets, classes: usize, share: f64, seed: u64) -> Vec<usize> {
        let noisy = noisy_labels(targets, classes, share, seed).unwrap();
        let differ = |number: &usize| match (targets, &noisy) {
            (Targets::Classes(old), Targets::Classes(new)) => old[*number] != new[*number],
            (Targets::Scores(old), Targets::Scores(new)) => old[*number] != new[*number],
            _ => panic!("the kind of targets changed"),
        };
        (0..1001).filter(differ).collect()
    }

    fn classes(count: i64) -> Targets {
        Targets::Classes((0..1001).map(|number| number % count).collect())
    }

    fn scores() -> Targets {
        Targets::Scores((0..1001).map(|number| number as f32).collect())
    }

    #[test]
    fn exactly_the_share_is_wrong_nested_and_seeded() {
        for (targets, count) in [(classes(2), 2), (classes(3), 3), (scores(), 1)] {
            let small = changed(&targets, count, 0.1, 7);
            let large = changed(&targets, count, 0.25, 7);
            // round(100.1) and round(250.25).
            assert_eq!((small.len(), large.len()), (100, 250));
            assert!(small.iter().all(|number| large.contains(number)));
            assert_eq!(small, changed(&targets, count, 0.1, 7));
            assert_ne!(small, changed(&targets, count, 0.1, 8));
            assert!(changed(&targets, count, 0.0, 7).is_empty());
            assert_eq!(changed(&targets, count, 1.0, 7).len(), 1001);
        }
    }

    #[test]
    fn wrong_classes_are_uniform_and_the_same_for_every_share() {
        let Targets::Classes(old) = classes(4) else { panic!() };
        let noisy = |share| match noisy_labels(&classes(4), 4, share, 3).unwrap() {
            Targets::Classes(ids) => ids,
            Targets::Scores(_) => panic!(),
        };
        let (all, half) = (noisy(1.0), noisy(0.5));
        let mut shifts = [0usize; 4];
        for (old, new) in old.iter().zip(&all) {
            assert!((0..4).contains(new));
            shifts[((new - old + 4) % 4) as usize] += 1;
        }
        assert_eq!(shifts[0], 0);
        // Five standard deviations of a third of 1001.
        assert!(shifts[1..].iter().all(|&count| (count as f64 - 333.7).abs() < 75.0), "{shifts:?}");
        assert!(half.iter().zip(&all).zip(&old).all(|((half, all), old)| half == all || half == old));
    }

    #[test]
    fn scores_change_places_only() {
        let Targets::Scores(mut noisy) = noisy_labels(&scores(), 1, 0.4, 3).unwrap() else { panic!() };
        noisy.sort_by(f32::total_cmp);
        assert_eq!(noisy, (0..1001).map(|number| number as f32).collect::<Vec<_>>());
    }

    #[test]
    fn one_class_has_no_other() {
        let one = Targets::Classes(vec![0; 5]);
        assert!(noisy_labels(&one, 1, 0.0, 1).is_ok());
        assert!(noisy_labels(&one, 1, 0.5, 1).unwrap_err().to_string().contains("one class only"));
    }
}

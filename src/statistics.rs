//! Statistics of a few numbers, such as one score a seed.
//!
//! Numbers are expected to be finite. Conventions are those of numpy and scipy, named at each function.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Returns the mean; nothing for no numbers.
pub fn mean(numbers: &[f64]) -> Option<f64> {
    (!numbers.is_empty()).then(|| numbers.iter().sum::<f64>() / numbers.len() as f64)
}

/// Returns whether one mean of scores is higher than another, by more than the order in which their terms were added can
/// make: scores of one data set that differ at all differ by far more.
pub fn is_above(one: f64, other: f64) -> bool {
    one > other + 1e-9
}

/// Returns the standard deviation of a sample, with n − 1 below (`numpy.std(ddof=1)`); nothing for fewer than two
/// numbers.
pub fn standard_deviation(numbers: &[f64]) -> Option<f64> {
    let mean = mean(numbers)?;
    let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
    (numbers.len() > 1).then(|| (squares / (numbers.len() - 1) as f64).sqrt())
}

/// Returns the median, for an even count the mean of the middle two; nothing for no numbers.
pub fn median(numbers: &[f64]) -> Option<f64> {
    quantile(numbers, 0.5)
}

/// Returns a quantile with linear interpolation (`numpy.quantile`); nothing for no numbers.
///
/// `share` is the share of numbers below it; what lies outside 0 to 1 is taken as 0 or 1.
pub fn quantile(numbers: &[f64], share: f64) -> Option<f64> {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let place = share.clamp(0.0, 1.0) * last as f64;
    let below = sorted[place.floor() as usize];
    let above = sorted[place.ceil() as usize];
    Some(below + (above - below) * place.fract())
}

/// Returns the smallest number; nothing for no numbers.
pub fn minimum(numbers: &[f64]) -> Option<f64> {
    numbers.iter().copied().min_by(f64::total_cmp)
}

/// Returns the largest number; nothing for no numbers.
pub fn maximum(numbers: &[f64]) -> Option<f64> {
    numbers.iter().copied().max_by(f64::total_cmp)
}

/// Returns half the width of the 95 % confidence interval of the mean, by Student's t with n − 1 degrees of freedom
/// (`scipy.stats.t.interval`); nothing for fewer than two numbers.
pub fn confidence_half_width(numbers: &[f64]) -> Option<f64> {
    let deviation = standard_deviation(numbers)?;
    let count = numbers.len() as f64;
    let student = StudentsT::new(0.0, 1.0, count - 1.0).ok()?;
    Some(student.inverse_cdf(0.975) * deviation / count.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_terms_makes_no_mean_higher() {
        let (one, other) = ([0.6101, 0.5523, 0.7013], [0.7013, 0.5523, 0.6101]);
        let [one, other] = [one, other].map(|numbers| mean(&numbers).unwrap());
        assert!(one != other && !is_above(one, other) && !is_above(other, one));
        assert!(is_above(0.5 + 1e-6, 0.5) && !is_above(0.5, 0.5 + 1e-6));
    }

    /// Scores of seven seeds, one of them collapsed.
    const SCORES: [f64; 7] = [0.8412, 0.8556, 0.7978, 0.8628, 0.8484, 0.5271, 0.8520];

    /// Checks a result against the number that numpy 2.3.4 or scipy 1.17.1 prints, to their last digits but one.
    fn agrees(found: Option<f64>, reference: f64) {
        let found = found.unwrap();
        assert!(
            (found - reference).abs() <= 4.0 * f64::EPSILON * reference.abs(),
            "{found} is not {reference}"
        );
    }

    #[test]
    fn agrees_with_numpy() {
        agrees(mean(&SCORES), 0.7978428571428572);
        agrees(standard_deviation(&SCORES), 0.12126134114854105);
        agrees(median(&SCORES), 0.8484);
        agrees(minimum(&SCORES), 0.5271);
        agrees(maximum(&SCORES), 0.8628);
        for (share, reference) in
            [(0.0, 0.5271), (0.05, 0.60831), (0.25, 0.8194999999999999), (0.9, 0.85848), (1.0, 0.8628)]
        {
            agrees(quantile(&SCORES, share), reference);
        }
        let even = [4.0, 1.0, 3.0, 2.0];
        agrees(median(&even), 2.5);
        agrees(quantile(&even, 0.1), 1.3);
        agrees(quantile(&even, 0.75), 3.25);
        agrees(standard_deviation(&even), 1.2909944487358056);
    }

    #[test]
    fn interval_agrees_with_scipy() {
        for (numbers, reference) in [
            (&SCORES[..], 0.11214803579657212),
            (&[1.0, 2.0, 3.0, 4.0], 2.0542602567605206),
            (&[1.0, 3.0], 12.706204736174694),
        ] {
            let found = confidence_half_width(numbers).unwrap();
            assert!((found / reference - 1.0).abs() < 1e-9, "{found} is not {reference}");
        }
    }

    #[test]
    fn too_few_numbers_have_no_statistics() {
        for statistic in [mean, median, minimum, maximum, standard_deviation, confidence_half_width] {
            assert_eq!(statistic(&[]), None);
        }
        assert_eq!(mean(&[0.5]), Some(0.5));
        assert_eq!(standard_deviation(&[0.5]), None);
        assert_eq!(confidence_half_width(&[0.5]), None);
    }
}

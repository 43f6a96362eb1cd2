//! The learning rate of each step.

/// Linear warm-up from zero, then linear decay to zero (transformers' `get_linear_schedule_with_warmup`).
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Number of warm-up steps.
    pub warmup: u64,
    /// Number of all steps.
    pub total: u64,
}

impl Schedule {
    /// Returns the learning rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        let share = if step < self.warmup {
            step as f64 / self.warmup as f64
        } else {
            self.total.saturating_sub(step) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64
        };
        self.learning_rate * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The multipliers that transformers gives, from `scripts/make_fixtures.py`.
    #[test]
    fn agrees_with_transformers() {
        let text = include_str!("../../tests/fixtures/schedule.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        for case in cases {
            let (warmup, total) = (case["warmup"].as_u64().unwrap(), case["total"].as_u64().unwrap());
            let schedule = Schedule { learning_rate: 1.0, warmup, total };
            let multipliers = case["multipliers"].as_array().unwrap();
            assert!(multipliers.len() as u64 >= total);
            for (step, expected) in multipliers.iter().enumerate() {
                let expected = expected.as_f64().unwrap();
                assert!((schedule.at(step as u64) - expected).abs() < 1e-12, "{warmup}/{total} step {step}");
            }
        }
    }
}

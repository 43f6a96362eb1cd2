//! "Did you mean": the known name that is nearest to a misspelt one.

/// Returns `; did you mean `x`?` for the nearest of the known names, or nothing if none is near.
pub fn suggestion<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&name.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map_or(String::new(), |(_, candidate)| format!("; did you mean `{candidate}`?"))
}

#[cfg(test)]
mod tests {
    use super::suggestion;

    #[test]
    fn suggests_near_names_only() {
        assert_eq!(suggestion("epoch", ["batch_size", "epochs"]), "; did you mean `epochs`?");
        assert_eq!(suggestion("zzz", ["batch_size", "epochs"]), "");
    }
}

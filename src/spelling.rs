//! Names in messages: the known one that is nearest to a misspelt one, and foreign ones without what a terminal obeys.

/// Returns `; did you mean `x`?` for the nearest of the known names, or nothing if none is near.
pub fn suggestion<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    known
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&name.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map_or(String::new(), |(_, candidate)| format!("; did you mean `{candidate}`?"))
}

/// Returns a foreign text as a terminal may show it: without control characters.
pub fn visible(text: &str) -> String {
    let visible =
        |character: char| if character.is_control() { char::REPLACEMENT_CHARACTER } else { character };
    text.chars().map(visible).collect()
}

/// Returns the beginning of a foreign text, so many characters at most, as a terminal may show it.
pub fn excerpt(text: &str, most: usize) -> String {
    let mut excerpt = visible(&text.chars().take(most).collect::<String>());
    if text.chars().nth(most).is_some() {
        excerpt.push_str("...");
    }
    excerpt
}

/// Returns a foreign name as a message may quote it.
pub fn quoted(name: &str) -> String {
    format!("`{}`", excerpt(name, 80))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_near_names_only() {
        assert_eq!(suggestion("epoch", ["batch_size", "epochs"]), "; did you mean `epochs`?");
        assert_eq!(suggestion("zzz", ["batch_size", "epochs"]), "");
    }

    #[test]
    fn foreign_names_are_cut_and_lose_what_a_terminal_obeys() {
        assert_eq!(visible("don't \u{1b}[31m\n"), "don't \u{fffd}[31m\u{fffd}");
        assert_eq!((excerpt("äöü", 3), excerpt("äöü", 2)), ("äöü".to_owned(), "äö...".to_owned()));
        assert_eq!(quoted(&"a".repeat(81)), format!("`{}...`", "a".repeat(80)));
    }
}

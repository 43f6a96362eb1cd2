//! Names of models on the Hub.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The revision of a model that is meant where none is named.
const USUAL_REVISION: &str = "main";

/// The longest name of a repository, its owner's included.
const LONGEST_NAME: usize = 96;

/// A model on the Hub: `bert-large-cased`, `owner/name`, or either with `@` and a branch, a tag or a commit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModelId {
    /// The name, with its owner's before a slash where there is one.
    pub repository: String,
    /// A branch, a tag, or a commit's 40 digits.
    pub revision: String,
}

impl ModelId {
    /// Returns whether the revision is a commit, which names the same files for ever.
    pub fn is_pinned(&self) -> bool {
        is_commit(&self.revision)
    }

    /// Returns the name of the repository's folder in the cache.
    pub(super) fn folder_name(&self) -> String {
        format!("models--{}", self.repository.replace('/', "--"))
    }

    /// Returns the repository that a folder in the cache is of.
    pub(super) fn of_folder_name(name: &str) -> Option<Self> {
        Self::from_str(&name.strip_prefix("models--")?.replace("--", "/")).ok()
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.repository)?;
        if self.revision == USUAL_REVISION { Ok(()) } else { write!(formatter, "@{}", self.revision) }
    }
}

impl FromStr for ModelId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, USUAL_REVISION));
        let parts: Vec<&str> = repository.split('/').collect();
        let is_repository = parts.len() <= 2
            && repository.len() <= LONGEST_NAME
            && parts.iter().all(|part| is_name(part) && !part.contains("--"))
            && !repository.ends_with(".git");
        let is_revision = revision.len() <= 255 && revision.split('/').all(is_name);
        if is_repository && is_revision {
            return Ok(Self { repository: repository.to_owned(), revision: revision.to_owned() });
        }
        Err(Error::configuration(format!(
            "`{text}` is not the name of a model on the Hub; write it as bert-large-cased or owner/name, with @ and a branch, tag or \
             commit behind it where it is not to be the newest"
        )))
    }
}

/// Returns whether a text is a commit as the Hub names them.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
}

/// Returns whether a text may be a part of a path: it cannot lead out of a folder, nor be hidden there.
pub(super) fn is_name(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty()
        && text.bytes().all(is_part)
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
        && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_revisions_and_folders() {
        let commit = "1d0f8c4a".repeat(5);
        for (text, repository, revision, folder) in [
            ("bert-large-cased", "bert-large-cased", "main", "models--bert-large-cased"),
            ("a/B_c.1", "a/B_c.1", "main", "models--a--B_c.1"),
            ("a/b@v1.0", "a/b", "v1.0", "models--a--b"),
            ("a@refs/pr/7", "a", "refs/pr/7", "models--a"),
            (&format!("a@{commit}"), "a", &commit, "models--a"),
        ] {
            let id: ModelId = text.parse().unwrap();
            assert_eq!((id.repository.as_str(), id.revision.as_str()), (repository, revision));
            assert_eq!((id.folder_name().as_str(), id.to_string().as_str()), (folder, text));
            assert_eq!(ModelId::of_folder_name(folder).unwrap().repository, repository);
            assert_eq!(id.is_pinned(), text.ends_with(&commit));
        }
        assert_eq!("a@main".parse::<ModelId>().unwrap().to_string(), "a");
    }

    #[test]
    fn paths_and_what_leads_out_of_folders_are_no_names() {
        let long = "x".repeat(97);
        for text in [
            "", ".", "..", "/a", "a/", "a//b", "a/b/c", "./a", "../a", "~/a", "a/..", "a..b", "a--b", "-a",
            "a.git", "a b", "a\\b", "a\0", "ä", "a@", "a@..", "a@../b", "a@/b", "a@b/", "a@b//c", "a@.b",
            "a@b@c", "@a", "a%2Fb", "a?b", "a#b", &long,
        ] {
            let error = text.parse::<ModelId>().unwrap_err();
            assert!(
                error.exit_code() == 2 && error.to_string().contains("is not the name of a model on the Hub"),
                "{text}"
            );
        }
        assert!(ModelId::of_folder_name("datasets--a").is_none());
        assert!(ModelId::of_folder_name("models--..--a").is_none());
    }
}

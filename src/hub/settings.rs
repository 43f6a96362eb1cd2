//! Where the Hub is and where its cache lies, by the environment variables of huggingface_hub.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::transfer::Patience;

/// The Hub and its cache on this machine.
#[derive(Clone)]
pub struct Hub {
    /// The folder with a folder for each repository.
    pub cache: PathBuf,
    /// Scheme and host of every address, without a slash at the end.
    pub endpoint: String,
    /// The token of `HF_TOKEN`; without it, that in `token_file` is used.
    pub token: Option<String>,
    /// The file that `hf auth login` writes a token to; `None` if it is not to be used.
    pub token_file: Option<PathBuf>,
    /// Whether the network is not to be used.
    pub offline: bool,
    /// How often a request is tried.
    pub patience: Patience,
}

impl Hub {
    /// Reads `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE` and
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN`, and the older names that huggingface_hub still takes for them.
    ///
    /// # Errors
    /// Fails if there is no home folder and none is named, or the endpoint is no address.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let get = |name: &str| get(name).filter(|value| !value.is_empty());
        let text = |name: &str| get(name).map(|value| value.to_string_lossy().into_owned());
        let user = get("HOME").map(PathBuf::from);
        let path = |name: &str| {
            let path = PathBuf::from(get(name)?);
            match (path.strip_prefix("~"), &user) {
                (Ok(rest), Some(user)) => Some(user.join(rest)),
                _ => Some(path),
            }
        };
        let usual = || {
            let caches = path("XDG_CACHE_HOME").or_else(|| Some(user.as_ref()?.join(".cache")))?;
            Some(caches.join("huggingface"))
        };
        let home = path("HF_HOME").or_else(usual);
        let in_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| in_home("hub"));
        let cache = cache.ok_or_else(|| {
            Error::configuration(
                "there is no home folder to keep models of the Hub in; name a folder with HF_HOME",
            )
        })?;
        let is_set = |name: &str| {
            text(name)
                .is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let offline = if get("HF_HUB_OFFLINE").is_some() { "HF_HUB_OFFLINE" } else { "TRANSFORMERS_OFFLINE" };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Error::configuration(format!(
                "HF_ENDPOINT `{endpoint}` is no address; write it as https://mirror.example"
            )));
        }
        let file = || path("HF_TOKEN_PATH").or_else(|| in_home("token"));
        let is_implicit = !is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN");
        Ok(Self {
            cache,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).filter(|_| is_implicit),
            token_file: file().filter(|_| is_implicit),
            offline: is_set(offline),
            patience: Patience::default(),
        })
    }

    /// Says in a few words where the token is found; nothing if there is none.
    pub fn token_place(&self) -> Option<String> {
        match (&self.token, &self.token_file) {
            (Some(_), _) => Some("HF_TOKEN".into()),
            (None, Some(file)) if file.is_file() => Some(file.display().to_string()),
            _ => None,
        }
    }

    /// Returns the value of `Authorization` for requests to the endpoint, if there is a token.
    ///
    /// # Errors
    /// Fails if the file with the token cannot be read, or the token cannot stand in a request.
    pub(super) fn authorization(&self) -> Result<Option<String>> {
        let token = match (&self.token, &self.token_file) {
            (Some(token), _) => Some(token.clone()),
            (None, Some(file)) => read_if_there(file)?,
            (None, None) => None,
        };
        let Some(token) = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty()) else {
            return Ok(None);
        };
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::configuration(format!(
                "the token in {} holds characters that no token has; copy it again from {}/settings/tokens",
                self.token_place().unwrap_or_default(),
                self.endpoint
            )));
        }
        Ok(Some(format!("Bearer {token}")))
    }
}

fn read_if_there(file: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", file)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<Hub> {
        let find =
            |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.into());
        Hub::from_variables(find)
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (variables, cache, token_file) in [
            (&[("HOME", "/u")][..], "/u/.cache/huggingface/hub", "/u/.cache/huggingface/token"),
            (&[("HOME", "/u"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub", "/x/huggingface/token"),
            (&[("HOME", "/u"), ("HF_HOME", "~/h")], "/u/h/hub", "/u/h/token"),
            (&[("HOME", "/u"), ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")], "/c", "/h/token"),
            (&[("HOME", "/u"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old", "/u/.cache/huggingface/token"),
            (&[("HOME", "/u"), ("HF_HOME", ""), ("HF_TOKEN_PATH", "/t")], "/u/.cache/huggingface/hub", "/t"),
        ] {
            let hub = hub(variables).unwrap();
            assert_eq!((hub.cache, hub.token_file), (cache.into(), Some(token_file.into())), "{variables:?}");
        }
        let homeless = hub(&[]).err().unwrap();
        assert!(homeless.exit_code() == 2 && homeless.to_string().contains("HF_HOME"), "{homeless}");
    }

    #[test]
    fn truth_endpoint_and_offline_are_read_as_python_reads_them() {
        let with = |name: &str, value: &str| hub(&[("HOME", "/u"), (name, value)]);
        for (value, expected) in
            [("1", true), ("true", true), ("Yes", true), ("on", true), ("0", false), ("2", false)]
        {
            assert_eq!(with("HF_HUB_OFFLINE", value).unwrap().offline, expected, "{value}");
            assert_eq!(with("TRANSFORMERS_OFFLINE", value).unwrap().offline, expected, "{value}");
        }
        let both = [("HOME", "/u"), ("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")];
        assert!(!hub(&both).unwrap().offline);
        assert_eq!(hub(&[("HOME", "/u")]).unwrap().endpoint, "https://huggingface.co");
        assert_eq!(with("HF_ENDPOINT", "http://127.0.0.1:80/").unwrap().endpoint, "http://127.0.0.1:80");
        assert!(with("HF_ENDPOINT", "hf-mirror.com").err().unwrap().to_string().contains("https://mirror"));
    }

    #[test]
    fn a_token_comes_from_the_variable_before_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let home = folder.path().to_str().unwrap();
        let of = |variables: &[(&str, &str)]| hub(&[&[("HF_HOME", home)], variables].concat()).unwrap();
        assert_eq!(of(&[]).authorization().unwrap(), None);
        assert_eq!(of(&[]).token_place(), None);
        std::fs::write(&file, "hf_file\n").unwrap();
        assert_eq!(of(&[]).authorization().unwrap().unwrap(), "Bearer hf_file");
        assert_eq!(of(&[]).token_place().unwrap(), file.display().to_string());
        assert_eq!(of(&[("HF_TOKEN", " hf_own ")]).authorization().unwrap().unwrap(), "Bearer hf_own");
        assert_eq!(
            of(&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("HF_TOKEN", "x")]).authorization().unwrap(),
            None
        );
        let bad = of(&[("HF_TOKEN", "hf_se\ncret")]).authorization().unwrap_err().to_string();
        assert!(bad.contains("token in HF_TOKEN holds") && !bad.contains("cret"), "{bad}");
    }
}

//! Where things lie outside the checkout.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// The cache shared by all checkouts: `$HUSK_CACHE`, else `$XDG_CACHE_HOME/husk`, else
/// `~/.cache/husk`.
///
/// # Errors
/// When none of them is set, or the path is relative.
pub fn cache_root() -> Result<PathBuf> {
    cache_root_from(|name| std::env::var_os(name).map(PathBuf::from))
}

fn cache_root_from(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf> {
    let set = |name| var(name).filter(|value| !value.as_os_str().is_empty());
    let path = match (set("HUSK_CACHE"), set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(cache), _, _) => cache,
        (None, Some(xdg), _) => xdg.join("husk"),
        (None, None, Some(home)) => home.join(".cache/husk"),
        (None, None, None) => bail!("no place for the cache: set HUSK_CACHE or HOME"),
    };
    if !path.is_absolute() {
        bail!("the cache's path {} is relative; it must be absolute", path.display());
    }
    Ok(path)
}

/// The checkout that the current directory is in, else the one that this binary was built from.
///
/// # Errors
/// When neither is there.
pub fn checkout() -> Result<PathBuf> {
    let here = std::env::current_dir().context("finding the current directory")?;
    if let Some(found) = here.ancestors().find(|dir| is_checkout(dir)) {
        return Ok(found.to_owned());
    }
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    if !is_checkout(&built_from) {
        bail!("run this inside a checkout of husk");
    }
    built_from.canonicalize().with_context(|| format!("resolving {}", built_from.display()))
}

fn is_checkout(dir: &Path) -> bool {
    dir.join("tests/harness/testhost/packages").is_file() && dir.join("Cargo.toml").is_file()
}

/// Directory of the state of one test host: two checkouts, or two names, never share a machine.
#[must_use]
pub fn state_dir(cache: &Path, checkout: &Path, name: &str) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    let digest = hex::encode(Sha256::digest(checkout.as_os_str().as_bytes()));
    cache.join("hosts").join(format!("{}-{name}", digest.get(..12).unwrap_or(&digest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_the_environment() {
        let from = |pairs: &[(&str, &str)]| {
            let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.into())).collect();
            cache_root_from(move |name| {
                pairs
                    .iter()
                    .find(|(key, _)| key == name)
                    .map(|(_, value): &(_, PathBuf)| value.clone())
            })
        };
        assert_eq!(from(&[("HOME", "/h")]).unwrap(), Path::new("/h/.cache/husk"));
        let xdg = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x")];
        assert_eq!(from(&xdg).unwrap(), Path::new("/x/husk"));
        let own = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HUSK_CACHE", "/c")];
        assert_eq!(from(&own).unwrap(), Path::new("/c"));
        assert_eq!(
            from(&[("HOME", "/h"), ("HUSK_CACHE", "")]).unwrap(),
            Path::new("/h/.cache/husk")
        );
        assert!(from(&[("HUSK_CACHE", "relative")]).is_err());
        assert!(from(&[]).is_err());
    }

    #[test]
    fn checkouts_and_names_have_their_own_state() {
        let cache = Path::new("/c");
        let one = state_dir(cache, Path::new("/a"), "main");
        assert_ne!(one, state_dir(cache, Path::new("/b"), "main"));
        assert_ne!(one, state_dir(cache, Path::new("/a"), "other"));
        assert_eq!(one, state_dir(cache, Path::new("/a"), "main"));
        assert!(one.starts_with("/c/hosts"));
    }
}

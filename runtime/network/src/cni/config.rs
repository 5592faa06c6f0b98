//! Network configurations: lists of plugins (`.conflist`), or a single one (`.conf`, `.json`).
//!
//! Which fields husk itself reads is in [`NetworkList`] and [`Plugin`]; everything else in a
//! plugin's object is the plugin's business and passed on as it is.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::VERSIONS;

/// Largest file that is read, in bytes, and most files of a directory.
const MAX_FILE: u64 = 1 << 20;
const MAX_FILES: usize = 1000;

/// Most plugins of a list.
const MAX_PLUGINS: usize = 64;

/// Version of a configuration that tells none.
const DEFAULT_VERSION: &str = "0.3.0";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no JSON.
    #[error("{path} is no JSON")]
    Json {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// What it says cannot be.
    #[error("{path}: {field}: {problem}")]
    Field {
        /// Which file.
        path: PathBuf,
        /// The field, e.g. `plugins[0].type`.
        field: String,
        /// What is wrong, with the value.
        problem: String,
    },
    /// None has this name.
    #[error("there is no CNI network {name:?} in {directory}; there is {there}{broken}")]
    NoNetwork {
        /// The name.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
        /// The names of those that are there.
        there: String,
        /// What was wrong with others.
        broken: String,
    },
}

/// A network: the plugins that make an interface, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkList {
    /// `name`
    pub name: String,
    /// The newest of `cniVersion` and `cniVersions` that is spoken here.
    pub version: String,
    /// `disableCheck`: CHECK is never called.
    pub disable_check: bool,
    /// `disableGC`: whether GC must not be called, if the configuration says it.
    pub disable_gc: Option<bool>,
    /// `plugins`, at least one.
    pub plugins: Vec<Plugin>,
}

/// A plugin of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    /// `type`: the name of its program.
    pub kind: String,
    /// The names in `capabilities` that are true.
    pub capabilities: Vec<String>,
    /// The whole object.
    pub config: Map<String, Value>,
}

/// Reads one field after the other, and names it where it is wrong.
struct Reader<'a> {
    path: &'a Path,
}

impl Reader<'_> {
    fn wrong(&self, field: &str, problem: impl Into<String>) -> ConfigError {
        let (path, field) = (self.path.to_owned(), field.to_owned());
        ConfigError::Field { path, field, problem: problem.into() }
    }

    fn flag(&self, object: &Map<String, Value>, field: &str) -> Result<bool, ConfigError> {
        match object.get(field) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            // What the specification calls deprecated but has examples of.
            Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
            Some(other) => Err(self.wrong(field, format!("{other} is neither true nor false"))),
        }
    }

    /// The newest version that the configuration allows and that is spoken here.
    fn version(&self, object: &Map<String, Value>) -> Result<String, ConfigError> {
        let mut allowed: Vec<&str> = Vec::new();
        match object.get("cniVersion") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => allowed.push(text),
            Some(other) => return Err(self.wrong("cniVersion", format!("{other} is no text"))),
        }
        match object.get("cniVersions") {
            None | Some(Value::Null) => {}
            Some(Value::Array(list)) => {
                for item in list {
                    let text = item.as_str();
                    allowed.push(
                        text.ok_or_else(|| {
                            self.wrong("cniVersions", format!("{item} is no text"))
                        })?,
                    );
                }
            }
            Some(other) => return Err(self.wrong("cniVersions", format!("{other} is no list"))),
        }
        if allowed.is_empty() {
            allowed.push(DEFAULT_VERSION);
        }
        let newest = VERSIONS.iter().rev().find(|version| allowed.contains(version));
        newest.map(|version| (*version).to_owned()).ok_or_else(|| {
            let problem = format!(
                "{} is not supported; supported are {}",
                allowed.join(", "),
                VERSIONS.join(", ")
            );
            self.wrong("cniVersion", problem)
        })
    }

    fn plugin(&self, at: &str, value: &Value) -> Result<Plugin, ConfigError> {
        let Value::Object(config) = value else {
            return Err(self.wrong(at, "it is no object"));
        };
        let field = format!("{at}type");
        let kind = match config.get("type") {
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(self.wrong(&field, format!("{other} is no text"))),
            None => return Err(self.wrong(&field, "it is required")),
        };
        // It becomes a path.
        if !is_file_name(kind) {
            return Err(self.wrong(&field, format!("{kind:?} is no file name")));
        }
        let field = format!("{at}capabilities");
        let capabilities = match config.get("capabilities") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(all)) => {
                let wanted = |(name, value): (&String, &Value)| {
                    (*value == Value::Bool(true)).then(|| name.clone())
                };
                all.iter().filter_map(wanted).collect()
            }
            Some(other) => return Err(self.wrong(&field, format!("{other} is no object"))),
        };
        Ok(Plugin { kind: kind.clone(), capabilities, config: config.clone() })
    }

    fn name(&self, object: &Map<String, Value>) -> Result<String, ConfigError> {
        match object.get("name") {
            Some(Value::String(name)) if is_identifier(name) => Ok(name.clone()),
            Some(other) => {
                let problem = "must be letters, digits, dots, _ and -, and begin with one of the \
                               first two";
                Err(self.wrong("name", format!("{other} {problem}")))
            }
            None => Err(self.wrong("name", "it is required")),
        }
    }

    /// The plugins of a list: those in it, and those in a directory of the network's name beside the
    /// file.
    fn plugins(&self, name: &str, object: &Map<String, Value>) -> Result<Vec<Plugin>, ConfigError> {
        let mut plugins = Vec::new();
        match object.get("plugins") {
            None | Some(Value::Null) => {}
            Some(Value::Array(list)) => {
                for (number, value) in list.iter().take(MAX_PLUGINS + 1).enumerate() {
                    plugins.push(self.plugin(&format!("plugins[{number}]."), value)?);
                }
            }
            Some(other) => return Err(self.wrong("plugins", format!("{other} is no list"))),
        }
        if !self.flag(object, "loadOnlyInlinedPlugins")?
            && let Some(beside) = self.path.parent()
        {
            for path in files(&beside.join(name), &["conf"])? {
                let inner = Reader { path: &path };
                plugins.push(inner.plugin("", &read_json(&path)?)?);
            }
        }
        if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
            let problem = format!("must be 1 to {MAX_PLUGINS}");
            return Err(self.wrong("plugins", problem));
        }
        Ok(plugins)
    }
}

/// Of the form that the specification has for names of networks and identifiers of containers.
pub(crate) fn is_identifier(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && text.len() <= 255 && text.bytes().all(inner)
}

fn is_file_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 255 && !text.contains(['/', '\0']) && !text.starts_with('.')
}

impl NetworkList {
    /// Reads a configuration that came from this file.
    ///
    /// # Errors
    /// [`ConfigError::Field`].
    pub fn of(path: &Path, value: &Value) -> Result<Self, ConfigError> {
        let reader = Reader { path };
        let Value::Object(object) = value else {
            return Err(reader.wrong("(the whole)", "it is no object"));
        };
        let name = reader.name(object)?;
        let plugins = if object.contains_key("type") && !object.contains_key("plugins") {
            vec![reader.plugin("", value)?]
        } else {
            reader.plugins(&name, object)?
        };
        Ok(NetworkList {
            version: reader.version(object)?,
            disable_check: reader.flag(object, "disableCheck")?,
            disable_gc: match object.get("disableGC") {
                None | Some(Value::Null) => None,
                Some(_) => Some(reader.flag(object, "disableGC")?),
            },
            name,
            plugins,
        })
    }

    /// Whether any of its plugins has this capability.
    #[must_use]
    pub fn is_capable_of(&self, capability: &str) -> bool {
        self.plugins.iter().any(|plugin| plugin.capabilities.iter().any(|c| c == capability))
    }

    /// The same as JSON, from which [`NetworkList::of`] makes it again.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let NetworkList { name, version, disable_check, disable_gc, plugins } = self;
        let plugins: Vec<_> = plugins.iter().map(|plugin| &plugin.config).collect();
        json!({
            "name": name, "cniVersion": version, "disableCheck": disable_check,
            "disableGC": disable_gc, "loadOnlyInlinedPlugins": true, "plugins": plugins,
        })
    }
}

/// The files of a directory that end so, in the order of their names. No directory is none.
fn files(directory: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { path: directory.to_owned(), source };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for entry in entries.take(MAX_FILES) {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension.is_some_and(|extension| extensions.contains(&extension)) && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read_json(path: &Path) -> Result<Value, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(failed(io::Error::other(format!("it has more than {MAX_FILE} bytes"))));
    }
    serde_json::from_slice(&bytes)
        .map_err(|source| ConfigError::Json { path: path.to_owned(), source })
}

/// What is in a directory of configurations.
#[derive(Debug, Default)]
pub struct Directory {
    /// The networks, in the order of their files' names.
    pub networks: Vec<NetworkList>,
    /// What is wrong with the other files.
    pub broken: Vec<ConfigError>,
}

/// Reads a directory of configurations. A file that is wrong does not hide the others.
///
/// # Errors
/// If the directory is there and cannot be read.
pub fn read_directory(directory: &Path) -> Result<Directory, ConfigError> {
    let mut found = Directory::default();
    for path in files(directory, &["conflist", "conf", "json"])? {
        match read_json(&path).and_then(|value| NetworkList::of(&path, &value)) {
            Ok(network) => found.networks.push(network),
            Err(error) => found.broken.push(error),
        }
    }
    Ok(found)
}

impl Directory {
    /// The network of this name: a list if there is one, as in the reference implementation the
    /// first of it.
    ///
    /// # Errors
    /// [`ConfigError::NoNetwork`] with what there is instead.
    pub fn named(self, name: &str, directory: &Path) -> Result<NetworkList, ConfigError> {
        let Directory { networks, broken } = self;
        let names: Vec<_> = networks.iter().map(|network| network.name.clone()).collect();
        networks.into_iter().find(|network| network.name == name).ok_or_else(|| {
            let broken: Vec<_> = broken.iter().map(|error| format!("; {error}")).collect();
            ConfigError::NoNetwork {
                name: name.to_owned(),
                directory: directory.to_owned(),
                there: if names.is_empty() { "none".to_owned() } else { names.join(", ") },
                broken: broken.concat(),
            }
        })
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;

//! What plugins answer: results, errors, versions.

use std::fmt;
use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

/// Longest text of a plugin that goes into a message, in characters.
const MAX_TEXT: usize = 2048;

/// What an ADD has made, as far as husk looks at it. The rest stays in the JSON for the plugins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddResult {
    /// The addresses of the pod's interface, in the plugins' order: the first is the pod's own.
    pub addresses: Vec<IpAddr>,
}

/// The fields that are read, of versions 0.3.0 to 1.1.0.
#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    interfaces: Vec<WireInterface>,
    #[serde(default)]
    ips: Vec<WireIp>,
}

#[derive(Deserialize)]
struct WireInterface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct WireIp {
    address: String,
    #[serde(default)]
    interface: Option<usize>,
}

impl AddResult {
    /// Reads a result, of which the addresses of the interface `ifname` count.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of(value: &Value, ifname: &str) -> Result<Self, String> {
        // A list would be taken for the fields in their order.
        if !value.is_object() {
            return Err("its result is none: it is no JSON object".to_owned());
        }
        let Wire { interfaces, ips } =
            Wire::deserialize(value).map_err(|error| format!("its result is none: {error}"))?;
        let mut addresses = Vec::new();
        for WireIp { address, interface } in ips {
            let own = match interface.and_then(|index| interfaces.get(index)) {
                Some(interface) => interface.name == ifname && !interface.sandbox.is_empty(),
                // It does not say whose it is: then it is the pod's.
                None => true,
            };
            let (ip, _) = address.split_once('/').unwrap_or((&address, ""));
            let ip = ip.parse().map_err(|_| format!("its result has no address: {address:?}"))?;
            if own && !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
        Ok(AddResult { addresses })
    }
}

/// What a plugin says of its failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginError {
    /// Its number; those below 100 are the specification's.
    pub code: u64,
    /// What it says.
    pub message: String,
    /// And more of it.
    pub details: String,
}

/// Code of a plugin that does not speak the version.
pub(super) const INCOMPATIBLE_VERSION: u64 = 1;

impl PluginError {
    /// Reads an error, if it is one.
    pub(super) fn of(value: &Value) -> Option<Self> {
        let code = value.get("code")?.as_u64()?;
        let text = |field| value.get(field).and_then(Value::as_str).map(clean).unwrap_or_default();
        Some(PluginError { code, message: text("msg"), details: text("details") })
    }
}

impl fmt::Display for PluginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PluginError { code, message, details } = self;
        f.write_str(if message.is_empty() { "(no message)" } else { message })?;
        if !details.is_empty() {
            write!(f, "; {details}")?;
        }
        write!(f, " (code {code})")
    }
}

/// The versions that a plugin supports.
pub(super) fn versions(value: &Value) -> Option<Vec<String>> {
    let list = value.get("supportedVersions")?.as_array()?;
    Some(list.iter().filter_map(|version| version.as_str().map(str::to_owned)).collect())
}

/// A text of a plugin without what could confuse a terminal, and not too long.
pub(super) fn clean(text: &str) -> String {
    let harmless = |c: char| if c.is_control() && c != '\n' { '\u{fffd}' } else { c };
    text.trim().chars().take(MAX_TEXT).map(harmless).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_are_those_of_the_pods_interface() {
        let result = json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": "br0"}, {"name": "eth0"}, {"name": "eth0", "sandbox": "/run/netns/x"}
            ],
            "ips": [
                {"address": "10.0.0.1/24", "interface": 0},
                {"address": "10.0.0.2/24", "interface": 2, "gateway": "10.0.0.1"},
                {"version": "6", "address": "fd00::2/64", "interface": 2},
                {"address": "10.0.0.2/24"}
            ],
        });
        let found = AddResult::of(&result, "eth0").unwrap().addresses;
        assert_eq!(
            found.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.2", "fd00::2"]
        );
        assert_eq!(AddResult::of(&json!({}), "eth0").unwrap(), AddResult::default());
    }

    #[test]
    fn what_is_no_result_is_told() {
        for value in [json!([]), json!({"ips": 3}), json!({"ips": [{"address": "10.0.0/8"}]})] {
            assert!(
                AddResult::of(&value, "eth0").unwrap_err().starts_with("its result"),
                "{value}"
            );
        }
    }

    #[test]
    fn errors_are_the_plugins_own_words() {
        let error = json!({"code": 7, "msg": "no\u{1b} range", "details": "set one"});
        let error = PluginError::of(&error).unwrap();
        assert_eq!(error.to_string(), "no\u{fffd} range; set one (code 7)");
        assert_eq!(PluginError::of(&json!({"msg": "x"})), None);
        assert_eq!(
            PluginError::of(&json!({"code": 3})).unwrap().to_string(),
            "(no message) (code 3)"
        );
    }
}

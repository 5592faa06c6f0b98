//! The network of a host that has no configuration.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{ConfigError, NetworkList};

/// Its name, which is also that of its bridge with a number.
pub const BUILTIN: &str = "husk";

/// A bridge with addresses from private ranges, by which the host is reached, other pods, and,
/// behind the host's address, everything else; and ports of the host that lead to pods.
///
/// `ipv6` says whether the host has IPv6. The loopback interface needs no plugin: it is up in every
/// namespace that husk makes.
///
/// # Errors
/// None in practice: it is the reader of configurations that can fail.
pub fn builtin(ipv6: bool) -> Result<NetworkList, ConfigError> {
    let mut ranges = vec![json!([{"subnet": "10.63.0.0/16"}])];
    let mut routes = vec![json!({"dst": "0.0.0.0/0"})];
    if ipv6 {
        // A unique local prefix whose number is "husk".
        ranges.push(json!([{"subnet": "fd68:7573:6b00::/64"}]));
        routes.push(json!({"dst": "::/0"}));
    }
    let value: Value = json!({
        "cniVersion": "1.0.0",
        "name": BUILTIN,
        "loadOnlyInlinedPlugins": true,
        "plugins": [
            {
                "type": "bridge",
                "bridge": "husk0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": ranges, "routes": routes},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    NetworkList::of(Path::new("(built in)"), &value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_bridge_with_port_mappings() {
        for ipv6 in [false, true] {
            let network = builtin(ipv6).unwrap();
            let kinds: Vec<_> = network.plugins.iter().map(|plugin| plugin.kind.as_str()).collect();
            assert_eq!(kinds, ["bridge", "portmap"]);
            let text = network.to_json().to_string();
            assert_eq!(text.contains("fd68:"), ipv6);
        }
    }
}

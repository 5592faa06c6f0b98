//! `/etc/hosts` of a pod's containers, as the kubelet makes it.

use std::net::IpAddr;

use crate::types::{HostAlias, PodSpec};

/// What every such file begins with.
const BEGINNING: &str = "# Kubernetes-managed hosts file.\n\
    127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::0\tip6-localnet\n\
    fe00::0\tip6-mcastprefix\n\
    fe00::1\tip6-allnodes\n\
    fe00::2\tip6-allrouters\n";

/// The file of a pod that has these addresses. Without one its own name is that of the loopback
/// address.
pub(crate) fn hosts(spec: &PodSpec, addresses: &[IpAddr]) -> String {
    let loopback = [IpAddr::from([127, 0, 0, 1])];
    let own = if addresses.is_empty() { &loopback[..] } else { addresses };
    let mut text = BEGINNING.to_owned();
    for address in own {
        text.push_str(&format!("{address}\t{}\n", spec.hostname));
    }
    if !spec.host_aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for HostAlias { ip, hostnames } in &spec.host_aliases {
        text.push_str(&format!("{ip}\t{}\n", hostnames.join("\t")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::stand_in;

    #[test]
    fn a_pod_finds_itself_and_its_aliases() {
        let mut spec = stand_in::spec(&["main"]);
        spec.hostname = "web-0".into();
        assert!(hosts(&spec, &[]).ends_with("\n127.0.0.1\tweb-0\n"));
        let hostnames = vec!["db".into(), "db.example".into()];
        spec.host_aliases = vec![HostAlias { ip: IpAddr::from([10, 0, 0, 9]), hostnames }];
        let text = hosts(&spec, &[IpAddr::from([10, 0, 0, 2])]);
        let end =
            "\n10.0.0.2\tweb-0\n\n# Entries added by HostAliases.\n10.0.0.9\tdb\tdb.example\n";
        assert!(text.ends_with(end) && !text.contains("127.0.0.1\tweb-0"), "{text}");
    }
}

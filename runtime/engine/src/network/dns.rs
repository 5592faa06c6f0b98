//! `/etc/resolv.conf` of a pod's containers, as the kubelet makes it.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;

use crate::types::{Dns, DnsOption, DnsPolicy, Network, PodSpec};

/// The host's own, and the one behind it where a stub on the loopback interface (systemd-resolved)
/// answers, which a pod does not reach.
const OF_HOST: &str = "/etc/resolv.conf";
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// Most of a file of the host that is read, in bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Most name servers that resolvers look at, and search domains that Kubernetes passes on.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;

/// Whom containers ask for names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Resolver {
    nameservers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

/// The file of a pod. Blocks for moments.
pub(crate) fn resolv_conf(spec: &PodSpec) -> String {
    let base = match (&spec.network, spec.dns.policy) {
        // Nobody can be reached.
        (Network::Loopback, _) | (_, DnsPolicy::None) => Resolver::default(),
        (Network::Cni(_) | Network::Netns(_), DnsPolicy::Default) => of_host(),
    };
    with_config(base, &spec.dns).to_string()
}

/// What the host asks, as far as a pod can ask it, too.
fn of_host() -> Resolver {
    let read = |path| {
        let mut text = String::new();
        let file = File::open(path)?;
        file.take(MAX_FILE).read_to_string(&mut text).map(|_| Resolver::parse(&text))
    };
    let own = read(OF_HOST).unwrap_or_else(|error| {
        tracing::warn!(%error, path = OF_HOST, "the pod has no name server from the host");
        Resolver::default()
    });
    let is_reached = |server: &String| !server.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    if !own.nameservers.is_empty() && !own.nameservers.iter().any(is_reached) {
        return read(BEHIND_STUB).unwrap_or_else(|_| {
            tracing::warn!(
                "the host's name server is on its loopback interface: no pod reaches it"
            );
            Resolver { nameservers: Vec::new(), ..own }
        });
    }
    Resolver { nameservers: own.nameservers.into_iter().filter(is_reached).collect(), ..own }
}

impl Resolver {
    fn parse(text: &str) -> Self {
        let mut resolver = Resolver::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => resolver.nameservers.extend(words.next()),
                // The last one counts.
                Some("search") => resolver.searches = words.collect(),
                Some("options") => resolver.options = words.collect(),
                _ => {}
            }
        }
        resolver
    }
}

/// Adds what the pod says itself.
fn with_config(base: Resolver, dns: &Dns) -> Resolver {
    let Dns { policy: _, nameservers, searches, options } = dns;
    let own = nameservers.iter().map(ToString::to_string);
    let mut resolver = Resolver {
        nameservers: unique(base.nameservers.into_iter().chain(own), MAX_NAMESERVERS),
        searches: unique(base.searches.into_iter().chain(searches.iter().cloned()), MAX_SEARCHES),
        options: base.options,
    };
    for DnsOption { name, value } in options {
        let of_name = |option: &String| option.split(':').next() == Some(name);
        resolver.options.retain(|option| !of_name(option));
        resolver.options.push(match value {
            Some(value) => format!("{name}:{value}"),
            None => name.clone(),
        });
    }
    resolver
}

/// The first of equals, and no more than so many.
fn unique(all: impl Iterator<Item = String>, most: usize) -> Vec<String> {
    let mut unique = Vec::new();
    for one in all {
        if !unique.contains(&one) && unique.len() < most {
            unique.push(one);
        }
    }
    unique
}

impl std::fmt::Display for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Resolver { nameservers, searches, options } = self;
        if !searches.is_empty() {
            writeln!(f, "search {}", searches.join(" "))?;
        }
        for server in nameservers {
            writeln!(f, "nameserver {server}")?;
        }
        if !options.is_empty() {
            writeln!(f, "options {}", options.join(" "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "# made by hand\nnameserver 10.0.0.53\nsearch old.example\n\
        search lan.example example\nnameserver fd00::53\noptions ndots:2 edns0\nsortlist x\n";

    #[test]
    fn a_file_of_a_host_is_read_and_written() {
        let resolver = Resolver::parse(HOST);
        let text = "search lan.example example\nnameserver 10.0.0.53\nnameserver fd00::53\n\
            options ndots:2 edns0\n";
        assert_eq!(resolver.to_string(), text);
        assert_eq!(Resolver::parse(text), resolver);
        assert_eq!(Resolver::default().to_string(), "");
    }

    #[test]
    fn what_the_pod_says_is_added_and_its_options_win() {
        let ip = |text: &str| text.parse::<IpAddr>().ok();
        let dns = Dns {
            policy: DnsPolicy::Default,
            nameservers: [ip("fd00::53"), ip("1.1.1.1"), ip("9.9.9.9")]
                .into_iter()
                .flatten()
                .collect(),
            searches: vec!["example".into(), "pod.example".into()],
            options: vec![
                DnsOption { name: "ndots".into(), value: Some("5".into()) },
                DnsOption { name: "rotate".into(), value: None },
            ],
        };
        let text = "search lan.example example pod.example\n\
            nameserver 10.0.0.53\nnameserver fd00::53\nnameserver 1.1.1.1\n\
            options edns0 ndots:5 rotate\n";
        assert_eq!(with_config(Resolver::parse(HOST), &dns).to_string(), text);
    }
}

//! Reads whom a pod's containers ask for names, and the names that they know without asking.

use std::net::IpAddr;

use super::names;
use super::pod::check;
use super::problem::Problems;
use super::view::View;
use crate::types::{Dns, DnsOption, DnsPolicy, HostAlias};

/// Most of each, as in Kubernetes, and most bytes of all search domains together.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCHES_LEN: usize = 2048;

/// Reads `dnsPolicy` and `dnsConfig`.
pub(super) fn read(spec: &View<'_>, problems: &mut Problems) -> Dns {
    let policies = [
        // There is no cluster whose name server would be first. What is left is the host's.
        ("ClusterFirst", DnsPolicy::Default),
        ("ClusterFirstWithHostNet", DnsPolicy::Default),
        ("Default", DnsPolicy::Default),
        ("None", DnsPolicy::None),
    ];
    let policy = spec.get("dnsPolicy").one_of(&policies, problems).unwrap_or_default();
    let config = spec.get("dnsConfig");
    let mut dns = Dns { policy, ..Dns::default() };
    if !config.is_object(problems) {
        return dns;
    }
    let servers = config.get("nameservers");
    let items = servers.items(problems);
    dns.nameservers = items.iter().filter_map(|v| read_ip(v, problems)).collect();
    if items.len() > MAX_NAMESERVERS {
        let count = items.len().to_string();
        servers.invalid(count, format!("must be at most {MAX_NAMESERVERS}"), problems);
    }
    if policy == DnsPolicy::None && servers.items(&mut problems.fork()).is_empty() {
        let reason = "must have a name server where dnsPolicy is None";
        servers.invalid("", reason, problems);
    }
    dns.searches = read_searches(&config.get("searches"), problems);
    for option in config.get("options").objects(problems) {
        let name = option.get("name");
        let text = name.required_text(problems).unwrap_or_default();
        check_word(&name, text, problems);
        let value = option.get("value");
        let value_text = value.text(problems);
        check_word(&value, value_text.unwrap_or_default(), problems);
        dns.options.push(DnsOption { name: text.into(), value: value_text.map(str::to_owned) });
    }
    dns
}

fn read_searches(view: &View<'_>, problems: &mut Problems) -> Vec<String> {
    let mut searches = Vec::new();
    for item in view.items(problems) {
        let Some(text) = item.required_text(problems) else { continue };
        // With a dot at its end it is a name from the root.
        let domain = text.strip_suffix('.').unwrap_or(text);
        if text != "." {
            check(&item, domain, names::subdomain, problems);
        }
        searches.push(text.to_owned());
    }
    let len: usize = searches.iter().map(|text| text.len().saturating_add(1)).sum();
    if searches.len() > MAX_SEARCHES || len > MAX_SEARCHES_LEN {
        let reason =
            format!("must be at most {MAX_SEARCHES}, of {MAX_SEARCHES_LEN} bytes together");
        view.invalid(searches.len().to_string(), reason, problems);
    }
    searches
}

/// Reads `hostAliases`.
pub(super) fn read_host_aliases(view: &View<'_>, problems: &mut Problems) -> Vec<HostAlias> {
    let mut aliases = Vec::new();
    for alias in view.objects(problems) {
        let ip = alias.get("ip");
        ip.require(problems);
        let names_view = alias.get("hostnames");
        let mut hostnames = Vec::new();
        for item in names_view.items(problems) {
            let Some(text) = item.required_text(problems) else { continue };
            check(&item, text, names::subdomain, problems);
            hostnames.push(text.to_owned());
        }
        if let Some(ip) = read_ip(&ip, problems)
            && !hostnames.is_empty()
        {
            aliases.push(HostAlias { ip, hostnames });
        }
    }
    aliases
}

/// An IP address.
pub(super) fn read_ip(view: &View<'_>, problems: &mut Problems) -> Option<IpAddr> {
    let text = view.text(problems)?;
    let ip = text.parse().ok();
    if ip.is_none() {
        view.invalid(text, "must be an IP address", problems);
    }
    ip
}

/// Notes what would be more than one word of a line.
fn check_word(view: &View<'_>, text: &str, problems: &mut Problems) {
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        view.invalid(text, "must not contain white space", problems);
    }
}

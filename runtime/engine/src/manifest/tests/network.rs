//! Ports of the host, name servers and aliases of manifests.

use super::*;

#[test]
fn what_a_pod_says_of_names_and_ports_is_read() {
    let pod = one(&container_with(
        "    ports: [{containerPort: 80, hostPort: 8080, hostIP: 127.0.0.1}, {containerPort: 81, \
         hostPort: 0, hostIP: ''}]\n  \
         dnsPolicy: None\n  \
         dnsConfig: {nameservers: [10.0.0.53, 'fd00::53'], searches: [a.example, b.example., .], \
         options: [{name: ndots, value: '2'}, {name: edns0}]}\n  \
         hostAliases: [{ip: 10.0.0.9, hostnames: [db, db.example]}]",
    ));
    let ports: Vec<_> =
        pod.containers[0].ports.iter().map(|port| (port.host_port, port.host_ip)).collect();
    assert_eq!(ports, [(Some(8080), "127.0.0.1".parse().ok()), (None, None)]);
    assert_eq!(pod.dns.policy, DnsPolicy::None);
    assert_eq!(pod.dns.nameservers.len(), 2);
    assert_eq!(pod.dns.searches, ["a.example", "b.example.", "."]);
    assert_eq!(pod.dns.options[0], DnsOption { name: "ndots".into(), value: Some("2".into()) });
    assert_eq!(pod.dns.options[1], DnsOption { name: "edns0".into(), value: None });
    let alias = HostAlias {
        ip: "10.0.0.9".parse().unwrap(),
        hostnames: vec!["db".into(), "db.example".into()],
    };
    assert_eq!(pod.host_aliases, [alias]);
    assert_eq!(one(&container_with("  dnsPolicy: ClusterFirst")).dns, Dns::default());
}

#[test]
fn what_cannot_be_a_name_server_or_a_port_is_named() {
    refused(
        &container_with(
            "    ports: [{containerPort: 80, hostPort: 70000, hostIP: here}]\n  \
             dnsPolicy: Else\n  \
             dnsConfig: {nameservers: [10.0.0, 1.1.1.1, 2.2.2.2, 3.3.3.3, 4.4.4.4], \
             searches: [a b], options: [{name: 'a b'}, {value: x}]}\n  \
             hostAliases: [{ip: x, hostnames: [A]}, {hostnames: [a]}]",
        ),
        &[
            "spec.containers[0].ports[0].hostPort: 70000: must be 0 to 65535",
            "spec.containers[0].ports[0].hostIP: here: must be an IP address",
            "spec.dnsPolicy: Else: must be one of: ClusterFirst, ClusterFirstWithHostNet, Default, None",
            "spec.dnsConfig.nameservers: 5: must be at most 3",
            "spec.dnsConfig.nameservers[0]: 10.0.0: must be an IP address",
            "spec.dnsConfig.searches[0]: a b: must be a DNS subdomain name: \
             at most 253 of a-z, 0-9, '-' and '.', every part beginning and ending with a \
             letter or a digit",
            "spec.dnsConfig.options[0].name: a b: must not contain white space",
            "spec.dnsConfig.options[1].name: required",
            "spec.hostAliases[0].ip: x: must be an IP address",
            "spec.hostAliases[0].hostnames[0]: A: must be a DNS subdomain name: \
             at most 253 of a-z, 0-9, '-' and '.', every part beginning and ending with a \
             letter or a digit",
            "spec.hostAliases[1].ip: required",
        ],
    );
}

#[test]
fn a_port_of_the_host_leads_to_one_place() {
    let two =
        "    ports: [{containerPort: 80, hostPort: 8080}, {containerPort: 81, hostPort: 8080}]";
    let complaints = complaints(&container_with(two));
    assert!(
        complaints[0].ends_with("another port of this pod has this hostPort"),
        "{complaints:?}"
    );
    one(&container_with(
        "    ports: [{containerPort: 80, hostPort: 53}, {containerPort: 80, hostPort: 53, protocol: UDP}]",
    ));
}

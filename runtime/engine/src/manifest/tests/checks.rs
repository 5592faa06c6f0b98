//! Probes, hooks, last words and deadlines of manifests.

use super::*;

#[test]
fn probes_have_the_defaults_of_an_api_server() {
    let container = &one(&container_with(
        "    ports: [{name: http, containerPort: 8080}]\n    \
         startupProbe: {exec: {command: [test, -e, /x]}, periodSeconds: 0}\n    \
         livenessProbe: {httpGet: {port: http, path: a b, httpHeaders: [{name: X-A, value: b}], \
         scheme: HTTPS, host: example.com}, \
         terminationGracePeriodSeconds: 5}\n    \
         readinessProbe: {grpc: {port: 9}, initialDelaySeconds: 1, periodSeconds: 2, \
         timeoutSeconds: 3, successThreshold: 4, failureThreshold: 5}",
    ))
    .containers[0];
    let defaults = Probe {
        check: Check::Exec(vec!["test".into(), "-e".into(), "/x".into()]),
        initial_delay_s: 0,
        period_s: 10,
        timeout_s: 1,
        success_threshold: 1,
        failure_threshold: 3,
        termination_grace_s: None,
    };
    assert_eq!(container.probes.startup.as_ref(), Some(&defaults));
    let get = HttpGet {
        scheme: Scheme::Https,
        host: "example.com".into(),
        port: 8080,
        path: "/a%20b".into(),
        headers: vec![("X-A".into(), "b".into())],
    };
    let liveness =
        Probe { check: Check::HttpGet(get), termination_grace_s: Some(5), ..defaults.clone() };
    assert_eq!(container.probes.liveness.as_ref(), Some(&liveness));
    let readiness = Probe {
        check: Check::Grpc { port: 9, service: String::new() },
        initial_delay_s: 1,
        period_s: 2,
        timeout_s: 3,
        success_threshold: 4,
        failure_threshold: 5,
        ..defaults
    };
    assert_eq!(container.probes.readiness.as_ref(), Some(&readiness));
}

#[test]
fn hooks_last_words_and_the_deadline_are_read() {
    let pod = one(&container_with(
        "    lifecycle: {postStart: {exec: {command: [a]}}, preStop: {sleep: {seconds: 3}}}\n    \
         terminationMessagePath: /tmp//words\n    \
         terminationMessagePolicy: FallbackToLogsOnError\n  activeDeadlineSeconds: 60",
    ));
    assert_eq!(pod.active_deadline_s, Some(60));
    let container = &pod.containers[0];
    let post_start = Hook::Check(Check::Exec(vec!["a".into()]));
    assert_eq!(container.lifecycle.post_start, Some(post_start));
    assert_eq!(container.lifecycle.pre_stop, Some(Hook::Sleep(3)));
    let message = TerminationMessage { path: "/tmp/words".into(), fall_back_to_logs: true };
    assert_eq!(container.termination_message, message);
    let plain = one(&container_with(""));
    assert_eq!(plain.containers[0].termination_message, TerminationMessage::default());
    assert_eq!(plain.containers[0].probes, Probes::default());
}

#[test]
fn what_a_cluster_would_refuse_is_refused() {
    refused(
        &container_with(
            "    livenessProbe: {successThreshold: 2, tcpSocket: {port: none}}\n    \
             readinessProbe: {terminationGracePeriodSeconds: 1, exec: {command: [a]}}\n    \
             startupProbe: {exec: {command: []}, httpGet: {port: 1}}\n    \
             lifecycle: {postStart: {}, preStop: {sleep: {seconds: 31}}}\n    \
             terminationMessagePath: words\n    terminationMessagePolicy: Log\n  \
             activeDeadlineSeconds: 0",
        ),
        &[
            "spec.containers[0].livenessProbe.successThreshold: 2: must be 1, unless for a readinessProbe",
            "spec.containers[0].livenessProbe.tcpSocket.port: none: this container has no port of this name",
            "spec.containers[0].readinessProbe.terminationGracePeriodSeconds: readinessProbe: it does not end the container",
            "spec.containers[0].startupProbe: startupProbe: must do one thing, not several",
            "spec.containers[0].lifecycle.postStart: postStart: does nothing: there is no exec or httpGet or the like",
            "spec.containers[0].lifecycle.preStop.sleep.seconds: 31: must be at most terminationGracePeriodSeconds, 30",
            "spec.containers[0].terminationMessagePath: words: must be an absolute path",
            "spec.containers[0].terminationMessagePolicy: Log: must be one of: File, FallbackToLogsOnError",
            "spec.activeDeadlineSeconds: 0: must be 1 to 2147483647",
        ],
    );
    refused(
        &pod_with(
            "  initContainers:\n  - {name: a, image: i, livenessProbe: {exec: {command: [a]}}}\n  \
             - {name: b, image: i, restartPolicy: Always, startupProbe: {tcpSocket: {port: 1}}}\n  \
             containers: [{name: c, image: i, \
             livenessProbe: {httpGet: {port: 443, scheme: https, host: 'example.com:443'}}, \
             lifecycle: {preStop: {tcpSocket: {port: 1}}}}]",
        ),
        &[
            "spec.initContainers[0].livenessProbe: init container: only init containers with restartPolicy: Always can have it",
            "spec.containers[0].livenessProbe.httpGet.scheme: https: must be one of: HTTP, HTTPS",
            "spec.containers[0].livenessProbe.httpGet.host: example.com:443: must be an address, or a name: letters, digits, '-' and '_' between dots",
            "spec.containers[0].lifecycle.preStop.tcpSocket: not supported yet",
        ],
    );
}

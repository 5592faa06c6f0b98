//! What a manifest says beside images and commands: configuration, probes, hooks, last words,
//! deadlines. The guest half of each test is its manifest. Few pods that do much each: a start takes
//! seconds on an emulated host.

use std::collections::BTreeMap;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use husk_cases::pods::{self, Finished, Husk};
use serde_json::Value;

/// Nothing here depends on a time; this only ends what hangs.
const LIMIT: Duration = Duration::from_secs(300);

/// Waits for a pod that must end by itself.
fn finish(mut child: Child) -> Result<Finished> {
    let deadline = Instant::now() + LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            let text = pods::finish(child)?.text;
            anyhow::bail!("the pod does not end:\n{text}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    pods::finish(child)
}

fn run(manifest: &str) -> Result<Finished> {
    finish(Husk::shared()?.start(manifest)?)
}

#[test]
fn the_example_of_configuration_succeeds() -> Result<()> {
    let pod = run(include_str!("../../../examples/config.yaml"))?.succeeded()?;
    assert_eq!(pod.log("main"), ["config has 64 MiB"], "{}", pod.text);
    Ok(())
}

/// Volumes of every kind in one pod, as a user without rights sees them.
const VOLUMES: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: c}
data: {a: "1", b: "2"}
binaryData: {z: AAH/}
---
apiVersion: v1
kind: Secret
metadata: {name: s}
data: {k: c2VjcmV0}
---
apiVersion: v1
kind: Pod
metadata: {name: case, uid: u-1, annotations: {note: 'x "y"'}}
spec:
  restartPolicy: Never
  securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000}
  containers:
  - name: main
    image: localhost/husk/busybox:test
    command:
    - sh
    - -c
    - |
      ls -A /all | sort | tr '\n' ' '; echo
      readlink /all/a
      stat -L -c '%a %g' /all/s/key /all/a
      cat /all/s/key; echo
      od -An -tx1 /config/z
      cat /all/note; echo
      cat /all/cpu /one; echo
      grep -E ' /(all|one) ' /proc/self/mountinfo | cut -d' ' -f5,6 | cut -d, -f1 | sort
      touch /scratch/x && stat -c %n /whole/sub/x
    resources: {limits: {cpu: 500m, memory: 64Mi}}
    volumeMounts:
    - {name: all, mountPath: /all}
    - {name: config, mountPath: /config}
    - {name: config, mountPath: /one, subPath: b}
    - {name: empty, mountPath: /scratch, subPath: sub}
    - {name: empty, mountPath: /whole}
  volumes:
  - {name: empty, emptyDir: {}}
  - {name: config, configMap: {name: c}}
  - name: all
    projected:
      defaultMode: 0444
      sources:
      - configMap: {name: c, items: [{key: a, path: a}]}
      - secret: {name: s, items: [{key: k, path: s/key, mode: 0400}]}
      - downwardAPI:
          items:
          - {path: note, fieldRef: {fieldPath: metadata.annotations}}
          - {path: cpu, resourceFieldRef: {containerName: main, resource: limits.cpu, divisor: 1m}}
"#;

#[test]
fn volumes_of_files_are_as_kubernetes_makes_them() -> Result<()> {
    let pod = run(VOLUMES)?.succeeded()?;
    let log = pod.log("main");
    let (names, rest) = log.split_first().context("it says nothing")?;
    ensure!(names.starts_with("..") && names.ends_with(" ..data a cpu note s "), "{names}");
    let expected = [
        "..data/a",
        "440 2000",
        "444 2000",
        "secret",
        " 00 01 ff",
        r#"note="x \"y\"""#,
        "5002",
        "/all ro",
        "/one ro",
        "/whole/sub/x",
    ];
    assert_eq!(rest, expected, "{}", pod.text);
    Ok(())
}

/// Three servers that three kinds of probes watch, and a client that ends it all. The first server
/// serves only its first run badly; so does the second. The third is not ready until it is told.
const PROBES: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 2
  volumes: [{name: state, emptyDir: {}}]
  initContainers:
  - name: web
    image: localhost/husk/busybox:test
    restartPolicy: Always
    volumeMounts: [{name: state, mountPath: /state}]
    command:
    - sh
    - -c
    - |
      echo run >> /state/web
      mkdir -p /www; echo ok > /www/first
      [ $(wc -l < /state/web) = 1 ] || echo ok > /www/alive
      exec httpd -f -p 8080 -h /www
    ports: [{name: http, containerPort: 8080}]
    startupProbe: {httpGet: {path: /first, port: http}, periodSeconds: 1, failureThreshold: 60}
    livenessProbe: {httpGet: {path: /alive, port: http}, periodSeconds: 1, timeoutSeconds: 30}
  - name: after
    image: localhost/husk/busybox:test
    command: [sh, -c, "wget -q -O - http://127.0.0.1:8080/first"]
  containers:
  - name: shell
    image: localhost/husk/busybox:test
    volumeMounts: [{name: state, mountPath: /state}]
    command:
    - sh
    - -c
    - |
      echo run >> /state/shell
      [ $(wc -l < /state/shell) = 1 ] || { cat /state/post; exit 0; }
      trap 'echo ended > /dev/termination-log; exit 5' TERM
      while :; do sleep 0.1; done
    livenessProbe:
      exec: {command: [sh, -c, "sleep 1000"]}
      periodSeconds: 1
      failureThreshold: 2
    lifecycle:
      # In the second run it is beside the command that reads what the first has written.
      postStart: {exec: {command: [sh, -c, "[ -e /state/post ] || echo from the hook > /state/post"]}}
      preStop: {exec: {command: [sh, -c, "echo from the other hook > /state/pre"]}}
  - name: last
    image: localhost/husk/busybox:test
    volumeMounts: [{name: state, mountPath: /state}]
    terminationMessagePolicy: FallbackToLogsOnError
    command:
    - sh
    - -c
    - |
      until [ -e /state/pre ] && [ $(wc -l < /state/web) -ge 2 ]; do sleep 0.1; done
      cat /state/pre
      # Only its last words count.
      [ -e /state/failed ] && exit 0
      touch /state/failed; echo the end of its output; exit 3
    readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
"#;

#[test]
fn probes_and_hooks_do_what_they_do_under_the_kubelet() -> Result<()> {
    let pod = run(PROBES)?.succeeded()?;
    assert_eq!(pod.log("after"), ["ok"], "{}", pod.text);
    // The server that answered 404 was ended and started again, and so was the shell whose probe
    // never answered.
    let restarts = |name: &str| pod.container(name)["restarts"].as_u64();
    assert!(restarts("web") >= Some(1), "{:#}", pod.report);
    assert_eq!(restarts("shell"), Some(1), "{:#}", pod.report);
    assert_eq!(pod.log("shell"), ["from the hook"], "{}", pod.text);
    assert!(pod.log("last").contains(&"from the other hook"), "{}", pod.text);
    assert_eq!(restarts("last"), Some(1), "{:#}", pod.report);
    Ok(())
}

/// A server of HTTPS whose certificate nobody knows, in a sidecar: the pod's container starts when its
/// startup probe has succeeded. What the server says of itself is in files.
const HTTPS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: https-probes}
spec:
  restartPolicy: OnFailure
  terminationGracePeriodSeconds: 2
  volumes:
  - {name: state, emptyDir: {}}
  - {name: tls, secret: {secretName: tls}}
  initContainers:
  - name: server
    image: localhost/husk/debian:test
    restartPolicy: Always
    volumeMounts: [{name: state, mountPath: /state}, {name: tls, mountPath: /tls}]
    ports: [{name: https, containerPort: 8443}]
    command:
    - python3
    - -c
    - |
      import http.server, os, ssl
      class Handler(http.server.BaseHTTPRequestHandler):
          def do_GET(self):
              is_well = os.path.exists("/state" + self.path)
              self.send_response(200 if is_well else 503)
              self.end_headers()
      # What a server has said of itself before its end is nothing that the next one says.
      for path in ["/started", "/ready", "/alive"]:
          open("/state" + path, "w").close()
      open("/state/runs", "a").write("run\n")
      context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
      context.load_cert_chain("/tls/certificate", "/tls/key")
      context.sni_callback = lambda _, name, __: name and open("/state/name", "w").write(name) and None
      server = http.server.ThreadingHTTPServer(("127.0.0.1", 8443), Handler)
      server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
      server.serve_forever()
    startupProbe:
      httpGet: {scheme: HTTPS, host: localhost, path: /started, port: https}
      periodSeconds: 1
      timeoutSeconds: 30
      failureThreshold: 300
    readinessProbe:
      httpGet: {scheme: HTTPS, path: /ready, port: https}
      periodSeconds: 1
      timeoutSeconds: 30
      failureThreshold: 1
    livenessProbe:
      httpGet: {scheme: HTTPS, path: /alive, port: https}
      periodSeconds: 1
      timeoutSeconds: 30
      failureThreshold: 1
  containers:
  - name: main
    image: localhost/husk/busybox:test
    volumeMounts: [{name: state, mountPath: /state}]
    command: [sh, -c, "cat /state/name; echo; until [ -e /state/enough ]; do sleep 0.1; done"]
---
apiVersion: v1
kind: Secret
metadata: {name: tls}
"#;

/// A Secret's data: a certificate of its own for a name that nobody uses, and its key.
fn certificate() -> Result<String> {
    let directory = tempfile::tempdir()?;
    let (key, certificate) = (directory.path().join("key"), directory.path().join("certificate"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-nodes", "-days", "3650", "-subj", "/CN=other.example", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output()
        .context("cannot run openssl")?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let texts = [
        ("key", std::fs::read_to_string(key)?),
        ("certificate", std::fs::read_to_string(certificate)?),
    ];
    Ok(format!("stringData: {}\n", serde_json::to_string(&BTreeMap::from(texts))?))
}

/// Looks at a pod that runs until what it shows of a container is as wanted.
fn until(
    husk: &Husk,
    (pod, container): (&str, &str),
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let output = husk.output(&["inspect", pod])?;
        // Until the pod is known there is no JSON, but an error, which is shown in the end.
        let all = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        let containers = all[0]["status"]["containers"].as_array().into_iter().flatten();
        if containers.into_iter().any(|one| one["name"] == container && wanted(one)) {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(Instant::now() < deadline, "never {what}: {text}{all:#}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_server_of_https_is_probed_as_by_the_kubelet() -> Result<()> {
    let husk = Husk::shared()?;
    let pod = "https-probes";
    let mut child = husk.start(&(HTTPS.to_owned() + &certificate()?))?;
    let server = (pod, "server");
    let looked_at = (|| {
        until(husk, server, "ready", |server| {
            server["started"] == true && server["ready"] == true
        })?;
        let exec = |script: &str| -> Result<()> {
            let output = husk.output(&["exec", "-c", "main", pod, "sh", "-c", script])?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        exec("rm /state/ready")?;
        until(husk, server, "unready", |server| {
            server["ready"] == false && server["restarts"] == 0
        })?;
        exec("touch /state/ready")?;
        until(husk, server, "ready again", |server| server["ready"] == true)?;
        exec("rm /state/alive")?;
        until(husk, server, "restarted", |server| {
            server["restarts"] == 1 && server["ready"] == true
        })?;
        exec("[ $(wc -l < /state/runs) = 2 ] && touch /state/enough")
    })();
    if looked_at.is_err() {
        // It would not end by itself.
        child.kill()?;
    }
    let pod = finish(child)?;
    looked_at.with_context(|| pod.text.clone())?;
    let pod = pod.succeeded()?;
    // The name that the startup probe told the server: that of its host.
    assert_eq!(pod.log("main"), ["localhost"], "{}", pod.text);
    Ok(())
}

#[test]
fn last_words_come_from_the_file_or_else_from_the_output() -> Result<()> {
    let container = |name: &str, script: &str, more: &str| {
        format!(
            "  - name: {name}\n    image: localhost/husk/busybox:test\n    \
             command: [sh, -c, '{script}']\n{more}"
        )
    };
    let fallback = "    terminationMessagePolicy: FallbackToLogsOnError\n";
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: case}}\nspec:\n  restartPolicy: Never\n  \
         containers:\n{}{}{}{}",
        container("file", "echo said > /dev/termination-log; exit 1", fallback),
        container("output", "echo one; echo two >&2; sleep 1; echo three; exit 1", fallback),
        container("good", "echo unsaid", fallback),
        container(
            "path",
            "echo elsewhere > /tmp/words",
            "    terminationMessagePath: /tmp/words\n"
        ),
    );
    let pod = run(&manifest)?;
    let message = |name: &str| pod.container(name)["message"].as_str().unwrap_or_default();
    assert_eq!(message("file"), "said\n", "{:#}", pod.report);
    assert!(message("output").ends_with("three\n"), "{:#}", pod.report);
    assert!(message("output").contains("one\n") && message("output").contains("two\n"));
    assert_eq!(message("good"), "");
    assert_eq!(message("path"), "elsewhere\n");
    Ok(())
}

#[test]
fn a_pod_that_takes_too_long_fails_for_that() -> Result<()> {
    // The time counts from the pod's own start, before there is a machine.
    let manifest = pods::shell("trap 'exit 0' TERM; while :; do sleep 0.1; done")
        .replace("  restartPolicy", "  activeDeadlineSeconds: 20\n  restartPolicy");
    let pod = run(&manifest)?;
    assert_eq!(pod.phase(), "Failed", "{}", pod.text);
    assert_eq!(pod.report["reason"], Value::from("DeadlineExceeded"), "{:#}", pod.report);
    Ok(())
}

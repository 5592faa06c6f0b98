//! The life of pods: order, restarts, sharing, ends. The guest half of each test is its manifest.

use anyhow::{Result, ensure};
use husk_cases::pods::{self, Husk};

#[test]
fn the_demo_succeeds() -> Result<()> {
    let manifest = include_str!("../../../examples/web.yaml");
    let pod = Husk::shared()?.run(manifest)?.succeeded()?;
    assert!(pod.log("client").contains(&"the page is right"), "{}", pod.text);
    assert_eq!(pod.exit_code("page"), Some(0));
    assert_eq!(pod.container("nginx")["kind"], "sidecar");
    let steps: Vec<&str> = pod.report["timeline"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|step| step["step"].as_str())
        .collect();
    assert!(steps.len() > 5, "{steps:?}");
    assert_ne!(pod.report["guestKernel"], pod.report["hostKernel"]);
    Ok(())
}

#[test]
fn exit_codes_and_signals_are_exact() -> Result<()> {
    let husk = Husk::shared()?;
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255)] {
        let pod = husk.run(&pods::shell(script))?;
        assert_eq!(pod.exit_code("main"), Some(code), "{}", pod.text);
        assert_eq!(pod.code, Some(i32::try_from(code)?));
    }
    // The shell is PID 1 of its namespace: only a child can die of a signal it sends itself. The
    // manifest makes one $ of two.
    let pod = husk.run(&pods::shell("sh -c 'kill -TERM $$$$'; exit $?"))?;
    assert_eq!(pod.exit_code("main"), Some(128 + 15), "{}", pod.text);
    Ok(())
}

#[test]
fn a_program_that_cannot_be_run_is_told_as_runc_tells_it() -> Result<()> {
    let husk = Husk::shared()?;
    let with_command = |command: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: case}}\nspec:\n  restartPolicy: Never\n  \
             containers:\n  - name: main\n    image: localhost/husk/busybox:test\n    command: {command}\n"
        )
    };
    let cases = [
        ("[no-such-program]", 127, "executable file not found in $PATH"),
        ("[/no/such/program]", 127, "no such file or directory"),
        ("[/etc/passwd]", 126, "permission denied"),
    ];
    for (command, code, words) in cases {
        let pod = husk.run(&with_command(command))?;
        assert_eq!(pod.phase(), "Failed", "{}", pod.text);
        assert_eq!(pod.exit_code("main"), Some(code), "{}", pod.report);
        assert_eq!(pod.container("main")["reason"], "StartError");
        let message = pod.container("main")["message"].as_str().unwrap_or_default();
        assert!(message.contains(words), "{message}");
        assert_eq!(pod.code, Some(i32::try_from(code)?));
    }
    // An executable for another architecture: an ELF header with machine 0xb7 (AArch64).
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  initContainers:
  - name: maker
    image: localhost/husk/busybox:test
    command:
    - sh
    - -c
    - |
      printf '\177ELF\2\1\1\0\0\0\0\0\0\0\0\0\2\0\267\0\1\0\0\0' > /data/arm; chmod +x /data/arm
    volumeMounts: [{name: data, mountPath: /data}]
  containers:
  - name: main
    image: localhost/husk/busybox:test
    command: [/data/arm]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"#;
    let pod = husk.run(manifest)?;
    assert_eq!((pod.exit_code("main"), pod.code), (Some(126), Some(126)), "{}", pod.text);
    let message = pod.container("main")["message"].as_str().unwrap_or_default();
    assert!(message.contains("exec format error"), "{message}");
    Ok(())
}

#[test]
fn init_containers_run_one_after_the_other_and_stop_the_pod_when_they_fail() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  initContainers:
  - name: one
    image: localhost/husk/busybox:test
    command: [sh, -c, 'sleep 1; echo one >> /data/order']
    volumeMounts: [{name: data, mountPath: /data}]
  - name: two
    image: localhost/husk/busybox:test
    command: [sh, -c, 'echo two >> /data/order; exit CODE']
    volumeMounts: [{name: data, mountPath: /data}]
  containers:
  - name: main
    image: localhost/husk/busybox:test
    command: [cat, /data/order]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"#;
    let husk = Husk::shared()?;
    let pod = husk.run(&manifest.replace("CODE", "0"))?.succeeded()?;
    assert_eq!(pod.log("main"), ["one", "two"]);
    let pod = husk.run(&manifest.replace("CODE", "3"))?;
    assert_eq!((pod.phase(), pod.exit_code("two"), pod.code), ("Failed", Some(3), Some(3)));
    assert_eq!(pod.container("main")["state"], "waiting", "{}", pod.report);
    Ok(())
}

#[test]
fn a_container_that_fails_is_restarted_on_failure() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: OnFailure
  containers:
  - name: main
    image: localhost/husk/busybox:test
    command: [sh, -c, 'echo run >> /data/runs; test $(wc -l < /data/runs) -ge 2']
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"#;
    let pod = Husk::shared()?.run(manifest)?.succeeded()?;
    assert_eq!(pod.container("main")["restarts"], 1);
    Ok(())
}

#[test]
fn containers_share_network_and_volumes_but_not_processes_and_files() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  hostname: shell
  containers:
  - name: server
    image: localhost/husk/busybox:test
    command: [sh, -c, 'echo private > /private; echo hi | nc -l -p 7000; echo served']
    volumeMounts: [{name: memory, mountPath: /shared}]
  - name: client
    image: localhost/husk/busybox:test
    command:
    - sh
    - -c
    - |
      until nc 127.0.0.1 7000 < /dev/null > /tmp/got 2>/dev/null; do sleep 0.2; done
      cat /tmp/got
      hostname
      test -e /private && echo "sees the other's files"
      ps -o comm | grep -qx nc && echo "sees the other's processes"
      mount | grep -q ' on /shared type tmpfs' && echo tmpfs
      exit 0
    volumeMounts: [{name: memory, mountPath: /shared}]
  volumes: [{name: memory, emptyDir: {medium: Memory, sizeLimit: 8Mi}}]
"#;
    let pod = Husk::shared()?.run(manifest)?.succeeded()?;
    assert_eq!(pod.log("client"), ["hi", "shell", "tmpfs"]);
    assert_eq!(pod.log("server"), ["served"]);
    Ok(())
}

#[test]
fn a_sidecar_runs_beside_and_ends_after_the_containers() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 20
  initContainers:
  - name: side
    image: localhost/husk/busybox:test
    restartPolicy: Always
    command: [sh, -c, 'trap "echo stopping; exit 0" TERM; echo up; while :; do sleep 0.2; done']
  containers:
  - name: main
    image: localhost/husk/busybox:test
    command: [sh, -c, 'sleep 1; echo done']
"#;
    let pod = Husk::shared()?.run(manifest)?.succeeded()?;
    assert_eq!(pod.log("side"), ["up", "stopping"]);
    let (main, side) = (pod.container("main"), pod.container("side"));
    ensure!(main["finishedAt"].as_str() <= side["finishedAt"].as_str(), "{}", pod.report);
    Ok(())
}

#[test]
fn the_manifest_reaches_the_process() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case, labels: {app: shell}}
spec:
  restartPolicy: Never
  securityContext: {runAsUser: 1000, runAsGroup: 2000, fsGroup: 3000, supplementalGroups: [4000]}
  containers:
  - name: main
    image: localhost/husk/busybox:test
    workingDir: /data
    env:
    - {name: GREETING, value: hello}
    - {name: WHOLE, value: '$(GREETING) $(NOBODY) $$(GREETING)'}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
    - {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    args: [sh, -c, 'echo "$WHOLE"; echo "$POD $APP $LIMIT $0"; id -u; id -g; id -G; pwd; touch f; stat -c %g f; grep CapEff /proc/self/status; touch /x || echo read-only; nproc', '$(GREETING)']
    resources: {limits: {cpu: 1500m, memory: 96Mi}}
    securityContext:
      readOnlyRootFilesystem: true
      capabilities: {drop: [ALL]}
    volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {}}]
"#;
    let pod = Husk::shared()?.run(manifest)?.succeeded()?;
    let log = pod.log("main");
    let stdout: Vec<&str> = log.iter().copied().filter(|l| !l.starts_with("touch:")).collect();
    let expected = [
        "hello $(NOBODY) $(GREETING)",
        "case shell 96 hello",
        "1000",
        "2000",
        "2000 3000 4000",
        "/data",
        "3000",
        "CapEff:\t0000000000000000",
        "read-only",
        "2",
    ];
    assert_eq!(stdout, expected, "{}", pod.text);
    Ok(())
}

#[test]
fn what_a_container_may_not_see_is_masked_and_a_privileged_one_sees_it() -> Result<()> {
    let script = "wc -c < /proc/keys; touch /proc/sys/vm/x /sys/x 2>/dev/null || echo sealed\n\
                  mount -t tmpfs none /tmp 2>/dev/null && echo mounted; ls /dev/vda 2>/dev/null; true";
    let husk = Husk::shared()?;
    let pod = husk.run(&pods::shell(script))?.succeeded()?;
    assert_eq!(pod.log("main"), ["0", "sealed"], "{}", pod.text);
    let more = "    securityContext: {privileged: true}";
    let script = "mount -t tmpfs none /tmp && echo mounted; grep CapEff /proc/self/status";
    let pod = husk.run(&pods::one("busybox", script, more))?.succeeded()?;
    assert_eq!(pod.log("main")[0], "mounted");
    assert_ne!(pod.log("main")[1], "CapEff:\t0000000000000000");
    Ok(())
}

#[test]
fn several_documents_are_several_pods() -> Result<()> {
    let two = format!(
        "{}---\n{}",
        pods::shell("echo first"),
        pods::shell("echo second; exit 4").replace("name: case", "name: other")
    );
    let pod = Husk::shared()?.run(&two)?;
    assert_eq!(pod.code, Some(1), "{}", pod.text);
    assert!(pod.text.contains("case/main") && pod.text.contains("other/main"), "{}", pod.text);
    Ok(())
}

#[test]
fn images_with_several_layers_and_a_user_run_their_own_program() -> Result<()> {
    let manifest = r#"
apiVersion: v1
kind: Pod
metadata: {name: case}
spec:
  restartPolicy: Never
  initContainers:
  - name: redis
    image: localhost/husk/redis:test
    restartPolicy: Always
  containers:
  - name: client
    image: localhost/husk/debian:test
    command:
    - python3
    - -c
    - |
      import socket, time
      while True:
          try:
              s = socket.create_connection(("127.0.0.1", 6379)); break
          except OSError:
              time.sleep(0.5)
      s.sendall(b"SET k husk\r\nGET k\r\n")
      got = b""
      while b"husk" not in got:
          got += s.recv(100)
      print("redis answers", got.decode().split()[-1])
"#;
    let pod = Husk::shared()?.run(manifest)?.succeeded()?;
    assert_eq!(pod.log("client"), ["redis answers husk"], "{}", pod.text);
    Ok(())
}

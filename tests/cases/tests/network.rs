//! Pods with networks, with the CNI plugins that Debian has, and with plugins that misbehave. Each
//! test has bridges, addresses and directories of its own: the network of the machine is shared.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cases::pods::{self, Finished, Husk};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long something that is on its way may take on a slow machine.
const PATIENCE: u32 = 600;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(program: &str, args: &str) -> Result<String> {
    let output = Command::new(program).args(args.split_whitespace()).output()?;
    ensure!(output.status.success(), "{program} {args}: {}", text(&output.stderr));
    Ok(text(&output.stdout))
}

/// A directory with configurations of CNI, plugins and leases, and how husk is told of it.
struct Place {
    husk: &'static Husk,
    root: tempfile::TempDir,
    /// In every name, so that tests do not meet.
    tag: &'static str,
}

impl Place {
    fn new(tag: &'static str) -> Result<Place> {
        let root = tempfile::tempdir()?;
        std::fs::create_dir(root.path().join("net.d"))?;
        std::fs::create_dir(root.path().join("bin"))?;
        Ok(Place { husk: Husk::shared()?, root, tag })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn configure(&self, network: &Value) -> Result<()> {
        Ok(std::fs::write(self.path("net.d/10-test.conflist"), network.to_string())?)
    }

    /// A plugin that is a script, and notes its calls.
    fn plugin(&self, name: &str, script: &str) -> Result<()> {
        let (path, log) = (self.path("bin").join(name), self.path("log"));
        let log = log.display();
        std::fs::write(&path, format!("#!/bin/sh\necho $CNI_COMMAND >> {log}\n{script}\n"))?;
        Ok(std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?)
    }

    fn calls(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.husk.command(args);
        command.env("NETCONFPATH", self.path("net.d")).env("CNI_PATH", self.path("bin"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self, args: &[&str], manifest: &str) -> Result<Child> {
        let mut child = self.command(args).spawn()?;
        child.stdin.take().context("no input")?.write_all(manifest.as_bytes())?;
        Ok(child)
    }

    /// Runs a pod in the foreground to its end.
    fn run(&self, network: &str, manifest: &str) -> Result<Finished> {
        pods::finish(self.start(&["run", "--output=json", "--network", network, "-"], manifest)?)
    }

    fn ok(&self, args: &[&str]) -> Result<String> {
        let output: Output = self.command(args).output()?;
        ensure!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        Ok(text(&output.stdout))
    }

    /// The uid of the pod of this name.
    fn uid(&self, pod: &str) -> String {
        format!("net-{}-{pod}", self.tag)
    }

    fn pod(&self, name: &str, script: &str, more: &str) -> String {
        let script = script.replace('\n', "\n      ");
        let (tag, uid) = (self.tag, self.uid(name));
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {tag}-{name}, uid: {uid}}}\nspec:\n  \
             restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n{more}  containers:\n  \
             - name: main\n    image: localhost/husk/busybox:test\n    \
             ports: [{{containerPort: 80, hostPort: {}}}]\n    \
             env:\n    - {{name: POD_IPS, valueFrom: {{fieldRef: {{fieldPath: status.podIPs}}}}}}\n    \
             command:\n    - sh\n    - -c\n    - |\n      {script}\n",
            if name == "server" { HOST_PORT } else { 0 }
        )
    }

    /// Starts a pod in the background.
    fn up(&self, network: &str, name: &str, script: &str, more: &str) -> Result<Pod<'_>> {
        let args = ["run", "-d", "--replace", "--network", network, "-"];
        let output = self.start(&args, &self.pod(name, script, more))?.wait_with_output()?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        Ok(Pod { place: self, name: format!("{}-{name}", self.tag) })
    }

    /// Fails if anything of a pod's network is left.
    fn nothing_left(&self, pod: &str) -> Result<()> {
        let uid = self.uid(pod);
        let netns = Path::new("/run/netns").join(format!("husk-{uid}"));
        ensure!(!netns.exists(), "{} is left", netns.display());
        let record = self.husk.state().join("network").join(format!("{uid}.json"));
        ensure!(!record.exists(), "{} is left", record.display());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains(&uid), "something is mounted:\n{mounts}");
        let leases = self.path(&format!("leases/{}", self.tag));
        for entry in std::fs::read_dir(leases).into_iter().flatten() {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            ensure!(name.parse::<IpAddr>().is_err(), "the lease {name} is left");
        }
        Ok(())
    }
}

/// A port that no other test of this machine uses.
const HOST_PORT: u16 = 48_081;

/// A pod in the background; removed when this is dropped.
struct Pod<'a> {
    place: &'a Place,
    name: String,
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.place.ok(&["rm", "-f", &self.name]) {
            eprintln!("{} stays: {error:#}", self.name);
        }
    }
}

impl Pod<'_> {
    fn status(&self) -> Result<Value> {
        let all: Value = serde_json::from_str(&self.place.ok(&["ps", "-a", "--output=json"])?)?;
        let all = all.as_array().context("no list")?.clone();
        all.into_iter().find(|pod| pod["name"] == self.name.as_str()).context("it is not listed")
    }

    fn addresses(&self) -> Result<Vec<IpAddr>> {
        let all = self.status()?["podIPs"].as_array().cloned().unwrap_or_default();
        all.iter().map(|ip| Ok(ip.as_str().context("no text")?.parse()?)).collect()
    }

    fn exec(&self, script: &str) -> Result<String> {
        self.place.ok(&["exec", &self.name, "--", "sh", "-c", script])
    }
}

/// What a server answers to an HTTP request from here, once it listens.
fn get(address: SocketAddr) -> Result<String> {
    let mut last = None;
    for _ in 0..PATIENCE {
        let asked =
            TcpStream::connect_timeout(&address, Duration::from_secs(10)).and_then(|mut s| {
                s.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
                let mut answer = String::new();
                s.read_to_string(&mut answer).map(|_| answer)
            });
        match asked {
            Ok(answer) if answer.contains("200 OK") => return Ok(answer),
            other => last = Some(format!("{other:?}")),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("{address} does not answer: {last:?}")
}

const SERVER: &str =
    "mkdir /www; echo this is $POD_IPS > /www/index.html; exec httpd -f -p '[::]:80' -h /www";

/// A bridge with both families of addresses, by Debian's plugins.
fn bridge(place: &Place, third: u8) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": place.tag,
        "plugins": [
            {"type": "bridge", "bridge": format!("hk{}", place.tag), "isGateway": true,
             "ipMasq": true, "hairpinMode": true, "mtu": 1400,
             "ipam": {"type": "host-local", "dataDir": place.path("leases"),
                      "ranges": [[{"subnet": format!("10.199.{third}.0/24")}],
                                 [{"subnet": format!("fd00:199:{third}::/64")}]],
                      "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": true}}]
    })
}

#[test]
fn pods_on_a_bridge_reach_each_other_and_the_host_and_leave_nothing() -> Result<()> {
    let place = Place::new("two")?;
    place.configure(&bridge(&place, 10))?;
    let more = "  hostAliases: [{ip: 10.199.10.1, hostnames: [the-host]}]\n  \
        dnsConfig: {nameservers: [10.199.10.1], searches: [pods.example], options: [{name: ndots, value: '3'}]}\n  \
        dnsPolicy: None\n";
    let server = place.up("default", "server", SERVER, more)?;
    let client = place.up("two", "client", "exec sleep 100000", more)?;
    let addresses = server.addresses()?;
    let [v4, v6] = addresses.as_slice() else { anyhow::bail!("{addresses:?}") };
    ensure!(v4.is_ipv4() && v6.is_ipv6(), "{addresses:?}");

    let said = get((*v4, 80).into())?;
    ensure!(said.contains(&format!("this is {v4},{v6}")), "{said}");
    get((*v6, 80).into())?;
    // By the host's port, on an address of the host that is not the loopback's.
    get(("10.199.10.1".parse::<IpAddr>()?, HOST_PORT).into())?;

    let from_pod = client.exec(&format!(
        "ping -c 3 -W 10 {v4} && ping -c 3 -W 10 {v6} && ping -c 1 -s 1372 -W 10 {v4} && \
         wget -qO- http://{v4}/ && wget -qO- http://[{v6}]/"
    ))?;
    ensure!(from_pod.matches("this is").count() == 2, "{from_pod}");
    let from_host = run("ping", &format!("-c 3 -W 10 {v4}"))?;
    ensure!(from_host.contains(" 3 received"), "{from_host}");

    let listener = TcpListener::bind("10.199.10.1:0")?;
    let port = listener.local_addr()?.port();
    let host = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(b"the host\n").map(|()| peer.ip())
    });
    let said = client.exec(&format!("nc the-host {port} < /dev/null"))?;
    ensure!(said == "the host\n", "{said}");
    let peer = host.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    ensure!(client.addresses()?.contains(&peer), "{peer}");

    let seen = client.exec("cat /etc/resolv.conf /etc/hosts; ip addr; ip route; ip -6 route")?;
    for words in [
        "search pods.example\nnameserver 10.199.10.1\noptions ndots:3\n",
        "10.199.10.1\tthe-host\n",
        "\ttwo-client\n",
        "eth0: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1400",
        "default via 10.199.10.1 dev eth0",
        "default via fd00:199:10::1 dev eth0",
    ] {
        ensure!(seen.contains(words), "{words:?} is missing:\n{seen}");
    }
    drop((server, client));
    place.nothing_left("server")?;
    place.nothing_left("client")?;
    run("ip", "link del hktwo").map(drop)
}

#[test]
fn names_are_asked_of_the_name_server_that_the_pod_is_told() -> Result<()> {
    let place = Place::new("dns")?;
    place.configure(&bridge(&place, 11))?;
    // A name server of one name: the answer is the question with an address behind it.
    let socket = std::net::UdpSocket::bind("0.0.0.0:53");
    let socket = socket.context("the port of name servers is taken")?;
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut question) {
            let mut answer = question[..len].to_vec();
            let is_a = question[..len].ends_with(&[0, 1, 0, 1]);
            answer[2] |= 0x84;
            answer[7] = u8::from(is_a);
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
            }
            if socket.send_to(&answer, from).is_err() {
                return;
            }
        }
    });
    let more = "  dnsPolicy: None\n  dnsConfig: {nameservers: [10.199.11.1]}\n";
    let pod = place.run("dns", &place.pod("asks", "nslookup some.example", more))?;
    ensure!(pod.text.contains("192.0.2.77"), "{}", pod.text);
    place.nothing_left("asks")?;
    run("ip", "link del hkdns").map(drop)
}

/// A network namespace that is not husk's.
struct Namespace(&'static str);

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run("ip", &format!("netns del {}", self.0)) {
            eprintln!("{error:#}");
        }
    }
}

#[test]
fn three_interfaces_of_a_namespace_that_is_there_are_the_guests() -> Result<()> {
    let place = Place::new("three")?;
    run("ip", "netns add hkthree")?;
    let _namespace = Namespace("hkthree");
    for (number, name, mtu) in [(21, "eth0", 1500), (22, "net1", 9000), (23, "storage", 1280)] {
        run(
            "ip",
            &format!("link add hk3o{number} mtu {mtu} type veth peer name {name} netns hkthree"),
        )?;
        run("ip", &format!("addr add 10.199.{number}.1/24 dev hk3o{number}"))?;
        run("ip", &format!("link set hk3o{number} up"))?;
        run("ip", &format!("-n hkthree addr add 10.199.{number}.2/24 dev {name}"))?;
        run("ip", &format!("-n hkthree link set {name} mtu {mtu} up"))?;
    }
    run("ip", "-n hkthree route add default via 10.199.21.1 dev eth0")?;
    run("ip", "-n hkthree route add 10.250.0.0/16 via 10.199.23.1 dev storage")?;
    let pod = place.up("/run/netns/hkthree", "pod", SERVER, "")?;
    ensure!(pod.addresses()?.len() == 3, "{:?}", pod.addresses());
    for number in [21, 22, 23] {
        get(SocketAddr::from(([10, 199, number, 2], 80)))?;
    }
    // Not one byte of it in fragments.
    let ping = run("ping", "-c 3 -W 10 -M do -s 8972 10.199.22.2")?;
    ensure!(ping.contains(" 3 received"), "{ping}");
    let seen = pod.exec("ip addr; ip route")?;
    for words in
        ["net1: ", "mtu 9000", "storage: ", "mtu 1280", "10.250.0.0/16 via 10.199.23.1 dev storage"]
    {
        ensure!(seen.contains(words), "{words:?} is missing:\n{seen}");
    }
    let checked = place.ok(&["check", &pod.name])?;
    ensure!(checked.contains("its network namespace /run/netns/hkthree is there"), "{checked}");
    drop(pod);
    place.nothing_left("pod")?;
    let links = run("ip", "-n hkthree -o link")?;
    ensure!(!links.contains("husk-tap"), "{links}");
    for name in ["eth0", "net1", "storage"] {
        let filters = run("tc", &format!("-n hkthree filter show dev {name} ingress"))?;
        ensure!(filters.is_empty(), "{filters}");
    }
    Ok(())
}

#[test]
fn a_guest_follows_what_changes_in_the_namespace() -> Result<()> {
    let place = Place::new("follow")?;
    run("ip", "netns add hkfollow")?;
    let _namespace = Namespace("hkfollow");
    run("ip", "link add hkfollow mtu 1400 type veth peer name eth0 netns hkfollow")?;
    run("ip", "addr add 10.199.24.1/24 dev hkfollow")?;
    run("ip", "link set hkfollow up")?;
    let inside = |args: &str| run("ip", &format!("-n hkfollow {args}"));
    inside("addr add 10.199.24.2/24 dev eth0")?;
    inside("link set eth0 mtu 1400 up")?;
    inside("route add default via 10.199.24.1")?;
    let pod = place.up("/run/netns/hkfollow", "pod", SERVER, "")?;
    let until = |script: &str, shall: &dyn Fn(&str) -> bool| {
        let mut seen = String::new();
        for _ in 0..PATIENCE {
            seen = pod.exec(script)?;
            if shall(&seen) {
                return Ok(());
            }
        }
        anyhow::bail!("{script}: {seen}")
    };

    inside("addr add 10.199.25.2/24 dev eth0")?;
    run("ip", "addr add 10.199.25.1/24 dev hkfollow")?;
    get(SocketAddr::from(([10, 199, 25, 2], 80)))?;
    inside("addr add fd00:199:24::2/64 dev eth0 nodad")?;
    inside("route replace default via 10.199.24.7")?;
    inside("route add 10.250.0.0/16 via 10.199.25.1")?;
    let routes = ["default via 10.199.24.7 dev eth0", "10.250.0.0/16 via 10.199.25.1 dev eth0"];
    until("ip route", &|seen| routes.iter().all(|route| seen.contains(route)))?;
    until("ip -6 addr", &|seen| seen.contains("fd00:199:24::2/64"))?;
    ensure!(!pod.exec("ip route")?.contains("10.199.24.1 "), "the old route is left");

    // Also beyond what it was at the start.
    run("ip", "link set hkfollow mtu 9000")?;
    inside("link set eth0 mtu 9000")?;
    until("ip link show eth0", &|seen| seen.contains("mtu 9000"))?;
    let ping = run("ping", "-c 3 -W 10 -M do -s 8972 10.199.24.2")?;
    ensure!(ping.contains(" 3 received"), "{ping}");

    inside("link set eth0 down")?;
    until("ip link show eth0", &|seen| !seen.contains(",UP"))?;
    inside("link set eth0 up")?;
    // A route goes with its interface, and somebody has to set it again.
    inside("addr del 10.199.25.2/24 dev eth0")?;
    until("ip addr show eth0", &|seen| seen.contains(",UP") && !seen.contains("10.199.25.2"))?;
    get(SocketAddr::from(([10, 199, 24, 2], 80))).map(drop)
}

#[test]
fn a_plugin_that_misbehaves_fails_the_pod_with_its_words_and_is_asked_to_take_back() -> Result<()> {
    let place = Place::new("bad")?;
    place
        .configure(&json!({"cniVersion": "1.0.0", "name": "bad", "plugins": [{"type": "bad"}]}))?;
    for (script, words) in [
        (
            r#"echo '{"cniVersion": "1.0.0", "code": 11, "msg": "no luck today", "details": "sorry"}'; exit 1"#,
            "no luck today; sorry (code 11)",
        ),
        ("echo this is no JSON", "its output is no JSON object; its output: \"this is no JSON\""),
        ("sleep 100000", "did not end within 5 s, and was killed"),
        ("exec yes", "wrote more than 1048576 bytes"),
    ] {
        place.plugin("bad", &format!("[ $CNI_COMMAND = DEL ] && exit 0\n{script}"))?;
        let manifest = place.pod("pod", "true", "");
        let mut child = place
            .command(&["run", "--output=json", "--network=default", "-"])
            .env("HUSK_CNI_TIMEOUT", "5")
            .spawn()?;
        child.stdin.take().context("no input")?.write_all(manifest.as_bytes())?;
        let pod = pods::finish(child)?;
        ensure!((pod.phase(), pod.code) == ("Failed", Some(125)), "{script}: {}", pod.text);
        let message = pod.report["message"].as_str().unwrap_or_default();
        ensure!(message.contains(words) && message.contains("\"bad\""), "{script}: {message}");
        ensure!(place.calls() == "ADD\nDEL\n", "{script}: {}", place.calls());
        std::fs::remove_file(place.path("log"))?;
        place.nothing_left("pod")?;
    }
    Ok(())
}

#[test]
fn networks_that_are_not_there_and_ports_that_cannot_be_are_refused() -> Result<()> {
    let place = Place::new("refuse")?;
    place.configure(
        &json!({"cniVersion": "1.0.0", "name": "plain", "plugins": [{"type": "bridge"}]}),
    )?;
    let server = place.pod("server", "true", "");
    let client = place.pod("client", "true", "");
    for (network, manifest, words) in [
        ("absent", &client, "there is no CNI network \"absent\""),
        ("/proc/self/ns/mnt", &client, "/proc/self/ns/mnt is no network namespace"),
        ("/nonexistent", &client, "cannot open the network namespace /nonexistent"),
        ("none", &server, "hostPort 48081 cannot lead to the pod: the pod has no network"),
        ("plain", &server, "no plugin of network \"plain\" has the capability portMappings"),
    ] {
        let pod = place.run(network, manifest)?;
        let message = pod.report["message"].as_str().unwrap_or_default();
        ensure!(
            pod.phase() == "Failed" && message.contains(words),
            "{network}: {message} {}",
            pod.text
        );
    }
    place.nothing_left("server")?;
    place.nothing_left("client")
}

#[test]
fn the_network_of_a_pod_whose_process_was_killed_is_taken_back() -> Result<()> {
    let place = Place::new("kill")?;
    place.configure(&bridge(&place, 12))?;
    let pod = place.up("default", "pod", "exec sleep 100000", "")?;
    let holder = pod.status()?["pid"].as_i64().context("no process")?;
    kill_process(Pid::from_raw(holder.try_into()?).context("PID 0")?, Signal::KILL)?;
    let netns = PathBuf::from("/run/netns").join(format!("husk-{}", place.uid("pod")));
    ensure!(netns.exists(), "it was taken back by nobody");
    for _ in 0..PATIENCE {
        if pod.status()?["running"] == false {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    place.ok(&["rm", &pod.name])?;
    std::mem::forget(pod);
    place.nothing_left("pod")?;
    run("ip", "link del hkkill").map(drop)
}

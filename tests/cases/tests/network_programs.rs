//! Programs that people use, over a pod's network: on one side in a pod, on the other on the host.
//! Those that the host does not have are taken out of the pod.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cases::background::{Pod, text};
use husk_cases::pods::Husk;
use serde_json::Value;

/// How often something that is on its way is looked for, and the pause between.
const PATIENCE: u32 = 600;
const PAUSE: Duration = Duration::from_millis(100);

/// How long an answer may take.
const STILL: Duration = Duration::from_secs(60);

/// What a program wrote that succeeded.
fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output()?;
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.success(), "{program} {args:?}: {} {out} {err}", output.status);
    Ok(out)
}

fn ip(args: &str) -> Result<String> {
    run("ip", &args.split_whitespace().collect::<Vec<_>>())
}

/// A network namespace with an interface whose other end is the host's, both with large packets.
struct Link {
    name: &'static str,
    third: u8,
}

impl Link {
    fn new(name: &'static str, third: u8) -> Result<Link> {
        ip(&format!("netns add {name}"))?;
        let link = Link { name, third };
        ip(&format!("link add {name} mtu 9000 type veth peer name eth0 netns {name}"))?;
        ip(&format!("addr add 10.199.{third}.1/24 dev {name}"))?;
        ip(&format!("addr add fd00:199:{third}::1/64 dev {name} nodad"))?;
        ip(&format!("link set {name} up"))?;
        ip(&format!("-n {name} addr add 10.199.{third}.2/24 dev eth0"))?;
        ip(&format!("-n {name} addr add fd00:199:{third}::2/64 dev eth0 nodad"))?;
        ip(&format!("-n {name} link set eth0 mtu 9000 up"))?;
        ip(&format!("-n {name} route add default via 10.199.{third}.1"))?;
        Ok(link)
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    fn guest(&self) -> String {
        format!("10.199.{}.2", self.third)
    }

    fn host(&self) -> String {
        format!("10.199.{}.1", self.third)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Err(error) = ip(&format!("netns del {}", self.name)) {
            eprintln!("{error:#}");
        }
    }
}

fn shell(pod: &Pod, script: &str) -> Result<String> {
    let output = pod.exec(&["--", "sh", "-c", script])?;
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    ensure!(output.status.success(), "{script}: {out} {err}");
    Ok(out)
}

/// Programs of a pod's first container, with their libraries, in a directory of the host.
struct Taken(tempfile::TempDir);

impl Taken {
    fn of(pod: &Pod, programs: &str) -> Result<Taken> {
        let script = format!(
            "for p in {programs}; do echo $p; ldd $p | grep -o '/[^ ]*'; done | sort -u | \
             tar -chf - -T - 2>/dev/null"
        );
        let output = pod.exec(&["--", "sh", "-c", &script])?;
        ensure!(output.status.success(), "{}", text(&output.stderr));
        let directory = tempfile::tempdir()?;
        let mut untar = Command::new("tar")
            .args(["-x", "-C"])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .spawn()?;
        untar.stdin.take().context("no input")?.write_all(&output.stdout)?;
        ensure!(untar.wait()?.success(), "the programs cannot be unpacked");
        Ok(Taken(directory))
    }

    fn run(&self, args: &str) -> Result<String> {
        let root = self.0.path().to_str().context("a path that is no text")?;
        let args: Vec<&str> = [root].into_iter().chain(args.split_whitespace()).collect();
        run("chroot", &args)
    }
}

/// What `iperf3` in the guest gets from here, or sends.
fn iperf(server: &str, more: &str) -> Result<()> {
    let args = format!("-c {server} -t 1 -J --connect-timeout 60000 {more}");
    let mut result = Value::Null;
    for _ in 0..PATIENCE {
        let output = Command::new("iperf3").args(args.split_whitespace()).output()?;
        result = serde_json::from_slice(&output.stdout)?;
        // Between two tests its server does not listen for a moment, or resets who came too early.
        if result["error"].is_null() || result["start"]["connected"][0].is_object() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    let end = &result["end"];
    let sum = if end["sum_received"].is_object() { &end["sum_received"] } else { &end["sum"] };
    let bytes = sum["bytes"].as_f64().unwrap_or_default();
    ensure!(result["error"].is_null() && bytes > 100_000.0, "{more}: {bytes} of {result:#}");
    Ok(())
}

fn until_listens(place: SocketAddr) -> Result<()> {
    for _ in 0..PATIENCE {
        if TcpStream::connect_timeout(&place, Duration::from_secs(10)).is_ok() {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
    anyhow::bail!("{place} does not listen")
}

/// A server on the host that says its own name to each who comes.
fn host_server(place: &str) -> Result<u16> {
    let listener = TcpListener::bind(place)?;
    let port = listener.local_addr()?.port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let answer = b"HTTP/1.0 200 OK\r\n\r\nthe host\n";
            // Whoever is gone is not of interest.
            drop(stream.read(&mut [0; 1024]).and_then(|_| stream.write_all(answer)));
        }
    });
    Ok(port)
}

/// Types of records.
const A: u8 = 1;
const TXT: u8 = 16;

/// A question for the records of NAME.example (RFC 1035, 4.1).
fn question(name: &str, kind: u8) -> Vec<u8> {
    // An identifier, that recursion is desired, one question.
    let mut message = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in [name, "example", ""] {
        message.extend(label.len().to_le_bytes().first());
        message.extend(label.bytes());
    }
    message.extend([0, kind, 0, 1]);
    message
}

/// Whether an answer has more than its transport carries.
fn is_cut(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|flags| flags & 2 != 0)
}

fn by_datagram(server: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(STILL))?;
    socket.send_to(question, server)?;
    let mut answer = vec![0; 4096];
    let length = socket.recv(&mut answer)?;
    answer.truncate(length);
    Ok(answer)
}

fn by_stream(server: SocketAddr, question: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server)?;
    stream.set_read_timeout(Some(STILL))?;
    stream.write_all(&u16::try_from(question.len())?.to_be_bytes())?;
    stream.write_all(question)?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

/// The records are one of an address, and one that is too long for a datagram of 512 bytes.
const TOOLS: &str = r#"
set -e
mkdir /www && head -c 3000000 /dev/urandom > /www/file && cd /www
python3 -m http.server 8080 --bind :: &
long=$(printf 'x%.0s' $(seq 250))
dnsmasq --no-resolv --no-hosts --user=root --address=/some.example/10.199.40.2 \
  --txt-record=long.example,$long,$long,$long,$long --edns-packet-max=512
iperf3 -s -D
exec sleep 100000
"#;

#[test]
fn programs_on_both_sides_of_a_pods_network() -> Result<()> {
    Husk::shared()?.import(&["network"])?;
    let link = Link::new("hkprog", 40)?;
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: programs}}\nspec:\n  \
         restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n  dnsPolicy: None\n  \
         dnsConfig: {{nameservers: [10.199.40.2]}}\n  containers:\n  \
         - name: tools\n    image: localhost/husk/network:test\n    \
         command:\n    - bash\n    - -c\n    - |\n{}\n    \
         resources: {{limits: {{cpu: '2', memory: 512Mi}}}}\n  \
         - name: nginx\n    image: localhost/husk/nginx:test\n  \
         - name: redis\n    image: localhost/husk/redis:test\n",
        TOOLS.lines().map(|line| format!("      {line}\n")).collect::<String>()
    );
    let pod = Pod::of("programs", &manifest, &["--replace", "--network", &link.path()])?;
    let guest = link.guest();
    for port in [80, 6379, 53] {
        until_listens(format!("{guest}:{port}").parse()?)?;
    }
    until_listens("[fd00:199:40::2]:8080".parse()?)?;
    let taken = Taken::of(&pod, "/usr/bin/wrk /usr/bin/redis-benchmark")?;

    for more in ["", "-R", "-P 8", "-u -b 20M"] {
        iperf(&guest, more)?;
    }
    iperf("fd00:199:40::2", "-6")?;

    let wrk = taken.run(&format!("/usr/bin/wrk -t1 -c16 -d3 --timeout 60 http://{guest}:80/"))?;
    ensure!(!wrk.contains("errors") && !wrk.contains("Non-2xx"), "{wrk}");
    let rate = wrk.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    ensure!(rate.context(wrk.clone())?.trim().parse::<f64>()? > 1.0, "{wrk}");

    let redis = format!("/usr/bin/redis-benchmark -h {guest} -n 2000 -c 20 -P 4 -t set,get --csv");
    let redis = taken.run(&redis)?;
    ensure!(["\"SET\",", "\"GET\","].iter().all(|test| redis.contains(test)), "{redis}");

    let sum = |text: String| text.split_whitespace().next().map(str::to_owned);
    let here = tempfile::NamedTempFile::new()?;
    let path = here.path().to_str().context("a path that is no text")?;
    run("curl", &["-gsSo", path, "http://[fd00:199:40::2]:8080/file"])?;
    ensure!(sum(run("sha256sum", &[path])?) == sum(shell(&pod, "sha256sum /www/file")?), "{path}");
    for (bind, url) in [("10.199.40.1", "10.199.40.1"), ("[fd00:199:40::1]", "[fd00:199:40::1]")] {
        let port = host_server(&format!("{bind}:0"))?;
        let said = shell(&pod, &format!("curl -gsS http://{url}:{port}/"))?;
        ensure!(said == "the host\n", "{said}");
    }

    for (family, size) in [("-4", "8972"), ("-6", "8952")] {
        let place = if family == "-4" { &guest } else { "fd00:199:40::2" };
        let args = [family, "-c", "3", "-W", "10", "-M", "do", "-s", size, place];
        let ping = run("ping", &args)?;
        ensure!(ping.contains(" 3 received"), "{ping}");
    }

    // By its name, which the pod asks of itself; over both transports, and over both in turn.
    let said = shell(&pod, "curl -sS http://some.example/")?;
    ensure!(said.contains("Welcome to nginx!"), "{said}");
    let server: SocketAddr = format!("{guest}:53").parse()?;
    let address = question("some", A);
    for answer in [by_datagram(server, &address)?, by_stream(server, &address)?] {
        ensure!(answer.ends_with(&[10, 199, 40, 2]) && !is_cut(&answer), "{answer:?}");
    }
    // What is too long for a datagram is cut there, and asked again by a stream.
    let texts = question("long", TXT);
    let (cut, whole) = (by_datagram(server, &texts)?, by_stream(server, &texts)?);
    ensure!(is_cut(&cut) && cut.len() <= 512, "{cut:?}");
    ensure!(!is_cut(&whole) && whole.len() > 1000, "{whole:?}");
    let said = shell(&pod, "dig long.example TXT +short +noedns")?;
    ensure!(said.matches("xxx\"").count() == 4, "{said}");
    Ok(())
}

/// What a service mesh's init container does: all that comes in goes to one port, all that goes out
/// to another, but for what the proxy itself sends, which is known by its user.
const RULES: &str = r#"
nft -f - <<EOF
table inet mesh {
  chain in {
    type nat hook prerouting priority dstnat;
    meta l4proto tcp tcp dport != { 15001, 15006 } redirect to :15006
  }
  chain out {
    type nat hook output priority -100;
    meta skuid 1337 return
    oifname lo return
    meta l4proto tcp redirect to :15001
  }
}
EOF
"#;

/// A proxy that says where a connection was to go.
const PROXY: &str = r#"
import socket, struct, threading
def serve(name, port):
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        peer, _ = listener.accept()
        meant = peer.getsockopt(socket.SOL_IP, 80, 16)
        port_meant, ip = struct.unpack("!2xH4s8x", meant)
        peer.recv(65536)
        text = f"{name} {socket.inet_ntoa(ip)}:{port_meant}\n"
        peer.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + text.encode())
        peer.close()
threading.Thread(target=serve, args=("in", 15006)).start()
serve("out", 15001)
"#;

#[test]
fn packets_are_redirected_inside_a_pod_as_a_service_mesh_does() -> Result<()> {
    Husk::shared()?.import(&["network"])?;
    let link = Link::new("hkmesh", 41)?;
    let indent = |script: &str| -> String {
        script.trim().lines().map(|line| format!("      {line}\n")).collect()
    };
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: mesh}}\nspec:\n  \
         restartPolicy: Never\n  terminationGracePeriodSeconds: 1\n  initContainers:\n  \
         - name: init\n    image: localhost/husk/network:test\n    \
         securityContext: {{capabilities: {{add: [NET_ADMIN]}}}}\n    \
         command:\n    - sh\n    - -c\n    - |\n{}  containers:\n  \
         - name: app\n    image: localhost/husk/network:test\n    \
         command: [sleep, '100000']\n  \
         - name: proxy\n    image: localhost/husk/debian:test\n    \
         securityContext: {{runAsUser: 1337}}\n    \
         command:\n    - python3\n    - -c\n    - |\n{}",
        indent(RULES),
        indent(PROXY),
    );
    let pod = Pod::of("mesh", &manifest, &["--replace", "--network", &link.path()])?;
    let (guest, host) = (link.guest(), link.host());
    until_listens(format!("{guest}:15006").parse()?)?;
    let port = host_server(&format!("{host}:0"))?;

    // To a port at which nobody listens.
    let said = run("curl", &["-sS", &format!("http://{guest}:8000/")])?;
    ensure!(said == format!("in {guest}:8000\n"), "{said}");
    let said = shell(&pod, &format!("curl -sS http://{host}:{port}/"))?;
    ensure!(said == format!("out {host}:{port}\n"), "{said}");
    let ask = format!(
        "import urllib.request as r; print(r.urlopen('http://{host}:{port}/').read().decode())"
    );
    let said = pod.exec(&["-c", "proxy", "--", "python3", "-c", &ask])?;
    ensure!(text(&said.stdout).contains("the host"), "{said:?}");
    // Nobody else may change that.
    let refused = pod.exec(&["--", "nft", "flush", "ruleset"])?;
    ensure!(!refused.status.success(), "{refused:?}");
    // Nor does the host see any of it.
    let rules = run("ip", &["netns", "exec", link.name, "nft", "list", "ruleset"])?;
    ensure!(rules.is_empty(), "{rules}");
    Ok(())
}

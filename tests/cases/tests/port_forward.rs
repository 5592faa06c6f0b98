//! Servers that listen on a guest's loopback interface only, reached from the host: by
//! `husk port-forward`, and by connections to `localhost` of the pod's network namespace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_cases::background::Pod;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// How often something that is on its way is looked for on a slow machine, and the pause between.
const PATIENCE: u32 = 600;
const PAUSE: Duration = Duration::from_millis(100);

/// How long a connection may stand still.
const STILL: Duration = Duration::from_secs(120);

const WHOLE: u16 = 7001;
const ECHO: u16 = 7002;
const ECHO_V6: u16 = 7003;
const NOBODY: u16 = 7009;

/// Servers: one that answers with all that it was told once that has an end, and one that answers
/// at once, on every loopback address.
const SERVERS: &str = r"use IO::Socket::IP; $SIG{CHLD} = 'IGNORE';
sub serve { my ($host, $port, $work) = @_; return if fork;
  my $l = IO::Socket::IP->new(LocalHost => $host, LocalPort => $port, Listen => 64,
    Type => SOCK_STREAM, ReuseAddr => 1) or die qq($host $port: $@);
  while (1) { my $s = $l->accept or next; if (!fork) { $work->($s); exit } } }
sub whole { my $s = shift; local $/; my $all = <$s>; print $s $all }
sub echo { my $s = shift; my $b; while (sysread($s, $b, 65536)) { syswrite($s, $b) } }
serve('127.0.0.1', 7001, \&whole); serve('0.0.0.0', 7002, \&echo); serve('::1', 7003, \&echo);
sleep 100000";

/// Starts a pod with the servers.
fn up(name: &'static str, network: &str) -> Result<Pod> {
    let script = SERVERS.replace('\n', "\n      ");
    let containers = format!(
        "  - name: main\n    image: localhost/husk/debian:test\n    command:\n    - perl\n    \
         - -e\n    - |\n      {script}\n"
    );
    Pod::up(name, &containers, &["--replace", "--network", network])
}

/// `husk port-forward`, killed when this is dropped.
struct Forward {
    child: Child,
    /// Where it listens for each remote port.
    from: Vec<(SocketAddr, u16)>,
}

impl Forward {
    /// Forwards free ports to these, and waits for the lines that say which, two for each.
    fn to(pod: &Pod, ports: &[u16]) -> Result<Forward> {
        let mut args = vec!["port-forward".to_owned(), pod.name.to_owned()];
        args.extend(ports.iter().map(|port| format!(":{port}")));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = pod.husk.command(&args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let mut from = Vec::new();
        for _ in 0..ports.len() * 2 {
            let line = lines.next().context("it ended")??;
            let places = line.strip_prefix("Forwarding from ").context(line.clone())?;
            let (local, remote) = places.split_once(" -> ").context(line.clone())?;
            from.push((local.parse()?, remote.parse()?));
        }
        // What it says of each connection is not of interest, but has to go somewhere.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Forward { child, from })
    }

    fn place(&self, ip: impl Into<IpAddr>, remote: u16) -> Result<SocketAddr> {
        let ip = ip.into();
        let found = self.from.iter().find(|(local, port)| local.ip() == ip && *port == remote);
        Ok(found.with_context(|| format!("{ip} {remote}: {:?}", self.from))?.0)
    }

    /// Its end, and what it complained of.
    fn end(mut self) -> Result<(Option<i32>, String)> {
        let status = self.child.wait()?;
        let mut text = String::new();
        self.child.stderr.take().context("no errors")?.read_to_string(&mut text)?;
        Ok((status.code(), text))
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill() {
            eprintln!("the command is left: {error}");
        }
    }
}

/// Bytes that repeat after a prime number of them.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 65_521 % 251) as u8).collect()
}

fn connect(place: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(place)?;
    stream.set_read_timeout(Some(STILL))?;
    stream.set_write_timeout(Some(STILL))?;
    Ok(stream)
}

/// A network namespace that is not husk's, with an interface.
struct Namespace(&'static str);

impl Namespace {
    fn new(name: &'static str) -> Result<Namespace> {
        let namespace = Namespace(name);
        Namespace::ip(&format!("netns add {name}"))?;
        Namespace::ip(&format!("-n {name} link set lo up"))?;
        Namespace::ip(&format!("link add {name} type veth peer name eth0 netns {name}"))?;
        Namespace::ip(&format!("-n {name} addr add 10.199.31.2/24 dev eth0"))?;
        Namespace::ip(&format!("-n {name} link set eth0 up"))?;
        Ok(namespace)
    }

    fn ip(args: &str) -> Result<()> {
        let output = Command::new("ip").args(args.split_whitespace()).output()?;
        ensure!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// A connection from within.
    fn connect(&self, place: SocketAddr) -> std::io::Result<TcpStream> {
        let file = std::fs::File::open(format!("/run/netns/{}", self.0))?;
        let enter = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            connect(place)
        };
        let connected = std::thread::spawn(enter).join();
        connected.map_err(|_| std::io::Error::other("the thread in it panicked"))?
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = Namespace::ip(&format!("netns del {}", self.0)) {
            eprintln!("{error:#}");
        }
    }
}

/// What a server answers to all of it.
fn ask(place: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    talk(connect(place)?, question)
}

fn talk(mut stream: TcpStream, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        let mut to = stream.try_clone()?;
        let writing = scope.spawn(move || {
            to.write_all(question)?;
            to.shutdown(Shutdown::Write)
        });
        let read = stream.read_to_end(&mut answer);
        writing.join().map_err(|_| std::io::Error::other("the writer panicked"))??;
        read.map(|_| answer)
    })
}

/// The same, once the server listens.
fn ask_soon(place: SocketAddr, question: &[u8]) -> Result<()> {
    let mut last = String::new();
    for _ in 0..PATIENCE {
        match ask(place, question) {
            Ok(answer) if answer == question => return Ok(()),
            other => last = format!("{other:?}"),
        }
        std::thread::sleep(PAUSE);
    }
    anyhow::bail!("{place} does not answer: {last}")
}

#[test]
fn ports_are_forwarded_to_the_loopback_interface_of_a_pod_without_a_network() -> Result<()> {
    let pod = up("forwarded", "none")?;
    let forward = Forward::to(&pod, &[WHOLE, ECHO, ECHO_V6, NOBODY])?;
    let (v4, v6) = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
    for remote in [WHOLE, ECHO, ECHO_V6] {
        ask_soon(forward.place(v4, remote)?, b"are you there?")?;
    }
    ask_soon(forward.place(v6, ECHO)?, b"by the other address")?;

    // All of it up, its end, and all of it down again; and both at the same time.
    let question = bytes(10 << 20);
    for remote in [WHOLE, ECHO] {
        let answer = ask(forward.place(v4, remote)?, &question)?;
        ensure!(answer == question, "{remote}: {} of {}", answer.len(), question.len());
    }
    many_at_once(forward.place(v4, ECHO)?)?;

    // One that nobody accepts is reset; the others go on.
    let refused = ask(forward.place(v4, NOBODY)?, b"nobody?");
    ensure!(!matches!(&refused, Ok(answer) if !answer.is_empty()), "{refused:?}");
    ask_soon(forward.place(v4, WHOLE)?, b"still there?")?;
    let pid = Pid::from_raw(forward.child.id().try_into()?).context("no process")?;
    kill_process(pid, Signal::INT)?;
    let (code, text) = forward.end()?;
    ensure!(code == Some(0), "{code:?}: {text}");
    let words = format!("-> {NOBODY}: connect to 127.0.0.1:{NOBODY}: Connection refused");
    ensure!(text.contains(&words), "{text}");

    let forward = Forward::to(&pod, &[ECHO])?;
    pod.ok(&["rm", "-f", pod.name])?;
    let (code, text) = forward.end()?;
    ensure!(code == Some(125) && text.contains("forwarded has ended"), "{code:?}: {text}");
    Ok(())
}

/// More connections than are carried at once, of which one reads nothing: it holds up no other.
fn many_at_once(place: SocketAddr) -> Result<()> {
    let mut stubborn = connect(place)?;
    stubborn.set_nonblocking(true)?;
    // Until nothing more is taken, anywhere on the way.
    let (piece, mut taken) = (bytes(64 << 10), 0);
    for _ in 0..PATIENCE {
        match stubborn.write(&piece) {
            Ok(count) => taken += count,
            Err(_) if taken > (1 << 20) => break,
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..70).map(|_| scope.spawn(|| ask(place, &bytes(20_000)))).collect();
        for one in asking {
            let answer = one.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
            ensure!(answer == bytes(20_000), "{} bytes", answer.len());
        }
        Ok(())
    })
}

#[test]
fn localhost_of_the_pods_network_namespace_is_the_guests() -> Result<()> {
    let namespace = Namespace::new("hklocal")?;
    let pod = up("localhosts", "/run/netns/hklocal")?;
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let ask = |ip: IpAddr, port: u16, question: &[u8]| {
        talk(namespace.connect((ip, port).into())?, question)
    };
    // On either address, whichever of the two the server has.
    let places = [(v4, WHOLE), (v4, ECHO), (v4, ECHO_V6), (v6, WHOLE), (v6, ECHO_V6)];
    for (ip, port) in places {
        let mut answer = ask(ip, port, b"are you there?");
        for _ in 0..PATIENCE {
            if matches!(&answer, Ok(answer) if answer == b"are you there?") {
                break;
            }
            std::thread::sleep(PAUSE);
            answer = ask(ip, port, b"are you there?");
        }
        ensure!(answer.as_deref().is_ok_and(|a| a == b"are you there?"), "{ip} {port}: {answer:?}");
    }
    let question = bytes(10 << 20);
    let answer = ask(v4, WHOLE, &question)?;
    ensure!(answer == question, "{} of {}", answer.len(), question.len());

    let mut nobody = namespace.connect((v4, NOBODY).into())?;
    let reset = nobody.read(&mut [0]);
    let is_reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
    ensure!(reset.as_ref().is_err_and(is_reset), "{reset:?}");
    pod.ok(&["rm", "-f", pod.name])?;
    let after = namespace.connect((v4, WHOLE).into());
    let is_refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    ensure!(after.as_ref().is_err_and(is_refused), "{after:?}");
    Ok(())
}

//! The handle and the driver against a stand-in for the VMM: a process of a shell script, and the
//! other end of the control socket in the test's hands.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use husk_vmm_api::{Event, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn server(dir: &Path, name: &str) -> FileServer {
    FileServer { program: script(name), dir: dir.to_owned() }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// A VM whose process is silent, and the VMM's end of its control socket (which blocks).
pub(crate) async fn vm_in_hand() -> (Vm, Channel) {
    let (ours, theirs) = Channel::pair().unwrap();
    // The process gets a socket too, but it is another.
    let (_, unused) = Channel::pair().unwrap();
    let process = process::spawn("vmm", &script("vmm-silent"), unused.into_fd()).await.unwrap();
    (Vm::drive(ours, process).unwrap(), theirs)
}

pub(crate) fn connection(vmm: &Channel, port: u32) -> std::os::unix::net::UnixStream {
    let (guest, host) = std::os::unix::net::UnixStream::pair().unwrap();
    let event = Event::VsockAccepted { port, guest_port: 9, fd: FdIndex(0) };
    vmm.send(&event, &[host.as_fd()]).unwrap();
    guest
}

#[tokio::test]
async fn the_vmm_gets_a_control_socket_at_3_and_nothing_else() {
    let vm = Vm::spawn(&script("vmm-inspects")).await.unwrap();
    match &*vm.exited().await {
        VmExit::Died { status: Some(status), stderr_tail } => {
            assert!(status.success(), "{status}: {stderr_tail}");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_vmm_that_is_killed_is_told_with_its_signal_and_last_words() {
    let vm = Vm::spawn(&script("vmm-killed")).await.unwrap();
    let exit = vm.exited().await.to_string();
    assert!(exit.contains("signal: 9"), "{exit}");
    assert!(exit.contains("last words"), "{exit}");
    assert!(matches!(vm.counters().await, Err(VmError::Ended(_))));
    assert!(matches!(vm.accept(1).connected().await, Err(VmError::Ended(_))));
}

#[tokio::test]
async fn a_vmm_that_does_not_exist_or_is_no_program_is_an_error() {
    assert!(matches!(Vm::spawn(Path::new("/nonexistent")).await, Err(VmError::NoVmm { .. })));
    assert!(matches!(Vm::spawn(Path::new("/etc/passwd")).await, Err(VmError::Spawn { .. })));
}

#[tokio::test]
async fn a_vmm_that_ignores_stop_is_killed() {
    let vm = Vm::spawn(&script("vmm-silent")).await.unwrap();
    tokio::time::pause();
    assert_eq!(*vm.kill().await, VmExit::Reported(Exit::Stopped));
}

#[tokio::test]
async fn dropping_the_last_handle_kills_the_process() {
    let vm = Vm::spawn(&script("vmm-silent")).await.unwrap();
    let (pid, mut exit) = (vm.pid(), vm.exit.clone());
    drop(vm);
    exit.wait_for(Option::is_some).await.unwrap();
    assert!(!Path::new("/proc").join(pid.to_string()).join("exe").exists());
}

#[tokio::test]
async fn boot_sends_the_configuration_with_every_descriptor() {
    let (vm, vmm) = vm_in_hand().await;
    let file = |text: &str| -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file.into()
    };
    let bucket = TokenBucketConfig { burst: 1 << 20, refill_per_second: 1 << 30 };
    let booted = vm.boot(VmSpec {
        vcpus: 2,
        memory_mib: 128,
        kvm: file("kvm"),
        kernel: file("kernel"),
        initramfs: file("initramfs"),
        console: file("console"),
        disks: vec![Disk { serial: "scratch".into(), image: file("disk"), read_only: false }],
        nics: vec![Nic {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 9000,
            taps: vec![file("tap queue 0"), file("tap queue 1")],
            rx_limit: RateLimit::default(),
            tx_limit: RateLimit { bytes: Some(bucket), operations: None },
        }],
        shares: Vec::new(),
        file_server: server(Path::new("/nonexistent"), "nonexistent"),
    });
    booted.await.unwrap();
    let mut boot = tokio::task::spawn_blocking(move || vmm.receive::<Request>().unwrap().unwrap())
        .await
        .unwrap();
    let Request::Boot(config) = boot.message.clone() else { panic!("{:?}", boot.message) };
    assert_eq!((config.vcpus, config.memory_mib), (2, 128));
    let mut text = |index| {
        let mut text = String::new();
        std::fs::File::from(boot.take_fd(index).unwrap()).read_to_string(&mut text).unwrap();
        text
    };
    assert_eq!(config.fs, None, "without a share there is no file system, and no server");
    assert_eq!(text(config.kvm), "kvm");
    assert_eq!(text(config.kernel), "kernel");
    assert_eq!(text(config.initramfs.unwrap()), "initramfs");
    assert_eq!(text(config.console.unwrap()), "console");
    assert_eq!(config.disks[0].serial, "scratch");
    assert_eq!(text(config.disks[0].fd), "disk");
    let nic = &config.nics[0];
    assert_eq!((nic.mac, nic.mtu), ([2, 0, 0, 0, 0, 1], 9000));
    assert_eq!(nic.rx_limit, RateLimit::default());
    assert_eq!(nic.tx_limit.bytes, Some(bucket));
    assert_eq!(nic.taps.len(), 2);
    assert_eq!(text(nic.taps[0]), "tap queue 0");
    assert_eq!(text(nic.taps[1]), "tap queue 1");
}

#[tokio::test]
async fn connections_go_to_who_waits_for_their_port_and_others_are_closed() {
    let (vm, vmm) = vm_in_hand().await;
    let (first, second) = (vm.accept(5), vm.accept(6));
    let mut stranger = connection(&vmm, 7);
    let mut guest = connection(&vmm, 6);
    let mut stream = second.connected().await.unwrap();
    stream.write_all(b"to the guest").await.unwrap();
    let mut text = [0; 12];
    guest.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"to the guest");
    assert_eq!(stranger.read(&mut text).unwrap(), 0, "closed");
    drop(first);
    assert!(lock(&vm.shared.accepts).is_empty());
    let mut late = connection(&vmm, 5);
    let again = vm.accept(6);
    connection(&vmm, 6).write_all(b"x").unwrap();
    assert_eq!(again.connected().await.unwrap().read_u8().await.unwrap(), b'x');
    assert_eq!(late.read(&mut text).unwrap(), 0, "interest was withdrawn");
}

#[tokio::test]
async fn a_registration_that_replaced_another_outlives_it() {
    let (vm, vmm) = vm_in_hand().await;
    let old = vm.accept(5);
    let new = vm.accept(5);
    drop(old);
    let _guest = connection(&vmm, 5);
    new.connected().await.unwrap();
}

#[tokio::test]
async fn what_was_reported_before_the_end_counts() {
    let (vm, vmm) = vm_in_hand().await;
    let exit = Exit::Panic { log_tail: "Oops".into() };
    vmm.send(&Event::Phase { phase: Phase::Kvm, at_ns: 17 }, &[]).unwrap();
    vmm.send(&Event::Phase { phase: Phase::Kvm, at_ns: 99 }, &[]).unwrap();
    vmm.send(&serde_json::json!("gibberish"), &[]).unwrap();
    vmm.send(&Event::Exited(exit.clone()), &[]).unwrap();
    drop(vmm);
    assert_eq!(*vm.exited().await, VmExit::Reported(exit));
    assert_eq!(vm.phases(), [(Phase::Kvm, 17)]);
}

#[tokio::test]
async fn the_vm_is_gone_only_when_its_process_is() {
    let (vm, vmm) = vm_in_hand().await;
    let process = Path::new("/proc").join(vm.pid().to_string());
    vmm.send(&Event::Exited(Exit::PowerOff), &[]).unwrap();
    vm.exited().await;
    assert!(process.join("exe").exists(), "the process sleeps, whatever was said in its name");
    tokio::time::pause(); // what the driver waits for is the grace period
    vm.gone().await;
    assert!(!process.exists());
    vm.gone().await;
}

#[tokio::test]
async fn counters_are_answered_to_who_asked() {
    let (vm, vmm) = vm_in_hand().await;
    let answer = std::thread::spawn(move || {
        assert_eq!(vmm.receive::<Request>().unwrap().unwrap().message, Request::Counters);
        let counters = Counters { io_exits_at_agent_ready: Some(3), ..Counters::default() };
        vmm.send(&Event::Counters(Box::new(counters)), &[]).unwrap();
        vmm
    });
    assert_eq!(vm.counters().await.unwrap().io_exits_at_agent_ready, Some(3));
    answer.join().unwrap();
}

#[tokio::test]
async fn answers_about_disks_go_to_who_asked() {
    let (vm, vmm) = vm_in_hand().await;
    let answers = std::thread::spawn(move || {
        let mut received = vmm.receive::<Request>().unwrap().unwrap();
        let Request::AddDisk { id, disk } = received.message.clone() else { panic!() };
        assert_eq!((disk.serial.as_str(), disk.read_only), ("data", true));
        received.take_fd(disk.fd).unwrap();
        vmm.send(&Event::DiskRemoved { id: id + 1 }, &[]).unwrap();
        vmm.send(&Event::DiskAdded { id, device: 9 }, &[]).unwrap();
        let message = vmm.receive::<Request>().unwrap().unwrap().message;
        let Request::RemoveDisk { id, serial } = message else { panic!("{message:?}") };
        let reason = format!("there is no {serial}");
        vmm.send(&Event::DiskRefused { id, reason }, &[]).unwrap();
        let _third = vmm.receive::<Request>().unwrap().unwrap();
        vmm.send(&Event::Exited(Exit::PowerOff), &[]).unwrap();
    });
    let image = tempfile::tempfile().unwrap().into();
    let disk = Disk { serial: "data".into(), image, read_only: true };
    assert_eq!(vm.add_disk(disk).await.unwrap(), 9);
    let refused = vm.remove_disk("other").await.unwrap_err();
    assert!(refused.to_string().ends_with("other: there is no other"), "{refused}");
    assert!(matches!(vm.remove_disk("data").await, Err(VmError::Ended(_))));
    answers.join().unwrap();
}

fn spec_with(shares: Vec<Share>, file_server: FileServer) -> VmSpec {
    let file = || tempfile::tempfile().unwrap().into();
    VmSpec {
        vcpus: 1,
        memory_mib: 128,
        kvm: file(),
        kernel: file(),
        initramfs: file(),
        console: file(),
        disks: Vec::new(),
        nics: Vec::new(),
        shares,
        file_server,
    }
}

fn share(path: &Path) -> Share {
    let path = rustix::fs::open(path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    Share { name: "data".into(), path, read_only: true }
}

/// The VMM's end of the file server's socket, and that of its control socket.
async fn files_of(vmm: Channel) -> (std::os::unix::net::UnixStream, Channel) {
    // The driver, on this thread, has to send it.
    let receive = move || (vmm.receive::<Request>().unwrap().unwrap(), vmm);
    let (mut boot, vmm) = tokio::task::spawn_blocking(receive).await.unwrap();
    let Request::Boot(config) = boot.message.clone() else { panic!("{:?}", boot.message) };
    let fs = config.fs.unwrap();
    assert_eq!(fs.tag, FS_TAG);
    (boot.take_fd(fs.socket).unwrap().into(), vmm)
}

#[tokio::test]
async fn a_file_server_is_lost_with_its_last_words_and_the_vm_lives_on() {
    let (vm, vmm) = vm_in_hand().await;
    let dir = tempfile::tempdir().unwrap();
    let spec = spec_with(vec![share(dir.path())], server(dir.path(), "fs-inspects"));
    vm.boot(spec).await.unwrap();
    let (_socket, vmm) = files_of(vmm).await;
    let event = Event::FileServerLost { reason: "it closed its connection".into() };
    vmm.send(&event, &[]).unwrap();
    // Time goes on: it is killed if it takes too long to end, which must not be before its words.
    let words = vm.file_server_lost().await;
    assert!(words.contains("signal: 9") && words.contains("last words"), "{words}");
    assert!(vm.exit.borrow().is_none());
    assert_eq!(vm.file_server_lost().await, words, "it is told again");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "the socket has no name left");
}

#[tokio::test]
async fn a_file_server_that_the_vmm_gives_up_is_killed() {
    let (vm, vmm) = vm_in_hand().await;
    let dir = tempfile::tempdir().unwrap();
    let spec = spec_with(vec![share(dir.path())], server(dir.path(), "vmm-silent"));
    vm.boot(spec).await.unwrap();
    vmm.send(&Event::FileServerLost { reason: "it lies".into() }, &[]).unwrap();
    tokio::time::pause();
    let words = vm.file_server_lost().await;
    assert!(words.contains("signal: 9") && words.contains("it lies"), "{words}");
}

#[tokio::test]
async fn the_file_server_ends_with_the_vm_and_is_not_a_loss_then() {
    let (vm, vmm) = vm_in_hand().await;
    let dir = tempfile::tempdir().unwrap();
    let spec = spec_with(vec![share(dir.path())], server(dir.path(), "vmm-silent"));
    vm.boot(spec).await.unwrap();
    assert!(*vm.shared.files.lives());
    vmm.send(&Event::Exited(Exit::PowerOff), &[]).unwrap();
    drop(vmm);
    vm.exited().await;
    tokio::time::pause();
    vm.gone().await;
    assert!(!*vm.shared.files.lives());
    let lost = tokio::time::timeout(Duration::from_secs(60), vm.file_server_lost());
    assert!(lost.await.is_err(), "there is nothing to tell");
}

#[tokio::test]
async fn a_file_server_that_does_not_exist_and_too_many_shares_are_errors() {
    let (vm, _vmm) = vm_in_hand().await;
    let dir = tempfile::tempdir().unwrap();
    let missing = spec_with(vec![share(dir.path())], server(dir.path(), "nonexistent"));
    assert!(matches!(vm.boot(missing).await, Err(VmError::NoFileServer { .. })));
    let many = (0..=MAX_SHARES).map(|_| share(dir.path())).collect();
    let many = spec_with(many, server(dir.path(), "vmm-silent"));
    assert!(matches!(vm.boot(many).await, Err(VmError::TooManyShares { shares: 97 })));
}

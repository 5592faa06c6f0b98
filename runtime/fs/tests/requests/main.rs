//! `husk-fs` before guests that send it FUSE requests of their own making, well-formed and not. What
//! stands between is the VMM's device, as in a VM, but no VM: the guest's driver is played here.
//!
//! Needs root, for the server's mount namespace: `--features root-tests`.

mod guest;
mod server;

use std::os::unix::fs::symlink;

use guest::{Guest, Outcome, name};
use server::Server;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const IOCTL: u32 = 39;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;

const ROOT: u64 = 1;

/// More memory than this the server never takes, in KiB, whatever it is sent: it is some megabytes for
/// itself, and a request of at most one.
const MAX_RESIDENT_KIB: u64 = 64 * 1024;

fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A server of one writable and one read-only share, and a guest that has said hello.
fn rig(dir: &std::path::Path) -> (Server, Guest) {
    std::fs::create_dir_all(dir.join("shared/sub")).unwrap();
    std::fs::write(dir.join("shared/file"), "text").unwrap();
    std::fs::write(dir.join("secret"), "secret").unwrap();
    symlink("../secret", dir.join("shared/link")).unwrap();
    let shared = dir.join("shared");
    let (server, socket) = Server::start(&[(&shared, false), (&shared, true)]);
    let mut guest = Guest::new(socket);
    guest.hello();
    (server, guest)
}

impl Guest {
    /// Looks a name up; its node, or the error.
    fn lookup(&mut self, parent: u64, text: &str) -> Result<u64, i32> {
        let reply = self.ask(LOOKUP, parent, &name(text))?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        let reply = self.ask(opcode, node, &u32s(&[flags.cast_unsigned(), 0]))?;
        Ok(u64::from_le_bytes(reply[..8].try_into().unwrap()))
    }

    fn write(&mut self, node: u64, handle: u64, bytes: &[u8]) -> Result<u32, i32> {
        let len = u32::try_from(bytes.len()).unwrap();
        let head = [u64s(&[handle, 0]), u32s(&[len, 0]), u64s(&[0]), u32s(&[0, 0])].concat();
        let reply = self.ask(WRITE, node, &[&head, bytes].concat())?;
        Ok(u32::from_le_bytes(reply[..4].try_into().unwrap()))
    }
}

#[test]
fn files_are_found_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, mut guest) = rig(dir.path());
    let share = guest.lookup(ROOT, "0").unwrap();
    let file = guest.lookup(share, "file").unwrap();
    let handle = guest.open(OPEN, file, libc::O_RDWR).unwrap();
    let read = [u64s(&[handle, 0]), u32s(&[100, 0]), u64s(&[0]), u32s(&[0, 0])].concat();
    assert_eq!(guest.ask(READ, file, &read).unwrap(), b"text");
    assert_eq!(guest.write(file, handle, b"from a guest"), Ok(12));
    let path = dir.path().join("shared/file");
    assert_eq!(std::fs::read_to_string(path).unwrap(), "from a guest");
}

#[test]
fn no_name_leads_out_of_a_share() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, mut guest) = rig(dir.path());
    let share = guest.lookup(ROOT, "0").unwrap();
    let sub = guest.lookup(share, "sub").unwrap();
    let link = guest.lookup(share, "link").unwrap();
    let outside = dir.path().join("secret").display().to_string();
    let up = "../".repeat(20);
    for (parent, text) in [
        (ROOT, "2"),
        (ROOT, "proc"),
        (ROOT, "etc"),
        (share, "../secret"),
        (share, &*outside),
        (sub, "../../secret"),
        (sub, &*format!("{up}{outside}")),
        (link, ""),
        (link, "x"),
    ] {
        let found = guest.lookup(parent, text);
        assert!(found.is_err(), "{parent} {text}: {found:?}");
    }
    // A symbolic link is not opened in the guest's stead.
    assert!(guest.open(OPEN, link, libc::O_RDONLY).is_err());
    // Nor is anything made above, or beside, a share.
    for (parent, text) in [(ROOT, "new"), (share, "../new"), (sub, "../../new"), (share, "/new")] {
        let made = guest.ask(MKDIR, parent, &[u32s(&[0o755, 0]), name(text)].concat());
        assert!(made.is_err(), "{parent} {text}");
    }
    assert!(!dir.path().join("new").exists());
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, mut guest) = rig(dir.path());
    let share = guest.lookup(ROOT, "1").unwrap();
    let file = guest.lookup(share, "file").unwrap();
    assert_eq!(guest.open(OPEN, file, libc::O_RDWR), Err(-libc::EROFS));
    let handle = guest.open(OPEN, file, libc::O_RDONLY).unwrap();
    assert!(guest.write(file, handle, b"x").is_err());
    let made = guest.ask(MKDIR, share, &[u32s(&[0o755, 0]), name("new")].concat());
    assert_eq!(made.err(), Some(-libc::EROFS));
    let attribute = [u32s(&[1, 0]), name("user.x"), b"v".to_vec()].concat();
    assert!(guest.ask(SETXATTR, file, &attribute).is_err());
}

#[test]
fn nothing_that_raises_rights_on_the_host_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, mut guest) = rig(dir.path());
    let share = guest.lookup(ROOT, "0").unwrap();
    let file = guest.lookup(share, "file").unwrap();
    let device = [u32s(&[libc::S_IFBLK | 0o666, 0x0801, 0, 0]), name("disk")].concat();
    assert_eq!(guest.ask(MKNOD, share, &device).err(), Some(-libc::EPERM));
    // A capability of the second revision: CAP_SYS_ADMIN, permitted and effective.
    let value = u32s(&[0x0200_0001, 1 << 21, 0, 0, 0]);
    let len = u32::try_from(value.len()).unwrap();
    let attribute = [u32s(&[len, 0]), name("security.capability"), value].concat();
    assert_eq!(guest.ask(SETXATTR, file, &attribute).err(), Some(-libc::EPERM));
}

/// Requests whose lengths lie, and what else no kernel sends. Each is answered by an error, or ends the
/// server; none hangs it or has it take memory.
#[test]
fn requests_that_lie_are_refused_or_end_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let huge = u32::MAX;
    let cases: Vec<(&str, u32, Vec<u8>)> = vec![
        ("a name without an end", LOOKUP, b"file".to_vec()),
        ("no name", LOOKUP, Vec::new()),
        ("a name with an end in it", LOOKUP, b"fi\0le\0".to_vec()),
        ("a name of a megabyte", LOOKUP, vec![b'n'; 1 << 20]),
        ("an attribute of 4 GiB", GETXATTR, [u32s(&[huge, 0]), name("user.x")].concat()),
        ("a list of 4 GiB", LISTXATTR, u32s(&[huge, 0])),
        ("a value that is not there", SETXATTR, [u32s(&[huge, 0]), name("user.x")].concat()),
        ("4 billion nodes to forget", BATCH_FORGET, u32s(&[huge, 0])),
        ("a cut-off header of a request", WRITE, vec![0; 7]),
        ("a write of 4 GiB", WRITE, [u64s(&[0, 0]), u32s(&[huge, 0, 0, 0, 0, 0])].concat()),
        ("a read of 4 GiB", READ, [u64s(&[0, 0]), u32s(&[huge, 0, 0, 0, 0, 0])].concat()),
        ("a directory of 4 GiB", READDIR, [u64s(&[0, 0]), u32s(&[huge, 0, 0, 0, 0, 0])].concat()),
        ("the same with nodes", READDIRPLUS, [u64s(&[0, 0]), u32s(&[huge; 6])].concat()),
        ("an ioctl", IOCTL, vec![0xff; 32]),
        ("an opcode that there is not", 4095, vec![0; 64]),
        ("a node that there is not", GETATTR, vec![0xff; 16]),
    ];
    for (what, opcode, body) in cases {
        let (server, mut guest) = rig(&dir.path().join(what));
        let node = guest.lookup(ROOT, "0").unwrap();
        let node = if opcode == GETATTR { 1 << 60 } else { node };
        for claimed in [None, Some(0), Some(39), Some(huge)] {
            let outcome = guest.send(opcode, node, &body, 4096, claimed);
            if let Outcome::Reply(reply) = &outcome {
                assert!(reply.error < 0 || opcode == BATCH_FORGET, "{what}: {reply:?}");
            }
            assert!(server.peak_kib() < MAX_RESIDENT_KIB, "{what}: {} KiB", server.peak_kib());
            if matches!(outcome, Outcome::Lost) {
                break;
            }
        }
    }
}

#[test]
fn replies_for_which_there_is_no_room_do_not_hang_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, mut guest) = rig(dir.path());
    for room in [0, 1, 15, 16, 100] {
        // Whatever comes of it, the request is given back.
        drop(guest.send(LOOKUP, ROOT, &name("0"), room, None));
        drop(guest.send(FORGET, ROOT, &[0; 8], room, None));
    }
}

/// Requests of random opcodes and bodies, among them many that are nearly right. Some end the server,
/// which is then started again, and that is what takes time.
#[test]
fn random_requests_leave_the_host_as_it_was() {
    const ROUNDS: u32 = 200;
    let dir = tempfile::tempdir().unwrap();
    let mut noise = guest::Noise::new(42);
    let mut lives = 0;
    let mut running: Option<(Server, Guest)> = None;
    for round in 0..ROUNDS {
        let (server, guest) = running.get_or_insert_with(|| {
            lives += 1;
            rig(&dir.path().join(lives.to_string()))
        });
        let opcode = u32::try_from(noise.below(53)).unwrap();
        // To forget its own nodes, and to say hello or farewell, is the guest's own affair.
        let opcode = if [2, 26, 38, 42].contains(&opcode) { OPENDIR } else { opcode };
        let node = noise.below(4);
        let body = noise.body();
        let outcome = guest.send(opcode, node, &body, 4096, None);
        assert!(server.peak_kib() < MAX_RESIDENT_KIB, "round {round}: {} KiB", server.peak_kib());
        if matches!(outcome, Outcome::Lost) {
            running = None;
        }
    }
    for life in 1..=lives {
        let secret = dir.path().join(life.to_string()).join("secret");
        assert_eq!(std::fs::read_to_string(secret).unwrap(), "secret");
    }
}

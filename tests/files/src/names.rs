//! Names: directories, links, special files.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, RenameFlags, mknodat, renameat_with};
use rustix::io::Errno;

use crate::Case;

pub(crate) const CASES: &[Case] = &[
    ("a rename replaces", renames),
    ("a rename that may not replace does not", no_replace),
    ("a directory that is not empty stays", not_empty),
    ("hard links are one file", hard_links),
    ("symbolic links hold their text", symbolic_links),
    ("every entry is listed once", listing),
    ("exclusive creation succeeds once", exclusive),
    ("long names are kept and longer ones refused", long_names),
    ("a socket connects", socket),
    ("a pipe carries", pipe),
    ("device nodes are refused", devices),
];

fn kind<T: std::fmt::Debug>(result: std::io::Result<T>) -> Result<ErrorKind> {
    match result {
        Ok(value) => bail!("it succeeded: {value:?}"),
        Err(error) => Ok(error.kind()),
    }
}

fn renames(dir: &Path) -> Result<()> {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::write(&from, "new")?;
    fs::write(&to, "old")?;
    let old = File::open(&to)?;
    fs::rename(&from, &to)?;
    ensure!(!from.exists() && fs::read_to_string(&to)? == "new", "not replaced");
    let mut text = String::new();
    (&old).read_to_string(&mut text)?;
    ensure!(text == "old", "who had it open has another file now");
    fs::create_dir(dir.join("sub"))?;
    fs::rename(&to, dir.join("sub/moved"))?;
    fs::rename(dir.join("sub"), dir.join("other"))?;
    ensure!(fs::read_to_string(dir.join("other/moved"))? == "new", "not moved");
    ensure!(kind(fs::rename(dir.join("other"), dir.join("other/in")))? == ErrorKind::InvalidInput);
    Ok(())
}

fn no_replace(dir: &Path) -> Result<()> {
    let (one, other) = (dir.join("one"), dir.join("other"));
    fs::write(&one, "1")?;
    fs::write(&other, "2")?;
    let refused = renameat_with(CWD, &one, CWD, &other, RenameFlags::NOREPLACE);
    ensure!(refused == Err(Errno::EXIST), "NOREPLACE: {refused:?}");
    renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).context("EXCHANGE")?;
    let texts = (fs::read_to_string(&one)?, fs::read_to_string(&other)?);
    ensure!(texts == ("2".to_owned(), "1".to_owned()), "{texts:?}");
    Ok(())
}

fn not_empty(dir: &Path) -> Result<()> {
    let sub = dir.join("sub");
    fs::create_dir(&sub)?;
    fs::write(sub.join("file"), "")?;
    ensure!(kind(fs::remove_dir(&sub))? == ErrorKind::DirectoryNotEmpty);
    ensure!(kind(fs::create_dir(&sub))? == ErrorKind::AlreadyExists);
    ensure!(kind(fs::remove_dir(sub.join("file")))? == ErrorKind::NotADirectory);
    ensure!(kind(fs::remove_file(sub.join("none")))? == ErrorKind::NotFound);
    Ok(())
}

fn hard_links(dir: &Path) -> Result<()> {
    let (one, other) = (dir.join("one"), dir.join("other"));
    fs::write(&one, "x")?;
    fs::hard_link(&one, &other)?;
    let (a, b) = (fs::metadata(&one)?, fs::metadata(&other)?);
    ensure!((a.ino(), a.nlink(), b.nlink()) == (b.ino(), 2, 2), "{a:?} {b:?}");
    fs::remove_file(&one)?;
    ensure!(fs::metadata(&other)?.nlink() == 1 && fs::read_to_string(&other)? == "x");
    Ok(())
}

fn symbolic_links(dir: &Path) -> Result<()> {
    fs::write(dir.join("file"), "text")?;
    symlink("file", dir.join("near"))?;
    symlink("/nonexistent/../far", dir.join("far"))?;
    symlink("loop", dir.join("loop"))?;
    ensure!(fs::read_to_string(dir.join("near"))? == "text", "not followed");
    ensure!(fs::read_link(dir.join("far"))? == Path::new("/nonexistent/../far"));
    ensure!(kind(fs::metadata(dir.join("far")))? == ErrorKind::NotFound);
    let looped = File::open(dir.join("loop")).map_err(|error| error.raw_os_error());
    ensure!(looped.err() == Some(Some(libc::ELOOP)), "a loop");
    Ok(())
}

fn listing(dir: &Path) -> Result<()> {
    for number in 0..600 {
        File::create(dir.join(format!("an entry with a name of some length {number}")))?;
    }
    let listed: Vec<_> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    let unique: BTreeSet<_> = listed.iter().collect();
    ensure!((listed.len(), unique.len()) == (600, 600), "{} {}", listed.len(), unique.len());
    Ok(())
}

fn exclusive(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    File::create_new(&path)?;
    ensure!(kind(File::create_new(&path))? == ErrorKind::AlreadyExists);
    symlink("nowhere", dir.join("link"))?;
    ensure!(kind(File::create_new(dir.join("link")))? == ErrorKind::AlreadyExists);
    Ok(())
}

fn long_names(dir: &Path) -> Result<()> {
    let longest = "n".repeat(255);
    fs::write(dir.join(&longest), "x")?;
    ensure!(fs::read_to_string(dir.join(&longest))? == "x");
    let longer = File::create(dir.join(longest + "n")).map_err(|error| error.raw_os_error());
    ensure!(longer.err() == Some(Some(libc::ENAMETOOLONG)), "256 bytes");
    let strange = std::ffi::OsStr::new("two words\n\u{1F980}");
    fs::write(dir.join(strange), "x")?;
    ensure!(fs::metadata(dir.join(strange))?.len() == 1);
    Ok(())
}

fn socket(dir: &Path) -> Result<()> {
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path).context("bind")?;
    ensure!(fs::metadata(&path)?.file_type().is_socket(), "no socket");
    let mut client = UnixStream::connect(&path).context("connect")?;
    client.write_all(b"hello")?;
    let (mut server, _) = listener.accept()?;
    let mut text = [0; 5];
    server.read_exact(&mut text)?;
    ensure!(&text == b"hello", "{text:?}");
    Ok(())
}

fn pipe(dir: &Path) -> Result<()> {
    let path = dir.join("pipe");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).context("mkfifo")?;
    let mut both = File::options().read(true).write(true).open(&path)?;
    both.write_all(b"hello")?;
    let mut text = [0; 5];
    both.read_exact(&mut text)?;
    ensure!(&text == b"hello", "{text:?}");
    Ok(())
}

fn devices(dir: &Path) -> Result<()> {
    let device = rustix::fs::makedev(7, 0);
    let made = mknodat(CWD, dir.join("device"), FileType::BlockDevice, Mode::RUSR, device);
    // A file system of the guest's own makes one, a share does not.
    ensure!(matches!(made, Ok(()) | Err(Errno::PERM)), "{made:?}");
    Ok(())
}

//! `husk cp`: files between here and containers.
//!
//! What comes out of a container is made by a guest that may be hostile: it is unpacked without
//! following any symbolic link (`husk_archive::unpack`).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use husk_archive::pack::pack;
use husk_archive::unpack::{Options, unpack};
use husk_engine::holder::client::messages::copy_in_request::Message;
use husk_engine::holder::client::messages::{CopyInRequest, CopyInStart, CopyOutRequest};
use husk_engine::holder::client::{Code, Status};
use husk_engine::holder::record::Found;
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Pods, block_on, connect, container, refusal};
use crate::args::Global;

/// How many pieces wait to be sent or unpacked.
const QUEUE: usize = 4;

/// Size of a piece, in bytes.
const PIECE: usize = 32 * 1024;

/// Copy files and directories between here and a container
///
/// One of the two is POD:PATH; the path in the container is absolute. If the target is a directory,
/// the copy is made in it under its own name, else under the target's name, in a directory that
/// exists. Directories are copied with all that is in them. What is there of the same name is
/// replaced; directories are merged.
///
/// In the container the files belong to its root; here, to whoever copies them. Symbolic links are
/// copied as links, and not followed when they are in the way; a link that is named itself is followed
/// in the container and copied as a link from here. Hard links become files of their own. Sockets,
/// pipes and devices are left out.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    husk cp web:/etc/nginx/nginx.conf .\n  \
    husk cp ./site web:/usr/share/nginx/html\n  \
    husk cp -c nginx team/web:/var/log /tmp/logs")]
pub(crate) struct CpArgs {
    /// In this container [default: the first one]
    #[arg(short, long, value_name = "NAME")]
    container: Option<String>,
    /// What to copy: PATH or POD:PATH
    #[arg(value_name = "SOURCE")]
    from: String,
    /// Where to: PATH or POD:PATH
    #[arg(value_name = "TARGET")]
    to: String,
}

/// One end of a copy.
enum Place<'a> {
    Here(&'a Path),
    InPod(&'a str, &'a str),
}

/// Understands `POD:PATH`. As for scp, what has a slash before its first colon is a path here,
/// unless that slash parts a namespace from a name and the path behind the colon is absolute.
fn place(text: &str) -> Place<'_> {
    match text.split_once(':') {
        Some((pod, path)) if is_pod(pod) && (!pod.contains('/') || path.starts_with('/')) => {
            Place::InPod(pod, path)
        }
        _ => Place::Here(Path::new(text)),
    }
}

fn is_pod(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
    };
    match name.split_once('/') {
        Some((namespace, name)) => part(namespace) && part(name),
        None => part(name),
    }
}

pub(crate) fn run(global: &Global, args: &CpArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let named = args.container.as_deref();
    match (place(&args.from), place(&args.to)) {
        (Place::InPod(pod, path), Place::Here(target)) => {
            let found = pods.find(pod)?;
            copy_out(found, container(found, named)?, path, target)?;
        }
        (Place::Here(source), Place::InPod(pod, path)) => {
            let found = pods.find(pod)?;
            copy_in(found, container(found, named)?, source, path)?;
        }
        _ => anyhow::bail!("one of source and target must be POD:PATH, and the other a path here"),
    }
    Ok(ExitCode::SUCCESS)
}

/// A directory and a name in it.
fn split(path: &Path) -> anyhow::Result<(PathBuf, &OsStr)> {
    let name = path.file_name().with_context(|| format!("{} has no name", path.display()))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new(".")).to_owned(), name))
}

/// Takes something out of a container.
fn copy_out(found: &Found, container: &str, path: &str, target: &Path) -> anyhow::Result<()> {
    let (directory, rename) = if target.is_dir() {
        (target.to_owned(), None)
    } else {
        let (parent, name) = split(target)?;
        (parent, Some(name.to_owned()))
    };
    let directory = File::open(&directory)
        .with_context(|| format!("cannot open the directory {}", directory.display()))?;
    let (to, pieces) = mpsc::channel(QUEUE);
    let unpacking = std::thread::Builder::new().name("unpack".into()).spawn(move || {
        let options = Options { owners: false, rename: rename.as_deref() };
        let from = BufReader::with_capacity(PIECE, Pieces { pieces, rest: Vec::new() });
        unpack(directory.as_fd(), from, options)
    })?;
    let request = CopyOutRequest { container: container.to_owned(), path: path.to_owned() };
    let carried: anyhow::Result<Option<Status>> = block_on(async {
        let mut pod = connect(found).await?;
        let mut answers = match pod.copy_out(request).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => return Ok(Some(status)),
        };
        loop {
            match answers.message().await {
                Ok(Some(piece)) => {
                    if to.send(piece.data).await.is_err() {
                        // It is not taken any more: the thread says why.
                        break;
                    }
                }
                Ok(None) => break,
                Err(status) => {
                    drop(to);
                    return Ok(Some(status));
                }
            }
        }
        drop(to);
        Ok(None)
    });
    let unpacked = unpacking.join().map_err(|_| anyhow::anyhow!("the unpacking was cut off"))?;
    // Why the archive broke off is the better reason than that it did.
    if let Some(status) = carried? {
        return Err(refusal(status));
    }
    unpacked.context("cannot unpack what came from the container")?;
    Ok(())
}

/// The pieces of an archive as a stream.
struct Pieces {
    pieces: mpsc::Receiver<Vec<u8>>,
    /// What was not read of the last one.
    rest: Vec<u8>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.rest = piece,
                None => return Ok(0),
            }
        }
        let n = self.rest.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(self.rest.drain(..n)) {
            *to = from;
        }
        Ok(n)
    }
}

/// Brings something into a container: into the directory that the path is, or else under its name
/// into the directory above.
fn copy_in(found: &Found, container: &str, source: &Path, path: &str) -> anyhow::Result<()> {
    anyhow::ensure!(path.starts_with('/'), "{path:?}: a path in a container must be absolute");
    // A link is copied as such; with a slash behind it, what it leads to.
    let follow = source.as_os_str().as_bytes().ends_with(b"/");
    let flags = if follow { OFlags::empty() } else { OFlags::NOFOLLOW };
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let open = || -> anyhow::Result<OwnedFd> {
        rustix::fs::open(source, flags, Mode::empty())
            .with_context(|| format!("cannot open {}", source.display()))
    };
    let absolute = std::path::absolute(source)?;
    let own_name = absolute.file_name().unwrap_or(OsStr::new("root")).to_owned();
    match send(found, container, path, open()?, own_name.as_bytes())? {
        Ok(()) => return Ok(()),
        Err(status) if matches!(status.code(), Code::NotFound | Code::FailedPrecondition) => {
            // No directory: a name in one, unless it says otherwise.
            let (parent, name) = path.rsplit_once('/').unwrap_or_default();
            if name.is_empty() || matches!(name, "." | "..") {
                return Err(refusal(status));
            }
            let parent = if parent.is_empty() { "/" } else { parent };
            send(found, container, parent, open()?, name.as_bytes())?.map_err(refusal)?;
        }
        Err(status) => return Err(refusal(status)),
    }
    Ok(())
}

/// Sends an archive into a directory of a container.
fn send(
    found: &Found,
    container: &str,
    path: &str,
    source: OwnedFd,
    name: &[u8],
) -> anyhow::Result<Result<(), Status>> {
    let (to, requests) = mpsc::channel(QUEUE);
    let start = CopyInStart { container: container.to_owned(), path: path.to_owned() };
    to.try_send(CopyInRequest { message: Some(Message::Start(start)) })?;
    let name = name.to_owned();
    let packing = std::thread::Builder::new().name("pack".into()).spawn(move || {
        let to = BufWriter::with_capacity(PIECE, Requests(to));
        pack(source.as_fd(), &name, Some((0, 0)), to)
    })?;
    let answer = block_on(async {
        let mut pod = connect(found).await?;
        Ok(pod.copy_in(ReceiverStream::new(requests)).await)
    })?;
    let packed = packing.join().map_err(|_| anyhow::anyhow!("the packing was cut off"))?;
    match (answer, packed) {
        // The archive is whole here; what went wrong, went wrong there.
        (Err(status), Ok(_)) => Ok(Err(status)),
        // It is not taken any more: the other side says why.
        (Err(status), Err(husk_archive::pack::PackError::Write(_))) => Ok(Err(status)),
        (_, Err(error)) => Err(error).context("cannot read what is to be copied"),
        (Ok(_), Ok(_)) => Ok(Ok(())),
    }
}

/// A stream as requests.
struct Requests(mpsc::Sender<CopyInRequest>);

impl Write for Requests {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = bytes.get(..PIECE).unwrap_or(bytes);
        let message = Some(Message::Data(piece.to_vec()));
        match self.0.blocking_send(CopyInRequest { message }) {
            Ok(()) => Ok(piece.len()),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let pod = |text: &str| match place(text) {
            Place::InPod(pod, path) => Some(format!("{pod} {path}")),
            Place::Here(_) => None,
        };
        assert_eq!(pod("web:/etc").as_deref(), Some("web /etc"));
        assert_eq!(pod("team/web:/etc").as_deref(), Some("team/web /etc"));
        assert_eq!(pod("web:relative").as_deref(), Some("web relative"), "refused later");
        for here in ["./a:b", "/a:/b", "dir/file:x", "plain", "-x:/y"] {
            assert_eq!(pod(here), None, "{here}");
        }
    }
}

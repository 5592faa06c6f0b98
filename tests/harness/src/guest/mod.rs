//! The agent: this same binary as a service inside the test host.

mod exec;
mod receive;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::wire::{
    BOOT_MAGIC, GUEST_PORT, Kind, MAX_PAYLOAD, Operation, Request, TOKEN_LEN, TOKEN_OFFSET,
    receive as receive_frame, send,
};

/// The transfer disk as the test host sees it.
const TRANSFER_DISK: &str = "/dev/vda";

/// A client that has its answer closes within this time, or is stuck.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until the test host ends.
///
/// # Errors
/// When the transfer disk holds no token or the port cannot be bound.
pub(crate) fn serve() -> Result<()> {
    let token: Arc<str> = read_token()?.into();
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, GUEST_PORT))
        .with_context(|| format!("listening on port {GUEST_PORT}"))?;
    println!("husk-testhost: ready");
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let token = Arc::clone(&token);
                std::thread::spawn(move || session(stream, &token));
            }
            // A connection that was given up before it was accepted.
            Err(error) => eprintln!("husk-testhost: accept: {error}"),
        }
    }
}

fn read_token() -> Result<String> {
    let disk = File::open(TRANSFER_DISK).with_context(|| format!("opening {TRANSFER_DISK}"))?;
    let mut magic = [0; BOOT_MAGIC.len()];
    disk.read_exact_at(&mut magic, 0).context("reading the transfer disk")?;
    ensure!(magic == BOOT_MAGIC.as_bytes(), "the transfer disk has no header");
    let mut token = vec![0; TOKEN_LEN];
    disk.read_exact_at(&mut token, TOKEN_OFFSET).context("reading the token")?;
    String::from_utf8(token).context("the token is not text")
}

fn session(mut stream: TcpStream, token: &str) {
    if let Err(error) = serve_one(&mut stream, token) {
        let mut message = format!("{error:#}").into_bytes();
        message.truncate(MAX_PAYLOAD);
        if let Err(unsent) = send(&mut stream, Kind::Error, &message) {
            eprintln!("husk-testhost: {error:#}; and could not say so: {unsent}");
            return;
        }
    }
    if let Err(error) = close(&mut stream) {
        eprintln!("husk-testhost: closing a connection: {error}");
    }
}

/// Closes only after the client did: with input unread here, a plain close would reset the
/// connection, and the client would lose the last frames.
fn close(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    stream.set_read_timeout(Some(CLOSE_TIMEOUT))?;
    let mut ignored = [0; 4096];
    loop {
        match stream.read(&mut ignored) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // It was killed.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn serve_one(stream: &mut TcpStream, token: &str) -> Result<()> {
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    let Some(frame) = receive_frame(stream)? else { return Ok(()) };
    ensure!(frame.kind == Kind::Request, "expected a request, got {:?}", frame.kind);
    let request: Request = frame.json()?;
    ensure!(request.token == token, "wrong token");
    match request.operation {
        Operation::Hello => send(stream, Kind::Done, b"").context("answering"),
        Operation::Exec(command) => exec::run(stream, &command),
        Operation::Push(files) => receive::run(stream, &files),
    }
}

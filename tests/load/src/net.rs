//! Bytes over TCP.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

/// Length of a write.
const PIECE: usize = 128 * 1024;

/// Sends `bytes` over `streams` connections at once; done when the receiver has closed all of them.
pub(crate) fn send(to: SocketAddr, streams: u32, bytes: u64) -> Result<Duration> {
    ensure!(streams > 0, "0 streams carry nothing");
    let connect = |_| TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"));
    let connections: Vec<TcpStream> = (0..streams).map(connect).collect::<Result<_>>()?;
    let each = bytes / u64::from(streams);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let senders: Vec<_> =
            connections.into_iter().map(|stream| scope.spawn(move || fill(stream, each))).collect();
        senders
            .into_iter()
            .try_for_each(|sender| sender.join().map_err(|_| anyhow!("a sender panicked"))?)
    })?;
    Ok(start.elapsed())
}

fn fill(mut stream: TcpStream, bytes: u64) -> Result<()> {
    let piece = vec![0x5a; PIECE];
    let mut left = bytes;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        stream.write_all(&piece[..len])?;
        left -= len as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let answered = stream.read(&mut [0])?;
    ensure!(answered == 0, "the receiver is to say nothing");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn all_bytes_arrive() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let receiver = std::thread::spawn(move || {
            let count = |_| {
                let (mut stream, _) = listener.accept().unwrap();
                std::thread::spawn(move || {
                    std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
                })
            };
            let streams: Vec<_> = (0..3).map(count).collect();
            streams.into_iter().map(|stream| stream.join().unwrap()).sum::<u64>()
        });
        send(to, 3, 3_000_000).unwrap();
        assert_eq!(receiver.join().unwrap(), 3_000_000);
    }
}

//! `husk-load`: a load for `make bench`, and the time that it took.
//!
//! What it is for: doing the very same in guests of several VMMs, which may have nothing but a kernel
//! and this program, and on the host itself. What it is not for: finding out what a disk or a network
//! can do; it does so much, and then ends.
//!
//! The last line that it prints is `husk-load NAME NANOSECONDS`.

mod disk;
mod names;
mod net;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
struct Options {
    /// By what the result is called.
    name: String,
    #[command(subcommand)]
    load: Load,
}

/// What is done.
#[derive(Debug, Subcommand)]
enum Load {
    /// Random requests of 4 KiB.
    Disk {
        /// Through the page cache instead of past it.
        #[arg(long)]
        cached: bool,
        /// A block device, or a file.
        path: PathBuf,
        /// What the requests are.
        access: Access,
        /// How many of them are under way at a time.
        depth: u32,
        /// How many there are.
        requests: u64,
    },
    /// Bytes over TCP, until the receiver has all of them.
    Send {
        /// Who receives.
        to: SocketAddr,
        /// Over how many connections.
        streams: u32,
        /// How many, over all connections together.
        bytes: u64,
    },
    /// Files that are made, looked at and removed.
    Names {
        /// Where.
        directory: PathBuf,
        /// How many.
        files: u32,
        /// How many bytes are written into each.
        #[arg(default_value_t = 0)]
        bytes: usize,
    },
}

/// What a request to a disk is.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Access {
    Read,
    Write,
}

fn main() -> Result<()> {
    let Options { name, load } = Options::parse();
    let took: Duration = match load {
        Load::Disk { cached, path, access, depth, requests } => {
            disk::run(&path, cached, access, depth, requests)?
        }
        Load::Send { to, streams, bytes } => net::send(to, streams, bytes)?,
        Load::Names { directory, files, bytes } => names::run(&directory, files, bytes)?,
    };
    println!("husk-load {name} {}", took.as_nanos());
    Ok(())
}

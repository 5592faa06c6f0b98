//! `husk-test-images`: makes the images of the tests, and serves them from a registry.
//!
//! See the library for what they are. Standard output is for programs: the images' directory, or
//! that the registry is ready.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use husk_harness::cache::paths;
use husk_test_images::recipe;
use husk_test_images::registry::{Options, Registry};

/// Real container images for the tests, made from Debian packages.
#[derive(Debug, Parser)]
#[command(name = "husk-test-images", version)]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make the images if the cache does not hold them, and print their directory.
    Build {
        /// Make them anew, with the packages that the mirror holds today.
        #[arg(long)]
        refresh: bool,
    },
    /// Serve the images from docker-registry until this is ended; in the test host.
    Registry {
        /// Directory of the OCI layouts.
        #[arg(long, default_value = "/opt/husk/images")]
        images: PathBuf,
        /// Where the registry keeps its files.
        #[arg(long, default_value = "/var/lib/husk-test-registry")]
        state: PathBuf,
        /// Address and port.
        #[arg(long, default_value = "127.0.0.1:5000")]
        listen: SocketAddr,
        /// Serve HTTPS, with a certificate made for it: certificate.pem in the state directory.
        #[arg(long)]
        tls: bool,
        /// Refuse requests without these credentials.
        #[arg(long, value_name = "USER:PASSWORD", value_parser = parse_credentials)]
        auth: Option<(String, String)>,
    },
}

fn parse_credentials(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((user, password)) if !user.is_empty() && !password.is_empty() => {
            Ok((user.to_owned(), password.to_owned()))
        }
        _ => Err("expected USER:PASSWORD".into()),
    }
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-test-images: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match cli.command {
        Action::Build { refresh } => {
            let directory =
                recipe::ensure_built(&paths::cache_root()?, &paths::checkout()?, refresh)?;
            println!("{}", directory.display());
        }
        Action::Registry { images, state, listen, tls, auth } => {
            let options = Options { images, state, address: listen, tls, credentials: auth };
            let mut registry = Registry::start(&options)?;
            println!("ready on {listen}");
            let status = registry.wait()?;
            bail!("docker-registry ended: {status}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn credentials_need_both_parts() {
        assert_eq!(parse_credentials("a:b:c"), Ok(("a".into(), "b:c".into())));
        for text in ["a", "a:", ":b", ""] {
            assert!(parse_credentials(text).is_err(), "{text}");
        }
    }
}

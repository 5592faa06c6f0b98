//! The grammar of `husk image`, and of the commands that are short for a part of it.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Output;

/// Pull, import, list and remove images
///
/// Layers are kept once, whatever images and pods use them, as read-only file systems in the state
/// directory.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    Pull(PullArgs),
    #[command(visible_alias = "load")]
    Import(ImportArgs),
    #[command(visible_alias = "list")]
    Ls(ListArgs),
    #[command(visible_alias = "remove")]
    Rm(RemoveArgs),
}

/// Pull an image from a registry
///
/// Credentials are taken from --user, or else from Docker's configuration (~/.docker/config.json and
/// its helpers).
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// E.g. nginx:1.27, or localhost:5000/team/app@sha256:...
    #[arg(value_name = "IMAGE")]
    pub(crate) reference: String,
    /// Choose this platform of an image that has several [default: this host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<String>,
    /// Speak http to the registry; =false: https [default: http to loopback addresses only]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", hide_possible_values = true)]
    pub(crate) plain_http: Option<bool>,
    /// Trust the certificates in this file (PEM) beside the system's; implies --plain-http=false
    #[arg(long, value_name = "FILE")]
    pub(crate) ca_file: Option<PathBuf>,
    /// Credentials for the registry; without a password it is read from standard input
    #[arg(long, value_name = "USER[:PASSWORD]")]
    pub(crate) user: Option<String>,
}

/// Import an image from an OCI layout (directory) or a `docker save` archive
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The directory or archive
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// Its name from now on [default: the name that it brings]
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Choose this platform of an image that has several [default: this host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub(crate) platform: Option<String>,
}

/// List the images that are here
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// How to show them
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) output: Output,
}

/// Remove images, and the layers that no other image or running pod uses
#[derive(Debug, Args)]
pub(crate) struct RemoveArgs {
    /// Names of images
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) references: Vec<String>,
}

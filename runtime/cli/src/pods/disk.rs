//! `husk disk`: disks for running pods.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use husk_engine::holder::client::messages::{AttachDiskRequest, DetachDiskRequest};

use super::{Pods, block_on, connect, container};
use crate::args::Global;

/// Give disks to running pods and take them away
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    #[command(subcommand)]
    command: DiskCommand,
}

#[derive(Debug, Subcommand)]
enum DiskCommand {
    /// Mount the file system of an image file or block device in a running container
    ///
    /// The disk holds ext4 or erofs, and nobody else may use it meanwhile, unless all only read it. A
    /// container that is started again has it again; it is gone with the pod. Prints the disk's name.
    Attach(AttachArgs),
    /// Unmount a disk that was attached, and take it away
    ///
    /// When this returns nobody has the disk open, and what was written is on it. Refused while a
    /// process of the container uses it.
    Detach(DetachArgs),
}

#[derive(Debug, Args)]
struct AttachArgs {
    /// Pod
    pod: String,
    /// Image file or block device
    path: PathBuf,
    /// Where it is mounted; what is missing of the directory is made
    #[arg(short, long, value_name = "[CONTAINER:]DIR")]
    mount: String,
    /// What it is called in the pod [default: the file's name, as far as it can be]
    #[arg(short, long)]
    name: Option<String>,
    /// The pod may only read it
    #[arg(short, long)]
    read_only: bool,
    /// Refuse what holds another file system: ext4 or erofs
    #[arg(long, value_name = "TYPE")]
    fstype: Option<String>,
}

#[derive(Debug, Args)]
struct DetachArgs {
    /// Pod
    pod: String,
    /// The disk's name
    name: String,
}

pub(crate) fn run(global: &Global, args: &DiskArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        DiskCommand::Attach(args) => attach(global, args),
        DiskCommand::Detach(args) => detach(global, args),
    }
}

fn attach(global: &Global, args: &AttachArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    let (named, mount_path) = match args.mount.split_once(':') {
        Some((container, path)) => (Some(container), path),
        None => (None, args.mount.as_str()),
    };
    let path = std::path::absolute(&args.path)
        .with_context(|| format!("cannot use the path {}", args.path.display()))?;
    let name = args.name.clone().unwrap_or_else(|| name_of(&path));
    let request = AttachDiskRequest {
        name: name.clone(),
        path: path.to_str().context("the disk's path is not UTF-8")?.to_owned(),
        read_only: args.read_only,
        fstype: args.fstype.clone().unwrap_or_default(),
        container: container(found, named)?.to_owned(),
        mount_path: mount_path.to_owned(),
    };
    block_on(async {
        let mut pod = connect(found).await?;
        pod.attach_disk(request).await.map_err(super::refusal)?;
        Ok(())
    })?;
    println!("{name}");
    Ok(ExitCode::SUCCESS)
}

fn detach(global: &Global, args: &DetachArgs) -> anyhow::Result<ExitCode> {
    let pods = Pods::read(global)?;
    let found = pods.find(&args.pod)?;
    block_on(async {
        let mut pod = connect(found).await?;
        let request = DetachDiskRequest { name: args.name.clone() };
        pod.detach_disk(request).await.map_err(super::refusal)?;
        Ok(())
    })?;
    println!("{}", args.name);
    Ok(ExitCode::SUCCESS)
}

/// A disk's name after its file's.
fn name_of(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let name: String = stem.chars().map(|c| if good(c) { c } else { '-' }).collect();
    let name: String = name.trim_matches('-').chars().take(15).collect();
    if name.is_empty() { "disk".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_called_after_its_file() {
        for (path, name) in [
            ("/srv/Data_1.img", "data-1"),
            ("/dev/vdb", "vdb"),
            ("/a/very-long-name-of-a-disk.ext4", "very-long-name-"),
            ("/srv/.img", "img"),
            ("/", "disk"),
        ] {
            assert_eq!(name_of(Path::new(path)), name, "{path}");
        }
    }
}

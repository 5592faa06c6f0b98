//! Owners, permissions, times, attributes.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::{Case, this_program};

pub(crate) const CASES: &[Case] = &[
    ("owner and mode are kept", owner_and_mode),
    ("times are kept", times),
    ("attributes are kept", attributes),
    ("supplementary groups count", supplementary_groups),
    ("a new owner takes the set-user-ID bit", set_user_id),
];

const USER: u32 = 4001;
const GROUP: u32 = 4002;
/// The user is a member of it, and it is nobody's own group.
const SUPPLEMENTARY: u32 = 4003;

fn owner_and_mode(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "")?;
    chown(&path, Some(USER), Some(GROUP))?;
    fs::set_permissions(&path, Permissions::from_mode(0o4640))?;
    let told = fs::metadata(&path)?;
    let told = (told.uid(), told.gid(), told.mode() & 0o7777);
    ensure!(told == (USER, GROUP, 0o4640), "{told:?}");
    Ok(())
}

fn times(dir: &Path) -> Result<()> {
    let file = File::create(dir.join("file"))?;
    let time = SystemTime::UNIX_EPOCH + Duration::new(1_234_567_890, 123_456_789);
    file.set_modified(time)?;
    ensure!(fs::metadata(dir.join("file"))?.modified()? == time, "another time");
    Ok(())
}

fn attributes(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "")?;
    let name = "user.husk";
    match setxattr(&path, name, b"value", XattrFlags::CREATE) {
        // tmpfs before Linux 6.6 has none.
        Err(Errno::OPNOTSUPP) => return Ok(()),
        set => set.context("setxattr")?,
    }
    let again = setxattr(&path, name, b"value", XattrFlags::CREATE);
    ensure!(again == Err(Errno::EXIST), "{again:?}");
    let mut value = [0; 16];
    let len = getxattr(&path, name, &mut value)?;
    ensure!(&value[..len] == b"value", "{value:?}");
    let mut names = [0_u8; 256];
    let len = listxattr(&path, &mut names)?;
    ensure!(names[..len].split(|byte| *byte == 0).any(|listed| listed == name.as_bytes()));
    removexattr(&path, name)?;
    ensure!(getxattr(&path, name, &mut value) == Err(Errno::NODATA), "it is still there");
    Ok(())
}

fn supplementary_groups(dir: &Path) -> Result<()> {
    let shared = dir.join("shared");
    fs::create_dir(&shared)?;
    chown(&shared, Some(0), Some(SUPPLEMENTARY))?;
    fs::set_permissions(&shared, Permissions::from_mode(0o2770))?;
    fs::create_dir(dir.join("private"))?;
    fs::set_permissions(dir.join("private"), Permissions::from_mode(0o700))?;
    // The way there is open to all.
    fs::set_permissions(dir, Permissions::from_mode(0o755))?;
    let program = dir.join("program");
    fs::copy(this_program()?, &program)?;
    let output = Command::new(&program).arg("--as-member").arg(&shared).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}", said.trim());
    let told = fs::metadata(shared.join("file"))?;
    let told = (told.uid(), told.gid());
    ensure!(told == (USER, SUPPLEMENTARY), "the file is {told:?}'s");
    Ok(())
}

/// A process of a user who may write only as a member of the group.
pub(crate) fn as_member(directory: &Path) -> Result<()> {
    set_thread_groups(&[Gid::from_raw(SUPPLEMENTARY)])?;
    let (user, group) = (Uid::from_raw(USER), Gid::from_raw(GROUP));
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)?;
    let path = directory.join("file");
    fs::write(&path, "text").context("creating a file as a member of the group")?;
    ensure!(fs::read_to_string(&path)? == "text");
    fs::create_dir(directory.join("sub")).context("creating a directory")?;
    fs::write(directory.join("sub/file"), "").context("creating a file below it")?;
    match fs::write(directory.with_file_name("private").join("file"), "") {
        Ok(()) => bail!("it has the rights of root"),
        Err(_) => Ok(()),
    }
}

fn set_user_id(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    fs::write(&path, "#!/bin/sh\n")?;
    fs::set_permissions(&path, Permissions::from_mode(0o6755))?;
    chown(&path, Some(USER), Some(GROUP))?;
    // Linux: chown by anyone takes both bits of an executable file.
    let mode = fs::metadata(&path)?.mode() & 0o7777;
    ensure!(mode == 0o755, "{mode:o}");
    Ok(())
}

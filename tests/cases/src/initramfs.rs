//! Initial RAM file systems whose PID 1 is a shell script, for tests of the VMM's devices with husk's
//! kernel and without its agent.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// The Debian package busybox-static.
const BUSYBOX: &str = "/usr/bin/busybox";

/// What each script begins with: standard input, output and error are the console already.
const PRELUDE: &str = "#!/bin/busybox sh
set -eu
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
";

/// How each ends: as a reboot. A script that fails ends before, which is a panic of the kernel.
const EPILOGUE: &str = "
reboot -f
";

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// Major and minor number of `/dev/console`.
const CONSOLE: (u32, u32) = (5, 1);

/// An initramfs that runs `script` with busybox's programs and then reboots.
///
/// # Errors
/// There is no busybox, or no temporary file can be made.
pub fn of(script: &str) -> Result<File> {
    with_programs(script, &[])
}

/// The same, with programs that need no libraries, in `/bin`.
///
/// # Errors
/// As [`of`]; or a program cannot be read.
pub fn with_programs(script: &str, programs: &[&Path]) -> Result<File> {
    let busybox = std::fs::read(Path::new(BUSYBOX))
        .with_context(|| format!("cannot read {BUSYBOX}; install busybox-static"))?;
    let mut archive = Archive(Vec::new());
    for directory in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.entry(directory, DIRECTORY, &[], (0, 0));
    }
    archive.entry("dev/console", CHARACTER_DEVICE, &[], CONSOLE);
    archive.entry("bin/busybox", PROGRAM, &busybox, (0, 0));
    for program in programs {
        let name = program.file_name().context("a program without a name")?.to_string_lossy();
        let bytes =
            std::fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
        archive.entry(&format!("bin/{name}"), PROGRAM, &bytes, (0, 0));
    }
    let script = format!("{PRELUDE}{script}{EPILOGUE}");
    archive.entry("init", PROGRAM, script.as_bytes(), (0, 0));
    archive.entry("TRAILER!!!", 0, &[], (0, 0));
    Ok(archive.file()?)
}

/// A cpio archive of the newc format (the kernel's
/// Documentation/driver-api/early-userspace/buffer-format.rst).
struct Archive(Vec<u8>);

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        // Inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), length of name, checksum.
        let numbers = [
            self.0.len(),
            mode as usize,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            device.0 as usize,
            device.1 as usize,
            name.len() + 1,
            0,
        ];
        self.0.extend(b"070701");
        for number in numbers {
            self.0.extend(format!("{number:08X}").bytes());
        }
        self.0.extend(name.bytes());
        self.0.push(0);
        self.pad();
        self.0.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn file(self) -> io::Result<File> {
        let mut file = tempfile::tempfile()?;
        file.write_all(&self.0)?;
        Ok(file)
    }
}

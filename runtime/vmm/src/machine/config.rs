//! Checks of what the pod's process asks for.

use husk_vmm_api::{
    MAX_DISKS, MAX_MEMORY_MIB, MAX_SERIAL_LEN, MAX_VCPUS, MIN_MEMORY_MIB, VmConfig,
};

/// The configuration is not one that can be built; names the field and the value.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// A number is out of its range.
    #[error("{field} is {value}, accepted are {min} to {max}")]
    Range {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// A disk's serial is empty, too long, or not printable ASCII without spaces.
    #[error(
        "disks[{index}].serial is {serial:?}, accepted are 1 to {MAX_SERIAL_LEN} printable ASCII \
         characters"
    )]
    Serial {
        /// The disk's position.
        index: usize,
        /// The serial.
        serial: String,
    },
    /// Two disks have the same serial.
    #[error("disks[{index}].serial {serial:?} is another disk's too")]
    DuplicateSerial {
        /// The later disk's position.
        index: usize,
        /// The serial.
        serial: String,
    },
}

/// Checks every field that is not a descriptor.
///
/// # Errors
/// The first field that is out of its range.
pub fn validate(config: &VmConfig) -> Result<(), ConfigError> {
    let range = |field, value: u64, min: u64, max: u64| {
        if (min..=max).contains(&value) {
            Ok(())
        } else {
            Err(ConfigError::Range { field, value, min, max })
        }
    };
    range("vcpus", config.vcpus.into(), 1, MAX_VCPUS.into())?;
    let (min, max) = (MIN_MEMORY_MIB.into(), MAX_MEMORY_MIB.into());
    range("memory_mib", config.memory_mib.into(), min, max)?;
    let disks = u64::try_from(config.disks.len()).unwrap_or(u64::MAX);
    range("number of disks", disks, 0, u64::try_from(MAX_DISKS).unwrap_or(u64::MAX))?;
    if let Some(vsock) = &config.vsock {
        // 0 to 2 are reserved, as is the last (virtio 1.2, 5.10.4).
        range("vsock.guest_cid", vsock.guest_cid, 3, u64::from(u32::MAX).saturating_sub(1))?;
    }
    let mut seen = std::collections::HashSet::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let serial = disk.serial.clone();
        let fits = (1..=MAX_SERIAL_LEN).contains(&serial.len());
        if !fits || !serial.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ConfigError::Serial { index, serial });
        }
        if !seen.insert(&disk.serial) {
            return Err(ConfigError::DuplicateSerial { index, serial });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use husk_vmm_api::{DiskConfig, FdIndex, VsockConfig};

    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            vcpus: 1,
            memory_mib: 128,
            kvm: FdIndex(0),
            kernel: FdIndex(1),
            initramfs: None,
            cmdline: String::new(),
            console: None,
            serial_console: false,
            disks: Vec::new(),
            vsock: Some(VsockConfig { guest_cid: 3 }),
        }
    }

    fn disk(serial: &str) -> DiskConfig {
        DiskConfig { serial: serial.to_owned(), fd: FdIndex(2), read_only: true }
    }

    #[test]
    fn each_limit_is_named_with_its_value() {
        assert_eq!(validate(&config()), Ok(()));
        for (vcpus, memory_mib, cid, field) in [
            (0, 128, 3, "vcpus"),
            (65, 128, 3, "vcpus"),
            (1, 47, 3, "memory_mib"),
            (1, u32::MAX, 3, "memory_mib"),
            (1, 128, 2, "vsock.guest_cid"),
            (1, 128, u64::from(u32::MAX), "vsock.guest_cid"),
        ] {
            let vsock = Some(VsockConfig { guest_cid: cid });
            match validate(&VmConfig { vcpus, memory_mib, vsock, ..config() }) {
                Err(ConfigError::Range { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn serials_are_short_printable_and_unique() {
        let with = |serials: &[&str]| {
            validate(&VmConfig { disks: serials.iter().map(|s| disk(s)).collect(), ..config() })
        };
        assert_eq!(with(&["scratch", "layer-0"]), Ok(()));
        for bad in ["", "a b", "ä", "012345678901234567890"] {
            assert!(matches!(with(&["ok", bad]), Err(ConfigError::Serial { index: 1, .. })));
        }
        assert!(matches!(with(&["a", "a"]), Err(ConfigError::DuplicateSerial { index: 1, .. })));
        let many: Vec<String> = (0..=MAX_DISKS).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(matches!(with(&many), Err(ConfigError::Range { .. })));
    }
}

//! Checks of what the pod's process asks for.

use husk_vmm_api::{
    MAX_DISKS, MAX_MEMORY_MIB, MAX_MTU, MAX_NICS, MAX_QUEUE_PAIRS, MAX_SERIAL_LEN, MAX_TAG_LEN,
    MAX_VCPUS, MIN_MEMORY_MIB, MIN_MTU, NicConfig, RateLimit, VmConfig,
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
        "a disk's serial is {serial:?}, accepted are 1 to {MAX_SERIAL_LEN} printable ASCII characters"
    )]
    Serial {
        /// The serial.
        serial: String,
    },
    /// Two disks have the same serial.
    #[error("the serial {serial:?} is another disk's too")]
    SerialTaken {
        /// The serial.
        serial: String,
    },
    /// The tag of the file-system device is empty, too long, or not printable ASCII without spaces.
    #[error("fs.tag is {tag:?}, accepted are 1 to {MAX_TAG_LEN} printable ASCII characters")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// A NIC's address is zero, or one of a group.
    #[error("nics[{index}].mac is {mac:02x?}, accepted are addresses of single stations")]
    Mac {
        /// The NIC's position.
        index: usize,
        /// The address.
        mac: [u8; 6],
    },
    /// Two NICs have the same address.
    #[error("nics[{index}].mac {mac:02x?} is another NIC's too")]
    DuplicateMac {
        /// The later NIC's position.
        index: usize,
        /// The address.
        mac: [u8; 6],
    },
}

/// Checks every field that is not a descriptor.
///
/// # Errors
/// The first field that is out of its range.
pub fn validate(config: &VmConfig) -> Result<(), ConfigError> {
    range("vcpus", config.vcpus.into(), 1, MAX_VCPUS.into())?;
    let (min, max) = (MIN_MEMORY_MIB.into(), MAX_MEMORY_MIB.into());
    range("memory_mib", config.memory_mib.into(), min, max)?;
    range("number of disks", count(config.disks.len()), 0, count(MAX_DISKS))?;
    if let Some(vsock) = &config.vsock {
        // 0 to 2 are reserved, as is the last (virtio 1.2, 5.10.4).
        range("vsock.guest_cid", vsock.guest_cid, 3, u64::from(u32::MAX).saturating_sub(1))?;
    }
    if let Some(fs) = &config.fs
        && !is_name(&fs.tag, MAX_TAG_LEN)
    {
        return Err(ConfigError::Tag { tag: fs.tag.clone() });
    }
    let mut seen = std::collections::HashSet::new();
    for disk in &config.disks {
        validate_serial(&disk.serial)?;
        if !seen.insert(&disk.serial) {
            return Err(ConfigError::SerialTaken { serial: disk.serial.clone() });
        }
    }
    validate_nics(&config.nics)
}

/// Checks the serial of a disk.
///
/// # Errors
/// [`ConfigError::Serial`].
pub fn validate_serial(serial: &str) -> Result<(), ConfigError> {
    if !is_name(serial, MAX_SERIAL_LEN) {
        return Err(ConfigError::Serial { serial: serial.to_owned() });
    }
    Ok(())
}

/// Whether it has 1 to `max` bytes of printable ASCII without spaces.
fn is_name(name: &str, max: usize) -> bool {
    (1..=max).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

fn validate_nics(nics: &[NicConfig]) -> Result<(), ConfigError> {
    range("number of nics", count(nics.len()), 0, count(MAX_NICS))?;
    let mut seen = std::collections::HashSet::new();
    for (index, nic) in nics.iter().enumerate() {
        let mac = nic.mac;
        // The lowest bit of the first byte is a group's.
        if mac == [0; 6] || mac.first().is_none_or(|first| first & 1 != 0) {
            return Err(ConfigError::Mac { index, mac });
        }
        if !seen.insert(mac) {
            return Err(ConfigError::DuplicateMac { index, mac });
        }
        range("nics[].mtu", nic.mtu.into(), MIN_MTU.into(), MAX_MTU.into())?;
        range("number of nics[].taps", count(nic.taps.len()), 1, count(MAX_QUEUE_PAIRS))?;
        validate_limit("nics[].rx_limit", &nic.rx_limit)?;
        validate_limit("nics[].tx_limit", &nic.tx_limit)?;
    }
    Ok(())
}

/// A bucket that holds nothing, or gets nothing, would let nothing through.
fn validate_limit(field: &'static str, limit: &RateLimit) -> Result<(), ConfigError> {
    for bucket in [limit.bytes, limit.operations].into_iter().flatten() {
        range(field, bucket.burst, 1, u64::MAX)?;
        range(field, bucket.refill_per_second, 1, u64::MAX)?;
    }
    Ok(())
}

fn range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(ConfigError::Range { field, value, min, max })
    }
}

fn count(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use husk_vmm_api::{DiskConfig, FdIndex, FsConfig, TokenBucketConfig, VsockConfig};

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
            nics: Vec::new(),
            vsock: Some(VsockConfig { guest_cid: 3 }),
            fs: None,
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
            assert!(matches!(with(&["ok", bad]), Err(ConfigError::Serial { .. })));
        }
        assert!(matches!(with(&["a", "a"]), Err(ConfigError::SerialTaken { .. })));
        let many: Vec<String> = (0..=MAX_DISKS).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(matches!(with(&many), Err(ConfigError::Range { .. })));
    }

    #[test]
    fn tags_are_short_and_printable() {
        let with = |tag: &str| {
            let fs = FsConfig { tag: tag.to_owned(), socket: FdIndex(4) };
            validate(&VmConfig { fs: Some(fs), ..config() })
        };
        let longest = "t".repeat(MAX_TAG_LEN);
        assert_eq!((with("husk"), with(&longest)), (Ok(()), Ok(())));
        for bad in ["", "a b", "ä", &(longest + "t")] {
            assert_eq!(with(bad), Err(ConfigError::Tag { tag: bad.to_owned() }));
        }
    }

    fn nic(last: u8) -> NicConfig {
        NicConfig {
            mac: [2, 0, 0, 0, 0, last],
            mtu: 1500,
            taps: vec![FdIndex(3)],
            rx_limit: RateLimit::default(),
            tx_limit: RateLimit::default(),
        }
    }

    fn with_nics(nics: Vec<NicConfig>) -> Result<(), ConfigError> {
        validate(&VmConfig { nics, ..config() })
    }

    #[test]
    fn addresses_of_nics_are_single_stations_and_unique() {
        assert_eq!(with_nics(vec![nic(1), nic(2)]), Ok(()));
        for mac in [[0; 6], [1, 0, 0, 0, 0, 1], [0xff; 6]] {
            let refused = with_nics(vec![nic(1), NicConfig { mac, ..nic(2) }]);
            assert_eq!(refused, Err(ConfigError::Mac { index: 1, mac }));
        }
        let refused = with_nics(vec![nic(1), nic(1)]);
        assert!(matches!(refused, Err(ConfigError::DuplicateMac { index: 1, .. })));
    }

    #[test]
    fn limits_of_nics_are_named() {
        let empty = TokenBucketConfig { burst: 0, refill_per_second: 1 };
        let dry = TokenBucketConfig { burst: 1, refill_per_second: 0 };
        let cases = [
            (NicConfig { mtu: 67, ..nic(1) }, "nics[].mtu"),
            (NicConfig { mtu: 9001, ..nic(1) }, "nics[].mtu"),
            (NicConfig { taps: Vec::new(), ..nic(1) }, "number of nics[].taps"),
            (NicConfig { taps: vec![FdIndex(3); 9], ..nic(1) }, "number of nics[].taps"),
            (
                NicConfig {
                    rx_limit: RateLimit { bytes: Some(empty), operations: None },
                    ..nic(1)
                },
                "nics[].rx_limit",
            ),
            (
                NicConfig { tx_limit: RateLimit { bytes: None, operations: Some(dry) }, ..nic(1) },
                "nics[].tx_limit",
            ),
        ];
        for (nic, field) in cases {
            match with_nics(vec![nic]) {
                Err(ConfigError::Range { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        let many = (0..=8).map(nic).collect();
        assert!(matches!(with_nics(many), Err(ConfigError::Range { .. })));
    }
}

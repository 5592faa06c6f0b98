//! The `linux.resources` object, also the whole document of an update.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Resources {
    pub(crate) devices: Vec<DeviceRule>,
    pub(crate) memory: Memory,
    pub(crate) cpu: Cpu,
    pub(crate) pids: Option<Pids>,
    #[serde(rename = "blockIO")]
    pub(crate) block_io: BlockIo,
    #[serde(rename = "hugepageLimits")]
    pub(crate) hugepage_limits: Vec<HugepageLimit>,
    pub(crate) unified: BTreeMap<String, String>,
}

/// One rule of the device cgroup.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct DeviceRule {
    pub(crate) allow: bool,
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) major: Option<i64>,
    pub(crate) minor: Option<i64>,
    pub(crate) access: Option<String>,
}

/// In bytes; -1 for no limit.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Memory {
    pub(crate) limit: Option<i64>,
    pub(crate) reservation: Option<i64>,
    /// Memory and swap together, as in cgroup v1.
    pub(crate) swap: Option<i64>,
    /// Cannot be honoured by cgroup v2: only false is accepted.
    #[serde(rename = "disableOOMKiller")]
    pub(crate) disable_oom_killer: bool,
    /// Whether an update is to refuse a limit below what is in use.
    pub(crate) check_before_update: bool,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Cpu {
    pub(crate) shares: Option<u64>,
    /// In microseconds for each period; not positive for no limit.
    pub(crate) quota: Option<i64>,
    /// In microseconds.
    pub(crate) period: Option<u64>,
    pub(crate) burst: Option<u64>,
    pub(crate) idle: Option<i64>,
    pub(crate) cpus: Option<String>,
    pub(crate) mems: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Pids {
    /// Negative for no limit, 0 for unset.
    pub(crate) limit: i64,
}

/// Weights are those of cgroup v1, 10 to 1000.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct BlockIo {
    pub(crate) weight: Option<u16>,
    pub(crate) weight_device: Vec<WeightDevice>,
    #[serde(rename = "throttleReadBpsDevice")]
    pub(crate) read_bps: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteBpsDevice")]
    pub(crate) write_bps: Vec<ThrottleDevice>,
    #[serde(rename = "throttleReadIOPSDevice")]
    pub(crate) read_iops: Vec<ThrottleDevice>,
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub(crate) write_iops: Vec<ThrottleDevice>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct WeightDevice {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) weight: Option<u16>,
}

/// Bytes or operations per second.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct ThrottleDevice {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) rate: u64,
}

/// In bytes.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HugepageLimit {
    pub(crate) page_size: String,
    pub(crate) limit: u64,
}

//! The pod's shared world, made once.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use husk_proto::agent::{SetupPodRequest, volume};
use husk_proto::guest;
use rustix::time::{ClockId, Timespec};

use crate::host::Host;
use crate::storage::{self, StorageError};
use crate::sysctl::{self, SysctlError};

/// What containers need to know of their pod.
#[derive(Debug, Clone, Default)]
pub(crate) struct PodInfo {
    pub(crate) hostname: String,
    /// The file systems, and whether each is read-only.
    pub(crate) filesystems: BTreeMap<String, bool>,
    /// The volumes of files, and the group that each belongs to.
    pub(crate) file_volumes: BTreeMap<String, Option<u32>>,
}

/// A pod that was not set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    #[error("hostname: {0:?} must be 1 to 64 letters, digits, dots and hyphens")]
    Hostname(String),
    #[error("sysctls: {0} of them; a pod has at most {MAX_SYSCTLS}")]
    Sysctls(usize),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

impl PodError {
    /// Whether the request is at fault, so that it would fail anywhere.
    pub(crate) fn is_invalid(&self) -> bool {
        match self {
            Self::Hostname(_) | Self::Sysctls(_) | Self::Sysctl(SysctlError::NotNamespaced(_)) => {
                true
            }
            Self::Storage(e) => !matches!(e, StorageError::NoDisk { .. } | StorageError::Io { .. }),
            Self::Sysctl(SysctlError::Write { .. }) | Self::Io { .. } => false,
        }
    }
}

/// Longest host name (HOST_NAME_MAX of Linux).
const MAX_HOSTNAME: usize = 64;

/// Most sysctls of a pod.
const MAX_SYSCTLS: usize = 1024;

/// Checks what can be checked before anything is made.
pub(crate) fn check(request: &SetupPodRequest) -> Result<(), PodError> {
    let name = &request.hostname;
    let good = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'-');
    if name.is_empty() || name.len() > MAX_HOSTNAME || !name.bytes().all(good) {
        return Err(PodError::Hostname(name.clone()));
    }
    if request.sysctls.len() > MAX_SYSCTLS {
        return Err(PodError::Sysctls(request.sysctls.len()));
    }
    if let Some(key) = request.sysctls.keys().find(|key| !sysctl::is_namespaced(key)) {
        return Err(SysctlError::NotNamespaced(key.clone()).into());
    }
    Ok(storage::check(&request.filesystems, &request.volumes)?)
}

/// Makes the pod's world.
///
/// # Errors
/// [`PodError`]. What was made so far stays: the pod has failed, and its VM ends.
pub(crate) async fn set_up(host: &Host, request: &SetupPodRequest) -> Result<PodInfo, PodError> {
    check(request)?;
    let SetupPodRequest {
        hostname,
        filesystems,
        volumes,
        sysctls,
        realtime_ns,
        shm_size,
        hosts,
        resolv_conf,
    } = request;
    if *realtime_ns != 0 {
        set_clock(*realtime_ns).map_err(|source| PodError::Io { what: "set the clock", source })?;
    }
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(|e| PodError::Io { what: "set the host name", source: e.into() })?;
    for filesystem in filesystems {
        storage::mount(host, filesystem).await?;
    }
    for volume in volumes {
        storage::make_volume(host, volume)?;
    }
    storage::make_shm(*shm_size)?;
    let hosts = hosts.clone().unwrap_or_else(|| loopback_hosts(hostname));
    write_files(hostname, &hosts, resolv_conf)
        .map_err(|source| PodError::Io { what: "write the pod's files", source })?;
    sysctl::apply(sysctls)?;
    Ok(PodInfo {
        hostname: hostname.clone(),
        filesystems: filesystems.iter().map(|f| (f.name.clone(), f.read_only)).collect(),
        file_volumes: volumes
            .iter()
            .filter(|volume| matches!(volume.source, Some(volume::Source::Files(_))))
            .map(|volume| (volume.name.clone(), volume.fs_group))
            .collect(),
    })
}

/// The text of /etc/hosts of every container of a pod that has no network: what the kubelet writes,
/// and the pod's own name, which resolves to the loopback address.
fn loopback_hosts(hostname: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n\
         127.0.0.1\t{hostname}\n"
    )
}

/// Writes the files of the pod that containers bind over their own.
fn write_files(hostname: &str, hosts: &str, resolv_conf: &str) -> io::Result<()> {
    let directory = Path::new(guest::ETC);
    fs::create_dir_all(directory)?;
    let own_name = format!("{hostname}\n");
    let files = [
        ("hostname", own_name.as_str()),
        ("hosts", hosts),
        // Without a name server the C libraries ask the loopback address, where none answers.
        ("resolv.conf", resolv_conf),
    ];
    for (name, text) in files {
        let path = directory.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// Sets the guest's clock to ns since the epoch.
fn set_clock(ns: u64) -> io::Result<()> {
    const NS_PER_S: u64 = 1_000_000_000;
    let part = |value: u64| i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let time = Timespec { tv_sec: part(ns / NS_PER_S)?, tv_nsec: part(ns % NS_PER_S)? };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(hostname: &str) -> SetupPodRequest {
        SetupPodRequest { hostname: hostname.into(), ..Default::default() }
    }

    #[test]
    fn the_pods_own_name_and_localhost_resolve() {
        let text = loopback_hosts("web-0");
        assert!(
            text.contains("\n127.0.0.1\tweb-0\n") && text.starts_with("127.0.0.1\tlocalhost\n")
        );
    }

    #[test]
    fn host_names_are_checked() {
        check(&request("web-0.example")).unwrap();
        for name in ["", "a b", "a/b", &"a".repeat(65)] {
            let error = check(&request(name)).unwrap_err();
            assert!(error.is_invalid() && error.to_string().contains("hostname"), "{name:?}");
        }
    }

    #[test]
    fn sysctls_of_the_whole_guest_are_refused_before_anything_is_made() {
        let mut request = request("pod");
        request.sysctls.insert("vm.swappiness".into(), "1".into());
        assert!(check(&request).unwrap_err().is_invalid());
    }
}

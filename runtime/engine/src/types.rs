//! What the engine runs: pods and containers, validated, whatever door they came through.
//!
//! These types know nothing of YAML, of Kubernetes' API objects or of the CRI. A door makes them
//! ([`crate::manifest`] from Pod manifests) and answers for their validity; the engine does not
//! check again. Where doors differ in what they supply, the difference is an enum ([`Network`],
//! [`Rootfs`]), and there is one path below it.
//!
//! Units: memory in bytes unless the name says `mib`, CPU in thousandths of a CPU (`cpu_millis`),
//! time in seconds (`_s`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::storage::host_disk::FsType;

/// A pod, ready to be run.
///
/// Names of containers are unique over init containers and containers together, names of volumes
/// are unique, and every volume mount refers to a volume of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// Who the pod is.
    pub metadata: PodMetadata,
    /// Host name in the guest: a DNS name of at most 63 bytes.
    pub hostname: String,
    /// When containers that ended are started again. Does not concern sidecars, which always are.
    pub restart_policy: RestartPolicy,
    /// How long containers may take to end after SIGTERM, in seconds; then they are killed.
    pub termination_grace_s: u64,
    /// How long the pod may take from its start on, in seconds; then it is ended, and has failed.
    pub active_deadline_s: Option<u64>,
    /// Started before the containers, in this order: an [`ContainerKind::Init`] must have succeeded
    /// before the next is started, an [`ContainerKind::Sidecar`] must only have been started.
    /// Sidecars are stopped in reverse order, after all containers have ended.
    pub init_containers: Vec<ContainerSpec>,
    /// The containers proper ([`ContainerKind::Main`]), at least one.
    pub containers: Vec<ContainerSpec>,
    /// What containers can mount.
    pub volumes: Vec<VolumeSpec>,
    /// Size of the virtual machine.
    pub vm: VmSize,
    /// Group that owns the volumes, and of which every container's process is a member.
    pub fs_group: Option<u32>,
    /// Further groups of every container's process.
    pub supplemental_groups: Vec<u32>,
    /// Namespaced sysctls of the pod, by their dotted names.
    pub sysctls: BTreeMap<String, String>,
    /// Name of the service account (only seen through the environment: there is no token).
    pub service_account: String,
    /// What the pod reaches. Manifests do not say it: the door does.
    pub network: Network,
    /// Whom its containers ask for names.
    pub dns: Dns,
    /// Names that its containers know without asking.
    pub host_aliases: Vec<HostAlias>,
}

impl PodSpec {
    /// Init containers and containers, in the order of their start.
    pub fn all_containers(&self) -> impl Iterator<Item = &ContainerSpec> {
        self.init_containers.iter().chain(&self.containers)
    }

    /// The container of this name, of any kind.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&ContainerSpec> {
        self.all_containers().find(|container| container.name == name)
    }

    /// The quality-of-service class, as Kubernetes computes it from requests and limits.
    #[must_use]
    pub fn qos_class(&self) -> QosClass {
        let mut any = false;
        let mut all_guaranteed = true;
        for Resources { requests, limits } in self.all_containers().map(|c| &c.resources) {
            any |= *requests != Amounts::default() || *limits != Amounts::default();
            all_guaranteed &= limits.cpu_millis.is_some()
                && limits.memory.is_some()
                && requests.cpu_millis == limits.cpu_millis
                && requests.memory == limits.memory;
        }
        match (any, all_guaranteed) {
            (false, _) => QosClass::BestEffort,
            (true, true) => QosClass::Guaranteed,
            (true, false) => QosClass::Burstable,
        }
    }
}

/// Who a pod is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodMetadata {
    /// A DNS subdomain name, at most 253 bytes.
    pub name: String,
    /// A DNS label.
    pub namespace: String,
    /// Unique identifier; `None` if the door's input has none, and then the engine makes one.
    pub uid: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// When containers that ended are started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Whatever their exit code. Init containers that succeeded are not.
    #[default]
    Always,
    /// Those that failed.
    OnFailure,
    /// None.
    Never,
}

/// Quality-of-service class. Decides whom the guest's kernel kills first when memory runs out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QosClass {
    /// Every container has limits for CPU and memory, and requests equal to them.
    Guaranteed,
    /// Some container has a request or a limit.
    Burstable,
    /// None has.
    BestEffort,
}

/// What the pod reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Only its own loopback interface.
    Loopback,
    /// What the plugins of a CNI network give it: of the one of this name, or of the host's default.
    Cni(Option<String>),
    /// The interfaces of a network namespace that somebody else made, and keeps.
    Netns(PathBuf),
}

/// Whom a pod's containers ask for names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// What the rest is added to.
    pub policy: DnsPolicy,
    /// Name servers.
    pub nameservers: Vec<IpAddr>,
    /// Domains in which names without a dot are looked up.
    pub searches: Vec<String>,
    /// Options of resolvers.
    pub options: Vec<DnsOption>,
}

/// What a pod's name servers are before it adds its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DnsPolicy {
    /// Those of the host.
    #[default]
    Default,
    /// None.
    None,
}

/// An option of resolvers, e.g. `ndots`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsOption {
    /// Its name.
    pub name: String,
    /// Its value, if it has one.
    pub value: Option<String>,
}

/// Names of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAlias {
    /// The address.
    pub ip: IpAddr,
    /// Its names, at least one.
    pub hostnames: Vec<String>,
}

/// Size of a virtual machine. See [`crate::sizing`] for how it follows from the pod's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs, 1 to [`husk_vmm_api::MAX_VCPUS`].
    pub vcpus: u32,
    /// Guest memory in MiB, [`husk_vmm_api::MIN_MEMORY_MIB`] to
    /// [`husk_vmm_api::MAX_MEMORY_MIB`].
    pub memory_mib: u32,
}

/// One container of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// A DNS label.
    pub name: String,
    /// Its part in the life of the pod.
    pub kind: ContainerKind,
    /// Where its root file system comes from.
    pub rootfs: Rootfs,
    /// Replaces the image's entrypoint *and* its default arguments; empty leaves the entrypoint.
    /// `$(VAR)` is not expanded yet.
    pub command: Vec<String>,
    /// Replaces the image's default arguments; empty leaves them, unless there is a command.
    /// `$(VAR)` is not expanded yet.
    pub args: Vec<String>,
    /// Environment in the order of its definition, what comes of a whole ConfigMap or Secret
    /// first; a value sees those before it, and of a repeated
    /// name the last value stays. Not resolved yet: that happens at every start ([`crate::oci`]),
    /// when the pod's addresses are known.
    pub env: Vec<EnvVar>,
    /// Absolute path, instead of the image's.
    pub working_dir: Option<String>,
    /// The ports on which it says that it listens. Information only.
    pub ports: Vec<ContainerPort>,
    /// What it may use.
    pub resources: Resources,
    /// Where it sees which volumes; each path once.
    pub volume_mounts: Vec<VolumeMount>,
    /// Which volumes it has as block devices; each volume and each path once.
    pub volume_devices: Vec<VolumeDevice>,
    /// As whom it runs and what it may do: the pod's and the container's settings merged.
    pub security: SecurityContext,
    /// Whether it has a terminal. Its standard error then comes out of its standard output.
    pub tty: bool,
    /// Whether it has a standard input; else that is `/dev/null`.
    pub stdin: bool,
    /// Whether its standard input ends when the first one who attached detaches.
    pub stdin_once: bool,
    /// How it is asked whether it works.
    pub probes: Probes,
    /// What is done after its start and before its end.
    pub lifecycle: Lifecycle,
    /// Where its last words come from.
    pub termination_message: TerminationMessage,
}

/// A container's part in the life of its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    /// Runs to its end before the next one is started.
    Init,
    /// An init container with `restartPolicy: Always`: runs beside all that follow, is always
    /// restarted, and does not keep the pod from ending.
    Sidecar,
    /// A container proper.
    Main,
}

/// Where a root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// An image that husk has, or pulls.
    Image {
        /// As the user wrote it, e.g. `nginx:1.27` or `localhost/husk/busybox`.
        reference: String,
        /// Whether to ask the registry.
        pull_policy: PullPolicy,
    },
}

/// Whether the registry is asked for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// At every start; what is here already is used if the registry says that it is the same.
    Always,
    /// Only if it is not here.
    IfNotPresent,
    /// Never: it must be here.
    Never,
}

/// A variable of the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvVar {
    /// Its name: printable ASCII without `=`.
    pub name: String,
    /// Where its value comes from.
    pub value: EnvValue,
}

/// Where the value of a variable comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnvValue {
    /// This text, in which `$(VAR)` is not expanded yet.
    Literal(String),
    /// This text as it is: of a ConfigMap or a Secret.
    Verbatim(Hidden<String>),
    /// A field of the pod.
    Field(FieldRef),
    /// What a container of the pod may use.
    Resource(ResourceFieldRef),
}

/// A value that is not shown where its owner is debugged: it may be a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Hidden<T>(pub T);

impl<T> std::fmt::Debug for Hidden<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

/// A field of the pod, as the downward API names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FieldRef {
    /// `metadata.name`
    Name,
    /// `metadata.namespace`
    Namespace,
    /// `metadata.uid`
    Uid,
    /// `metadata.labels['KEY']`; empty if there is none.
    Label(String),
    /// `metadata.annotations['KEY']`; empty if there is none.
    Annotation(String),
    /// `metadata.labels`: all of them, as lines `KEY="VALUE"`. In volumes only.
    Labels,
    /// `metadata.annotations`: of the same form. In volumes only.
    Annotations,
    /// `spec.nodeName`
    NodeName,
    /// `spec.serviceAccountName`
    ServiceAccountName,
    /// `status.hostIP`
    HostIp,
    /// `status.hostIPs`, separated by commas
    HostIps,
    /// `status.podIP`
    PodIp,
    /// `status.podIPs`, separated by commas
    PodIps,
}

/// A resource of a container, in units of a divisor, rounded up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceFieldRef {
    /// Whose. Always a container of the pod.
    pub container: String,
    /// Which.
    pub resource: ResourceField,
    /// The unit: in thousandths of a CPU for CPU, in bytes for memory. At least 1.
    pub divisor: u64,
}

/// Which resource a [`ResourceFieldRef`] means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResourceField {
    /// `limits.cpu`; the VM's CPUs if the container has no limit.
    LimitsCpu,
    /// `limits.memory`; the VM's memory if the container has no limit.
    LimitsMemory,
    /// `requests.cpu`; 0 if there is none.
    RequestsCpu,
    /// `requests.memory`; 0 if there is none.
    RequestsMemory,
}

/// A port on which a container says that it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPort {
    /// Its name, unique in the container.
    pub name: Option<String>,
    /// 1 to 65535.
    pub port: u16,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port of the host that leads to it, if one does.
    pub host_port: Option<u16>,
    /// The address of the host on which that is; all of them if there is none.
    pub host_ip: Option<IpAddr>,
}

/// Protocol of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Protocol {
    /// TCP
    #[default]
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

/// What a container asks for and may use at most.
///
/// They size its cgroup in the guest: the CPU limit is its quota (`cpu.max`, period 100 ms), the
/// CPU request its weight (`cpu.weight`, by way of OCI `shares`), the memory limit its
/// `memory.max`. The memory request sizes nothing but decides the QoS class. Together the limits
/// size the virtual machine: [`crate::sizing`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// What it asks for: as given, or else the limits.
    pub requests: Amounts,
    /// What it may use.
    pub limits: Amounts,
}

/// Amounts of resources. A zero in the door's input means unset, and is `None` here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    /// CPU time, in thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// Memory in bytes.
    pub memory: Option<u64>,
}

/// Where a container sees a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// Name of a volume of the pod.
    pub volume: String,
    /// Absolute path in the container, without `..`; not `/`.
    pub mount_path: String,
    /// Whether it may only be read. A volume of [`VolumeSource::Files`] always is.
    pub read_only: bool,
    /// Whether, if it may only be read, that is so of what is mounted inside it too.
    pub recursive_read_only: bool,
    /// What of the volume is mounted instead of all of it.
    pub sub_path: Option<SubPath>,
    /// Whether what is mounted inside it is seen elsewhere.
    pub propagation: MountPropagation,
}

/// Where a container has a volume as a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeDevice {
    /// Name of a volume of the pod: a [`VolumeSource::Disk`], which no container of it mounts.
    pub volume: String,
    /// Absolute path in the container, without `..`; not `/`.
    pub device_path: String,
}

/// A part of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubPath {
    /// This path: relative, without `..`.
    Path(String),
    /// A path in which `$(VAR)` is not expanded yet.
    Expr(String),
}

/// How mounts inside a volume's mount spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MountPropagation {
    /// They do not.
    #[default]
    None,
    /// What another container mounts (with [`MountPropagation::Bidirectional`]) is seen in this one.
    HostToContainer,
    /// Both ways. Of privileged containers only.
    Bidirectional,
}

/// A volume of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// A DNS label.
    pub name: String,
    /// What it is.
    pub source: VolumeSource,
}

/// What a volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// An empty directory (mode 0777) that lives as long as the pod.
    EmptyDir {
        /// Where it is kept.
        medium: Medium,
        /// Most bytes that it may hold. `None`: what the medium has; for [`Medium::Memory`] that is
        /// the memory of the VM.
        size_limit: Option<u64>,
    },
    /// Small files that can only be read: of ConfigMaps, Secrets and the pod's own fields. Paths
    /// are unique, and none is below another.
    Files(Vec<FileSpec>),
    /// An image file or block device of the host: its file system, or itself to containers that have
    /// it as a block device.
    Disk {
        /// Where it is; absolute, without `..`.
        path: PathBuf,
        /// What is on it; of no meaning if it is a block device to containers.
        fstype: FsType,
        /// Whether the pod may only read it, and so may others at the same time.
        read_only: bool,
    },
    /// A file or directory of the host.
    HostPath {
        /// Where; absolute, without `..`.
        path: PathBuf,
        /// What must be there, or is made.
        kind: HostPathType,
    },
}

/// What must be at a path of the host, as Kubernetes names it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HostPathType {
    /// A file or a directory.
    #[default]
    Any,
    /// A directory, which is made if nothing is there.
    DirectoryOrCreate,
    /// A directory.
    Directory,
    /// A file, which is made if nothing is there.
    FileOrCreate,
    /// A file.
    File,
}

impl std::fmt::Display for HostPathType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            HostPathType::Any => "\"\"",
            HostPathType::DirectoryOrCreate => "DirectoryOrCreate",
            HostPathType::Directory => "Directory",
            HostPathType::FileOrCreate => "FileOrCreate",
            HostPathType::File => "File",
        })
    }
}

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// Relative, of components that are not empty and do not begin with `..`.
    pub path: String,
    /// Its permissions, at most 0777.
    pub mode: u32,
    /// What is in it.
    pub content: FileContent,
}

/// What is in a file of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileContent {
    /// These bytes.
    Bytes(Hidden<Vec<u8>>),
    /// A field of the pod.
    Field(FieldRef),
    /// What a container of the pod may use.
    Resource(ResourceFieldRef),
}

/// Where an empty directory is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Medium {
    /// On the pod's scratch disk.
    #[default]
    Disk,
    /// In guest memory (tmpfs): counts against the memory limit of the container that writes.
    Memory,
}

/// As whom a container runs and what it may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SecurityContext {
    /// User ID, instead of the image's user.
    pub run_as_user: Option<u32>,
    /// Primary group ID, instead of the image's or the user's.
    pub run_as_group: Option<u32>,
    /// Refuse to start as user ID 0.
    pub run_as_non_root: bool,
    /// Mount the root file system read-only.
    pub read_only_root: bool,
    /// All capabilities and nothing masked: root of the *guest*, never of the host.
    pub privileged: bool,
    /// Whether a set-user-ID program may give it more rights.
    pub allow_privilege_escalation: bool,
    /// Changes to the default set of capabilities.
    pub capabilities: CapabilityChanges,
    /// Whether the sensitive parts of `/proc` are masked.
    pub proc_mount: ProcMount,
}

/// Changes to the default set of capabilities: additions win over what is dropped by `ALL`, and
/// what is dropped by name wins over additions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapabilityChanges {
    /// Added: without the prefix `CAP_`, in capitals; `ALL` for all.
    pub add: Vec<String>,
    /// Dropped: of the same form.
    pub drop: Vec<String>,
}

/// Whether the sensitive parts of `/proc` are masked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProcMount {
    /// They are masked or read-only.
    #[default]
    Default,
    /// Nothing is.
    Unmasked,
}

/// How a container is asked whether it works. Times in seconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probes {
    /// Until it has succeeded the others wait; if it fails, the container is killed.
    pub startup: Option<Probe>,
    /// If it fails, the container is killed.
    pub liveness: Option<Probe>,
    /// While it fails, the container is not ready.
    pub readiness: Option<Probe>,
}

/// A question to a container that is asked again and again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What is asked.
    pub check: Check,
    /// From the container's start to the first time.
    pub initial_delay_s: u32,
    /// From one time to the next, at least 1.
    pub period_s: u32,
    /// Most that an answer may take, at least 1.
    pub timeout_s: u32,
    /// How many successes in a row make a success, at least 1.
    pub success_threshold: u32,
    /// How many failures in a row make a failure, at least 1.
    pub failure_threshold: u32,
    /// How long the container may take to end once it failed; the pod's grace period if `None`.
    pub termination_grace_s: Option<u64>,
}

/// What can be asked of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A command in the container: success is exit code 0.
    Exec(Vec<String>),
    /// An HTTP request: success is a status of 200 to 399.
    HttpGet(HttpGet),
    /// A TCP connection: success is that it comes about.
    TcpSocket(TcpSocket),
    /// gRPC's health check: success is `SERVING`.
    Grpc {
        /// Port.
        port: u16,
        /// Of which service; empty for the whole server.
        service: String,
    },
}

/// How an HTTP request is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// As it is.
    Http,
    /// By TLS, with whatever certificate the server has.
    Https,
}

/// An HTTP request (`GET`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpGet {
    /// With or without TLS.
    pub scheme: Scheme,
    /// An address, `localhost`, which is the pod's, or a name for the host's resolver; empty for the
    /// pod's own address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Path and query, beginning with a slash.
    pub path: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
}

/// A TCP connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpSocket {
    /// As of an [`HttpGet`].
    pub host: String,
    /// Port.
    pub port: u16,
}

/// What is done after a container's start and before its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lifecycle {
    /// Right after its program was started. If it fails, the container is killed.
    pub post_start: Option<Hook>,
    /// Before the container is asked to end, within the grace period.
    pub pre_stop: Option<Hook>,
}

/// What is done at a turn in a container's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hook {
    /// As a probe would; the answer counts.
    Check(Check),
    /// Nothing, for so many seconds.
    Sleep(u64),
}

/// Where a container's last words come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TerminationMessage {
    /// A file in the container, absolute, that the container may write them to.
    pub path: String,
    /// Whether, if the file is empty and the container failed, the end of its output is taken.
    pub fall_back_to_logs: bool,
}

impl Default for TerminationMessage {
    fn default() -> Self {
        TerminationMessage { path: "/dev/termination-log".into(), fall_back_to_logs: false }
    }
}

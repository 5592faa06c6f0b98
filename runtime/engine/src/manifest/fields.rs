//! The table of the fields of a Pod: those of Kubernetes 1.35, in its order of importance.

use super::schema::Literal::{Bool, Int, Text};
use super::schema::{Field, list, no_effect, not_yet, object, only, yes};

/// The fields of a manifest.
pub(super) const POD: &[Field] = &[
    yes("apiVersion", "`v1`"),
    yes("kind", "`Pod`"),
    object("metadata", METADATA, ""),
    object("spec", SPEC, ""),
    no_effect("status", "what an API server once recorded says nothing about this run"),
];

/// The fields of a ConfigMap.
pub(super) const CONFIG_MAP: &[Field] = &[
    yes("apiVersion", "`v1`"),
    yes("kind", "`ConfigMap`"),
    object("metadata", METADATA, "`name` and `namespace` tell which Pods can refer to it"),
    yes("data", "texts by their keys; with `binaryData`, at most 1 MiB together"),
    yes("binaryData", "base64; seen by volumes only"),
    yes("immutable", "`husk apply` refuses to change one that says so"),
];

/// The fields of a Secret.
pub(super) const SECRET: &[Field] = &[
    yes("apiVersion", "`v1`"),
    yes("kind", "`Secret`"),
    object("metadata", METADATA, "`name` and `namespace` tell which Pods can refer to it"),
    yes("data", "base64; with `stringData`, at most 1 MiB together"),
    yes("stringData", "texts; win over `data`"),
    no_effect("type", "the values are not interpreted"),
    yes("immutable", "`husk apply` refuses to change one that says so"),
];

const RECORDED: &str = "recorded by an API server";

const METADATA: &[Field] = &[
    yes("name", "required: a DNS subdomain name"),
    yes("namespace", "a DNS label; default `default`"),
    yes("uid", "default: a new one for every run"),
    yes("labels", "seen through `fieldRef`"),
    yes("annotations", "seen through `fieldRef`"),
    no_effect("generateName", "`name` is required, and wins"),
    no_effect("creationTimestamp", RECORDED),
    no_effect("deletionTimestamp", RECORDED),
    no_effect("deletionGracePeriodSeconds", RECORDED),
    no_effect("resourceVersion", RECORDED),
    no_effect("generation", RECORDED),
    no_effect("managedFields", RECORDED),
    no_effect("selfLink", RECORDED),
    no_effect("ownerReferences", "there are no other objects"),
    not_yet("finalizers"),
];

const SPEC: &[Field] = &[
    list("containers", CONTAINER, "required: at least one"),
    list(
        "initContainers",
        INIT_CONTAINER,
        "run one after the other before the containers; with `restartPolicy: Always`, sidecars; \
         their other fields are those of containers",
    ),
    list("volumes", VOLUME, ""),
    yes("restartPolicy", "`Always` (default), `OnFailure`, `Never`"),
    yes("terminationGracePeriodSeconds", "default 30"),
    yes("activeDeadlineSeconds", "from the pod's start; then it is ended: `DeadlineExceeded`"),
    yes("hostname", "a DNS label; default: `metadata.name`, cut to 63 bytes"),
    object("securityContext", POD_SECURITY, ""),
    yes("serviceAccountName", "seen through `fieldRef`; there is no token. Default `default`"),
    yes("serviceAccount", "the old name of `serviceAccountName`"),
    only("automountServiceAccountToken", &[Bool(false)], "there is no API server to give a token"),
    only(
        "hostNetwork",
        &[Bool(false)],
        "a pod has a kernel of its own, which cannot have the host's interfaces",
    ),
    only("hostPID", &[Bool(false)], "a pod never sees the host's processes, it has its VM's"),
    only("hostIPC", &[Bool(false)], "a pod never shares the host's IPC, it has its VM's"),
    only("hostUsers", &[Bool(true)], "user namespaces inside the VM are not supported yet"),
    only("shareProcessNamespace", &[Bool(false)], "sharing it is not supported yet"),
    yes(
        "dnsPolicy",
        "`ClusterFirst` (default), `ClusterFirstWithHostNet` and `Default`: the host's name servers, \
         as there is no cluster; `None`: those of `dnsConfig` only",
    ),
    object(
        "dnsConfig",
        &[
            yes("nameservers", "IP addresses; at most 3"),
            yes("searches", "domains; at most 32"),
            list("options", &[yes("name", "required"), yes("value", "")], ""),
        ],
        "what is added to the containers' `/etc/resolv.conf`",
    ),
    list(
        "hostAliases",
        &[yes("ip", "required"), yes("hostnames", "names of that address")],
        "what is added to the containers' `/etc/hosts`",
    ),
    no_effect("enableServiceLinks", "there are no services"),
    only("setHostnameAsFQDN", &[Bool(false)], "it needs a cluster's domain"),
    only("runtimeClassName", &[Text("husk")], "this is husk"),
    only("schedulerName", &[Text("default-scheduler")], "nothing is scheduled"),
    only("preemptionPolicy", &[Text("PreemptLowerPriority")], "nothing is scheduled"),
    only("priority", &[Int(0)], "nothing is scheduled"),
    no_effect("tolerations", "a host has no taints"),
    no_effect("imagePullSecrets", "registries are asked with the user's own credentials"),
    object("os", &[only("name", &[Text("linux")], "the guest runs Linux")], ""),
    not_yet("affinity"),
    not_yet("ephemeralContainers"),
    not_yet("hostnameOverride"),
    not_yet("nodeName"),
    not_yet("nodeSelector"),
    not_yet("overhead"),
    not_yet("priorityClassName"),
    not_yet("readinessGates"),
    not_yet("resourceClaims"),
    not_yet("resources"),
    not_yet("schedulingGates"),
    not_yet("subdomain"),
    not_yet("topologySpreadConstraints"),
    not_yet("workloadRef"),
];

const SECCOMP: &[Field] = &[
    only("type", &[Text("Unconfined")], "profiles are not supported yet"),
    not_yet("localhostProfile"),
];

const APPARMOR: &[Field] = &[
    only("type", &[Text("Unconfined")], "the guest has no AppArmor"),
    not_yet("localhostProfile"),
];

const RUN_AS_USER: &str = "instead of the image's user";
const RUN_AS_GROUP: &str = "instead of the image's or the user's group";
const RUN_AS_NON_ROOT: &str = "a container that would run as user 0 does not start";

const POD_SECURITY: &[Field] = &[
    yes("runAsUser", RUN_AS_USER),
    yes("runAsGroup", RUN_AS_GROUP),
    yes("runAsNonRoot", RUN_AS_NON_ROOT),
    yes("fsGroup", "owns the volumes, and every container is a member"),
    no_effect("fsGroupChangePolicy", "it does not concern volumes that start empty"),
    yes("supplementalGroups", "beside those of the image's `/etc/group`"),
    only("supplementalGroupsPolicy", &[Text("Merge")], "`Strict` is not supported yet"),
    list("sysctls", SYSCTL, "`kernel.shm*`, `kernel.msg*`, `kernel.sem`, `fs.mqueue.*`, `net.*`"),
    object("seccompProfile", SECCOMP, ""),
    object("appArmorProfile", APPARMOR, ""),
    not_yet("seLinuxOptions"),
    not_yet("seLinuxChangePolicy"),
    not_yet("windowsOptions"),
];

const SYSCTL: &[Field] = &[yes("name", "required"), yes("value", "required")];

const SECURITY: &[Field] = &[
    yes("runAsUser", RUN_AS_USER),
    yes("runAsGroup", RUN_AS_GROUP),
    yes("runAsNonRoot", RUN_AS_NON_ROOT),
    yes("readOnlyRootFilesystem", ""),
    yes("privileged", "all rights inside the VM, none on the host"),
    yes("allowPrivilegeEscalation", "default true; false sets `no_new_privs`"),
    object(
        "capabilities",
        &[
            yes("add", "names without `CAP_`, or `ALL`"),
            yes("drop", "names without `CAP_`, or `ALL`; wins over `add` by name"),
        ],
        "changes to the default set of containerd",
    ),
    yes("procMount", "`Default` or `Unmasked`"),
    object("seccompProfile", SECCOMP, ""),
    object("appArmorProfile", APPARMOR, ""),
    not_yet("seLinuxOptions"),
    not_yet("windowsOptions"),
];

/// The fields that init containers and containers have in common, and the one in which they differ.
macro_rules! container_fields {
    ($restart_policy:expr) => {
        &[
            yes("name", "required: a DNS label, unique in the pod"),
            yes("image", "required"),
            yes(
                "imagePullPolicy",
                "`Always`, `IfNotPresent`, `Never`; default `Always` for the tag `latest` or none, \
                 else `IfNotPresent`",
            ),
            yes("command", "replaces the image's entrypoint and arguments; `$(VAR)` is expanded"),
            yes("args", "replaces the image's arguments; `$(VAR)` is expanded"),
            list("env", ENV, "in this order; of a repeated name, the last wins"),
            list("envFrom", ENV_FROM, "before `env`, whose variables win"),
            yes("workingDir", "an absolute path; default: the image's"),
            list("ports", PORT, "every port is open, named here or not"),
            object("resources", RESOURCES, "size the container's cgroup and, together, the VM"),
            list("volumeMounts", MOUNT, ""),
            list(
                "volumeDevices",
                DEVICE,
                "disks as block devices, which the container may read and, unless the volume is \
                 `readOnly`, write",
            ),
            object("securityContext", SECURITY, "wins over the pod's"),
            yes("stdin", ""),
            yes("stdinOnce", ""),
            yes("tty", ""),
            $restart_policy,
            object("startupProbe", PROBE, "the others wait for its success"),
            object("livenessProbe", PROBE, "a container that fails it is ended"),
            object("readinessProbe", PROBE, "tells whether the container is ready"),
            object("lifecycle", LIFECYCLE, ""),
            yes("terminationMessagePath", "default `/dev/termination-log`; at most 4096 bytes"),
            yes(
                "terminationMessagePolicy",
                "`File` (default) or `FallbackToLogsOnError`: the last 80 lines, at most 2048 bytes",
            ),
            no_effect("resizePolicy", "nothing is resized"),
            not_yet("restartPolicyRules"),
        ]
    };
}

const CONTAINER: &[Field] = container_fields!(not_yet("restartPolicy"));

const INIT_CONTAINER: &[Field] = container_fields!(only(
    "restartPolicy",
    &[Text("Always")],
    "it makes a sidecar; other policies of single containers are not supported yet"
));

const ENV: &[Field] = &[
    yes("name", "required: printable ASCII without `=`"),
    yes("value", "`$(VAR)` of variables defined before is expanded; `$$` is a `$`"),
    object(
        "valueFrom",
        &[
            object("fieldRef", ENV_FIELD_REF, ""),
            object("resourceFieldRef", RESOURCE_FIELD_REF, ""),
            object("configMapKeyRef", KEY_REF, "a value of a ConfigMap in the same file"),
            object("secretKeyRef", KEY_REF, "a value of a Secret in the same file"),
            not_yet("fileKeyRef"),
        ],
        "instead of `value`",
    ),
];

const ENV_FIELD_REF: &[Field] = &[
    yes(
        "fieldPath",
        "`metadata.name`, `metadata.namespace`, `metadata.uid`, `metadata.labels['KEY']`, \
         `metadata.annotations['KEY']`, `spec.nodeName`, `spec.serviceAccountName`, \
         `status.podIP`, `status.podIPs`, `status.hostIP`, `status.hostIPs`",
    ),
    yes("apiVersion", "`v1`"),
];

const RESOURCE_FIELD_REF: &[Field] = &[
    yes(
        "resource",
        "`limits.cpu`, `limits.memory` (if unset: the VM's), `requests.cpu`, `requests.memory`",
    ),
    yes("containerName", "default: this container; required in volumes"),
    yes("divisor", "`1`, `1m` for CPU; `1`, `1k` to `1E`, `1Ki` to `1Ei` for memory"),
];

const OPTIONAL: &str = "what is missing is left out, and no error";

const KEY_REF: &[Field] =
    &[yes("name", "required"), yes("key", "required"), yes("optional", OPTIONAL)];

const OBJECT_REF: &[Field] = &[yes("name", "required"), yes("optional", OPTIONAL)];

const ENV_FROM: &[Field] = &[
    object("configMapRef", OBJECT_REF, "all of its `data`"),
    object("secretRef", OBJECT_REF, "all of it"),
    yes("prefix", "before every name"),
];

const PROBE: &[Field] = &[
    object("exec", EXEC, "success is exit code 0"),
    object("httpGet", HTTP_GET, "success is a status of 200 to 399"),
    object("tcpSocket", TCP_SOCKET, "success is a connection"),
    object(
        "grpc",
        &[yes("port", "required"), yes("service", "default: the whole server")],
        "gRPC health checking, without TLS",
    ),
    yes("initialDelaySeconds", "default 0"),
    yes("periodSeconds", "default 10"),
    yes("timeoutSeconds", "default 1"),
    yes("successThreshold", "default 1, and only that unless for readiness"),
    yes("failureThreshold", "default 3"),
    yes("terminationGracePeriodSeconds", "default: the pod's; not for readiness"),
];

const LIFECYCLE: &[Field] = &[
    object("postStart", HOOK, "if it fails, the container is ended"),
    object("preStop", HOOK, "within the grace period, before the signal"),
    not_yet("stopSignal"),
];

const HOOK: &[Field] = &[
    object("exec", EXEC, ""),
    object("httpGet", HTTP_GET, "any status is a success, as in Kubernetes"),
    object("sleep", &[yes("seconds", "at most the grace period")], ""),
    not_yet("tcpSocket"),
];

const EXEC: &[Field] = &[yes("command", "required: words, without a shell")];

const HOST: &str = "an address, `localhost` (the pod's) or a name; default: the pod's own";

const HTTP_GET: &[Field] = &[
    yes("host", HOST),
    yes("port", "required: a number, or the name of a port of the container"),
    yes("path", "with the query; default `/`"),
    yes("httpHeaders", "`name`, `value`"),
    yes("scheme", "`HTTP` (default), or `HTTPS`, with whatever certificate"),
];

const TCP_SOCKET: &[Field] =
    &[yes("host", HOST), yes("port", "required: a number, or the name of a port of the container")];

const PORT: &[Field] = &[
    yes("containerPort", "required: 1 to 65535"),
    yes("name", "unique in the container"),
    yes("protocol", "`TCP` (default), `UDP`, `SCTP`"),
    yes("hostPort", "a port of the host that leads to it; needs a network (`--network`)"),
    yes("hostIP", "the host's address that has the port; default: all"),
];

const RESOURCES: &[Field] = &[
    object("limits", AMOUNTS, ""),
    object("requests", AMOUNTS, "default: the limits"),
    not_yet("claims"),
];

const AMOUNTS: &[Field] = &[
    yes("cpu", "limit: quota (`cpu.max`); request: weight (`cpu.weight`)"),
    yes("memory", "limit: `memory.max`; request: only the quality-of-service class"),
    not_yet("ephemeral-storage"),
    not_yet("hugepages-*"),
    not_yet("*/*"),
];

const MOUNT: &[Field] = &[
    yes("name", "required: a volume of the pod"),
    yes("mountPath", "required: an absolute path, each once"),
    yes("readOnly", "default false; volumes of configMap and the like always are"),
    yes("subPath", "a relative path in the volume, made if it is missing"),
    yes("subPathExpr", "a `subPath` in which `$(VAR)` of declared variables is expanded"),
    yes(
        "recursiveReadOnly",
        "`Disabled` (default), or with `readOnly`, `IfPossible` and `Enabled`: what is mounted inside \
         is read-only too",
    ),
    yes(
        "mountPropagation",
        "`None` (default); `HostToContainer`: sees what other containers of the pod mount in the \
         volume with `Bidirectional`, which is for privileged ones",
    ),
];

const DEVICE: &[Field] = &[
    yes("name", "required: a `csi` volume of the pod that no container of it mounts; each once"),
    yes(
        "devicePath",
        "required: an absolute path, each once, not of a mount, not in `/proc` or `/sys`",
    ),
];

const MODE: &str = "default: `defaultMode`";
const PATH: &str = "required: relative, no part begins with `..`";

const KEY_TO_PATH: &[Field] = &[yes("key", "required"), yes("path", PATH), yes("mode", MODE)];

const DOWNWARD_ITEM: &[Field] = &[
    yes("path", PATH),
    yes("mode", MODE),
    object(
        "fieldRef",
        &[
            yes(
                "fieldPath",
                "`metadata.name`, `metadata.namespace`, `metadata.uid`, `metadata.labels`, \
                 `metadata.annotations`, `metadata.labels['KEY']`, `metadata.annotations['KEY']`",
            ),
            yes("apiVersion", "`v1`"),
        ],
        "",
    ),
    object("resourceFieldRef", RESOURCE_FIELD_REF, ""),
];

const PROJECTED_OBJECT: &[Field] = &[
    yes("name", "required"),
    list("items", KEY_TO_PATH, "default: all keys, as files of their names"),
    yes("optional", OPTIONAL),
];

const PROJECTION: &[Field] = &[
    object("configMap", PROJECTED_OBJECT, ""),
    object("secret", PROJECTED_OBJECT, ""),
    object("downwardAPI", &[list("items", DOWNWARD_ITEM, "")], ""),
    not_yet("serviceAccountToken"),
    not_yet("clusterTrustBundle"),
    not_yet("podCertificate"),
];

const VOLUME: &[Field] = &[
    yes("name", "required: a DNS label, unique in the pod"),
    object(
        "emptyDir",
        &[
            yes("medium", "empty (default): on the pod's scratch disk; `Memory`: a tmpfs"),
            yes(
                "sizeLimit",
                "for `Memory`, the size of the tmpfs, inside the memory limits; for the disk, the \
                 most that fits before ENOSPC",
            ),
        ],
        "",
    ),
    object(
        "configMap",
        &[
            yes("name", "required: a ConfigMap in the same file"),
            list("items", KEY_TO_PATH, "default: all keys, as files of their names"),
            yes("defaultMode", "default 0644"),
            yes("optional", OPTIONAL),
        ],
        "",
    ),
    object(
        "secret",
        &[
            yes("secretName", "required: a Secret in the same file"),
            list("items", KEY_TO_PATH, "default: all keys, as files of their names"),
            yes("defaultMode", "default 0644"),
            yes("optional", OPTIONAL),
        ],
        "",
    ),
    object(
        "downwardAPI",
        &[list("items", DOWNWARD_ITEM, ""), yes("defaultMode", "default 0644")],
        "",
    ),
    object(
        "hostPath",
        &[
            yes("path", "required: absolute, without `..`"),
            yes(
                "type",
                "empty (default): a file or a directory, which must be there; `DirectoryOrCreate`, \
                 `Directory`, `FileOrCreate`, `File`. No sockets and devices",
            ),
        ],
        "a file or directory of the host, by virtio-fs",
    ),
    object(
        "csi",
        &[
            yes(
                "driver",
                "required: `disk.husk.dev`, which stands for image files and block devices of the \
                 host; no other",
            ),
            yes(
                "fsType",
                "`ext4` (default) or `erofs`; nothing is formatted. Of no meaning with `volumeDevices`",
            ),
            yes("readOnly", "default false; must be true for `erofs`"),
            yes("volumeAttributes", "required: `path`, the absolute path of the file or device"),
            not_yet("nodePublishSecretRef"),
        ],
        "a disk that one pod may write, or any number may read; its owners and permissions stay",
    ),
    object("projected", &[list("sources", PROJECTION, ""), yes("defaultMode", "default 0644")], ""),
    not_yet("awsElasticBlockStore"),
    not_yet("azureDisk"),
    not_yet("azureFile"),
    not_yet("cephfs"),
    not_yet("cinder"),
    not_yet("ephemeral"),
    not_yet("fc"),
    not_yet("flexVolume"),
    not_yet("flocker"),
    not_yet("gcePersistentDisk"),
    not_yet("gitRepo"),
    not_yet("glusterfs"),
    not_yet("image"),
    not_yet("iscsi"),
    not_yet("nfs"),
    not_yet("persistentVolumeClaim"),
    not_yet("photonPersistentDisk"),
    not_yet("portworxVolume"),
    not_yet("quobyte"),
    not_yet("rbd"),
    not_yet("scaleIO"),
    not_yet("storageos"),
    not_yet("vsphereVolume"),
];

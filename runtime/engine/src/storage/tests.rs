//! Which disks pods have.

use super::*;
use crate::types::{Network, PodMetadata, RestartPolicy, VmSize};

fn spec(volumes: &[(Medium, Option<u64>)]) -> PodSpec {
    let volume = |(index, (medium, size_limit)): (usize, &(Medium, Option<u64>))| VolumeSpec {
        name: format!("v{index}"),
        source: VolumeSource::EmptyDir { medium: *medium, size_limit: *size_limit },
    };
    PodSpec {
        metadata: PodMetadata::default(),
        hostname: "h".into(),
        restart_policy: RestartPolicy::Never,
        termination_grace_s: 30,
        active_deadline_s: None,
        init_containers: Vec::new(),
        containers: Vec::new(),
        volumes: volumes.iter().enumerate().map(volume).collect(),
        vm: VmSize { vcpus: 1, memory_mib: 128 },
        fs_group: Some(7),
        supplemental_groups: Vec::new(),
        sysctls: BTreeMap::new(),
        service_account: String::new(),
        network: Network::Loopback,
        dns: Default::default(),
        host_aliases: Vec::new(),
    }
}

/// A layer whose digest ends with this number.
fn layer(number: usize) -> Layer {
    Layer {
        diff_id: format!("sha256:{number:064x}"),
        file: Arc::new(tempfile::tempfile().unwrap()),
    }
}

/// As [`layer`], with the number in the leading digits, which tell layers apart.
fn distinct(number: usize) -> Layer {
    let file = Arc::new(tempfile::tempfile().unwrap());
    Layer { diff_id: format!("sha256:{number:019x}{:045x}", 0), file }
}

fn containers(layers: Vec<Vec<Layer>>) -> BTreeMap<String, Vec<Layer>> {
    layers.into_iter().enumerate().map(|(index, layers)| (format!("c{index}"), layers)).collect()
}

fn serials(layout: &Layout) -> Vec<&str> {
    layout.disks.iter().map(|(serial, _)| serial.as_str()).collect()
}

#[test]
fn layers_are_shared_by_containers_and_kept_in_order() {
    let (one, two) = (distinct(1), distinct(2));
    let both = vec![one.clone(), two];
    let layout =
        layout(&spec(&[]), "uid", &containers(vec![both.clone(), both, vec![one]]), 1 << 30);
    let layout = layout.unwrap();
    let (first, second) = ("0000000000000000001", "0000000000000000002");
    assert_eq!(serials(&layout), ["scratch", first, second]);
    assert!(serials(&layout).iter().all(|serial| serial.len() <= MAX_SERIAL_LEN));
    assert_eq!(layout.root("c0").unwrap().lower, [first, second]);
    assert_eq!(layout.root("c2").unwrap().lower, [first]);
    assert_eq!(layout.root("c0").unwrap().upper_on, "scratch");
    assert!(layout.root("c3").is_none());
    let types: Vec<_> =
        layout.filesystems.iter().map(|fs| (fs.fstype.as_str(), fs.read_only)).collect();
    assert_eq!(types, [("ext4", false), ("erofs", true), ("erofs", true)]);
}

#[test]
fn a_layer_that_occurs_twice_in_an_image_counts_where_it_is_uppermost() {
    let (one, two) = (distinct(1), distinct(2));
    let image = vec![one.clone(), two, one];
    let layout = layout(&spec(&[]), "uid", &containers(vec![image]), 1 << 30).unwrap();
    let lower = &layout.root("c0").unwrap().lower;
    assert_eq!(lower, &["0000000000000000002", "0000000000000000001"]);
    assert_eq!(layout.disks.len(), 3);
}

#[test]
fn layers_that_cannot_be_told_apart_are_refused() {
    let refused = layout(&spec(&[]), "uid", &containers(vec![vec![layer(1), layer(2)]]), 1 << 30);
    assert!(matches!(refused, Err(StorageError::BadDigest { .. })));
    for digest in
        ["", "sha256", "sha256:12", "sha256:../../../../../../x", "sha256:ABCDEFABCDEFABCDEFABCDEF"]
    {
        let bad = Layer { diff_id: digest.into(), ..layer(1) };
        let refused = layout(&spec(&[]), "uid", &containers(vec![vec![bad]]), 1 << 30);
        assert!(matches!(refused, Err(StorageError::BadDigest { .. })), "{digest}");
    }
}

#[test]
fn an_image_without_layers_names_its_container() {
    let refused = layout(&spec(&[]), "uid", &containers(vec![Vec::new()]), 1 << 30).unwrap_err();
    assert!(matches!(&refused, StorageError::NoLayers { container } if container == "c0"));
}

#[test]
fn as_many_disks_as_a_vm_has_and_no_more() {
    let image = |count: usize| containers(vec![(0..count).map(distinct).collect()]);
    assert_eq!(
        layout(&spec(&[]), "uid", &image(MAX_DISKS - 1), 1 << 30).unwrap().disks.len(),
        MAX_DISKS
    );
    let refused = layout(&spec(&[]), "uid", &image(MAX_DISKS), 1 << 30).unwrap_err();
    let StorageError::TooManyDisks { needed, layers } = refused else { panic!("{refused}") };
    assert_eq!((needed, layers), (MAX_DISKS + 1, MAX_DISKS));
    let words = format!("{needed} disks ({layers} image layers, 1 others)");
    assert!(refused.to_string().contains(&words), "{refused}");
}

#[test]
fn volumes_are_directories_memory_or_disks_of_their_own() {
    use proto::volume::Source as Made;
    let gib = 1 << 30;
    let spec = spec(&[
        (Medium::Disk, None),
        (Medium::Disk, Some(gib)),
        (Medium::Memory, Some(4096)),
        (Medium::Memory, None),
        (Medium::Memory, Some(64 * gib)),
    ]);
    let layout = layout(&spec, "uid", &BTreeMap::new(), gib).unwrap();
    assert_eq!(serials(&layout), ["scratch", "vol-1"]);
    let memory = u64::from(spec.vm.memory_mib) << 20;
    let made: Vec<_> = layout.volumes.iter().map(|v| v.source.clone().unwrap()).collect();
    assert_eq!(
        made,
        [
            Made::DirectoryOn("scratch".into()),
            Made::Filesystem("vol-1".into()),
            Made::Tmpfs(proto::Tmpfs { size: 4096 }),
            Made::Tmpfs(proto::Tmpfs { size: memory }),
            Made::Tmpfs(proto::Tmpfs { size: memory }),
        ]
    );
    assert!(layout.volumes.iter().all(|v| v.mode == 0o777 && v.fs_group == Some(7)));
}

#[test]
fn volumes_of_files_carry_their_content() {
    let mut spec = spec(&[]);
    spec.metadata.labels.insert("app".into(), "web".into());
    let file = |path: &str, mode, content| FileSpec { path: path.into(), mode, content };
    let files = vec![
        file("a", 0o644, FileContent::Bytes(Hidden(vec![0, 255]))),
        file("uid", 0o400, FileContent::Field(crate::types::FieldRef::Uid)),
        file("l/s", 0o600, FileContent::Field(crate::types::FieldRef::Labels)),
    ];
    spec.volumes.push(VolumeSpec { name: "f".into(), source: VolumeSource::Files(files) });
    let layout = layout(&spec, "u-1", &BTreeMap::new(), 1 << 30).unwrap();
    assert_eq!(serials(&layout), ["scratch"], "they need no disk");
    let Some(proto::volume::Source::Files(made)) = &layout.volumes[0].source else { panic!() };
    let made: Vec<_> =
        made.files.iter().map(|f| (f.path.as_str(), f.content.as_slice(), f.mode)).collect();
    let expected: [(&str, &[u8], u32); 3] =
        [("a", &[0, 255], 0o644), ("uid", b"u-1", 0o400), ("l/s", b"app=\"web\"", 0o600)];
    assert_eq!(made, expected);
    assert_eq!((layout.volumes[0].mode, layout.volumes[0].fs_group), (0o755, Some(7)));
}

#[test]
fn files_of_the_host_are_shares_in_their_order_and_keep_their_owners() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("f");
    std::fs::write(&file, "").unwrap();
    let mut spec = crate::pod::stand_in::spec(&["a", "b"]);
    spec.fs_group = Some(7);
    let volume = |name: &str, source| VolumeSpec { name: name.into(), source };
    let of_host = |path: &Path| VolumeSource::HostPath {
        path: path.into(),
        kind: crate::types::HostPathType::Any,
    };
    let disk = VolumeSource::EmptyDir { medium: Medium::Disk, size_limit: None };
    spec.volumes = vec![
        volume("x", of_host(directory.path())),
        volume("e", disk),
        volume("y", of_host(&file)),
        volume("unused", of_host(&file)),
    ];
    let mount = |volume: &str, read_only| crate::types::VolumeMount {
        volume: volume.into(),
        mount_path: format!("/{volume}"),
        read_only,
        recursive_read_only: false,
        sub_path: None,
        propagation: Default::default(),
    };
    spec.containers[0].volume_mounts = vec![mount("x", true), mount("y", true)];
    spec.containers[1].volume_mounts = vec![mount("x", true), mount("y", false)];

    let layout = layout(&spec, "u", &BTreeMap::new(), 1 << 30).unwrap();
    use proto::volume::Source as Made;
    let made: Vec<_> = layout.volumes.iter().map(|v| v.source.clone().unwrap()).collect();
    let expected =
        [Made::Share(0), Made::DirectoryOn("scratch".into()), Made::Share(1), Made::Share(2)];
    assert_eq!(made, expected);
    let groups: Vec<_> = layout.volumes.iter().map(|volume| volume.fs_group).collect();
    assert_eq!(groups, [None, Some(7), None, None]);

    let shares = host_path::open_shares(&spec).unwrap();
    let shares: Vec<_> = shares.iter().map(|share| (&*share.name, share.read_only)).collect();
    // The host sees to it that what every container may only read is not written.
    assert_eq!(shares, [("x", true), ("y", false), ("unused", true)]);

    spec.volumes[2].source = of_host(&directory.path().join("none"));
    let error = crate::pod::chain(&host_path::open_shares(&spec).unwrap_err());
    assert!(error.starts_with("spec.volumes[2].hostPath: ") && error.contains("/none: there is"));
}

#[test]
fn a_disk_of_the_host_keeps_its_owners_and_its_access() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let mut bytes = vec![0; 1 << 16];
    bytes[1080..1082].copy_from_slice(&[0x53, 0xef]);
    std::fs::write(&path, bytes).unwrap();
    let mut spec = spec(&[]);
    spec.fs_group = Some(7);
    let source = VolumeSource::Disk { path: path.clone(), fstype: FsType::Ext4, read_only: true };
    spec.volumes.push(VolumeSpec { name: "d".into(), source });
    let plan = layout(&spec, "uid", &BTreeMap::new(), 1 << 20).unwrap();
    let filesystem = plan.filesystems.last().unwrap();
    assert_eq!((filesystem.fstype.as_str(), filesystem.read_only), ("ext4", true));
    let volume = plan.volumes.last().unwrap();
    assert_eq!((volume.mode, volume.fs_group), (0, None));
    let made = proto::volume::Source::Filesystem(filesystem.name.clone());
    assert_eq!(volume.source, Some(made));

    let (_, source) = plan.disks.last().unwrap();
    assert!(matches!(source, Source::Host { read_only: true, .. }));
}

#[test]
fn a_disk_that_is_a_block_device_to_a_container_is_mounted_by_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw.img");
    // No file system that husk could mount.
    std::fs::write(&path, vec![0; 1 << 16]).unwrap();
    let mut spec = crate::pod::stand_in::spec(&["a", "b"]);
    for (name, read_only) in [("w", false), ("r", true)] {
        let source = VolumeSource::Disk { path: path.clone(), fstype: FsType::Ext4, read_only };
        spec.volumes.push(VolumeSpec { name: name.into(), source });
    }
    let device = |volume: &str| VolumeDevice {
        volume: volume.into(),
        device_path: format!("/dev/{volume}"),
    };
    spec.containers[0].volume_devices = vec![device("w"), device("r")];
    spec.containers[0].security.run_as_user = Some(1000);
    spec.containers[0].security.run_as_group = Some(2000);
    let mut plan = layout(&spec, "uid", &BTreeMap::new(), 1 << 30).unwrap();

    assert!(plan.volumes.is_empty());
    let names: Vec<_> = plan.filesystems.iter().map(|filesystem| &*filesystem.name).collect();
    assert_eq!(names, ["scratch"]);
    let devices = plan.devices(&spec.containers[0]);
    let expected = [("w", "vol-0", false), ("r", "vol-1", true)];
    let expected = expected.map(|(volume, serial, read_only)| proto::BlockDevice {
        disk_serial: serial.into(),
        path: format!("/dev/{volume}"),
        read_only,
        uid: 1000,
        gid: 2000,
    });
    assert_eq!(devices, expected);
    assert!(plan.devices(&spec.containers[1]).is_empty());

    // Of these alone, which need no mkfs.
    plan.disks.retain(|(serial, _)| serial == "vol-1");
    let config = ext4::tests::config(dir.path());
    let [disk] = &plan.open(&config).unwrap()[..] else { panic!("not one") };
    assert_eq!((&*disk.serial, disk.read_only), ("vol-1", true));
}

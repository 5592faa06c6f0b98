//! What the kernel makes of the blobs: mounted, alone and under overlayfs. The reference
//! implementation in user space reads them in the unit tests.
//!
//! Needs root and a kernel with EROFS and overlayfs: built with the feature `kernel-tests`, and run
//! in the test host.

mod common;

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{OCI_MANIFEST, TestImage, chain, descriptor, image_of};
use husk_image::{Image, ImportOptions, Platform, Store};
use rustix::fs::{XattrFlags, getxattr, setxattr};
use tempfile::TempDir;

/// Runs a shell command in a directory; returns what it printed.
fn shell(directory: &Path, command: &str) -> String {
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", command])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Unmounts when dropped.
struct Mount(PathBuf);

impl Mount {
    fn new(at: PathBuf, arguments: &str) -> Self {
        fs::create_dir(&at).unwrap();
        shell(Path::new("/"), &format!("mount {arguments} '{}'", at.display()));
        Self(at)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        shell(Path::new("/"), &format!("umount '{}'", self.0.display()));
    }
}

/// Imports an image of these layers.
fn import(directory: &TempDir, layers: Vec<Vec<u8>>) -> Image {
    let TestImage { config, layers, manifest } = image_of("amd64", layers);
    let layout = directory.path().join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    for blob in layers.iter().chain([&config, &manifest]) {
        fs::write(blobs.join(husk_image::Digest::of(blob).to_hex()), blob).unwrap();
    }
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = serde_json::json!({
        "schemaVersion": 2, "manifests": [descriptor(OCI_MANIFEST, &manifest)],
    });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let store = Store::open(directory.path().join("store")).unwrap();
    let platform = Platform::default();
    let options = ImportOptions { name: Some("test"), ..ImportOptions::new(&platform) };
    store.import_oci_layout(&layout, &options).unwrap_or_else(|error| panic!("{}", chain(&error)));
    store.resolve("test").unwrap()
}

fn mount_layer(directory: &TempDir, image: &Image, number: usize) -> Mount {
    let blob = image.layers[number].path.display();
    let at = directory.path().join(format!("layer{number}"));
    Mount::new(at, &format!("-t erofs -o ro,loop '{blob}'"))
}

#[test]
fn kernel_reads_a_tree_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    shell(
        &tree,
        "mkdir -p etc many 'odd names' deep/{1..9}/x
         echo hello > etc/motd; : > empty
         for size in 1 2047 2048 2049 4095 4096 4097 100000; do
           head -c $size /dev/urandom > f$size; done
         for n in {1..1500}; do echo $n > many/file-with-a-longer-name-$n; done
         touch 'odd names/ !' 'odd names/-' 'odd names/.hidden' $'odd names/new\\nline'
         ln -s etc/motd link; ln -s \"$(printf 'x/%.0s' {1..1500})\" longlink
         ln etc/motd hard; mknod null c 1 3; mknod disk b 259 70000; mkfifo fifo
         chmod 4755 f1; chmod 1777 many; chown 4000000000:12345 f2047
         touch -d '1960-01-02 03:04:05.678' f4096",
    );
    let big = vec![b'v'; 3000];
    let xattrs: [(&str, &str, &[u8]); 3] = [
        ("etc/motd", "user.note", b"value"),
        ("f2048", "trusted.big", &big),
        ("many", "trusted.one", b"1"),
    ];
    for (path, name, value) in xattrs {
        setxattr(tree.join(path), name, value, XattrFlags::empty()).unwrap();
    }
    shell(
        directory.path(),
        "tar --xattrs --xattrs-include='*' --format=pax -cf tree.tar -C tree .",
    );
    let layer = fs::read(directory.path().join("tree.tar")).unwrap();
    let image = import(&directory, vec![layer]);
    let mount = mount_layer(&directory, &image, 0);
    // Type, mode, owner, size, links, device, nanosecond of change, target; then content.
    let listing = "find . -mindepth 1 -printf '%p %y %m %U:%G %n %T@ %l ' \
                   \\( -type d -printf '\\n' -o -printf '%s\\n' \\) | LC_ALL=C sort";
    let (read, made) = (shell(&mount.0, listing), shell(&tree, listing));
    assert!(read.lines().count() > 1500);
    for (read, made) in read.lines().zip(made.lines()) {
        assert_eq!(read, made);
    }
    assert_eq!(read.len(), made.len());
    shell(
        directory.path(),
        "diff -r --no-dereference --exclude=null --exclude=disk --exclude=fifo tree layer0",
    );
    for (path, name, value) in xattrs {
        let mut read = [0; 4096];
        let len = getxattr(mount.path(path), name, &mut read).unwrap();
        assert_eq!(&read[..len], value, "{path} {name}");
    }
    for name in ["null", "disk"] {
        let (read, made) =
            (mount.path(name).metadata().unwrap(), tree.join(name).metadata().unwrap());
        assert_eq!(read.rdev(), made.rdev(), "{name}");
    }
    assert!(mount.path("fifo").metadata().unwrap().file_type().is_fifo());
    assert_eq!(
        mount.path("hard").metadata().unwrap().ino(),
        mount.path("etc/motd").metadata().unwrap().ino()
    );
}

#[test]
fn overlay_of_layers_shows_what_the_image_says() {
    let directory = tempfile::tempdir().unwrap();
    let mut layers = Vec::new();
    for script in [
        "mkdir a b c d; echo 1 > a/gone; echo 1 > a/kept; echo 1 > b/hidden; echo 1 > c/x; echo 1 > d/y",
        "mkdir a b c; touch a/.wh.gone; echo 2 > a/new; touch b/.wh..wh..opq; echo 2 > b/own
         touch .wh.c; rmdir c; mkdir c; echo 2 > c/z; touch .wh.d",
    ] {
        let tree = directory.path().join(format!("tree{}", layers.len()));
        fs::create_dir(&tree).unwrap();
        shell(&tree, script);
        shell(&tree, "tar -cf ../layer.tar .");
        layers.push(fs::read(directory.path().join("layer.tar")).unwrap());
    }
    let image = import(&directory, layers);
    let (lower, upper) = (mount_layer(&directory, &image, 0), mount_layer(&directory, &image, 1));
    let options =
        format!("-t overlay overlay -o ro,lowerdir={}:{}", upper.0.display(), lower.0.display());
    let merged = Mount::new(directory.path().join("merged"), &options);
    let files = shell(&merged.0, "find . -mindepth 1 | sort");
    assert_eq!(files, "./a\n./a/kept\n./a/new\n./b\n./b/own\n./c\n./c/z\n");
    drop(merged);
}

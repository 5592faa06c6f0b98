use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::erofs::reader::{ReadFile, read_blob};
use crate::limits::Limits;

/// Builds archives, hostile ones as well.
pub(crate) struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// An entry whose path goes into the header as it is.
    fn raw(mut self, kind: u8, path: &str, link: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.as_mut_bytes()[156] = kind;
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(100);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        if matches!(kind, b'3' | b'4') {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, data: &[u8]) -> Self {
        self.raw(b'0', path, "", 0o644, data)
    }

    fn dir(self, path: &str) -> Self {
        self.raw(b'5', path, "", 0o755, b"")
    }

    fn symlink(self, path: &str, target: &str) -> Self {
        self.raw(b'2', path, target, 0o777, b"")
    }

    fn hard_link(self, path: &str, target: &str) -> Self {
        self.raw(b'1', path, target, 0o644, b"")
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn convert(self) -> Result<Vec<u8>, LayerError> {
        convert_plain(&self.bytes())
    }

    fn read(self) -> BTreeMap<String, ReadFile> {
        let blob = self.convert().unwrap();
        fsck(&blob);
        read_blob(&blob)
    }
}

fn convert_plain(archive: &[u8]) -> Result<Vec<u8>, LayerError> {
    let spec = LayerSpec {
        blob: Some((Digest::of(archive), archive.len() as u64)),
        diff_id: Digest::of(archive),
        compression: Compression::None,
    };
    convert_with(archive, &spec, &Limits::default())
}

fn convert_with(input: &[u8], spec: &LayerSpec, limits: &Limits) -> Result<Vec<u8>, LayerError> {
    let mut out = io::Cursor::new(Vec::new());
    let stats = convert(input, spec, limits, &mut out, &|_| {})?;
    assert_eq!(stats.size, out.get_ref().len() as u64);
    Ok(out.into_inner())
}

/// The reference implementation must find nothing wrong.
fn fsck(blob: &[u8]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), blob).unwrap();
    let output = Command::new("fsck.erofs")
        .arg("--extract")
        .arg(file.path())
        .output()
        .expect("fsck.erofs (package erofs-utils) must be installed");
    assert!(output.status.success(), "{output:?}");
}

/// An error and everything below it, as the command line prints it.
fn chain(error: &LayerError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

fn refusal(archive: Archive) -> String {
    match archive.convert() {
        Ok(blob) => format!("accepted: {:?}", read_blob(&blob)),
        Err(error) => chain(&error),
    }
}

#[test]
fn every_kind_of_file_arrives_with_its_attributes() {
    let long_link = "x/".repeat(45);
    let big = vec![7; 10_000];
    let files = Archive::new()
        .raw(b'5', "./", "", 0o700, b"")
        .dir("bin/")
        .raw(b'0', "bin/su", "", 0o4755, b"program")
        .file("big", &big)
        .file("empty", b"")
        .file("block", &[1; 4096])
        .symlink("sh", "bin/su")
        .symlink("long", &long_link)
        .hard_link("bin/again", "./bin/su")
        .raw(b'3', "null", "", 0o666, b"")
        .raw(b'4', "disk", "", 0o660, b"")
        .raw(b'6', "fifo", "", 0o600, b"")
        .read();
    assert_eq!(files.len(), 12);
    assert_eq!(files[""].mode, 0o040_700);
    assert_eq!(files[""].nlink, 3);
    let su = &files["/bin/su"];
    assert_eq!((su.mode, su.uid, su.gid), (0o104_755, 1000, 100));
    assert_eq!((su.mtime, su.nlink, su.data.as_slice()), ((1_700_000_000, 0), 2, &b"program"[..]));
    assert_eq!(files["/bin/again"], *su);
    assert_eq!(files["/big"].data, big);
    assert_eq!(files["/empty"].data, b"");
    assert_eq!(files["/block"].data, [1; 4096]);
    assert_eq!((files["/sh"].mode, files["/sh"].data.as_slice()), (0o120_777, &b"bin/su"[..]));
    assert_eq!(files["/long"].data, long_link.as_bytes());
    assert_eq!((files["/null"].mode, files["/null"].device), (0o020_666, 0x103));
    assert_eq!((files["/disk"].mode, files["/disk"].device), (0o060_660, 0x103));
    assert_eq!(files["/fifo"].mode, 0o010_600);
}

#[test]
fn extension_headers_correct_the_entry() {
    let path = "d/".repeat(100) + &"n".repeat(200);
    let long_target = "t".repeat(3000);
    let capability: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let files = Archive::new()
        .pax(&[
            ("path", path.as_bytes()),
            ("uid", b"4000000000"),
            ("gid", b"3000000"),
            ("mtime", b"-1.25"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.user.note", b"a=b\nc"),
            ("SCHILY.xattr.com.apple.what", b"left out"),
        ])
        .file("short", b"data")
        .pax(&[("linkpath", long_target.as_bytes())])
        .symlink("link", "x")
        .pax(&[("size", b"5")])
        .raw(b'0', "sized", "", 0o600, b"12345")
        .read();
    let file = &files[&format!("/{path}")];
    assert_eq!((file.uid, file.gid), (4_000_000_000, 3_000_000));
    assert_eq!(file.mtime, (-2, 750_000_000));
    assert_eq!(file.xattrs.len(), 2);
    assert_eq!(file.xattrs["security.capability"], capability);
    assert_eq!(file.xattrs["user.note"], b"a=b\nc");
    // Too long to lie behind its inode.
    assert_eq!(files["/link"].data, long_target.as_bytes());
    assert_eq!(files["/sized"].data, b"12345");
}

#[test]
fn gnu_long_names_are_joined() {
    let path = "g/".repeat(60) + "file";
    let name = [path.as_bytes(), b"\0"].concat();
    let target = "l".repeat(150);
    let files = Archive::new()
        .raw(b'L', "././@LongLink", "", 0, &name)
        .file("cut", b"1")
        .raw(b'K', "././@LongLink", "", 0, target.as_bytes())
        .symlink("s", "cut")
        .read();
    assert_eq!(files[&format!("/{path}")].data, b"1");
    assert_eq!(files["/s"].data, target.as_bytes());
}

#[test]
fn large_extended_attributes_span_blocks() {
    let value = vec![9; 60_000];
    let files = Archive::new()
        .pax(&[("SCHILY.xattr.user.big", &value), ("SCHILY.xattr.user.small", b"s")])
        .file("f", b"inline otherwise")
        .read();
    assert_eq!(files["/f"].xattrs["user.big"], value);
    assert_eq!(files["/f"].xattrs["user.small"], b"s");
    assert_eq!(files["/f"].data, b"inline otherwise");
}

#[test]
fn missing_parents_are_made_for_root() {
    let files = Archive::new().file("a/b/c", b"x").read();
    for path in ["/a", "/a/b"] {
        assert_eq!((files[path].mode, files[path].uid), (0o040_755, 0), "{path}");
    }
}

#[test]
fn last_of_several_entries_wins() {
    let files = Archive::new()
        .file("f", b"first")
        .hard_link("kept", "f")
        .file("f", b"second")
        .file("d/inside", b"x")
        .raw(b'5', "d", "", 0o711, b"")
        .file("gone/inside", b"x")
        .file("gone", b"a file now")
        .read();
    assert_eq!(files["/f"].data, b"second");
    assert_eq!(files["/kept"].data, b"first");
    assert_eq!(files["/d"].mode, 0o040_711);
    assert!(files.contains_key("/d/inside"));
    assert_eq!(files["/gone"].data, b"a file now");
    assert!(!files.contains_key("/gone/inside"));
}

#[test]
fn whiteouts_become_what_overlayfs_understands() {
    let opaque = |file: &ReadFile| {
        file.xattrs.get("trusted.overlay.opaque").map(Vec::as_slice) == Some(&b"y"[..])
    };
    let files = Archive::new()
        .file("etc/.wh.motd", b"")
        .file("var/.wh..wh..opq", b"")
        .raw(b'5', "var", "", 0o755, b"")
        .file("remade/.wh.a", b"")
        .file("remade/a/new", b"x")
        .file("late/b/new", b"x")
        .file("late/.wh.b", b"")
        .file("file", b"x")
        .file(".wh.file", b"")
        .file(".wh..wh.aufs", b"")
        .read();
    assert_eq!((files["/etc/motd"].mode, files["/etc/motd"].device), (0o020_000, 0));
    assert!(opaque(&files["/var"]), "metadata that comes later keeps it");
    assert!(opaque(&files["/remade/a"]));
    assert!(opaque(&files["/late/b"]));
    assert!(files.contains_key("/late/b/new"));
    assert_eq!(files["/file"].data, b"x", "a whiteout hides nothing of its own layer");
    assert!(!files.contains_key("/.wh..wh.aufs"));
}

#[test]
fn symlinks_on_the_way_are_followed_inside_the_layer() {
    let files = Archive::new()
        .dir("usr/lib")
        .symlink("lib", "usr/lib")
        .symlink("up", "../../../usr")
        .symlink("abs", "/new/place")
        .file("lib/a", b"1")
        .file("up/b", b"2")
        .file("abs/c", b"3")
        .hard_link("d", "lib/a")
        .read();
    assert_eq!(files["/usr/lib/a"].data, b"1");
    assert_eq!(files["/usr/b"].data, b"2");
    assert_eq!(files["/new/place/c"].data, b"3");
    assert_eq!(files["/d"].nid, files["/usr/lib/a"].nid);
    assert_eq!(files["/lib"].mode, 0o120_777);
}

#[test]
fn large_directories_are_found_whole() {
    let mut archive = Archive::new();
    for number in 0..3000 {
        archive = archive.file(&format!("d/!{number:0>width$}", width = number % 90 + 1), b"");
    }
    let files = archive.read();
    assert!(files.len() > 2900, "{}", files.len());
}

#[test]
fn hostile_entries_are_refused_by_name() {
    let far = "d/".repeat(45);
    for (archive, expected) in [
        (Archive::new().file("../etc/passwd", b"x"), "\"../etc/passwd\": it contains '..'"),
        (Archive::new().file("a/../../b", b"x"), "it contains '..'"),
        (Archive::new().file(".wh.", b""), "whiteout that names nothing"),
        (Archive::new().file(".", b""), "which must be a directory"),
        (Archive::new().hard_link("l", "../x"), "it contains '..'"),
        (Archive::new().hard_link("l", "nothing"), "\"l\" is a link to \"nothing\": no earlier"),
        (Archive::new().dir("d").hard_link("l", "d"), "it is a directory"),
        (Archive::new().hard_link("l", "l"), "no earlier entry"),
        (Archive::new().file(".wh.w", b"").hard_link("l", "w"), "no earlier entry"),
        (Archive::new().file("f", b"").file("f/below", b""), "\"f\", which is not a directory"),
        (Archive::new().symlink("a", "b").symlink("b", "a").file("a/x", b""), "too many symbolic"),
        (Archive::new().symlink("s", ""), "it is empty"),
        (
            Archive::new().raw(b'S', "f", "", 0, b""),
            "\"f\" at byte 0 is of the unsupported type sparse",
        ),
        (Archive::new().raw(b'Z', "f", "", 0, b""), "unsupported type 'Z'"),
        (Archive::new().pax(&[("GNU.sparse.map", b"0,1")]).file("f", b"x"), "sparse file"),
        (Archive::new().pax(&[("path", b"a\0b")]).file("f", b"x"), "contains a NUL"),
        (
            Archive::new().pax(&[("path", "p".repeat(5000).as_bytes())]).file("f", b""),
            "5000 bytes, more than 4095",
        ),
        (
            Archive::new().pax(&[("path", "p".repeat(256).as_bytes())]).file("f", b""),
            "longer than 255",
        ),
        (Archive::new().pax(&[("uid", b"4294967296")]).file("f", b""), "a bad value"),
        (Archive::new().pax(&[("size", b"-1")]).file("f", b""), "a bad value"),
        (
            Archive::new().pax(&[("comment", &vec![b'x'; 2 << 20])]).file("f", b""),
            "more than 1048576",
        ),
        (
            Archive::new().raw(b'x', "p", "", 0, b"no records").file("f", b""),
            "pax header at byte 0",
        ),
        (Archive::new().raw(b'x', "p", "", 0, b"99 a=b\n").file("f", b""), "pax header at byte 0"),
        (
            Archive::new().raw(b'L', "l", "", 0, &[b'x'; 9000]).file("f", b""),
            "path at byte 0 has 9000",
        ),
        (Archive::new().pax(&[("comment", b"last")]), "the archive ends early"),
        (
            Archive::new().pax(&[("SCHILY.xattr.user.x", &vec![0; 70_000])]).file("f", b""),
            "too long",
        ),
        (
            (0..17)
                .fold(Archive::new(), |archive, _| archive.pax(&[("comment", b"c")]))
                .file(&far, b""),
            "extension headers in a row",
        ),
    ] {
        let message = refusal(archive);
        assert!(message.contains(expected), "{message:?} should say {expected:?}");
    }
}

#[test]
fn truncated_archives_are_refused_wherever_they_end() {
    let whole = Archive::new().file("a", &[1; 3000]).file("b", &[2; 5000]).bytes();
    for end in [1, 511, 513, 600, 3000, 3600, 4097, 5000] {
        let message = chain(&convert_plain(&whole[..end]).unwrap_err());
        assert!(message.contains("ends"), "{end}: {message}");
    }
    // Without the zeros at its end an archive is accepted: the digest vouches for it.
    convert_plain(&whole[..512 + 3072]).unwrap();
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn spec_of(stored: &[u8], plain: &[u8], compression: Compression) -> LayerSpec {
    LayerSpec {
        blob: Some((Digest::of(stored), stored.len() as u64)),
        diff_id: Digest::of(plain),
        compression,
    }
}

#[test]
fn compressions_give_the_same_blob() {
    let plain = Archive::new().file("a", &[1; 30_000]).bytes();
    let blob = convert_plain(&plain).unwrap();
    let gzip = gzip(&plain);
    // Several members, as parallel compressors write them.
    let (first, second) = plain.split_at(700);
    let members = [self::gzip(first), self::gzip(second)].concat();
    let zstd = zstd::encode_all(plain.as_slice(), 3).unwrap();
    for (stored, compression) in [
        (&gzip, Compression::Gzip),
        (&members, Compression::Gzip),
        (&zstd, Compression::Zstd),
        (&gzip, Compression::Detect),
        (&zstd, Compression::Detect),
        (&plain, Compression::Detect),
    ] {
        let spec = spec_of(stored, &plain, compression);
        assert_eq!(convert_with(stored, &spec, &Limits::default()).unwrap(), blob);
    }
}

#[test]
fn wrong_bytes_are_told_by_their_digest_and_length() {
    let plain = Archive::new().file("a", &[1; 30_000]).bytes();
    let stored = gzip(&plain);
    let good = spec_of(&stored, &plain, Compression::Gzip);
    let limits = Limits::default();

    let mut damaged = stored.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x55;
    let error = convert_with(&damaged, &good, &limits).unwrap_err();
    assert!(matches!(error, LayerError::Digest { .. }), "{}", chain(&error));

    let error = convert_with(&stored[..middle], &good, &limits).unwrap_err();
    assert!(matches!(error, LayerError::Size { .. }), "{}", chain(&error));

    let longer = [stored.as_slice(), b"more"].concat();
    let message = chain(&convert_with(&longer, &good, &limits).unwrap_err());
    assert!(message.contains("more than"), "{message}");

    let spec = LayerSpec { diff_id: Digest::of(b"other"), ..good };
    let error = convert_with(&stored, &spec, &limits).unwrap_err();
    assert!(matches!(error, LayerError::DiffId { .. }), "{}", chain(&error));
}

#[test]
fn bombs_end_at_their_limits() {
    let plain = Archive::new().file("zeros", &vec![0; 4 << 20]).bytes();
    let stored = gzip(&plain);
    let spec = spec_of(&stored, &plain, Compression::Gzip);
    let base = Limits::default();
    let limits = Limits { max_ratio: 100, bomb_free_bytes: 1 << 20, ..base };
    let message = chain(&convert_with(&stored, &spec, &limits).unwrap_err());
    assert!(message.contains("decompression bomb"), "{message}");
    let limits = Limits { max_layer_bytes: 1 << 20, ..base };
    let message = chain(&convert_with(&stored, &spec, &limits).unwrap_err());
    assert!(message.contains("more than the 1048576 bytes"), "{message}");

    let plain = Archive::new().file("a/b/c/d/e/f", b"").bytes();
    let spec = spec_of(&plain, &plain, Compression::None);
    let limits = Limits { max_layer_entries: 5, ..base };
    let message = chain(&convert_with(&plain, &spec, &limits).unwrap_err());
    assert!(message.contains("more than 5 files"), "{message}");
    let limits = Limits { max_layer_name_bytes: 5, ..base };
    let message = chain(&convert_with(&plain, &spec, &limits).unwrap_err());
    assert!(message.contains("names in the layer take more than 5"), "{message}");
    let plain = Archive::new().pax(&[("SCHILY.xattr.user.x", b"12345")]).file("f", b"").bytes();
    let spec = spec_of(&plain, &plain, Compression::None);
    let limits = Limits { max_layer_xattr_bytes: 5, ..base };
    let message = chain(&convert_with(&plain, &spec, &limits).unwrap_err());
    assert!(message.contains("extended attributes in the layer"), "{message}");
}

/// A disk that is full after so many bytes.
struct SmallDisk(io::Cursor<Vec<u8>>, usize);

impl Write for SmallDisk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.get_ref().len() + bytes.len() > self.1 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for SmallDisk {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn full_disk_is_reported_as_such() {
    let plain = Archive::new().file("a", &[1; 100_000]).bytes();
    let spec = spec_of(&plain, &plain, Compression::None);
    let out = SmallDisk(io::Cursor::new(Vec::new()), 50_000);
    let error = convert(&plain[..], &spec, &Limits::default(), out, &|_| {}).unwrap_err();
    assert!(matches!(error, LayerError::Write { source: WriteError::Blob(_), .. }), "{error:?}");
}

/// A file of a random tree.
#[derive(Debug, Clone)]
enum Model {
    File(Vec<u8>),
    Directory,
    Symlink(String),
}

fn model() -> impl Strategy<Value = BTreeMap<String, Model>> {
    let name = "[!-.0-9A-Za-z\u{e9}]{1,30}".prop_filter("no special names", |name| {
        name != "." && name != ".." && !name.starts_with(".wh.")
    });
    let path = prop::collection::vec(name, 1..4).prop_map(|parts| parts.join("/"));
    let sizes = prop_oneof![0usize..100, 1900usize..2200, 4000usize..4200, 0usize..20_000];
    let file = (sizes, any::<u8>()).prop_map(|(size, byte)| Model::File(vec![byte; size]));
    let link = "[a-z/.]{1,80}".prop_map(Model::Symlink);
    prop::collection::btree_map(path, prop_oneof![file, Just(Model::Directory), link], 0..60)
        .prop_map(|mut files| {
            // Nothing lies below a file.
            let blocked: Vec<String> = files
                .iter()
                .filter(|(_, file)| !matches!(file, Model::Directory))
                .map(|(path, _)| format!("{path}/"))
                .collect();
            files.retain(|path, _| !blocked.iter().any(|above| path.starts_with(above.as_str())));
            files
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_trees_survive(files in model()) {
        let mut archive = Archive::new();
        for (path, file) in &files {
            let records: [(&str, &[u8]); 1] = [("path", path.as_bytes())];
            archive = archive.pax(&records);
            archive = match file {
                Model::File(data) => archive.file("f", data),
                Model::Directory => archive.dir("d"),
                Model::Symlink(target) => archive.symlink("s", target),
            };
        }
        let blob = archive.convert().unwrap();
        fsck(&blob);
        let read = read_blob(&blob);
        for (path, file) in &files {
            let found = &read[&format!("/{path}")];
            match file {
                Model::File(data) => prop_assert_eq!(&found.data, data),
                Model::Directory => prop_assert_eq!(found.mode, 0o040_755),
                Model::Symlink(target) => prop_assert_eq!(&found.data, target.as_bytes()),
            }
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        if let Ok(blob) = convert_plain(&bytes) {
            read_blob(&blob);
        }
    }

    /// Damage behind a correct checksum, which random bytes would hardly have.
    #[test]
    fn damaged_headers_never_panic(
        damage in prop::collection::vec((0usize..6000, any::<u8>()), 1..12),
    ) {
        let mut bytes = Archive::new()
            .pax(&[("path", b"some/where"), ("SCHILY.xattr.user.a", b"b")])
            .file("x", b"data")
            .symlink("some/link", "where")
            .hard_link("hard", "some/where")
            .bytes();
        let len = bytes.len();
        for (at, byte) in damage {
            bytes[at % len] = byte;
        }
        for start in (0..len).step_by(512) {
            let header = &mut bytes[start..start + 512];
            if header[257..262] == *b"ustar" {
                header[148..156].fill(b' ');
                let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
                header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            }
        }
        if let Ok(blob) = convert_plain(&bytes) {
            read_blob(&blob);
        }
    }
}

use super::*;

/// An archive of one empty file whose header has these bytes, and a right checksum.
fn archive(patches: &[(usize, &[u8])]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path("f").unwrap();
    header.set_size(0);
    header.set_mode(0o644);
    for (at, bytes) in patches {
        header.as_mut_bytes()[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn entry(patches: &[(usize, &[u8])]) -> Result<Entry, TarError> {
    TarReader::new(archive(patches).as_slice()).next_entry().map(Option::unwrap)
}

#[test]
fn numbers_are_octal_or_binary() {
    for (field, expected) in [
        (*b"0000644\0", Some(0o644)),
        (*b"    644 ", Some(0o644)),
        (*b"644\0\0\0\0\0", Some(0o644)),
        ([0; 8], Some(0)),
        ([0x80, 0, 0, 0, 0xEE, 0x6B, 0x28, 0], Some(4_000_000_000)),
        (*b"0000648\0", None),
        (*b"12 34\0\0\0", None),
        // -1, and 2^32.
        ([0xFF; 8], None),
        ([0x80, 0, 0, 1, 0, 0, 0, 0], None),
    ] {
        let uid = entry(&[(108, &field)]);
        match expected {
            Some(expected) => assert_eq!(uid.unwrap().uid, expected, "{field:?}"),
            None => {
                let error = uid.unwrap_err();
                assert!(matches!(error, TarError::Number { field: "user id", .. }), "{error}");
            }
        }
    }
    assert_eq!(entry(&[(136, &[0xFF; 12])]).unwrap().mtime, (-1, 0));
}

#[test]
fn huge_sizes_are_refused_or_run_into_the_end() {
    // 2^88 - 1 does not fit; 2^62 does, but is not there.
    let error =
        entry(&[(124, &[0x80, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF])]);
    assert!(matches!(error, Err(TarError::Number { field: "size", .. })));
    let bytes = archive(&[(124, &[0x80, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0])]);
    let mut reader = TarReader::new(bytes.as_slice());
    assert_eq!(reader.next_entry().unwrap().unwrap().size, 1 << 62);
    assert!(matches!(reader.next_entry(), Err(TarError::Truncated { offset: 512 })));
}

#[test]
fn prefix_counts_in_ustar_alone() {
    assert_eq!(entry(&[(345, b"some/dir")]).unwrap().path, b"some/dir/f");
    let gnu = entry(&[(257, b"ustar  \0"), (345, b"not a path")]);
    assert_eq!(gnu.unwrap().path, b"f");
}

#[test]
fn wrong_checksum_is_no_header() {
    let mut bytes = archive(&[]);
    bytes[0] = b'g';
    let error = TarReader::new(bytes.as_slice()).next_entry().unwrap_err();
    assert!(matches!(error, TarError::Checksum { offset: 0 }), "{error}");
}

#[test]
fn types_without_data_have_none_whatever_their_size_field_says() {
    for flag in [b"1", b"2", b"5", b"6"] {
        let entry = entry(&[(156, flag), (157, b"target"), (124, b"00000001000\0")]).unwrap();
        assert_eq!(entry.size, 0, "{flag:?}");
    }
}

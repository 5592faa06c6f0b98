use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;

const MIB: u64 = 1 << 20;

fn image(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

fn reopen(file: &File, options: &std::fs::OpenOptions) -> File {
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

#[test]
fn bytes_beyond_the_last_sector_are_not_seen() {
    assert_eq!(Disk::new("a", image(1023), false).unwrap().sectors(), 1);
    assert_eq!(Disk::new("a", image(1024), false).unwrap().sectors(), 2);
}

#[test]
fn a_file_without_a_sector_is_refused() {
    for len in [0, 511] {
        assert!(matches!(
            Disk::new("a", image(len), true),
            Err(BlkError::TooSmall { len: got }) if got == len
        ));
    }
}

#[test]
fn a_serial_that_the_guest_cannot_see_whole_is_refused() {
    for serial in ["", "123456789012345678901", "tab\t", "\u{e9}"] {
        assert!(matches!(Disk::new(serial, image(512), true), Err(BlkError::Serial { .. })));
    }
    assert!(Disk::new("12345678901234567890", image(512), true).is_ok());
}

#[test]
fn a_descriptor_must_allow_what_the_disk_needs() {
    let file = image(512);
    let read = reopen(&file, std::fs::OpenOptions::new().read(true));
    assert!(matches!(
        Disk::new("a", read.try_clone().unwrap(), false),
        Err(BlkError::Access { access: "writing" })
    ));
    assert!(Disk::new("a", read, true).is_ok());
    let write = reopen(&file, std::fs::OpenOptions::new().write(true));
    assert!(matches!(Disk::new("a", write, true), Err(BlkError::Access { access: "reading" })));
    let append = reopen(&file, std::fs::OpenOptions::new().read(true).append(true));
    assert!(matches!(Disk::new("a", append, false), Err(BlkError::Access { .. })));
}

#[test]
fn what_is_no_disk_is_refused() {
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Disk::new("a", null, true), Err(BlkError::NotADisk)));
    let directory = File::open("/").unwrap();
    assert!(matches!(Disk::new("a", directory, true), Err(BlkError::NotADisk)));
}

#[test]
fn ranges_are_checked_against_the_capacity_without_overflow() {
    let disk = Disk::new("a", image(10 * 512), false).unwrap();
    assert_eq!(disk.offset(9, 1).unwrap(), 9 * 512);
    assert_eq!(disk.offset(10, 0).unwrap(), 10 * 512);
    for (sector, sectors) in [(10, 1), (9, 2), (0, 11), (u64::MAX, 1), (u64::MAX, 0), (11, 0)] {
        assert!(disk.offset(sector, sectors).is_err(), "{sector} {sectors}");
    }
}

#[test]
fn a_transfer_crosses_pieces_and_survives_more_of_them_than_one_call_takes() {
    let file = image(MIB);
    let mut from: Vec<u8> = (0..5000_u32).map(|i| i as u8).collect();
    let mut to = vec![0; 5000];
    let pieces = |bytes: &mut [u8]| -> Vec<VolatileSlice<'static>> {
        let base = VolatileSlice::from(bytes);
        let offsets = (0..5000 / 2).map(|i| base.subslice(2 * i, 2).unwrap());
        // SAFETY: `from` and `to` outlive every use of the slices below.
        offsets
            .map(|piece| unsafe { VolatileSlice::new(piece.ptr_guard_mut().as_ptr(), 2) })
            .collect()
    };
    transfer(&file, &pieces(&mut from), 100, Direction::Write).unwrap();
    transfer(&file, &pieces(&mut to), 100, Direction::Read).unwrap();
    assert_eq!(from, to);
    let mut there = vec![0; 5000];
    file.read_exact_at(&mut there, 100).unwrap();
    assert_eq!(there, from);
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_no_endless_loop() {
    let file = image(1024);
    let disk = Disk::new("a", file.try_clone().unwrap(), false).unwrap();
    file.set_len(512).unwrap();
    let mut bytes = vec![0; 1024];
    let slice = [VolatileSlice::from(bytes.as_mut_slice())];
    let error = transfer(&disk.file, &slice, 0, Direction::Read).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn advancing_stops_within_and_between_pieces() {
    let lens = |moved: usize| -> Vec<usize> {
        let mut iovecs: Vec<libc::iovec> =
            [3, 4, 5].map(|iov_len| libc::iovec { iov_base: std::ptr::null_mut(), iov_len }).into();
        advance(&mut iovecs, moved).iter().map(|iovec| iovec.iov_len).collect()
    };
    assert_eq!(lens(0), [3, 4, 5]);
    assert_eq!(lens(2), [1, 4, 5]);
    assert_eq!(lens(3), [4, 5]);
    assert_eq!(lens(8), [4]);
    assert_eq!(lens(12), [] as [usize; 0]);
}

#[test]
fn a_discard_gives_the_space_back_and_leaves_the_rest() {
    let file = image(4 * MIB);
    file.write_all_at(&vec![7; 2 * MIB as usize], 0).unwrap();
    let before = file.metadata().unwrap().blocks();
    let disk = Disk::new("a", file.try_clone().unwrap(), false).unwrap();
    let range = Range { sector: 0, sectors: 2048, unmap: false };
    disk.for_ranges(&[range], Disk::discard).unwrap();
    let mut bytes = vec![1; 2 * MIB as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..MIB as usize].iter().all(|byte| *byte == 0));
    assert!(bytes[MIB as usize..].iter().all(|byte| *byte == 7));
    assert!(file.metadata().unwrap().blocks() < before);
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
}

#[test]
fn writing_zeroes_writes_zeroes_or_says_that_it_cannot() {
    for unmap in [true, false] {
        let file = image(MIB);
        file.write_all_at(&[7; 4096], 0).unwrap();
        let disk = Disk::new("a", file.try_clone().unwrap(), false).unwrap();
        let range = Range { sector: 1, sectors: 2, unmap };
        match disk.for_ranges(&[range], Disk::write_zeroes) {
            Ok(()) => {
                let mut bytes = [0; 4096];
                file.read_exact_at(&mut bytes, 0).unwrap();
                assert!(bytes[512..1536].iter().all(|byte| *byte == 0));
                assert!(bytes[..512].iter().chain(&bytes[1536..]).all(|byte| *byte == 7));
            }
            // tmpfs has no ZERO_RANGE.
            Err(error) => {
                assert!(matches!(error, DiskError::Refused(Failure::Unsupported)), "{error:?}");
            }
        }
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let disk = Disk::new("a", image(MIB), true).unwrap();
    let range = Range { sector: 0, sectors: 1, unmap: false };
    for each in [Disk::discard, Disk::write_zeroes] {
        assert!(matches!(
            disk.for_ranges(&[range], each),
            Err(DiskError::Refused(Failure::IoError))
        ));
    }
}

//! A layer's archive to an EROFS blob: must never panic, whatever the bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| husk_image::fuzzing::layer_tar(bytes));

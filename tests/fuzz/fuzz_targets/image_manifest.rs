//! An image's manifest, index or configuration: must never panic, whatever the bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| husk_image::fuzzing::image_manifest(bytes));

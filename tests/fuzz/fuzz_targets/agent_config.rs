//! A container's `config.json`: answered with a plan or with the name of a field, whatever the bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| husk_agent::fuzzing::config(bytes));

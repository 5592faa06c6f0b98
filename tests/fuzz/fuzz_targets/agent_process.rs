//! The `process` object of an exec: answered with a plan or with the name of a field.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| husk_agent::fuzzing::process(bytes));

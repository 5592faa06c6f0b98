//! Requests to the agent: decoded, checked, and refused with a status that says whose fault it is.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| husk_agent::fuzzing::request(bytes));

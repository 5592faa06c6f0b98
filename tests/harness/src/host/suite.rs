//! Test binaries in the test host.

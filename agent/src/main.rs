//! husk-agent: PID 1 of a husk guest.
//!
//! What it is for: to be the only file of the guest's initramfs, and hand over to the library. What
//! it is not for: anything else; see the library's own header.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    husk_agent::run()
}

//! x86-64: direct boot by the 64-bit protocol (`Documentation/arch/x86/boot.rst`).

pub mod boot_params;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod regs;

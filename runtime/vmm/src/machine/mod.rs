//! The machine: built by one linear recipe ([`builder`]), run by its vCPU threads ([`vcpu`]), and
//! governed by the control loop ([`control`]).

pub mod builder;
pub mod config;
pub mod control;
pub mod report;
pub mod slots;
pub mod vcpu;

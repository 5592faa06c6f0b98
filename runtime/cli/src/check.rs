//! `husk check`.
use std::process::ExitCode;

use crate::args::{CheckArgs, Global};

pub(crate) fn run(_global: &Global, _args: &CheckArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not yet")
}

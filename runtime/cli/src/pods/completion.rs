//! `husk completion`: scripts by which shells complete husk's commands.

use std::process::ExitCode;

use clap::{Args, CommandFactory, ValueEnum};

use crate::args::Cli;

/// Print a script by which a shell completes husk's commands and options
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  \
    source <(husk completion bash)\n  \
    husk completion zsh > \"${fpath[1]}/_husk\"\n  \
    husk completion fish > ~/.config/fish/completions/husk.fish")]
pub(crate) struct CompletionArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(args: &CompletionArgs) -> ExitCode {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    clap_complete::generate(shell, &mut Cli::command(), "husk", &mut std::io::stdout());
    ExitCode::SUCCESS
}

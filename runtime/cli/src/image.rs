//! `husk image`: what is in the store.

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use husk_image::{Credentials, ImportOptions, Imported, Platform, PullError, PullOptions, Store};
use serde::Serialize;

use crate::args::{Global, ImageCommand, ImportArgs, ListArgs, Output, PullArgs, RemoveArgs};
use crate::progress::Reporter;

/// Longest password that is read, in bytes.
const MAX_PASSWORD: u64 = 4096;

/// Does what a subcommand of `husk image` says.
pub(crate) fn run(global: &Global, command: ImageCommand) -> anyhow::Result<ExitCode> {
    let images = global.config()?.images_dir();
    let progress = Reporter::on_stderr(global.quiet);
    let store = Store::open(&images)
        .with_context(|| format!("cannot use the image store in {}", images.display()))?;
    match command {
        ImageCommand::Pull(PullArgs { reference, platform, plain_http, ca_file, user }) => {
            let options = PullOptions {
                platform: platform_of(platform.as_deref())?,
                credentials: user.as_deref().map(credentials).transpose()?,
                // Unless asked for, http is spoken to this machine only; and whoever names
                // certificates wants them looked at.
                plain_http: plain_http.or(ca_file.as_ref().map(|_| false)),
                extra_ca: ca_file,
                ..PullOptions::default()
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("cannot make an event loop")?;
            let pulled = runtime.block_on(pull(&store, &reference, options, progress));
            print_imported(&pulled.map_err(|error| cannot_pull(&reference, error))?);
        }
        ImageCommand::Import(ImportArgs { path, name, platform }) => {
            import(&store, &path, name.as_deref(), platform.as_deref(), &progress)?;
        }
        ImageCommand::Ls(ListArgs { output }) => list(&store, output)?,
        ImageCommand::Rm(RemoveArgs { references }) => remove(&store, &references)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Pulls an image, and shows its progress.
pub(crate) async fn pull(
    store: &Store,
    reference: &str,
    options: PullOptions,
    progress: Arc<Reporter>,
) -> Result<Imported, PullError> {
    progress.pulling(reference);
    store.pull(reference, &PullOptions { progress, ..options }).await
}

/// A failed pull with its causes, and a line on what to do where that is known.
fn cannot_pull(reference: &str, error: PullError) -> anyhow::Error {
    let untrusted = error.is_untrusted_certificate();
    let advice = match &error {
        PullError::CredentialsNeeded { .. } => Some(
            "Give them with --user USER[:PASSWORD], or keep them in docker's configuration \
             (docker login).",
        ),
        PullError::Status { status: 401, .. } => {
            Some("Check the user name and the password: those given were refused.")
        }
        // What Go's servers say, and nearly every registry is one.
        PullError::Status { status: 400, message, .. } if message.contains("HTTPS server") => {
            Some("Give --plain-http=false: the registry speaks https.")
        }
        _ if untrusted => Some(
            "If the registry is the right one, trust who issued its certificate: give the issuer's \
             with --ca-file FILE, or add it to the system's.",
        ),
        _ => None,
    };
    let error = anyhow::Error::new(error).context(format!("cannot pull {reference}"));
    // What `openssl req -x509` makes unless told otherwise, and other clients may tolerate.
    let advice = if untrusted && format!("{error:#}").contains("CaUsedAsEndEntity") {
        Some(
            "The registry's certificate is that of a CA, which no server may use: give it another \
             (with openssl req -x509: -addext basicConstraints=critical,CA:FALSE).",
        )
    } else {
        advice
    };
    match advice {
        Some(advice) => anyhow::anyhow!("{error:#}\n{advice}"),
        None => error,
    }
}

/// `USER:PASSWORD`, or `USER` with the password on standard input.
fn credentials(user: &str) -> anyhow::Result<Credentials> {
    if let Some((username, password)) = user.split_once(':') {
        let (username, password) = (username.to_owned(), password.to_owned());
        return Ok(Credentials::Password { username, password });
    }
    if std::io::stdin().is_terminal() {
        // It would be shown as it is typed.
        anyhow::bail!(
            "--user {user} has no password: give --user {user}:PASSWORD, or the password on standard \
             input, e.g. `husk image pull --user {user} IMAGE < password-file`"
        );
    }
    let mut password = String::new();
    std::io::stdin()
        .take(MAX_PASSWORD)
        .read_to_string(&mut password)
        .context("cannot read the password from standard input")?;
    let password = password.trim_end_matches(['\r', '\n']).to_owned();
    Ok(Credentials::Password { username: user.to_owned(), password })
}

fn print_imported(image: &Imported) {
    for reference in &image.references {
        println!("{reference}  {}", image.manifest_digest);
    }
}

fn platform_of(text: Option<&str>) -> anyhow::Result<Platform> {
    match text {
        None => Ok(Platform::default()),
        Some(text) => text.parse().with_context(|| format!("--platform {text:?}")),
    }
}

fn import(
    store: &Store,
    path: &Path,
    name: Option<&str>,
    platform: Option<&str>,
    progress: &Reporter,
) -> anyhow::Result<()> {
    let platform = platform_of(platform)?;
    let options = ImportOptions { name, platform: &platform, progress };
    let kind =
        std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let imported = if kind.is_dir() {
        store.import_oci_layout(path, &options)
    } else {
        store.import_docker_archive(path, &options)
    };
    let imported = imported.with_context(|| format!("cannot import {}", path.display()))?;
    imported.iter().for_each(print_imported);
    Ok(())
}

/// An image as `--output json` shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonImage {
    reference: String,
    manifest_digest: String,
    config_digest: String,
    platform: String,
    layers: usize,
    size_bytes: u64,
    /// Seconds since the epoch.
    stored_at: u64,
}

fn list(store: &Store, output: Output) -> anyhow::Result<()> {
    let images = store.list().context("cannot list the images")?;
    if output == Output::Json {
        let images: Vec<JsonImage> = images
            .into_iter()
            .map(|image| JsonImage {
                reference: image.reference,
                manifest_digest: image.manifest_digest.to_string(),
                config_digest: image.config_digest.to_string(),
                platform: image.platform,
                layers: image.layers,
                size_bytes: image.size,
                stored_at: image
                    .stored_at
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| since.as_secs()),
            })
            .collect();
        println!("{}", serde_json::to_string_pretty(&images)?);
        return Ok(());
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["IMAGE", "ID", "PLATFORM", "LAYERS", "SIZE", "STORED"]);
    for image in images {
        let id: String =
            image.config_digest.to_string().chars().skip("sha256:".len()).take(12).collect();
        let age = SystemTime::now().duration_since(image.stored_at).unwrap_or_default();
        table.add_row([
            image.reference,
            id,
            image.platform,
            image.layers.to_string(),
            human_bytes(image.size),
            format!("{} ago", human_age(age.as_secs())),
        ]);
    }
    for column in [3, 4] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    Ok(())
}

fn remove(store: &Store, references: &[String]) -> anyhow::Result<()> {
    for reference in references {
        store.remove(reference).with_context(|| format!("cannot remove {reference}"))?;
        println!("{reference} removed");
    }
    Ok(())
}

/// Bytes in the largest binary unit that leaves at least one.
pub(crate) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths of the unit, exactly.
    let mut scaled = u128::from(bytes) * 10 / 1024;
    for unit in UNITS {
        if scaled < 10_240 || unit == "TiB" {
            return format!("{}.{} {unit}", scaled / 10, scaled % 10);
        }
        scaled /= 1024;
    }
    format!("{bytes} B")
}

fn human_age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_units_that_fit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (5 << 20, "5.0 MiB"),
            (3 << 30, "3.0 GiB"),
            (2048 << 40, "2048.0 TiB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn ages_are_shown_in_units_that_fit() {
        assert_eq!(human_age(5), "5 s");
        assert_eq!(human_age(3600), "60 min");
        assert_eq!(human_age(86_400), "24 h");
        assert_eq!(human_age(864_000), "10 days");
    }
}

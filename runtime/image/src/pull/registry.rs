//! A client of the OCI distribution protocol that only reads (distribution-spec 1.1, "Pull").
//!
//! Our own, because a registry is not trusted: every body is read within a bound, which the
//! existing client crates do not do.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::header::{ACCEPT, WWW_AUTHENTICATE};
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::challenge::Challenge;
use super::{Credentials, PullError};
use crate::digest::Digest;
use crate::document::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use crate::reference::Reference;

/// Until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two pieces of a response.
const READ_TIMEOUT: Duration = Duration::from_secs(120);
const MAX_REDIRECTS: usize = 10;
/// Bytes of a token server's response.
const MAX_TOKEN_RESPONSE: u64 = 1 << 20;
/// Bytes of an error's body that are looked at.
const MAX_ERROR_BODY: u64 = 16 << 10;
/// Characters of an error's message that are passed on.
const MAX_ERROR_MESSAGE: usize = 300;

/// How to reach a registry.
#[derive(Debug)]
pub(super) struct Access<'a> {
    pub(super) credentials: Option<Credentials>,
    pub(super) plain_http: Option<bool>,
    pub(super) extra_ca: Option<&'a Path>,
}

/// One repository of one registry.
pub(super) struct Registry {
    http: Client,
    /// `https://host:port/v2/repository`.
    base: String,
    plain_http: bool,
    repository: String,
    credentials: Option<Credentials>,
    authorization: Mutex<Option<Authorization>>,
}

/// What a request carries once the registry has asked for it.
#[derive(Clone)]
enum Authorization {
    Basic(String, String),
    Bearer(String),
}

impl Registry {
    pub(super) fn new(reference: &Reference, access: Access<'_>) -> Result<Self, PullError> {
        let Access { credentials, plain_http, extra_ca } = access;
        let host = reference.registry_host();
        let loopback = is_loopback(host);
        let plain_http = plain_http.unwrap_or(loopback);
        let mut builder = Client::builder()
            .user_agent(concat!("husk/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(redirect::Policy::custom(follow));
        if let Some(path) = extra_ca {
            for certificate in read_certificates(path)? {
                builder = builder.add_root_certificate(certificate);
            }
        }
        if loopback {
            // A proxy could not reach what listens here.
            builder = builder.no_proxy();
        }
        let http = builder.build().map_err(PullError::Client)?;
        let scheme = if plain_http { "http" } else { "https" };
        let repository = reference.repository().to_owned();
        let base = format!("{scheme}://{host}/v2/{repository}");
        let authorization = Mutex::new(None);
        Ok(Self { http, base, plain_http, repository, credentials, authorization })
    }

    /// The bytes of a manifest or index, by tag or digest; at most `max`.
    pub(super) async fn manifest(&self, name: &str, max: u64) -> Result<Vec<u8>, PullError> {
        let url = format!("{}/manifests/{name}", self.base);
        let accept = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
        let response = self.get(&url, Some(&accept)).await?;
        read_bounded(response, &url, max).await
    }

    /// Starts the download of a blob.
    pub(super) async fn blob(&self, digest: &Digest) -> Result<(String, Response), PullError> {
        let url = format!("{}/blobs/{digest}", self.base);
        let response = self.get(&url, None).await?;
        Ok((url, response))
    }

    /// The bytes of a blob; at most `max`.
    pub(super) async fn small_blob(&self, digest: &Digest, max: u64) -> Result<Vec<u8>, PullError> {
        let (url, response) = self.blob(digest).await?;
        read_bounded(response, &url, max).await
    }

    /// A successful response; authenticates if it must.
    async fn get(&self, url: &str, accept: Option<&str>) -> Result<Response, PullError> {
        let known = self.authorization.lock().await.clone();
        let response = self.send(url, accept, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return check_status(url, response).await;
        }
        let Some(challenge) = challenge_of(&response) else {
            return check_status(url, response).await;
        };
        let authorization = self.authorize(challenge).await?;
        let response = self.send(url, accept, Some(&authorization)).await?;
        let response = check_status(url, response).await?;
        *self.authorization.lock().await = Some(authorization);
        Ok(response)
    }

    async fn send(
        &self,
        url: &str,
        accept: Option<&str>,
        authorization: Option<&Authorization>,
    ) -> Result<Response, PullError> {
        let mut request = self.http.get(url);
        if let Some(accept) = accept {
            request = request.header(ACCEPT, accept);
        }
        request = match authorization {
            None => request,
            Some(Authorization::Basic(user, password)) => request.basic_auth(user, Some(password)),
            Some(Authorization::Bearer(token)) => request.bearer_auth(token),
        };
        send(url, request).await
    }

    async fn authorize(&self, challenge: Challenge) -> Result<Authorization, PullError> {
        let (realm, service, scope) = match (challenge, &self.credentials) {
            (Challenge::Basic, Some(Credentials::Password { username, password })) => {
                return Ok(Authorization::Basic(username.clone(), password.clone()));
            }
            (Challenge::Basic, _) => {
                let registry = self.base.clone();
                return Err(PullError::CredentialsNeeded { registry });
            }
            (Challenge::Bearer { realm, service, scope }, _) => (realm, service, scope),
        };
        let mut url = Url::parse(&realm).map_err(|source| PullError::Realm {
            realm: realm.clone(),
            reason: source.to_string(),
        })?;
        if url.scheme() != "https" && !(self.plain_http && url.scheme() == "http") {
            let reason = "it is not https".to_owned();
            return Err(PullError::Realm { realm, reason });
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        let mut pairs = vec![("scope", scope)];
        pairs.extend(service.map(|service| ("service", service)));
        let request = match &self.credentials {
            // OAuth 2, with what `docker login` stored.
            Some(Credentials::IdentityToken(token)) => {
                pairs.extend([
                    ("grant_type", "refresh_token".to_owned()),
                    ("refresh_token", token.clone()),
                    ("client_id", "husk".to_owned()),
                ]);
                self.http.post(url).form(&pairs)
            }
            other => {
                url.query_pairs_mut().extend_pairs(&pairs);
                let request = self.http.get(url);
                match other {
                    Some(Credentials::Password { username, password }) => {
                        request.basic_auth(username, Some(password))
                    }
                    _ => request,
                }
            }
        };
        let response = check_status(&realm, send(&realm, request).await?).await?;
        let body = read_bounded(response, &realm, MAX_TOKEN_RESPONSE).await?;
        token_in(&body)
            .map(Authorization::Bearer)
            .ok_or_else(|| PullError::Realm { realm, reason: "it gave no token".to_owned() })
    }
}

/// Redirects lead to where the blobs are kept; reqwest drops the credentials on the way to another
/// host. Never from https to http.
fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let secure = |url: &Url| url.scheme() == "https";
    let was_secure = attempt.previous().last().is_some_and(secure);
    if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error("too many redirects")
    } else if was_secure && !secure(attempt.url()) {
        attempt.error("a redirect from https to http")
    } else {
        attempt.follow()
    }
}

async fn send(url: &str, request: RequestBuilder) -> Result<Response, PullError> {
    request.send().await.map_err(|source| PullError::Request {
        url: url.to_owned(),
        // Where a redirect led may hold a signature.
        source: source.without_url(),
    })
}

fn challenge_of(response: &Response) -> Option<Challenge> {
    let headers = response.headers().get_all(WWW_AUTHENTICATE);
    headers.iter().filter_map(|header| Challenge::parse(header.to_str().ok()?)).next()
}

/// The response, or the error in it.
async fn check_status(url: &str, response: Response) -> Result<Response, PullError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = read_bounded(response, url, MAX_ERROR_BODY).await.unwrap_or_default();
    let message = error_message(&body);
    Err(PullError::Status { url: url.to_owned(), status: status.as_u16(), message })
}

/// What a registry says went wrong (distribution-spec, "Error Codes").
fn error_message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Body>(body) {
        Ok(body) => {
            let items = body.errors.iter().map(|item| format!("{} {}", item.code, item.message));
            items.collect::<Vec<_>>().join("; ")
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let printable = text.chars().filter(|character| !character.is_control());
    let message: String = printable.take(MAX_ERROR_MESSAGE).collect();
    if message.trim().is_empty() { "no reason given".to_owned() } else { message }
}

fn token_in(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        token: Option<String>,
        access_token: Option<String>,
    }
    let Body { token, access_token } = serde_json::from_slice(body).ok()?;
    token.or(access_token).filter(|token| !token.is_empty())
}

/// A body of at most `max` bytes.
async fn read_bounded(mut response: Response, url: &str, max: u64) -> Result<Vec<u8>, PullError> {
    let mut bytes = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
            Ok(None) => return Ok(bytes),
            Err(source) => {
                let (url, source) = (url.to_owned(), source.without_url());
                return Err(PullError::Request { url, source });
            }
        }
        if bytes.len() as u64 > max {
            return Err(PullError::TooLarge { url: url.to_owned(), max });
        }
    }
}

fn read_certificates(path: &Path) -> Result<Vec<Certificate>, PullError> {
    let path_buf = || PathBuf::from(path);
    let bytes =
        std::fs::read(path).map_err(|source| PullError::CaFile { path: path_buf(), source })?;
    let certificates = Certificate::from_pem_bundle(&bytes)
        .map_err(|source| PullError::Ca { path: path_buf(), source })?;
    if certificates.is_empty() {
        return Err(PullError::CaEmpty { path: path_buf() });
    }
    Ok(certificates)
}

/// Whether `host`, with or without a port, is this machine.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["registry.example", "localhost.example:5000", "10.0.0.1:5000", "128.0.0.1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn error_messages_are_short_and_printable() {
        let body =
            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest\u001b[31m unknown"}]}"#;
        assert_eq!(error_message(body), "MANIFEST_UNKNOWN manifest[31m unknown");
        assert_eq!(error_message(b""), "no reason given");
        assert_eq!(error_message(&[b'x'; 5000]).len(), MAX_ERROR_MESSAGE);
    }

    #[test]
    fn tokens_are_found_under_both_names() {
        assert_eq!(token_in(br#"{"token":"a"}"#).as_deref(), Some("a"));
        assert_eq!(token_in(br#"{"access_token":"b"}"#).as_deref(), Some("b"));
        assert_eq!(token_in(br#"{"token":""}"#), None);
        assert_eq!(token_in(b"x"), None);
    }
}

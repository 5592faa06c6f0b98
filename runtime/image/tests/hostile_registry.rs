//! Pulls from registries that misbehave, or that want a token: small servers of our own.

mod common;

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{OCI_MANIFEST, TestImage, chain, image};
use husk_image::{Credentials, Digest, PullOptions, Store};
use tempfile::TempDir;

/// A request: its path with the query, and its headers by lower-case name.
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

/// What a handler answers with. `announced` is the length in the header, if it is not the body's.
struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    announced: Option<usize>,
}

impl Answer {
    fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self { status: "200 OK", headers: Vec::new(), body: body.into(), announced: None }
    }

    fn status(status: &'static str) -> Self {
        Self { status, ..Self::ok("") }
    }
}

/// Serves until the process ends; returns its address.
fn serve(handler: impl Fn(&str, Request) -> Answer + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (handler, own) = (Arc::new(handler), address.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (handler, own) = (Arc::clone(&handler), own.clone());
            // A client that hangs up early is none of the server's business.
            std::thread::spawn(move || drop(answer(stream, &own, &*handler)));
        }
    });
    address
}

fn answer(
    mut stream: TcpStream,
    own: &str,
    handler: &(impl Fn(&str, Request) -> Answer + ?Sized),
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let Answer { status, headers, body, announced } = handler(own, Request { path, headers });
    let length = announced.unwrap_or(body.len());
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n")?;
    for (name, value) in headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    stream.write_all(&body)
}

/// What a registry has for a path.
fn content(image: &TestImage, path: &str) -> Answer {
    let blobs = image.layers.iter().chain([&image.config]);
    for blob in blobs {
        if path.ends_with(&format!("/blobs/{}", Digest::of(blob))) {
            return Answer::ok(blob.clone());
        }
    }
    if path.contains("/manifests/") {
        let kind = ("Content-Type", OCI_MANIFEST.to_owned());
        return Answer { headers: vec![kind], ..Answer::ok(image.manifest.clone()) };
    }
    Answer::status("404 Not Found")
}

async fn pull(address: &str, options: &PullOptions) -> (TempDir, Result<(), String>) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let result = store.pull(&format!("{address}/test/image:1"), options).await;
    let result = result.map(drop).map_err(|error| chain(&error));
    assert_eq!(result.is_ok(), store.resolve(&format!("{address}/test/image:1")).is_ok());
    (directory, result)
}

#[tokio::test(flavor = "multi_thread")]
async fn token_is_fetched_with_the_password_and_used() {
    let image = image("amd64", "token");
    let address = serve(move |own, request| {
        let authorization = request.headers.get("authorization").map_or("", String::as_str);
        if let Some(query) = request.path.strip_prefix("/token?") {
            // husk:chestnut
            assert_eq!(authorization, "Basic aHVzazpjaGVzdG51dA==");
            assert!(query.contains("scope=repository%3Atest%2Fimage%3Apull"), "{query}");
            assert!(query.contains("service=here"), "{query}");
            return Answer::ok(r#"{"token":"let-me-in"}"#);
        }
        if authorization != "Bearer let-me-in" {
            let challenge = format!(r#"Bearer realm="http://{own}/token",service="here""#);
            let headers = vec![("WWW-Authenticate", challenge)];
            return Answer { headers, ..Answer::status("401 Unauthorized") };
        }
        content(&image, &request.path)
    });
    let credentials =
        Credentials::Password { username: "husk".to_owned(), password: "chestnut".to_owned() };
    let options = PullOptions { credentials: Some(credentials), ..PullOptions::default() };
    pull(&address, &options).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn redirected_blobs_are_fetched_without_the_credentials() {
    let image = Arc::new(image("amd64", "redirect"));
    let elsewhere = Arc::clone(&image);
    let storage = serve(move |_, request| {
        assert!(!request.headers.contains_key("authorization"));
        content(&elsewhere, &request.path)
    });
    // Another host, as far as HTTP is concerned.
    let storage = storage.replace("127.0.0.1", "localhost");
    let address = serve(move |_, request| {
        if !request.headers.contains_key("authorization") {
            let headers = vec![("WWW-Authenticate", r#"Basic realm="r""#.to_owned())];
            return Answer { headers, ..Answer::status("401 Unauthorized") };
        }
        if request.path.contains("/blobs/") {
            let headers = vec![("Location", format!("http://{storage}{}", request.path))];
            return Answer { headers, ..Answer::status("307 Temporary Redirect") };
        }
        content(&image, &request.path)
    });
    let credentials =
        Credentials::Password { username: "husk".to_owned(), password: "chestnut".to_owned() };
    let options = PullOptions { credentials: Some(credentials), ..PullOptions::default() };
    pull(&address, &options).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_download_is_tried_again() {
    let image = image("amd64", "interrupted");
    let failures = AtomicUsize::new(0);
    let layer = Digest::of(&image.layers[0]).to_string();
    let address = serve(move |_, request| {
        let mut answer = content(&image, &request.path);
        if request.path.ends_with(&layer) && failures.fetch_add(1, Ordering::SeqCst) < 2 {
            answer.announced = Some(answer.body.len());
            answer.body.truncate(1000);
        }
        answer
    });
    pull(&address, &PullOptions::default()).await.1.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_manifest_is_cut_off() {
    let address = serve(|_, _| Answer::ok(vec![b' '; 5 << 20]));
    let message = pull(&address, &PullOptions::default()).await.1.unwrap_err();
    assert!(message.contains("more than 4194304 bytes"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn manifest_with_other_content_than_its_index_names_is_refused() {
    let (wanted, other) = (image("amd64", "wanted"), image("amd64", "other"));
    let index = common::index(&[("amd64", &wanted)]);
    let address = serve(move |_, request| {
        if request.path.ends_with("/manifests/1") {
            return Answer::ok(index.clone());
        }
        content(&other, &request.path)
    });
    let message = pull(&address, &PullOptions::default()).await.1.unwrap_err();
    assert!(message.contains("does not have the content"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn longer_layer_than_announced_is_refused() {
    let image = image("amd64", "long");
    let layer = Digest::of(&image.layers[1]).to_string();
    let address = serve(move |_, request| {
        let mut answer = content(&image, &request.path);
        if request.path.ends_with(&layer) {
            answer.body.extend_from_slice(&[0; 100_000]);
        }
        answer
    });
    let (directory, result) = pull(&address, &PullOptions::default()).await;
    let message = result.unwrap_err();
    assert!(message.contains("layer 2 of 2"), "{message}");
    let left = std::fs::read_dir(directory.path().join("layers/sha256")).unwrap().count();
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_where_it_is_asked_for() {
    let address = serve(|_, _| Answer::status("500 Internal Server Error"));
    let options = PullOptions { plain_http: Some(false), ..PullOptions::default() };
    let message = pull(&address, &options).await.1.unwrap_err();
    assert!(message.contains("cannot get https://"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_own_failure_is_reported_with_its_words() {
    let address = serve(|_, _| Answer {
        status: "503 Service Unavailable",
        ..Answer::ok(r#"{"errors":[{"code":"UNAVAILABLE","message":"come back later"}]}"#)
    });
    let message = pull(&address, &PullOptions::default()).await.1.unwrap_err();
    assert!(message.contains("answered 503: UNAVAILABLE come back later"), "{message}");
}

//! Pulls from a real registry: Debian's docker-registry, on a loopback port.

mod common;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{OCI_INDEX, OCI_MANIFEST, TestImage, chain, image, index};
use husk_image::{Credentials, Digest, Platform, PullOptions, Store};
use tempfile::TempDir;

/// A registry process; it ends with the test.
struct Registry {
    process: Child,
    address: String,
    directory: TempDir,
    password: Option<&'static str>,
}

const USER: &str = "husk";
const PASSWORD: &str = "chestnut";
/// bcrypt of [`PASSWORD`].
const PASSWORD_HASH: &str = "$2b$10$hjE3/kJYE0Y0htDQLvm.LOnFOrba2XUmdOYE0numjCMJAahbPK1I2";

impl Registry {
    fn start(password: Option<&'static str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Free now; taken again by the registry in a moment.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let root = directory.path().join("data");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '{address}'}}\n\
             storage: {{filesystem: {{rootdirectory: '{}'}}}}\n",
            root.display()
        );
        if password.is_some() {
            let passwords = directory.path().join("htpasswd");
            fs::write(&passwords, format!("{USER}:{PASSWORD_HASH}\n")).unwrap();
            config +=
                &format!("auth: {{htpasswd: {{realm: r, path: '{}'}}}}\n", passwords.display());
        }
        let path = directory.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry must be installed: scripts/need-packages docker-registry");
        let registry = Self { process, address, directory, password };
        let deadline = Instant::now() + Duration::from_secs(120);
        while TcpStream::connect(&registry.address).is_err() {
            assert!(Instant::now() < deadline, "the registry does not come up");
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/husk/test:{tag}", self.address)
    }

    fn authorized(&self, request: reqwest::RequestBuilder) -> reqwest::RequestBuilder {
        match self.password {
            Some(password) => request.basic_auth(USER, Some(password)),
            None => request,
        }
    }

    async fn push_blob(&self, client: &reqwest::Client, bytes: &[u8]) {
        let url = format!("http://{}/v2/husk/test/blobs/uploads/", self.address);
        let response = self.authorized(client.post(url)).send().await.unwrap();
        let location =
            response.error_for_status().unwrap().headers()["location"].to_str().unwrap().to_owned();
        let separator = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{separator}digest={}", Digest::of(bytes));
        let request = client.put(url).body(bytes.to_vec());
        self.authorized(request).send().await.unwrap().error_for_status().unwrap();
    }

    async fn push_manifest(&self, name: &str, media_type: &str, bytes: &[u8]) {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://{}/v2/husk/test/manifests/{name}", self.address);
        let request = client.put(url).header("content-type", media_type).body(bytes.to_vec());
        self.authorized(request).send().await.unwrap().error_for_status().unwrap();
    }

    async fn push(&self, tag: &str, image: &TestImage) {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        for blob in image.layers.iter().chain([&image.config]) {
            self.push_blob(&client, blob).await;
        }
        self.push_manifest(tag, OCI_MANIFEST, &image.manifest).await;
    }

    fn blob_path(&self, bytes: &[u8]) -> PathBuf {
        let hex = Digest::of(bytes).to_hex();
        let blobs = self.directory.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn store() -> (TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path().join("store")).unwrap();
    (directory, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn image_is_pulled_whole_and_only_once() {
    let registry = Registry::start(None);
    let image = image("amd64", "one");
    registry.push("1", &image).await;
    let (_directory, store) = store();
    let pulled = store.pull(&registry.name("1"), &PullOptions::default()).await.unwrap();
    assert_eq!(pulled.manifest_digest, Digest::of(&image.manifest));
    let resolved = store.resolve(&registry.name("1")).unwrap();
    assert_eq!(resolved.layers.len(), 2);
    for layer in &resolved.layers {
        let output = Command::new("fsck.erofs").arg(&layer.path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    // What the store has is not asked for again.
    for layer in &image.layers {
        fs::remove_file(registry.blob_path(layer)).unwrap();
    }
    store.pull(&registry.name("1"), &PullOptions::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn index_is_followed_to_the_platform_and_digests_are_pinned() {
    let registry = Registry::start(None);
    let (amd, arm) = (image("amd64", "amd"), image("arm64", "arm"));
    registry.push("amd", &amd).await;
    registry.push("arm", &arm).await;
    let index = index(&[("arm64", &arm), ("amd64", &amd)]);
    registry.push_manifest("multi", OCI_INDEX, &index).await;
    let (_directory, store) = store();
    let pulled = store.pull(&registry.name("multi"), &PullOptions::default()).await.unwrap();
    assert_eq!(pulled.manifest_digest, Digest::of(&amd.manifest));

    let platform: Platform = "linux/arm64".parse().unwrap();
    let options = PullOptions { platform, ..PullOptions::default() };
    let pinned = format!("{}/husk/test@{}", registry.address, Digest::of(&index));
    let pulled = store.pull(&pinned, &options).await.unwrap();
    assert_eq!(pulled.manifest_digest, Digest::of(&arm.manifest));

    let options =
        PullOptions { platform: "linux/riscv64".parse().unwrap(), ..PullOptions::default() };
    let error = store.pull(&registry.name("multi"), &options).await.unwrap_err();
    let message = chain(&error);
    assert!(message.contains("no image for linux/riscv64; there are: linux/arm64"), "{message}");
    let error = store.pull(&registry.name("arm"), &PullOptions::default()).await.unwrap_err();
    assert!(chain(&error).contains("is for linux/arm64, not for linux/amd64"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_tag_is_the_registrys_answer() {
    let registry = Registry::start(None);
    let (_directory, store) = store();
    let error = store.pull(&registry.name("none"), &PullOptions::default()).await.unwrap_err();
    assert!(chain(&error).contains("answered 404"), "{error}");
    assert!(store.list().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn password_is_asked_for_and_used() {
    let registry = Registry::start(Some(PASSWORD));
    let image = image("amd64", "private");
    registry.push("1", &image).await;
    let (_directory, store) = store();
    let pull = async |password: Option<&str>| {
        let credentials = password.map(|password| Credentials::Password {
            username: USER.to_owned(),
            password: password.to_owned(),
        });
        let options = PullOptions { credentials, ..PullOptions::default() };
        store.pull(&registry.name("1"), &options).await
    };
    let message = chain(&pull(None).await.unwrap_err());
    assert!(message.contains("wants a user name and a password"), "{message}");
    let message = chain(&pull(Some("wrong")).await.unwrap_err());
    assert!(message.contains("answered 401"), "{message}");
    pull(Some(PASSWORD)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_layer_is_refused_and_nothing_half_made_stays() {
    let registry = Registry::start(None);
    let image = image("amd64", "damaged");
    registry.push("1", &image).await;
    let path = registry.blob_path(&image.layers[0]);
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (directory, store) = store();
    let error = store.pull(&registry.name("1"), &PullOptions::default()).await.unwrap_err();
    let message = chain(&error);
    assert!(message.contains("layer 1 of 2"), "{message}");
    assert!(message.contains(&Digest::of(&image.layers[0]).to_string()), "{message}");
    assert!(message.contains("the layer's digest is"), "{message}");
    assert!(store.list().unwrap().is_empty());
    let left = fs::read_dir(directory.path().join("store/layers/sha256")).unwrap().count();
    assert_eq!(left, 0);
}

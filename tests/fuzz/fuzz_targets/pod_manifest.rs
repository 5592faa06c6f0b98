//! Any text as a manifest: answered within bounds, and what is accepted can be made into OCI
//! configurations or is refused with a reason.
#![no_main]

use husk_engine::manifest;
use husk_engine::oci::{StartContext, container_spec};
use libfuzzer_sys::fuzz_target;
use oci_spec::image::ImageConfiguration;

/// Longest message that any manifest may cause: 50 problems of a line each.
const MAX_MESSAGE: usize = 128 * 1024;

fuzz_target!(|text: &str| {
    let pods = match manifest::parse(text, "fuzz.yaml") {
        Ok(pods) => pods,
        Err(error) => {
            let message = error.to_string();
            assert!(!message.is_empty() && message.len() < MAX_MESSAGE);
            return;
        }
    };
    let image = ImageConfiguration::default();
    let context = StartContext {
        container_id: "c",
        pod_uid: "u",
        node_name: "n",
        host_ips: &[],
        pod_ips: &[],
    };
    for pod in &pods {
        assert!(!pod.containers.is_empty() && !pod.metadata.name.is_empty());
        for container in pod.all_containers() {
            if let Err(error) = container_spec(pod, container, &image, &context) {
                assert!(!error.to_string().is_empty());
            }
        }
    }
});

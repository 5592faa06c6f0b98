//! Probes of servers in containers, from within the pod's network namespace.

use husk_proto::agent as wire;
use husk_proto::agent::probe_request::Check;
use tonic::Code;

use crate::guest::{Guest, Options, base_spec};

/// Far longer than any answer takes.
const LONG_MS: u64 = 60_000;

async fn probe(guest: &Guest, check: Check, timeout_ms: u64) -> Result<(bool, String), Code> {
    let request = wire::ProbeRequest { check: Some(check), timeout_ms };
    let answer = guest.client().probe(request).await.map_err(|status| status.code())?.into_inner();
    Ok((answer.success, answer.message))
}

fn get(port: u32, path: &str) -> Check {
    Check::HttpGet(wire::HttpGet { port, path: path.into(), ..wire::HttpGet::default() })
}

fn tcp(port: u32) -> Check {
    Check::TcpSocket(wire::TcpSocket { host: String::new(), port })
}

#[tokio::test]
async fn a_server_in_a_container_is_asked() {
    let guest = Guest::boot().await;
    let script = "mkdir /www && echo fine > /www/ok && httpd -p 8080 -h /www && echo ready; \
                  sleep 1000";
    let mut streams = guest.start("a", base_spec(&["sh", "-c", script]), Options::default()).await;
    streams.read_until("ready\n").await;

    let answer = probe(&guest, get(8080, "/ok"), LONG_MS).await.unwrap();
    assert_eq!(answer, (true, "fine\n".into()));
    let (success, message) = probe(&guest, get(8080, "/none"), LONG_MS).await.unwrap();
    assert_eq!((success, message.as_str()), (false, "HTTP probe failed with statuscode: 404"));
    assert!(probe(&guest, tcp(8080), LONG_MS).await.unwrap().0);
    let (success, message) = probe(&guest, tcp(9), LONG_MS).await.unwrap();
    assert!(!success && message.contains("refused"), "{message}");
    // A web server is no gRPC server.
    let grpc = Check::Grpc(wire::Grpc { port: 8080, service: String::new() });
    assert!(!probe(&guest, grpc, LONG_MS).await.unwrap().0);

    let https = Check::HttpGet(wire::HttpGet {
        port: 1,
        path: "/".into(),
        scheme: "HTTPS".into(),
        ..wire::HttpGet::default()
    });
    for (check, timeout) in [(https, 1), (get(0, "/"), 1), (get(1, "x"), 1), (tcp(1), 0)] {
        assert_eq!(probe(&guest, check, timeout).await, Err(Code::InvalidArgument));
    }
    guest.signal_all("a", 9).await.unwrap();
}

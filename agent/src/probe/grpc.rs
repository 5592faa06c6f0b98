//! gRPC's health check (`grpc.health.v1.Health/Check`), without TLS. By HTTP/2 alone: a client of
//! tonic's would cost the agent more than all probes together.

use std::net::SocketAddr;

use h2::client;
use hyper::body::Bytes;
use hyper::{Method, Request, Version};
use prost::Message;

use super::{Answer, connect};

/// Longest answer in bytes: it is a number.
const MAX_ANSWER: usize = 1024;

/// `grpc.health.v1.HealthCheckRequest`
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    /// `ServingStatus`
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The values of `ServingStatus`.
const STATUSES: [&str; 4] = ["UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"];
const SERVING: i32 = 1;

/// Of gRPC.
const UNIMPLEMENTED: &str = "12";

/// Asks whether a service, or with an empty name the server, serves.
pub(super) async fn check(address: SocketAddr, service: &str) -> Answer {
    let stream = match connect(address).await {
        Ok(stream) => stream,
        Err(answer) => return answer,
    };
    let asked = async {
        let (send, connection) = client::handshake(stream).await.map_err(broken)?;
        // Both at once; the connection ends with the question.
        tokio::select! {
            answer = ask(send, address, service) => answer,
            ended = connection => Err(match ended {
                Ok(()) => Answer::failure("the server closed the connection"),
                Err(error) => broken(error),
            }),
        }
    };
    asked.await.unwrap_or_else(|answer| answer)
}

fn broken(error: h2::Error) -> Answer {
    Answer::failure(format!("gRPC: {error}"))
}

async fn ask(
    send: client::SendRequest<Bytes>,
    address: SocketAddr,
    service: &str,
) -> Result<Answer, Answer> {
    let mut send = send.ready().await.map_err(broken)?;
    let request = Request::builder()
        .method(Method::POST)
        .version(Version::HTTP_2)
        .uri(format!("http://{address}/grpc.health.v1.Health/Check"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("user-agent", "kube-probe/husk")
        .body(())
        .map_err(|e| Answer::failure(format!("gRPC: {e}")))?;
    let (response, mut body) = send.send_request(request, false).map_err(broken)?;
    body.send_data(encode(service), true).map_err(broken)?;
    let response = response.await.map_err(broken)?;
    if response.status() != hyper::StatusCode::OK {
        return Ok(Answer::failure(format!("gRPC: HTTP status {}", response.status())));
    }
    let status = |headers: &hyper::HeaderMap| {
        let text = |name| Some(headers.get(name)?.to_str().ok()?.to_owned());
        text("grpc-status").map(|code| (code, text("grpc-message").unwrap_or_default()))
    };
    if let Some((code, message)) = status(response.headers()) {
        // An answer of nothing but headers.
        return Ok(judge(&code, &message, &[]));
    }
    let mut body = response.into_body();
    let mut data = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(broken)?;
        if data.len().saturating_add(chunk.len()) > MAX_ANSWER {
            return Ok(Answer::failure("gRPC: the answer is too long"));
        }
        data.extend_from_slice(&chunk);
    }
    let trailers = body.trailers().await.map_err(broken)?;
    Ok(match trailers.as_ref().and_then(status) {
        Some((code, message)) => judge(&code, &message, &data),
        None => Answer::failure("gRPC: the answer has no status"),
    })
}

/// A message with the five bytes that gRPC puts before it: not compressed, length.
fn encode(service: &str) -> Bytes {
    let message = HealthCheckRequest { service: service.to_owned() }.encode_to_vec();
    let len = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0][..], &len.to_be_bytes(), &message].concat().into()
}

/// What an answer means that ended with this code of gRPC.
fn judge(code: &str, message: &str, data: &[u8]) -> Answer {
    if code == UNIMPLEMENTED {
        return Answer::failure("this server does not implement the grpc health protocol");
    }
    if code != "0" {
        return Answer::failure(format!("gRPC status {code}: {message}"));
    }
    let decoded = data.get(5..).map(HealthCheckResponse::decode);
    match (data.first(), decoded) {
        (Some(0), Some(Ok(HealthCheckResponse { status: SERVING }))) => {
            Answer::success("service healthy")
        }
        (Some(0), Some(Ok(HealthCheckResponse { status }))) => {
            let name = usize::try_from(status).ok().and_then(|n| STATUSES.get(n));
            Answer::failure(format!("service unhealthy: {}", name.unwrap_or(&"?")))
        }
        _ => Answer::failure("gRPC: the answer makes no sense"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_serving_is_a_success() {
        let answer = |status: u8| judge("0", "", &[0, 0, 0, 0, 2, 8, status]);
        assert_eq!(answer(1), Answer::success("service healthy"));
        assert_eq!(answer(2), Answer::failure("service unhealthy: NOT_SERVING"));
        assert_eq!(answer(9), Answer::failure("service unhealthy: ?"));
        // The default value, UNKNOWN, is no byte at all.
        assert!(!judge("0", "", &[0, 0, 0, 0, 0]).success);
        for nonsense in [&[][..], &[0, 0, 0], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0, 1, 8]] {
            assert_eq!(judge("0", "", nonsense).message, "gRPC: the answer makes no sense");
        }
        assert!(judge("12", "", &[]).message.contains("does not implement"));
        assert_eq!(judge("5", "unknown service", &[]).message, "gRPC status 5: unknown service");
    }

    /// A server that takes one question and answers with this data and code of gRPC.
    async fn serve(data: &'static [u8], code: &'static str) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let mut send = respond.send_response(hyper::Response::new(()), false).unwrap();
            send.send_data(data.into(), false).unwrap();
            let mut trailers = hyper::HeaderMap::new();
            trailers.insert("grpc-status", code.parse().unwrap());
            send.send_trailers(trailers).unwrap();
            // Until the client goes.
            while connection.accept().await.is_some() {}
        });
        address
    }

    #[tokio::test]
    async fn a_server_is_asked() {
        let healthy = serve(&[0, 0, 0, 0, 2, 8, 1], "0").await;
        assert_eq!(check(healthy, "a").await, Answer::success("service healthy"));
        let unknown = serve(&[], "5").await;
        assert_eq!(check(unknown, "a").await, Answer::failure("gRPC status 5: "));
        let long = serve(&[0; 2000], "0").await;
        assert_eq!(check(long, "a").await, Answer::failure("gRPC: the answer is too long"));
    }

    #[tokio::test]
    async fn a_server_of_something_else_is_a_failure() {
        use tokio::io::AsyncWriteExt;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        });
        assert!(!check(address, "").await.success);
    }

    #[test]
    fn a_question_is_framed() {
        assert_eq!(encode(""), [0, 0, 0, 0, 0].as_slice());
        assert_eq!(encode("a"), [0, 0, 0, 0, 3, 10, 1, b'a'].as_slice());
    }
}

//! gRPC over a connection that is there already.

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Error};

/// The endpoint of a peer that is known by its connection only.
pub(crate) fn nameless() -> Endpoint {
    Endpoint::from_static("http://husk.invalid")
}

/// Turns one connection into a gRPC channel, with an endpoint's settings; its address is never
/// looked up. When the connection breaks there is no other: every later call fails.
///
/// # Errors
/// The handshake failed.
pub(crate) async fn over<S>(stream: S, endpoint: Endpoint) -> Result<Channel, Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = Some(stream);
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = stream.take().ok_or_else(|| {
            std::io::Error::new(std::io::ErrorKind::NotConnected, "the connection is closed")
        });
        std::future::ready(stream.map(TokioIo::new))
    });
    endpoint.connect_with_connector(connector).await
}

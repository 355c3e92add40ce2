//! Who is at the other end of a connection. Does not know: what an address may do.

use std::net::{IpAddr, SocketAddr};

use axum::extract::Request;

/// Address of the client's end of the connection that a request came over; of the proxy, where one stands between. Every
/// request has one as an extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer(pub IpAddr);

impl Peer {
    /// An IPv4 address that a socket for both protocols shows as an IPv6 one is the IPv4 address.
    pub(super) fn of_socket(address: SocketAddr) -> Self {
        Self(address.ip().to_canonical())
    }

    /// The peer of a request; `None` where it did not come over a connection.
    pub fn of<B>(request: &axum::http::Request<B>) -> Option<Self> {
        request.extensions().get().copied()
    }

    /// The request, with its peer.
    pub(super) fn mark(self, mut request: Request) -> Request {
        request.extensions_mut().insert(self);
        request
    }
}

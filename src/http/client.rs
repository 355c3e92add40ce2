//! Whose request it is: of the address that it came from, for as long as there are no identities. Behind a proxy all
//! requests are one client's.

use std::net::IpAddr;

use axum::extract::Request;
use tale_models::ClientId;

use super::Peer;

/// The client of a request. Requests that did not come over a connection are this process's own.
pub(super) fn of(request: &Request) -> ClientId {
    Peer::of(request).map_or(ClientId::default(), |Peer(address)| of_address(address))
}

/// An IPv4 address is a client, and so is an IPv6 network of 64 bits: a host may take any address of its own. Everything on
/// this machine is one client.
fn of_address(address: IpAddr) -> ClientId {
    match address.to_canonical() {
        address if address.is_loopback() => ClientId::default(),
        // IPv6 networks of so small a number are reserved, so that none is taken for an IPv4 address.
        IpAddr::V4(address) => ClientId(u64::from(address.to_bits())),
        IpAddr::V6(address) => ClientId((address.to_bits() >> 64) as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(address: &str) -> ClientId {
        of_address(address.parse().expect("an address"))
    }

    #[test]
    fn a_client_is_an_ipv4_address_or_an_ipv6_network() {
        assert_ne!(client("10.0.0.1"), client("10.0.0.2"));
        assert_eq!(client("10.0.0.1"), client("::ffff:10.0.0.1"));
        assert_eq!(client("2001:db8:0:1::1"), client("2001:db8:0:1:ffff::2"));
        assert_ne!(client("2001:db8:0:1::1"), client("2001:db8:0:2::1"));
        for local in ["127.0.0.1", "127.0.0.9", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(client(local), ClientId::default(), "{local}");
        }
    }
}

//! Opens a listener. Does not know: who connects.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket};

/// Connections that the system holds until they are accepted, as far as `net.core.somaxconn` allows. A burst that is
/// longer loses some, whose systems try again after a whole second: it has to be long enough for all that hundreds of
/// clients open at once.
const MAX_UNACCEPTED: u32 = 4096;

/// Listens on an address, also on one that a server before this one has just left. Needs a runtime.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(MAX_UNACCEPTED)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::TcpStream;

    use super::*;
    use crate::http::ConnectionLimits;

    /// More than tokio's own 1,024, and fewer than most systems allow.
    const BURST: usize = 1_500;

    #[tokio::test]
    async fn a_burst_waits_until_it_is_accepted() {
        let allowed = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
        if allowed.trim().parse::<usize>().is_ok_and(|allowed| allowed < BURST) {
            eprintln!("NOT RUN: this system holds {} unaccepted connections at most", allowed.trim());
            return;
        }
        ConnectionLimits::default().raise_file_limit();
        let listener = listen("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let mut held = Vec::new();
        for i in 0..BURST {
            let connected = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await;
            held.push(connected.unwrap_or_else(|_| panic!("connection {i} is not held")).expect("connected"));
        }
    }
}

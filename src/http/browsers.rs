//! What a web page in somebody's browser may do: nothing, unless it is configured.
//!
//! A browser inside a private network reaches this server, and so does the page that it shows. Two headers tell, which
//! pages cannot choose:
//!
//! - `Host` is the name that the browser looked up. A page that lets its own name point here (DNS rebinding) is of one
//!   origin with this server as browsers see it, but must use that name. So only names that no stranger can own are
//!   answered to: addresses, loopback names, names without a dot (of a container, a service or a machine beside this
//!   one; they have no public owners), and those that the operator names.
//! - `Origin` is the page that asks. Forms and simple requests need no permission beforehand (CORS only keeps the page
//!   from reading the answer), so a foreign page is refused before anything is done.
//!
//! Programs that are no browsers send a `Host`, and no `Origin`. Does not know: what CORS answers (`cors`).

use std::fmt::{self, Display};
use std::net::IpAddr;
use std::str::FromStr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, Uri, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::{AppState, cors};

/// What probes ask, by whatever name; it tells nobody anything.
const PROBED_PATHS: [&str; 2] = ["/livez", "/readyz"];

/// A name under which this server may be asked: `tale.example`, `.example` for every name below it, `*` for any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost(String);

impl AllowedHost {
    fn allows(&self, name: &str) -> bool {
        match self.0.as_str() {
            "*" => true,
            suffix if suffix.starts_with('.') => name.len() > suffix.len() && name.ends_with(suffix),
            same => same == name,
        }
    }
}

impl FromStr for AllowedHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_ascii_lowercase();
        let is_name = |name: &str| name.split('.').all(|label| !label.is_empty() && label.chars().all(is_of_name));
        if name == "*" || is_name(name.strip_prefix('.').unwrap_or(&name)) {
            return Ok(Self(name));
        }
        Err(format!(
            "`{text}` is not a host name; expected a name without a port, such as tale.example, .example for all names below, or *"
        ))
    }
}

fn is_of_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || "-_".contains(character)
}

impl Display for AllowedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Refuses requests for another server, and those of pages that may not ask.
pub(super) async fn check(State(state): State<AppState>, request: Request, next: Next) -> Response {
    match may_ask(&state, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn may_ask(state: &AppState, request: &Request) -> Result<(), ApiError> {
    let hosts = hosts(request)?;
    if PROBED_PATHS.contains(&request.uri().path()) {
        return Ok(());
    }
    let is_allowed = |host: &Host| host.is_safe() || state.0.allowed_hosts.iter().any(|name| name.allows(&host.name));
    if !hosts.iter().all(is_allowed) {
        let message = "the Host header names none of this server's names; the setting allowed_hosts has those";
        return Err(ApiError::forbidden("host_not_allowed", message));
    }
    let is_own = |origin: &HeaderValue| hosts.iter().any(|host| host.is_origin(origin));
    let mut origins = request.headers().get_all(header::ORIGIN).iter();
    if !origins.all(|origin| is_own(origin) || cors::allows(&state.0.cors_origins, origin)) {
        let message =
            "the Origin header names a web page that may not call this server; the setting cors_origins has those";
        return Err(ApiError::forbidden("origin_not_allowed", message));
    }
    Ok(())
}

/// The hosts that a request names: in its `Host`, which HTTP/1.1 has once (RFC 9112, 3.2), and in a target that is a whole
/// URL.
fn hosts(request: &Request) -> Result<Vec<Host>, ApiError> {
    let mut hosts = Vec::with_capacity(1);
    if let Some(host) = host_header(request.headers(), request.version())? {
        hosts.push(host);
    }
    if request.uri().authority().is_some() {
        hosts
            .push(of_target(request.uri()).ok_or_else(|| ApiError::invalid_head("the host in the target is not one"))?);
    }
    Ok(hosts)
}

fn host_header(headers: &HeaderMap, version: Version) -> Result<Option<Host>, ApiError> {
    let mut values = headers.get_all(header::HOST).iter();
    let (first, second) = (values.next(), values.next());
    let problem = match (first, second) {
        (None, _) if version < Version::HTTP_11 => return Ok(None),
        (None, _) => "the Host header is missing",
        (_, Some(_)) => "there is more than one Host header",
        (Some(host), None) => match host.to_str().ok().and_then(|host| host.parse().ok()) {
            Some(host) => return Ok(Some(host)),
            None => "the Host header is not a host and a port",
        },
    };
    Err(ApiError::invalid_head(problem))
}

fn of_target(target: &Uri) -> Option<Host> {
    target.authority()?.as_str().parse().ok()
}

/// A host and maybe a port, as `Host` has them.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    /// In lower case, without the dot at the end that a name may have; an IPv6 address in its brackets.
    name: String,
    port: Option<u16>,
}

impl FromStr for Host {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let authority: Authority = text.parse().map_err(drop)?;
        let name = authority.host().to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let is_address = name.starts_with('[') && address(name).is_some();
        let is_name = name.chars().all(|c| is_of_name(c) || c == '.');
        // What is left of the text is a port, which may be empty (RFC 3986, 3.2.3).
        let port = text.get(authority.host().len()..).ok_or(())?;
        let port = match port.strip_prefix(':') {
            None if !port.is_empty() => return Err(()),
            None | Some("") => None,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => Some(digits.parse().map_err(drop)?),
            Some(_) => return Err(()),
        };
        if name.is_empty() || !(is_address || is_name) {
            return Err(());
        }
        Ok(Self { name: name.to_owned(), port })
    }
}

impl Host {
    /// Whether no stranger can make this name lead here.
    fn is_safe(&self) -> bool {
        !self.name.contains('.') || self.name.ends_with(".localhost") || address(&self.name).is_some()
    }

    /// Whether a page of this origin came from here. The scheme is of whoever ends TLS before this server.
    fn is_origin(&self, origin: &HeaderValue) -> bool {
        let Some((scheme, host)) = origin.to_str().ok().and_then(|origin| origin.split_once("://")) else {
            return false;
        };
        let Some(default_port) = cors::default_port(scheme) else { return false };
        let port = |host: &Host| host.port.unwrap_or(default_port);
        host.parse().is_ok_and(|origin: Host| origin.name == self.name && port(&origin) == port(self))
    }
}

/// An address, as it stands in a URL.
fn address(name: &str) -> Option<IpAddr> {
    match name.strip_prefix('[') {
        Some(rest) => Some(IpAddr::V6(rest.strip_suffix(']')?.parse().ok()?)),
        None => Some(IpAddr::V4(name.parse().ok()?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_a_name_and_a_port() {
        for (text, name, port) in [
            ("localhost", "localhost", None),
            ("Tale.Example.:8080", "tale.example", Some(8080)),
            ("10.0.0.5:80", "10.0.0.5", Some(80)),
            ("[::1]:8080", "[::1]", Some(8080)),
            ("my_tale:", "my_tale", None),
        ] {
            assert_eq!(text.parse(), Ok(Host { name: name.to_owned(), port }), "{text}");
        }
        for wrong in
            ["", ":80", "a b", "a,b", "a/b", "u@a", "a:b", "a:99999", "[::1", "[x]", "::1", "a:1:2", ".", "%61"]
        {
            assert_eq!(wrong.parse::<Host>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn names_that_somebody_may_own_are_not_safe() {
        for (name, safe) in [
            ("localhost", true),
            ("tale.localhost", true),
            ("127.0.0.1", true),
            ("192.168.1.7", true),
            ("[fd00::1]", true),
            ("tale", true),
            ("tale.example", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example", false),
            ("tale.default.svc.cluster.local", false),
        ] {
            assert_eq!(name.parse::<Host>().expect(name).is_safe(), safe, "{name}");
        }
    }

    #[test]
    fn configured_names_are_names() {
        let allows = |name: &str, host: &str| name.parse::<AllowedHost>().expect(name).allows(host);
        assert!(allows("Tale.Example", "tale.example") && !allows("tale.example", "a.tale.example"));
        assert!(allows(".svc.cluster.local", "tale.default.svc.cluster.local"));
        assert!(!allows(".example", "example") && !allows(".example", "evilexample"));
        assert!(allows("*", "evil.example"));
        for wrong in ["", ".", "a:80", "https://a", "a/b", "*.example", "a..b", "[::1]"] {
            assert!(wrong.parse::<AllowedHost>().expect_err(wrong).contains("is not a host name"), "{wrong}");
        }
    }

    #[test]
    fn a_page_of_this_server_has_its_host() {
        let is_origin = |host: &str, origin: &'static str| {
            host.parse::<Host>().expect(host).is_origin(&HeaderValue::from_static(origin))
        };
        assert!(is_origin("localhost:8080", "http://localhost:8080"));
        assert!(is_origin("tale.example", "https://tale.example"));
        assert!(is_origin("tale.example:443", "https://tale.example"));
        assert!(is_origin("[::1]:8080", "http://[::1]:8080"));
        assert!(!is_origin("localhost:8080", "http://localhost:3000"));
        assert!(!is_origin("localhost:8080", "http://localhost"));
        assert!(!is_origin("localhost", "null"));
        assert!(!is_origin("localhost:80", "app://localhost"));
        assert!(!is_origin("tale.example", "https://evil.example"));
    }
}

//! Which web pages may call this server from a browser: none unless their origin is configured.

use std::fmt::{self, Display};
use std::str::FromStr;
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::videos::POLL_HEADER;

/// How long a browser may remember the answer to its question.
const MAX_AGE: Duration = Duration::from_secs(3600);

/// Where a page comes from: `https://studio.example`, or `*` for all pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(HeaderValue);

impl Origin {
    fn is_any(&self) -> bool {
        self.0 == "*"
    }
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let problem =
            || format!("`{text}` is not an origin; expected a scheme and a host, such as https://studio.example, or *");
        let origin = text.to_ascii_lowercase();
        if origin != "*" {
            let uri: Uri = origin.parse().map_err(|_| problem())?;
            let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(problem()) };
            // What a browser sends has no path, no user, and no port that goes without saying.
            let is_default_port = authority.port_u16().is_some_and(|port| Some(port) == default_port(scheme));
            if origin != format!("{scheme}://{authority}") || authority.as_str().contains(['@', '*']) || is_default_port
            {
                return Err(problem());
            }
        }
        HeaderValue::try_from(origin).map(Self).map_err(|_| problem())
    }
}

impl Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or_default())
    }
}

/// The port of a scheme that goes without saying.
pub(super) fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

/// Whether pages of this origin may call, as a browser spells it.
pub(super) fn allows(origins: &[Origin], origin: &HeaderValue) -> bool {
    origins.iter().any(|allowed| allowed.is_any() || allowed.0 == origin)
}

/// Answers what browsers ask beforehand, and says which pages may read answers. `None` where no page may.
pub(super) fn layer(origins: &[Origin]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = match origins.iter().any(Origin::is_any) {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().map(|Origin(origin)| origin.clone())),
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // OpenAI's client says a lot about itself in headers of its own.
        .allow_headers(AllowHeaders::mirror_request())
        .allow_private_network(true)
        .expose_headers([
            header::RETRY_AFTER,
            header::CONTENT_RANGE,
            header::CONTENT_DISPOSITION,
            HeaderName::from_static(POLL_HEADER),
        ])
        .max_age(MAX_AGE);
    Some(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_what_browsers_send() {
        for (text, origin) in [
            ("*", "*"),
            ("https://studio.example", "https://studio.example"),
            ("HTTPS://Studio.Example:8443", "https://studio.example:8443"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("app://obsidian.md", "app://obsidian.md"),
        ] {
            assert_eq!(text.parse::<Origin>().map(|origin| origin.to_string()), Ok(origin.to_owned()));
        }
        for wrong in [
            "",
            "studio.example",
            "https://studio.example/",
            "https://studio.example/a",
            "https://u@studio.example",
            "https://studio.example:443",
            "http://studio.example:80",
            "https://",
            "null",
            "https://*",
            "a b",
            "**",
        ] {
            let problem = wrong.parse::<Origin>().expect_err(wrong);
            assert!(problem.contains("is not an origin"), "{problem}");
        }
    }
}

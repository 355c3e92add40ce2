//! What is asked of an order and not of its clip: how urgent it is, when it may begin, when it is of no use any more, and the name by which a
//! client knows that it has given it before.
//!
//! Owns: these fields and the header. Does not know: what a job is made of.

use std::time::Duration;

use axum::http::HeaderMap;
use tale_models::parameter::{Declaration, Options, Parameter};

use crate::http::error::ApiError;
use crate::job::node::Terms;
use crate::job::store::{Idempotency, Priority};

/// The header with the client's name for an order.
pub(in crate::http) const IDEMPOTENCY_HEADER: &str = "idempotency-key";
/// Longest of them.
pub(in crate::http) const MAX_KEY_BYTES: usize = 255;
/// Longest time that a job may be put off, and that it may have: a year.
const MAX_SECONDS: usize = 366 * 24 * 3600;

static PRIORITY: Parameter<String> = Parameter::choice(
    "priority",
    &["interactive", "standard", "batch"],
    "How urgent it is beside other jobs; standard when absent. Each has four times the device time of the next while both wait.",
);

static RUN_AFTER_SECONDS: Parameter<usize> =
    Parameter::integer("run_after_seconds", 0, MAX_SECONDS, "It begins no sooner; 0 when absent.");

static DEADLINE_SECONDS: Parameter<usize> = Parameter::integer(
    "deadline_seconds",
    1,
    MAX_SECONDS,
    "If it is not whole by then, it fails with `deadline_exceeded`; never when absent.",
);

/// All fields.
pub(super) static FIELDS: [&Declaration; 3] =
    [&PRIORITY.declaration, &RUN_AFTER_SECONDS.declaration, &DEADLINE_SECONDS.declaration];

/// What a request says of its order; `hash` is that of the whole body.
pub(super) fn terms(options: &Options, headers: &HeaderMap, hash: [u8; 32]) -> Result<Terms, ApiError> {
    let priority = options.get(&PRIORITY);
    let priority = priority.and_then(|name| Priority::ALL.into_iter().find(|priority| priority.as_str() == name));
    let seconds = |parameter| options.get(parameter).map(|seconds: usize| Duration::from_secs(seconds as u64));
    let (wait, deadline) = (seconds(&RUN_AFTER_SECONDS).unwrap_or_default(), seconds(&DEADLINE_SECONDS));
    if deadline.is_some_and(|deadline| deadline <= wait) {
        return Err(ApiError::field("deadline_seconds", "must be more than run_after_seconds"));
    }
    Ok(Terms {
        priority: priority.unwrap_or(Priority::Standard),
        wait,
        deadline,
        idempotency: idempotency(headers, hash)?,
        webhook: None,
    })
}

/// The client's name for the order.
fn idempotency(headers: &HeaderMap, request_hash: [u8; 32]) -> Result<Option<Idempotency>, ApiError> {
    let mut values = headers.get_all(IDEMPOTENCY_HEADER).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return match headers.contains_key(IDEMPOTENCY_HEADER) {
            true => Err(ApiError::field("Idempotency-Key", "is there twice; give one")),
            false => Ok(None),
        };
    };
    let key = value.to_str().ok().filter(|key| (1..=MAX_KEY_BYTES).contains(&key.len()));
    let problem = || format!("must be 1 to {MAX_KEY_BYTES} visible ASCII characters");
    let key = key.ok_or_else(|| ApiError::field("Idempotency-Key", problem()))?.to_owned();
    Ok(Some(Idempotency { key, request_hash }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_short_and_given_once() {
        let of = |keys: &[&str]| {
            let mut headers = HeaderMap::new();
            for key in keys {
                headers.append(IDEMPOTENCY_HEADER, key.parse().expect("a value"));
            }
            idempotency(&headers, [0; 32])
                .map(|found| found.map(|found| found.key))
                .map_err(|error| error.message().to_owned())
        };
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&["scene 7"]), Ok(Some("scene 7".to_owned())));
        assert_eq!(of(&[&"k".repeat(255)]).map(|key| key.map(|key| key.len())), Ok(Some(255)));
        assert!(of(&[&"k".repeat(256)]).is_err() && of(&[""]).is_err() && of(&["a", "b"]).is_err());
    }
}

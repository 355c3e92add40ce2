//! A client that goes away takes its work with it.

use std::sync::atomic::Ordering::Relaxed;

use http_body_util::BodyExt;
use serde_json::json;

use crate::support::{request, server};

#[tokio::test]
async fn a_dropped_stream_stops_its_work() {
    let server = server().await;
    let body = json!({"model": "words", "prompt": "x", "stream": true, "ignore_eos": true, "n": 2}).to_string();
    server.hold.store(true, Relaxed);
    let mut response = server.send(request("POST", "/v1/completions", "application/json", body)).await;
    let first = response.body_mut().frame().await.expect("some").expect("sound");
    assert!(first.data_ref().is_some_and(|data| data.starts_with(b"data: ")));
    server.wait_for_live(2).await;
    drop(response);
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_dropped_stream_of_previews_stops_its_work() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let body = json!({"model": "pictures", "prompt": "x", "stream": true, "num_inference_steps": 1000}).to_string();
    let response = server.send(request("POST", "/v1/images/generations", "application/json", body)).await;
    assert_eq!(response.status(), 200);
    server.wait_for_live(1).await;
    drop(response);
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_client_that_does_not_wait_for_the_whole_answer_stops_its_work() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let bodies = [
        ("/v1/completions", json!({"model": "words", "prompt": "x", "ignore_eos": true})),
        ("/v1/images/generations", json!({"model": "pictures", "prompt": "x", "num_inference_steps": 1000, "n": 2})),
    ];
    for (path, body) in bodies {
        let address = server.address;
        let request = request("POST", path, "application/json", body.to_string());
        let waiting = tokio::spawn(crate::support::send(address, request));
        server.wait_for_live(if path.contains("images") { 2 } else { 1 }).await;
        waiting.abort();
        server.wait_until_empty().await;
    }
}

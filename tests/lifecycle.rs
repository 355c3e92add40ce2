//! Loading, health, metrics, drain.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::json;
use tale::http::{AppState, ServerOptions};

use crate::support::{Setup, listen, read, request, send, server, start};

#[tokio::test]
async fn a_server_without_its_models_is_alive_and_not_ready() {
    let state = AppState::new(ServerOptions::default()).expect("a temporary folder can be made");
    let (address, stop, served) = listen(state, Duration::ZERO).await;
    let status = async |method: &str, path: &str, body: &str| {
        let answer = read(send(address, request(method, path, "application/json", body.to_owned())).await).await;
        (answer.status.as_u16(), answer.text().to_owned())
    };
    assert_eq!(status("GET", "/livez", "").await.0, 200);
    let (code, body) = status("GET", "/readyz", "").await;
    assert!(code == 503 && body.contains("loading"), "{code} {body}");
    assert_eq!(status("POST", "/v1/completions", "{}").await.0, 503);
    assert_eq!(status("GET", "/v1/models", "").await.0, 503);
    assert_eq!(status("GET", "/metrics", "").await.0, 200);
    stop.send(()).expect("the server listens");
    served.await.expect("no panic").expect("a clean end");
}

#[tokio::test]
async fn metrics_tell_of_requests_tokens_and_steps() {
    let server = server().await;
    server.get("/readyz").await.expect(200);
    let words = json!({"model": "words", "prompt": "abc", "max_tokens": 5});
    server.post("/v1/completions", &words).await.expect(200);
    let clip = json!({"model": "pictures", "prompt": "x"});
    server.post("/v1/images/generations", &clip).await.expect(200);
    let metrics = server.get("/metrics").await.expect(200);
    for needle in [
        "tale_http_requests_total{route=\"/v1/completions\",method=\"POST\",status=\"200\"}",
        "tale_http_request_seconds_bucket{route=\"/v1/completions\"",
        "tale_prompt_tokens_total{model_name=\"words\"}",
        "vllm:generation_tokens_total{model_name=\"words\"}",
        "vllm:time_to_first_token_seconds_bucket{model_name=\"words\",le=\"0.001\"}",
        "tale_inter_token_seconds_bucket{model_name=\"words\",le=\"0.00025\"}",
        "tale_step_seconds_count{model_name=\"words\",phase=\"decode\"}",
        "tale_step_seconds_count{model_name=\"pictures\",phase=\"denoise\"}",
        "tale_queue_depth{model_name=\"clips\"} 0",
        "vllm:num_requests_running{model_name=\"words\"} 0",
        "vllm:num_requests_waiting{model_name=\"words\"} 0",
        "vllm:kv_cache_usage_perc{model_name=\"words\"} 0",
        "tale_ledger_capacity_bytes{device=\"cpu\"} 1048576",
        "tale_jobs_active 0",
    ] {
        assert!(metrics.text().contains(needle), "{needle} is not in\n{}", metrics.text());
    }
}

#[tokio::test]
async fn a_drain_finishes_streams_and_refuses_new_work() {
    let mut server = server().await;
    server.hold.store(true, Relaxed);
    let words = json!({"model": "words", "prompt": "x", "stream": true}).to_string();
    let stream = server.send(request("POST", "/v1/completions", "application/json", words)).await;
    let job = server.post("/v1/videos", &json!({"model": "clips", "prompt": "x"})).await.expect(200).json();
    let events =
        server.send(request("GET", &format!("/v1/jobs/{}/events", job["id"].as_str().expect("a name")), "", ""));
    let events = events.await;
    server.stop.take().expect("not stopped yet").send(()).expect("the server listens");
    let begun = Instant::now();
    while server.get("/readyz").await.status != 503 {
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    let refused = server.post("/v1/completions", &json!({"model": "words", "prompt": "x"})).await.expect(503);
    assert_eq!(refused.json()["error"]["code"], "shutting_down");
    assert_eq!(server.get("/livez").await.status, 200);
    server.hold.store(false, Relaxed);
    assert!(read(stream).await.text().ends_with("data: [DONE]\n\n"));
    assert_eq!(read(events).await.events().last().expect("some")["type"], "finished");
    server.served.await.expect("no panic").expect("a clean end");
}

#[tokio::test]
async fn what_is_late_is_cut_off_and_told_so() {
    let mut server = start(Setup { drain: Duration::from_millis(100), ..Setup::default() }).await;
    server.hold.store(true, Relaxed);
    let words = json!({"model": "words", "prompt": "x", "stream": true, "ignore_eos": true}).to_string();
    let stream = server.send(request("POST", "/v1/completions", "application/json", words)).await;
    server.wait_for_live(1).await;
    server.stop.take().expect("not stopped yet").send(()).expect("the server listens");
    let events = read(stream).await.events();
    assert_eq!(events.last().expect("some")["error"]["code"], "shutting_down");
    server.served.await.expect("no panic").expect("a clean end");
}

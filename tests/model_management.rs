//! Models that come and go over HTTP, from real checkpoints.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tale::engine::{Engine, EngineOptions, ModelSpec};
use tale::http::{AppState, ModelManagement, ServerOptions};

use crate::support::{Answer, Server, listen, read, request, server};

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

/// A server of language models on demand, whose clients may load and unload them.
async fn managed(names: &[&str]) -> Server {
    let path = goldens().join("llama-tied/checkpoint");
    let spec = |name: &&str| ModelSpec { on_demand: true, ..ModelSpec::new(*name, path.as_path()) };
    let models = names.iter().map(spec).collect();
    let mut options = EngineOptions { memory_bytes: Some(64 << 20), ..EngineOptions::default() };
    options.load.kv_cache_bytes = 1 << 20;
    let engine = tokio::task::spawn_blocking(move || Engine::load(models, options, |_, _| ())).await.expect("no panic");
    let engine = engine.expect("the checkpoint is sound");
    let management = ModelManagement { models_dir: Some(goldens()), configured: vec![path] };
    let options = ServerOptions { model_management: Some(management), ..ServerOptions::default() };
    let state = AppState::new(options).expect("a temporary folder can be made");
    state.set_engine(engine.clone());
    let (address, stop, served) = listen(state, Duration::from_secs(10)).await;
    let (hold, fail) = Default::default();
    Server { address, engine, fixed_bytes: 0, stop: Some(stop), served, hold, fail }
}

async fn model(server: &Server, name: &str) -> Value {
    server.get(&format!("/v1/models/{name}")).await.expect(200).json()
}

async fn wait_for(server: &Server, name: &str, state: &str) -> Value {
    let begun = Instant::now();
    loop {
        let model = model(server, name).await;
        if model["state"] == state {
            return model;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{model}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn words(model: &str, more: Value) -> Value {
    let mut body = json!({"model": model, "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": true});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

fn code(answer: &Answer) -> Value {
    answer.json()["error"]["code"].clone()
}

#[tokio::test]
async fn a_model_on_demand_comes_with_a_request_and_goes_when_told() {
    let server = managed(&["org/a"]).await;
    let before = model(&server, "org/a").await;
    assert_eq!((&before["state"], &before["devices"]), (&json!("unloaded"), &json!([])));
    let ready = server.get("/readyz").await.expect(200);
    assert_eq!(ready.text(), "ready\norg/a: unloaded\n");
    let refused = server.post("/v1/completions", &words("org/a", json!({}))).await.expect(503);
    assert_eq!(code(&refused), "model_loading");
    assert_eq!(refused.header("retry-after"), "5");
    let there = wait_for(&server, "org/a", "ready").await;
    assert_eq!(there["devices"], json!(["cpu"]));
    assert_eq!(server.get("/readyz").await.expect(200).text(), "ready\n");
    server.post("/v1/completions", &words("org/a", json!({}))).await.expect(200);
    let gone = server.post("/v1/models/org/a/unload", &json!({"drain_seconds": 5})).await.expect(202);
    assert!(["unloading", "unloaded"].contains(&gone.json()["state"].as_str().expect("a state")), "{gone:?}");
    wait_for(&server, "org/a", "unloaded").await;
    assert_eq!(server.engine.status().ledger_used_bytes(), 0);
    // A request that has time waits: as its body says, or its head.
    server.post("/v1/completions", &words("org/a", json!({"allow_cold_start": true}))).await.expect(200);
    for (path, body) in [
        ("/v1/completions", words("org/a", json!({}))),
        ("/tokenize", json!({"model": "org/a", "prompt": "x"})),
        ("/v1/responses", json!({"model": "org/a", "input": "x", "max_output_tokens": 2})),
    ] {
        server.call("POST", "/v1/models/org/a/unload", "", "").await.expect(202);
        wait_for(&server, "org/a", "unloaded").await;
        let mut request = request("POST", path, "application/json", body.to_string());
        request.headers_mut().insert("x-allow-cold-start", "true".parse().expect("a value"));
        let answer = read(server.send(request).await).await;
        // A model without a chat template has no conversations: but it is there to say so.
        assert!(answer.status != 503, "{answer:?}");
    }
    let mut wrong = request("POST", "/v1/completions", "application/json", words("org/a", json!({})).to_string());
    wrong.headers_mut().insert("x-allow-cold-start", "1".parse().expect("a value"));
    assert_eq!(read(server.send(wrong).await).await.expect(400).json()["error"]["param"], "x-allow-cold-start");
}

#[tokio::test]
async fn what_clients_may_not_do_with_models_is_refused() {
    let closed = server().await;
    let refused = closed.post("/v1/models/words/unload", &json!({})).await.expect(403);
    assert_eq!(code(&refused), "model_management_off");
    assert!(refused.json()["error"]["message"].as_str().expect("words").contains("model_management = true"));
    closed.get("/v1/models/words").await.expect(200);

    let server = managed(&["a"]).await;
    for (path, body, status, expected) in [
        ("/v1/models/none/load", json!({}), 404, "model_not_found"),
        ("/v1/models/a/reload", json!({}), 404, "unknown_url"),
        ("/v1/models/a", json!({}), 404, "unknown_url"),
        ("/v1/models/a/load", json!({"path": "../../Cargo.toml"}), 400, "path_not_allowed"),
        ("/v1/models/a/load", json!({"path": "/etc"}), 400, "path_not_allowed"),
        ("/v1/models/a/load", json!({"path": "none"}), 400, "path_not_allowed"),
        ("/v1/models/a/load", json!({"path": 3}), 400, "invalid_value"),
        ("/v1/models/a/load", json!({"devices": ["gpu"]}), 400, "invalid_value"),
        ("/v1/models/a/load", json!({"devices": ["cuda:7"]}), 400, "invalid_value"),
        ("/v1/models/a/load", json!({"when": "now"}), 400, "invalid_value"),
        ("/v1/models/a/load", json!({"drain_seconds": -1}), 400, "invalid_value"),
        ("/v1/models/a/load", json!({"patth": "x"}), 400, "unknown_parameter"),
        ("/v1/models/a/unload", json!({"path": "x"}), 400, "unknown_parameter"),
        ("/v1/models/a/unload", json!({}), 409, "model_state"),
        // Words that are there and are no checkpoint of a model.
        ("/v1/models/a/load", json!({"path": "README.md"}), 400, "invalid_checkpoint"),
    ] {
        let answer = server.post(path, &body).await.expect(status);
        assert_eq!(code(&answer), expected, "{path} {body}: {answer:?}");
    }
    let failed = wait_for(&server, "a", "failed").await;
    assert!(failed["problem"].as_str().is_some_and(|problem| !problem.is_empty()), "{failed}");
    assert_eq!(server.engine.status().ledger_used_bytes(), 0);
    server.call("POST", "/v1/models/a/load", "", "").await.expect(202);
    wait_for(&server, "a", "ready").await;
    assert_eq!(code(&server.post("/v1/models/a/load", &json!({})).await.expect(409)), "model_state");
}

/// Requests go on while other weights take the place of those that are there, and none of them fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weights_are_swapped_while_requests_come() {
    let server = std::sync::Arc::new(managed(&["a"]).await);
    server.post("/v1/completions", &words("a", json!({"allow_cold_start": true}))).await.expect(200);
    let is_over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let (server, is_over) = (server.clone(), is_over.clone());
            tokio::spawn(async move {
                let mut answered = 0;
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) || answered < 3 {
                    server.post("/v1/completions", &words("a", json!({"allow_cold_start": true}))).await.expect(200);
                    answered += 1;
                }
            })
        })
        .collect();
    let vocabulary = async |server: &Server| {
        let body = json!({"model": "a", "prompt": "x", "allow_cold_start": true});
        server.post("/tokenize", &body).await.expect(200).json()["max_model_len"].clone()
    };
    let old = vocabulary(&server).await;
    for (path, when) in [("qwen2/checkpoint", "beside"), ("llama-tied/checkpoint", "after")] {
        let begun = server.post("/v1/models/a/load", &json!({"path": path, "when": when})).await.expect(202);
        assert!(["ready", "loading", "unloading"].contains(&begun.json()["state"].as_str().expect("a state")));
        let asked = Instant::now();
        loop {
            let model = model(&server, "a").await;
            if model["state"] == "ready" && model.get("progress").is_none() {
                break;
            }
            assert!(model["state"] != "failed" && asked.elapsed() < Duration::from_secs(60), "{model}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert_eq!(vocabulary(&server).await, old);
    is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        client.await.expect("no request failed");
    }
}

//! Bodies and files take no more than their share: of places, of memory, of values, of threads.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Server, Setup, server, start};

/// A connection on which a body of `length` bytes is announced, and `sent` of it has come.
async fn announce(server: &Server, path: &str, length: usize, sent: &[u8]) -> TcpStream {
    let mut connection = TcpStream::connect(server.address).await.expect("the server listens");
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).await.expect("the server reads");
    connection.write_all(sent).await.expect("the server reads");
    connection
}

/// The head and the beginning of the body of an answer.
async fn answer(mut connection: TcpStream) -> String {
    let mut bytes = vec![0; 4096];
    let length = connection.read(&mut bytes).await.expect("the server answers");
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

fn words() -> Value {
    json!({"model": "words", "prompt": "a boat", "max_tokens": 1})
}

#[tokio::test]
async fn a_place_is_taken_when_the_body_is_there() {
    let server = start(Setup { max_requests: 2, ..Setup::default() }).await;
    let mut begun = Vec::new();
    for _ in 0..8 {
        begun.push(announce(&server, "/v1/completions", words().to_string().len(), b"{").await);
    }
    for _ in 0..4 {
        server.post("/v1/completions", &words()).await.expect(200);
    }
    let mut first = begun.swap_remove(0);
    first.write_all(&words().to_string().as_bytes()[1..]).await.expect("the server reads");
    assert!(answer(first).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn announced_bytes_take_no_memory_and_those_that_come_a_bounded_one() {
    let server = start(Setup { max_body_memory: 8 << 20, ..Setup::default() }).await;
    let path = "/v1/images/generations";
    let mut announced = Vec::new();
    for _ in 0..40 {
        announced.push(announce(&server, path, 32 << 20, b"").await);
    }
    let body = json!({"model": "pictures", "prompt": "x"}).to_string() + &" ".repeat(2 << 20);
    let post = async || server.call("POST", path, "application/json", body.clone()).await;
    post().await.expect(200);
    // More than half of the memory, held by a body that goes on.
    let held = announce(&server, path, 6 << 20, &vec![b' '; 5 << 20]).await;
    let begun = Instant::now();
    let refused = loop {
        let answer = post().await;
        if answer.status != 200 {
            break answer.expect(503);
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "more memory is taken than there is");
    };
    assert_eq!(refused.json()["error"]["code"], "body_memory_full");
    assert_eq!(refused.header("retry-after"), "1");
    // What is small goes on.
    server.post("/v1/completions", &words()).await.expect(200);
    drop((held, announced));
    let begun = Instant::now();
    while post().await.status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(5), "the memory did not come back");
    }
}

/// Param and message of the refusal of `body`, which is not even whole JSON: it is refused on the way.
async fn check(server: &Server, path: &str, body: String, param: &str, problem: &str) {
    let refused = server.call("POST", path, "application/json", body).await.expect(400).json();
    let error = &refused["error"];
    assert_eq!((error["param"].as_str(), error["code"].as_str()), (Some(param), Some("invalid_value")), "{error}");
    assert_eq!(error["message"], format!("{param}: {problem}"));
}

#[tokio::test]
async fn what_a_field_holds_is_bounded_while_it_is_read() {
    let server = server().await;
    let list =
        |field: &str, element: &str, number: usize| format!("{{\"{field}\": [{}", vec![element; number].join(","));
    let message = r#"{"role":"user","content":""}"#;
    let problem = "has more than 8192 elements";
    check(&server, "/v1/chat/completions", list("messages", message, 8193), "messages", problem).await;
    let parts = format!(r#"{{"role":"user","content":[{}]}}"#, vec!["{}"; 16].join(","));
    let problem = "holds more than 131072 values";
    check(&server, "/v1/chat/completions", list("messages", &parts, 8192), "messages", problem).await;
    check(&server, "/v1/completions", list("prompt", "\"\"", 65), "prompt", "has more than 64 elements").await;
    check(&server, "/v1/completions", list("stop", "\"a\"", 17), "stop", "has more than 16 elements").await;
    let problem = "takes strings of at most 4096 bytes in all";
    let stop = json!({"model": "words", "prompt": "x", "stop": vec!["a".repeat(1024); 5]});
    check(&server, "/v1/completions", stop.to_string(), "stop", problem).await;
    let path = "/v1/images/edits";
    check(&server, path, list("reference_images", "\"\"", 9), "reference_images", "has more than 8 elements").await;
    check(&server, path, list("loras", "{}", 17), "loras", "has more than 16 elements").await;
    check(&server, path, list("size", "[]", 1025), "size", "holds more than 1024 values").await;
    let context = server.post("/v1/completions", &json!({"model": "words", "prompt": vec![1; 100]})).await.expect(200);
    assert_eq!(context.json()["usage"]["prompt_tokens"], 100);
    let tokens =
        server.call("POST", "/v1/completions", "application/json", list("prompt", "1", 1 << 20)).await.expect(400);
    let message = tokens.json()["error"]["message"].as_str().expect("text").to_owned();
    assert!(message.starts_with("prompt: has more than ") && message.ends_with(" numbers"), "{message}");
    let query = format!("/v1/videos?after={}", "a".repeat(1024));
    let refused = server.get(&query).await.expect(400).json();
    assert_eq!(refused["error"]["message"], "the query is longer than 1024 bytes");
}

#[tokio::test]
async fn a_file_that_is_gone_is_said_before_the_answer_begins() {
    let dir = tempfile::tempdir().expect("made");
    let server = start(Setup { output_dir: Some(dir.path().to_owned()), ..Setup::default() }).await;
    let body = json!({"model": "clips", "prompt": "x", "num_frames": 1, "output_format": "gif"});
    let job = server.post("/v1/videos", &body).await.expect(200).json();
    let path = format!("/v1/videos/{}", job["id"].as_str().expect("a name"));
    let begun = Instant::now();
    while server.get(&path).await.expect(200).json()["status"] != "completed" {
        assert!(begun.elapsed() < Duration::from_secs(20), "it is not made");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.get(&format!("{path}/content")).await.expect(200);
    for file in std::fs::read_dir(dir.path()).expect("there") {
        std::fs::remove_file(file.expect("an entry").path()).expect("there");
    }
    let gone = server.get(&format!("{path}/content")).await.expect(410).json();
    assert_eq!(gone["error"]["code"], "removed");
}

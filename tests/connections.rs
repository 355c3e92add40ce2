//! Connections as sockets see them: what hostile, odd and vanished clients get, and what others get beside them.

use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tale::http::{AppState, ConnectionLimits, ServerOptions, serve_health};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::support::{SECRET, Server, Setup, request, server, start};

/// Nothing here takes longer.
const SOON: Duration = Duration::from_secs(5);

async fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.expect("the server listens")
}

/// All that still comes over a connection.
async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the server closes");
    read.unwrap_or_else(|error| panic!("{error} after {}", String::from_utf8_lossy(&bytes)));
    String::from_utf8(bytes).expect("text")
}

/// Sends bytes as they are and reads until the server closes.
async fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> String {
    let mut stream = connect(address).await;
    stream.write_all(bytes.as_ref()).await.expect("sent");
    read_to_end(&mut stream).await
}

/// A whole request by hand.
fn post(path: &str, body: &Value) -> String {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

const LAST_GET: &str = "GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// The status and the error of an answer in the API's shape.
#[track_caller]
fn error_of(answer: &str) -> (u16, Value) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {answer:?}"));
    assert!(head.to_ascii_lowercase().contains("content-type: application/json"), "{head}");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, serde_json::from_str::<Value>(body).unwrap_or_else(|error| panic!("{error}: {answer}"))["error"].clone())
}

#[tokio::test]
async fn what_is_no_request_is_answered_at_once_in_the_shape_of_the_api() {
    let server = server().await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";
    let many = "a: b\r\n".repeat(101);
    for (bytes, status, code) in [
        (format!("G@{SECRET} / HTTP/1.1\r\n\r\n"), 400, "invalid_request_head"),
        (format!("GET / HTTP/1.1\r\nhost: localhost\r\nx: {SECRET}\x01\r\n\r\n"), 400, "invalid_request_head"),
        (format!("GET / HTTP/1.1\r\n{SECRET} : a\r\n"), 400, "invalid_request_head"),
        (format!("GET / HTTP/9.9\r\nx: {SECRET}\r\n\r\n"), 400, "invalid_request_head"),
        (format!("GET /\u{7f} HTTP/1.1\r\nhost: localhost\r\nx: {SECRET}\r\n\r\n"), 400, "invalid_request_head"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), 400, "invalid_request_head"),
        (format!("GET / HTTP/1.1\r\nx: {SECRET}\r\n\r\n"), 400, "invalid_request_head"),
        (format!("GET / HTTP/1.1\r\nhost: a\r\nhost: {SECRET}\r\n\r\n"), 400, "invalid_request_head"),
        (format!("GET / HTTP/1.1\r\nhost: {SECRET}/a b\r\n\r\n"), 400, "invalid_request_head"),
        (format!("{head}content-length: {SECRET}\r\n\r\n"), 400, "invalid_request_head"),
        (format!("{head}content-length: 1\r\ncontent-length: 2\r\n\r\n{{"), 400, "invalid_request_head"),
        (format!("{head}transfer-encoding: {SECRET}\r\n\r\n"), 400, "invalid_request_head"),
        (format!("{head}{many}\r\n"), 431, "request_head_too_large"),
        (format!("GET / HTTP/1.1\r\nx: {}", SECRET.repeat(6000)), 431, "request_head_too_large"),
        (format!("{head}transfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n{SECRET}"), 413, "request_too_large"),
        (format!("{head}transfer-encoding: chunked\r\n\r\n1\r\n{{\r\n7fffffff\r\n"), 413, "request_too_large"),
        (format!("{head}transfer-encoding: chunked\r\n\r\n{SECRET}\r\n"), 400, "invalid_body"),
    ] {
        let begun = Instant::now();
        let mut stream = connect(server.address).await;
        stream.write_all(bytes.as_bytes()).await.expect("sent");
        let mut answer = vec![0; 4096];
        let length = timeout(SOON, stream.read(&mut answer)).await.expect("an answer").expect("no reset");
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(begun.elapsed() < Duration::from_secs(2), "{bytes:.80} took {:?}", begun.elapsed());
        let (found, error) = error_of(&answer);
        assert_eq!((found, error["code"].as_str()), (status, Some(code)), "{bytes:.80}: {answer}");
        assert!(!answer.contains(SECRET), "{answer}");
    }
    server.get("/livez").await.expect(200);
}

#[tokio::test]
async fn an_old_client_needs_no_host() {
    let server = server().await;
    let answer = exchange(server.address, "\r\n\r\nGET /livez HTTP/1.0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK") && answer.ends_with("ok\n"), "{answer}");
}

#[tokio::test]
async fn requests_in_one_piece_are_answered_in_turn() {
    let server = server().await;
    let body = json!({"model": "words", "prompt": "x", "max_tokens": 2}).to_string();
    let chunks =
        format!("{:x};a=b\r\n{}\r\n{:x}\r\n{}\r\n0\r\nx: y\r\n\r\n", 5, &body[..5], body.len() - 5, &body[5..]);
    let chunked = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\n\r\n{chunks}"
    );
    let whole = post("/v1/completions", &json!({"model": "words", "prompt": "x", "max_tokens": 3}));
    let all = format!("{whole}\r\n{chunked}{whole}{LAST_GET}");
    let answer = exchange(server.address, &all).await;
    let tokens: Vec<_> = answer.split("\"completion_tokens\":").skip(1).map(|rest| &rest[..1]).collect();
    assert_eq!((tokens, answer.matches("HTTP/1.1 200").count()), (vec!["3", "2", "3"], 4), "{answer}");
    // The same a few bytes at a time.
    let mut stream = connect(server.address).await;
    stream.set_nodelay(true).expect("a socket");
    for part in all.as_bytes().chunks(7) {
        stream.write_all(part).await.expect("sent");
        tokio::task::yield_now().await;
    }
    assert_eq!(read_to_end(&mut stream).await.matches("HTTP/1.1 200").count(), 4);
    // A malformed one behind a sound one is told so, too.
    let answer = exchange(server.address, format!("{whole}GET / HTTP/7\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    assert!(answer.ends_with("\"code\":\"invalid_request_head\"}}"), "{answer}");
}

#[tokio::test]
async fn a_client_that_closes_its_sending_half_gets_its_answer() {
    let server = server().await;
    for stream in [false, true] {
        server.hold.store(true, Relaxed);
        let mut client = connect(server.address).await;
        let body = json!({"model": "words", "prompt": "x", "stream": stream, "max_tokens": 20});
        client.write_all(post("/v1/completions", &body).as_bytes()).await.expect("sent");
        client.shutdown().await.expect("half a close");
        server.wait_for_live(1).await;
        // Long enough for a client that has gone to be noticed.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(server.live_sessions(), 1, "stream: {stream}");
        server.hold.store(false, Relaxed);
        let answer = read_to_end(&mut client).await;
        // Interim answers may come first (RFC 9110, 15.2).
        let answer = answer.trim_start_matches("HTTP/1.1 100 Continue\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains(if stream { "data: [DONE]" } else { "\"completion_tokens\":20" }), "{answer}");
    }
}

/// As an SDK's client goes that waits for a queue: the head is there, and nothing else would be sent for a while.
#[tokio::test]
async fn a_client_that_leaves_a_silent_stream_is_noticed() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let job = server.post("/v1/videos", &json!({"model": "clips", "prompt": "x"})).await.expect(200).json();
    let events = format!("/v1/jobs/{}/events", job["id"].as_str().expect("a name"));
    let mut response = server.send(request("GET", &events, "", "")).await;
    http_body_util::BodyExt::frame(&mut response).await.expect("the past").expect("sound");
    let in_flight = async || {
        let metrics = server.get("/metrics").await;
        metrics.text().lines().filter(|line| line.starts_with("tale_http_requests_total{route=\"/v1/jobs")).count()
    };
    assert_eq!(in_flight().await, 0);
    drop(response);
    let begun = Instant::now();
    while in_flight().await == 0 {
        assert!(begun.elapsed() < SOON, "the stream goes on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn limits(most: usize, of_address: usize) -> ConnectionLimits {
    ConnectionLimits { max_connections: Some(most), max_per_address: Some(of_address), ..ConnectionLimits::default() }
}

#[tokio::test]
async fn heads_and_idle_connections_have_a_time() {
    let connections = ConnectionLimits {
        header: Duration::from_millis(300),
        idle: Duration::from_millis(600),
        ..ConnectionLimits::default()
    };
    let server = start(Setup { connections, ..Setup::default() }).await;
    let begun = Instant::now();
    assert_eq!(exchange(server.address, "").await, "", "a silent connection closes without a word");
    let (status, error) = error_of(&exchange(server.address, "GET /livez HTTP/1.1\r\nhost").await);
    assert_eq!((status, error["code"].as_str()), (408, Some("request_timeout")));
    assert!(begun.elapsed() >= Duration::from_millis(600), "{:?}", begun.elapsed());
    let begun = Instant::now();
    let answer = exchange(server.address, LAST_GET.replace("close", "keep-alive")).await;
    assert!(answer.ends_with("ok\n") && begun.elapsed() >= Duration::from_millis(600), "{:?}", begun.elapsed());
    // Work is not hurried.
    server.hold.store(true, Relaxed);
    let body = json!({"model": "words", "prompt": "x", "max_tokens": 2});
    let call = server.post("/v1/completions", &body);
    let release = async {
        tokio::time::sleep(Duration::from_millis(1000)).await;
        server.hold.store(false, Relaxed);
    };
    tokio::join!(call, release).0.expect(200);
}

#[tokio::test]
async fn a_client_that_takes_nothing_of_its_answer_is_given_up() {
    let connections = ConnectionLimits { send: Duration::from_millis(300), ..ConnectionLimits::default() };
    let server = start(Setup { connections, ..Setup::default() }).await;
    let mut stream = connect(server.address).await;
    let requests = "GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(2000);
    stream.write_all(requests.as_bytes()).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(1000)).await;
    let mut bytes = Vec::new();
    let _ = timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("the server has closed");
    let answers = String::from_utf8_lossy(&bytes).matches("HTTP/1.1 200 OK").count();
    assert!(answers < 2000, "{answers}");
}

#[tokio::test]
async fn silent_connections_make_room_and_busy_ones_do_not() {
    let server = start(Setup { connections: limits(6, 6), ..Setup::default() }).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(connect(server.address).await);
        server.get("/livez").await.expect(200);
    }
    server.hold.store(true, Relaxed);
    let body = json!({"model": "words", "prompt": "x", "stream": true, "ignore_eos": true}).to_string();
    let mut busy = Vec::new();
    for _ in 0..6 {
        busy.push(server.send(request("POST", "/v1/completions", "application/json", body.clone())).await);
    }
    let models = LAST_GET.replace("/livez", "/v1/models").replace("connection: close\r\n", "");
    let refused = exchange(server.address, &models).await;
    let (status, error) = error_of(&refused);
    assert_eq!((status, error["code"].as_str()), (503, Some("too_many_connections")));
    assert!(refused.contains("retry-after: 1\r\n") && refused.contains("6 connections (max_connections)"), "{refused}");
    // Health has a reserve, which silent connections do not take either.
    silent.extend(connections_to(server.address, 100).await);
    assert!(exchange(server.address, LAST_GET).await.ends_with("ok\n"));
    server.wait_for_live(6).await;
    busy.pop();
    let begun = Instant::now();
    while !exchange(server.address, format!("{models}{LAST_GET}")).await.ends_with("ok\n") {
        assert!(begun.elapsed() < SOON);
    }
}

async fn models_from(local: &str, server: &Server) -> String {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(local.parse().expect("an address")).expect("an address of this machine");
    let mut stream = socket.connect(server.address).await.expect("the server listens");
    stream.write_all(LAST_GET.replace("/livez", "/v1/models").as_bytes()).await.expect("sent");
    read_to_end(&mut stream).await
}

#[tokio::test]
async fn one_address_does_not_have_all_connections() {
    let server = start(Setup { connections: limits(10, 2), ..Setup::default() }).await;
    server.hold.store(true, Relaxed);
    let body = json!({"model": "words", "prompt": "x", "stream": true, "ignore_eos": true}).to_string();
    let mut busy = Vec::new();
    for _ in 0..2 {
        busy.push(server.send(request("POST", "/v1/completions", "application/json", body.clone())).await);
    }
    let (status, error) = error_of(&models_from("127.0.0.1:0", &server).await);
    assert!(error["message"].as_str().expect("text").contains("(max_connections_per_address)"), "{error}");
    assert_eq!(status, 503);
    let elsewhere = models_from("127.0.0.2:0", &server).await;
    assert!(elsewhere.starts_with("HTTP/1.1 200"), "{elsewhere}");
}

#[tokio::test]
async fn the_health_listener_answers_health_and_nothing_else() {
    let state = AppState::new(ServerOptions::default()).expect("a temporary folder can be made");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(serve_health(listener, state));
    let get = async |path: &str| exchange(address, LAST_GET.replace("/livez", path)).await;
    assert!(get("/livez").await.starts_with("HTTP/1.1 200"));
    assert_eq!(error_of(&get("/readyz").await).1["code"], "loading");
    assert!(get("/metrics").await.starts_with("HTTP/1.1 200"));
    assert_eq!(error_of(&get("/v1/models").await).0, 404);
    let silent = connections_to(address, 100).await;
    assert!(get("/livez").await.starts_with("HTTP/1.1 200"));
    drop(silent);
}

async fn connections_to(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let mut connections = Vec::new();
    for _ in 0..count {
        connections.push(connect(address).await);
    }
    connections
}

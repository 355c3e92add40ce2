//! Jobs that outlive their process: real servers over a folder of state, killed and asked to end in the middle of a clip.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::{NamedTempFile, tempdir};

/// Longest time that a clip of these may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Serving {
    child: Child,
    address: String,
    log: NamedTempFile,
}

impl Serving {
    fn start(state: &Path) -> Self {
        let log = NamedTempFile::new().unwrap();
        let goldens = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tale"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--state-dir"]).arg(state);
        command.args(["--model", &format!("wan={goldens}/wan-a/checkpoint")]);
        command.env("RUST_LOG", "info").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.reopen().unwrap());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Some(address) = line.strip_prefix("listening on http://") else {
            panic!("no address: {}", std::fs::read_to_string(log.path()).unwrap());
        };
        Self { address: address.trim().to_owned(), child, log }
    }

    fn call(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
        (status, answer[end + 4..].to_vec())
    }

    fn json(&self, method: &str, path: &str, headers: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer) = self.call(method, path, headers, &body);
        (status, serde_json::from_slice(&answer).unwrap())
    }

    fn order(&self, body: &Value) -> String {
        let (status, video) = self.json("POST", "/v1/videos", "", body);
        assert_eq!(status, 200, "{video}");
        video["id"].as_str().unwrap().to_owned()
    }

    fn video(&self, id: &str) -> Value {
        self.json("GET", &format!("/v1/videos/{id}"), "", &Value::Null).1
    }

    /// The video, once `is_there` says so.
    fn wait(&self, id: &str, is_there: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let video = self.video(id);
            if is_there(&video) {
                return video;
            }
            assert!(begun.elapsed() < PATIENCE && video["status"] != "failed", "{video}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The file, once it is whole.
    fn content(&self, id: &str) -> Vec<u8> {
        self.wait(id, |video| video["status"] == "completed");
        let (status, file) = self.call("GET", &format!("/v1/videos/{id}/content"), "", "");
        assert_eq!(status, 200);
        file
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    /// Ends the process with a signal, and tells how long that took.
    fn end(&mut self, signal: &str) -> Duration {
        let begun = Instant::now();
        let kill = format!("kill -{signal} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        self.child.wait().unwrap();
        begun.elapsed()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn clip(seed: u64) -> Value {
    json!({"model": "wan", "prompt": "a boat", "size": "64x64", "num_frames": 9, "num_inference_steps": 800, "seed": seed})
}

/// Killed without a word, then asked to end, then let alone: the clip is that of a server that nobody disturbed.
#[test]
fn a_clip_that_is_interrupted_has_the_same_bytes() {
    let states = tempdir().unwrap();
    let undisturbed = Serving::start(&states.path().join("a"));
    let order = clip(7);
    let expected = undisturbed.content(&undisturbed.order(&order));
    let state = states.path().join("b");
    let mut serving = Serving::start(&state);
    let id = serving.order(&order);
    let mut went_on = false;
    for (signal, percent) in [("KILL", 10), ("TERM", 40)] {
        serving.wait(&id, |video| video["progress"].as_u64() >= Some(percent));
        let took = serving.end(signal);
        assert!(took < Duration::from_secs(10), "{signal}: {took:?}");
        serving = Serving::start(&state);
        serving.wait(&id, |video| video["progress"].as_u64() > Some(percent));
        went_on |= serving.log().contains("goes on from its checkpoint");
    }
    assert_eq!(serving.content(&id), expected, "{}", serving.log());
    // On a machine that lets the test wait for long one of them may come too late, hardly both.
    assert!(went_on, "{}", serving.log());
    assert!(serving.end("TERM") < Duration::from_secs(10), "nothing is to be waited for");
    // What is done stays, and nothing lies beside it.
    let serving = Serving::start(&state);
    assert_eq!(serving.content(&id), expected);
    assert_eq!(std::fs::read_dir(state.join("objects")).unwrap().count(), 0);
}

#[test]
fn what_waits_is_made_by_the_next_process_and_an_order_given_twice_is_one() {
    let state = tempdir().unwrap();
    let mut serving = Serving::start(state.path());
    let first = serving.order(&clip(1));
    let key = "idempotency-key: scene 1\r\n";
    let (status, video) = serving.json("POST", "/v1/videos", key, &clip(2));
    assert_eq!(status, 200, "{video}");
    serving.end("KILL");
    let serving = Serving::start(state.path());
    let (status, again) = serving.json("POST", "/v1/videos", key, &clip(2));
    assert_eq!((status, &again["id"]), (200, &video["id"]));
    let (status, refused) = serving.json("POST", "/v1/videos", key, &clip(3));
    assert_eq!((status, refused["error"]["code"].as_str()), (422, Some("idempotency_key_reused")));
    for id in [first.as_str(), video["id"].as_str().unwrap()] {
        assert!(!serving.content(id).is_empty());
    }
    let (_, list) = serving.json("GET", "/v1/videos", "", &Value::Null);
    assert_eq!(list["data"].as_array().map(Vec::len), Some(2), "{list}");
}

#[test]
fn a_folder_has_one_process() {
    let state = tempdir().unwrap();
    let _serving = Serving::start(state.path());
    let model = concat!("a=", env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen2/checkpoint");
    let output = Command::new(env!("CARGO_BIN_EXE_tale"))
        .args(["serve", "--listen", "127.0.0.1:0", "--model", model, "--state-dir"])
        .arg(state.path())
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("another process of tale has it") && log.trim().lines().count() == 1, "{log}");
}

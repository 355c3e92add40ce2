//! How `tale serve` ends, and what it leaves: signals and a system without threads.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::{TempDir, tempdir};

/// A server, and the folder that it takes for the system's temporary one.
struct Serving {
    child: Child,
    address: String,
    temporary: TempDir,
    _stdout: BufReader<ChildStdout>,
}

impl Serving {
    fn start(before: &[&str]) -> Self {
        let temporary = tempdir().unwrap();
        let model = format!("tiny={}/tests/goldens/qwen2/checkpoint", env!("CARGO_MANIFEST_DIR"));
        let words =
            [before, &[env!("CARGO_BIN_EXE_tale"), "serve", "--listen", "127.0.0.1:0", "--model", &model]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_remove("RUST_LOG").env("TMPDIR", temporary.path());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.strip_prefix("listening on http://").expect("the address").trim().to_owned();
        Self { child, address, temporary, _stdout: stdout }
    }

    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    fn temporary_folders(&self) -> usize {
        std::fs::read_dir(self.temporary.path()).unwrap().count()
    }

    fn wait(&mut self) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or(-1);
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "still running");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_hangup_drains_as_a_termination_does() {
    for name in ["HUP", "TERM"] {
        let mut serving = Serving::start(&[]);
        assert_eq!(serving.temporary_folders(), 1);
        serving.signal(name);
        assert_eq!(serving.wait(), 0, "{name}");
        assert_eq!(serving.temporary_folders(), 0, "{name}");
    }
}

#[test]
fn a_hangup_that_is_ignored_stays_so() {
    let serving = Serving::start(&["nohup"]);
    serving.signal("HUP");
    std::thread::sleep(Duration::from_millis(300));
    assert!(TcpStream::connect(&serving.address).is_ok());
}

#[test]
fn a_second_signal_ends_at_once_and_leaves_nothing() {
    let mut serving = Serving::start(&[]);
    // A stream that takes longer than the drain is waited for.
    let body = r#"{"model":"tiny","prompt":"a","stream":true,"ignore_eos":true,"n":8}"#;
    let mut stream = TcpStream::connect(&serving.address).unwrap();
    let length = body.len();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    stream.read_exact(&mut [0; 15]).unwrap();
    serving.signal("TERM");
    std::thread::sleep(Duration::from_millis(50));
    serving.signal("INT");
    let code = serving.wait();
    assert!(code == 130 || code == 0, "{code}: a fast machine may have ended the stream");
    assert_eq!(serving.temporary_folders(), 0);
}

/// The limit is one of a user, and the superuser has none. What that user may not reach is passed as an open file.
#[test]
fn a_system_without_threads_is_told_in_one_line() {
    let is_root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all --inh-caps=-all";
    let limited = "prlimit --nproc=4 /proc/self/fd/0 serve --listen 127.0.0.1:0 --model a=/no/such";
    let line = if is_root { format!("{nobody} {limited}") } else { limited.to_owned() };
    let words: Vec<_> = line.split(' ').collect();
    let binary = File::open(env!("CARGO_BIN_EXE_tale")).unwrap();
    let output = Command::new(words[0]).args(&words[1..]).env_remove("RUST_LOG").stdin(binary).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.lines().count() == 1 && said.contains("threads cannot be started"), "{said}");
}

//! `tale serve` as a process: signals, what it leaves behind, and a system that gives it little.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::{NamedTempFile, TempDir, tempdir};

/// A server, the folder that it takes for the system's temporary one, and its log.
struct Serving {
    child: Child,
    address: String,
    temporary: TempDir,
    log: NamedTempFile,
    _stdout: BufReader<ChildStdout>,
}

impl Serving {
    fn start(before: &[&str], flags: &[&str]) -> Self {
        let (temporary, log) = (tempdir().unwrap(), NamedTempFile::new().unwrap());
        let model = format!("tiny={}/tests/goldens/qwen2/checkpoint", env!("CARGO_MANIFEST_DIR"));
        let serve =
            [env!("CARGO_BIN_EXE_tale"), "serve", "--state-dir", "none", "--listen", "127.0.0.1:0", "--model", &model];
        let words = [before, &serve, flags].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env_remove("RUST_LOG").env("TMPDIR", temporary.path()).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(log.reopen().unwrap()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.strip_prefix("listening on http://").expect("the address").trim().to_owned();
        Self { child, address, temporary, log, _stdout: stdout }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap()
    }

    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// A stream of several answers to `prompt`, which has begun.
    fn stream(&self, prompt: &str) -> TcpStream {
        let body = format!(r#"{{"model":"tiny","prompt":"{prompt}","stream":true,"ignore_eos":true,"n":8}}"#);
        let mut stream = self.connect();
        let length = body.len();
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream.read_exact(&mut [0; 15]).unwrap();
        stream
    }

    /// How often `bytes` stand in the memory that the process can write.
    fn copies_in_memory(&self, bytes: &[u8]) -> usize {
        let process = format!("/proc/{}", self.child.id());
        let memory = File::open(format!("{process}/mem")).unwrap();
        let maps = std::fs::read_to_string(format!("{process}/maps")).unwrap();
        let writable = maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with("rw")));
        let copies_in = |map: &str| {
            let (begin, end) = map.split(' ').next().unwrap().split_once('-').unwrap();
            let [begin, end] = [begin, end].map(|address| u64::from_str_radix(address, 16).unwrap());
            let mut content = vec![0; usize::try_from(end - begin).unwrap()];
            // A map that has gone since, or is a device's, has no copies.
            let is_read = memory.read_exact_at(&mut content, begin).is_ok();
            if is_read { content.windows(bytes.len()).filter(|window| *window == bytes).count() } else { 0 }
        };
        writable.map(copies_in).sum()
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

/// The whole answer.
fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: tale\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_hangup_drains_as_a_termination_does() {
    for name in ["HUP", "TERM"] {
        // Whoever runs the tests may ignore hangups, which children take over.
        let mut serving = Serving::start(&["env", "--default-signal=HUP"], &[]);
        assert_eq!(serving.temporary_folders(), 1);
        serving.signal(name);
        assert_eq!(serving.wait(), 0, "{name}");
        assert_eq!(serving.temporary_folders(), 0, "{name}");
    }
}

#[test]
fn a_hangup_that_is_ignored_stays_so() {
    let serving = Serving::start(&["nohup"], &[]);
    serving.signal("HUP");
    std::thread::sleep(Duration::from_millis(300));
    assert!(get(&serving.address, "/livez").ends_with("ok\n"));
}

#[test]
fn a_second_signal_ends_at_once_and_leaves_nothing() {
    let mut serving = Serving::start(&[], &[]);
    // A stream that takes longer than the drain is waited for.
    let _stream = serving.stream("a");
    serving.signal("TERM");
    std::thread::sleep(Duration::from_millis(50));
    serving.signal("INT");
    let code = serving.wait();
    assert!(code == 130 || code == 0, "{code}: a fast machine may have ended the stream");
    assert_eq!(serving.temporary_folders(), 0);
}

#[test]
fn the_memory_of_a_request_is_overwritten_with_its_end() {
    let serving = Serving::start(&[], &["--allow-core-dumps"]);
    let secret = format!("secret of {}", std::process::id());
    let stream = serving.stream(&secret);
    assert!(serving.copies_in_memory(secret.as_bytes()) > 0, "it is there while it is worked on");
    drop(stream);
    let begun = Instant::now();
    while serving.copies_in_memory(secret.as_bytes()) > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "it stays");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn health_is_told_beside_a_listener_that_is_full() {
    let serving = Serving::start(&[], &["--health-listen", "127.0.0.1:0", "--max-connections", "4"]);
    let log = serving.log();
    let line = log.lines().find(|line| line.contains("health is answered")).expect("the health listener's address");
    let health = line.split("address=").nth(1).unwrap().trim();
    let silent: Vec<_> = (0..200).map(|_| serving.connect()).collect();
    for address in [health, &serving.address] {
        assert!(get(address, "/livez").ends_with("ok\n"), "{address}");
        assert!(get(address, "/readyz").ends_with("ready\n"), "{address}");
    }
    drop(silent);
}

#[test]
fn a_process_without_files_says_so_once_and_goes_on() {
    let serving = Serving::start(&["prlimit", "--nofile=40"], &["--max-connections", "1000"]);
    let silent: Vec<_> = (0..100).map(|_| serving.connect()).collect();
    assert!(get(&serving.address, "/livez").ends_with("ok\n"));
    let log = serving.log();
    assert_eq!(log.matches("connections cannot be accepted").count(), 1, "{log}");
    assert!(log.contains("fewer files may be open than this needs"), "{log}");
    drop(silent);
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

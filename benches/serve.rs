//! What HTTP and the engine cost, over a runner that computes nothing, on loopback, clients in the same process.
//!
//! Two questions, with the targets beside the figures: how long a request takes beside the device's work (open loop at
//! 500 requests per second: a slow answer does not slow the next request down), and how many tokens per second pass
//! through server-sent events. The clients' own time is in the figures, and so is whatever else the machine does: its
//! load is printed. Takes about half a minute. `cargo bench --bench serve`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tale::engine::{Engine, EngineOptions};
use tale::http::{AppState, ServerOptions, runtime, serve};
use tale_models::testing::{Script, text_model};
use tokio::net::TcpListener;

const REQUESTS_PER_SECOND: u32 = 500;
const CONNECTIONS: u32 = 16;
const WARM_UP: Duration = Duration::from_secs(2);
const MEASURED: Duration = Duration::from_secs(10);
const TOKENS_PER_STREAM: usize = 4000;
const STREAM_BOUND: Duration = Duration::from_secs(8);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("{} cores, load {}", std::thread::available_parallelism()?, load()?);
    let runtime = runtime()?;
    let fast = server(&runtime, Duration::ZERO)?;
    for (name, body) in [
        ("completion", r#"{"model": "words", "prompt": "a boat", "max_tokens": 1}"#),
        ("chat", r#"{"model": "words", "messages": [{"role": "user", "content": "a boat"}], "max_tokens": 1}"#),
    ] {
        let path = if name == "chat" { "/v1/chat/completions" } else { "/v1/completions" };
        print_latencies(name, open_loop(fast, &request(path, body)));
    }
    for streams in [1, 16, 64] {
        print_stream("steps cost nothing", streams, &stream(fast, streams));
    }
    let paced = server(&runtime, Duration::from_millis(1))?;
    for streams in [64, 128] {
        print_stream("a step per ms", streams, &stream(paced, streams));
    }
    println!("load {}", load()?);
    Ok(())
}

fn load() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/loadavg")?.split(' ').take(2).collect::<Vec<_>>().join(" "))
}

/// A server whose text model takes `step` for each step.
fn server(runtime: &tokio::runtime::Runtime, step: Duration) -> Result<SocketAddr, Box<dyn std::error::Error>> {
    let on_step = move |_, _: &[_]| {
        if !step.is_zero() {
            std::thread::sleep(step);
        }
        Ok(())
    };
    let script = Script { max_batch: 256, on_step: Box::new(on_step), ..Script::default() };
    let engine = Engine::start(vec![("words".to_owned(), text_model(script)?)], EngineOptions::default())?;
    let state = AppState::new(ServerOptions::default())?;
    state.set_engine(engine);
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    runtime.spawn(serve(listener, state, std::future::pending(), Duration::ZERO));
    Ok(address)
}

fn request(path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}");
    format!("{head}\r\n\r\n{body}").into_bytes()
}

/// Latencies, sorted, of requests that are sent by the clock whether or not the ones before are answered (each thread
/// has every sixteenth; when it is late, the time counts from when it should have sent).
fn open_loop(address: SocketAddr, request: &[u8]) -> Vec<Duration> {
    let begun = Instant::now();
    let interval = Duration::from_secs(1) / REQUESTS_PER_SECOND;
    let client = |index: u32| -> JoinHandle<Vec<Duration>> {
        let request = request.to_vec();
        std::thread::spawn(move || {
            let mut connection = connect(address);
            let mut latencies = Vec::new();
            let mut due = begun + interval * index;
            while due < begun + WARM_UP + MEASURED {
                let sent = match due.checked_duration_since(Instant::now()) {
                    // The time that the system takes to wake this thread is not the server's.
                    Some(early) => {
                        std::thread::sleep(early);
                        Instant::now()
                    }
                    None => due,
                };
                connection.write_all(&request).expect("the server reads");
                read_answer(&mut connection);
                if due >= begun + WARM_UP {
                    latencies.push(sent.elapsed());
                }
                due += interval * CONNECTIONS;
            }
            latencies
        })
    };
    let clients: Vec<_> = (0..CONNECTIONS).map(client).collect();
    let mut latencies: Vec<_> = clients.into_iter().flat_map(|c| c.join().expect("no client panics")).collect();
    latencies.sort_unstable();
    latencies
}

fn connect(address: SocketAddr) -> TcpStream {
    let connection = TcpStream::connect(address).expect("the server listens");
    connection.set_nodelay(true).expect("a TCP socket");
    connection
}

/// Reads a whole answer of known length.
fn read_answer(connection: &mut TcpStream) {
    let mut buffer = [0; 4096];
    let mut length = 0;
    loop {
        length += connection.read(&mut buffer[length..]).expect("the server answers");
        let text = std::str::from_utf8(&buffer[..length]).expect("text");
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            assert!(head.starts_with("HTTP/1.1 200"), "{text}");
            let announced = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if announced.and_then(|n| n.parse().ok()) == Some(body.len()) {
                return;
            }
        }
    }
}

fn print_latencies(name: &str, latencies: Vec<Duration>) {
    let at = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize].as_micros();
    println!(
        "{name}: {} requests at {REQUESTS_PER_SECOND}/s: p50 {} us (target 150), p99 {} us (target 1000), max {} us",
        latencies.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

/// What came through a number of streams at once.
struct Streamed {
    events: usize,
    seconds: f64,
    tokens: usize,
}

fn stream(address: SocketAddr, streams: usize) -> Streamed {
    let body = format!(
        r#"{{"model": "words", "prompt": "x", "max_tokens": {TOKENS_PER_STREAM}, "ignore_eos": true, "stream": true}}"#
    );
    let request = request("/v1/completions", &body);
    let begun = Instant::now();
    let client = |_| {
        let request = request.clone();
        std::thread::spawn(move || read_stream(connect(address), &request, begun + STREAM_BOUND))
    };
    let clients: Vec<_> = (0..streams).map(client).collect();
    let counts: Vec<_> = clients.into_iter().map(|c| c.join().expect("no client panics")).collect();
    Streamed {
        events: counts.iter().map(|(events, _)| events).sum(),
        tokens: counts.iter().map(|(_, tokens)| tokens).sum(),
        seconds: begun.elapsed().as_secs_f64(),
    }
}

/// Events and tokens (a scripted token is one character) until the end of the stream or of the time.
fn read_stream(mut connection: TcpStream, request: &[u8], deadline: Instant) -> (usize, usize) {
    const TEXT: &[u8] = b"\"text\":\"";
    connection.write_all(request).expect("the server reads");
    let (mut buffer, mut filled) = (vec![0; 64 << 10], 0);
    let (mut events, mut tokens) = (0, 0);
    while Instant::now() < deadline {
        let read = connection.read(&mut buffer[filled..]).expect("the server answers");
        filled += read;
        let mut used = 0;
        while let Some(end) = find(&buffer[used..filled], b"\n\n") {
            let event = &buffer[used..used + end];
            if let Some(start) = find(event, TEXT) {
                let text = &event[start + TEXT.len()..];
                tokens += text.iter().position(|byte| *byte == b'"').unwrap_or(0);
                events += 1;
            }
            used += end + 2;
            if find(event, b"[DONE]").is_some() {
                return (events, tokens);
            }
        }
        buffer.copy_within(used..filled, 0);
        filled -= used;
        assert!(read > 0, "the stream ended early");
    }
    (events, tokens)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

fn print_stream(name: &str, streams: usize, streamed: &Streamed) {
    let Streamed { events, seconds, tokens } = streamed;
    println!(
        "{name}, {streams} streams: {:.0} tokens/s in {:.0} events/s (target 50000 tokens/s), {tokens} tokens in {seconds:.2} s",
        *tokens as f64 / seconds,
        *events as f64 / seconds
    );
}

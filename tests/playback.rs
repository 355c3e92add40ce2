//! Files play in a browser: Chromium loads them, tells how long they are, and seeks.
//!
//! Without Chromium (`chromium-headless-shell` of Debian) the test says so and passes.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tale::media::{ClipEncoder, ClipSettings, Codec, Encoding, OpenClip, Readers, join};
use tale_models::request::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const BROWSERS: [&str; 3] = ["chromium-headless-shell", "chromium", "google-chrome"];

/// Plays `/clip` and reports its duration, readiness, size, and where it is after a seek.
const PAGE: &str = r#"<!doctype html><body><script>
const v = document.createElement('video');
v.muted = true;
v.preload = 'auto';
const tell = (text) => fetch('/result', { method: 'POST', body: text });
v.onerror = () => tell('error: ' + v.error.message);
v.onloadeddata = () => {
    v.onseeked = () => tell([v.duration, v.readyState, v.videoWidth, v.videoHeight, v.currentTime].join(' '));
    // Behind the last key frame.
    v.currentTime = 0.95 * v.duration;
};
v.src = '/clip';
document.body.append(v);
</script></body>"#;

fn browser() -> Option<&'static str> {
    BROWSERS.into_iter().find(|name| {
        let version = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    })
}

/// Noise that moves, which is what a codec finds hardest.
fn frame(index: usize, (width, height): (usize, usize)) -> Frame {
    let value = |at: usize| ((at.wrapping_mul(2_654_435_761) >> 7).wrapping_add(index * 5) % 256) as u8;
    Frame { width, height, rgb: (0..3 * width * height).map(|at| value(at / 24)).collect() }
}

/// Answers the page, the clip (a part of it where that is asked for), and takes the result.
async fn serve(listener: TcpListener, clip: Arc<Vec<u8>>, media_type: &'static str, results: mpsc::Sender<String>) {
    while let Ok((mut connection, _)) = listener.accept().await {
        let (clip, results) = (clip.clone(), results.clone());
        tokio::spawn(async move {
            let mut request = vec![0; 64 << 10];
            let length = connection.read(&mut request).await.unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..length]).into_owned();
            let answer = |status: &str, fields: String, body: &[u8]| {
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{fields}\r\n");
                [head.as_bytes(), body].concat()
            };
            let answer = if request.starts_with("POST /result") {
                let body = request.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
                let _ = results.send(body).await;
                answer("204 No Content", String::new(), b"")
            } else if request.starts_with("GET /clip") {
                let from = request
                    .lines()
                    .find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
                let from = from.and_then(|range| range.split('-').next()?.parse::<usize>().ok()).unwrap_or(0);
                let range = format!("bytes {from}-{}/{}", clip.len() - 1, clip.len());
                let fields =
                    format!("content-type: {media_type}\r\naccept-ranges: bytes\r\ncontent-range: {range}\r\n");
                answer("206 Partial Content", fields, &clip[from.min(clip.len())..])
            } else {
                answer("200 OK", "content-type: text/html\r\n".into(), PAGE.as_bytes())
            };
            let _ = connection.write_all(&answer).await;
            let _ = connection.shutdown().await;
        });
    }
}

/// What the browser says of a clip.
async fn played(browser: &str, clip: Vec<u8>, media_type: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("bound");
    let (results, mut told) = mpsc::channel(4);
    let server = tokio::spawn(serve(listener, Arc::new(clip), media_type, results));
    let profile = tempfile::tempdir().expect("made");
    let mut running = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(format!("http://{address}/"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let told = tokio::time::timeout(Duration::from_secs(60), told.recv()).await;
    let _ = running.kill();
    let _ = running.wait();
    server.abort();
    told.expect("the browser answers within a minute").expect("it tells something")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_play_in_a_browser() {
    let Some(browser) = browser() else {
        eprintln!("not run: there is no {}", BROWSERS[0]);
        return;
    };
    let dir = tempfile::tempdir().expect("made");
    let (size, fps) = ((96, 64), 16);
    for (codec, media_type) in [("h264", "video/mp4"), ("av1", "video/mp4"), ("vp9", "video/webm")] {
        let Ok(encoding) = Encoding::choose(None, Codec::named(codec), None) else { continue };
        // A poster is no obstacle.
        let settings = ClipSettings { has_poster: encoding.holds_poster(), ..ClipSettings::new(encoding, fps) };
        let make = |name: &str, frames: std::ops::Range<usize>| {
            let path = dir.path().join(name);
            let mut clip = ClipEncoder::create(&path, &settings, size.0, size.1).expect("begins");
            frames.for_each(|index| clip.push(&frame(index, size)).expect("encodes"));
            clip.finish().expect("is whole");
            path
        };
        // A clip of two parts, the second of which has key frames of its own.
        let (first, second) = (make("first", 0..40), make("second", 40..340));
        join(&OpenClip::open(&first).expect("there"), &frame(0, size), &second, &settings, Readers::AsUsual)
            .expect("joined");
        let told = played(browser, std::fs::read(&second).expect("there"), media_type).await;
        let numbers: Vec<f64> = told.split(' ').filter_map(|number| number.parse().ok()).collect();
        let [duration, ready, width, height, time] = numbers[..] else { panic!("{codec}: {told}") };
        assert!((duration - 340.0 / 16.0).abs() < 0.002, "{codec}: {told}");
        assert!(ready >= 2.0 && (width, height) == (96.0, 64.0), "{codec}: {told}");
        assert!((time - 0.95 * duration).abs() < 0.07, "{codec}: {told}");
    }
}

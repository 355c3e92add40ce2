//! The disk under finished clips: full, away, and who may read what lies there.

use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::json;

use crate::support::{Setup, start};
use crate::videos::{order, wait_for};

/// Bytes of a clip that fits alone.
const ALL_MEMORY: usize = 1 << 20;

#[tokio::test]
async fn a_disk_without_room_is_told_before_device_work_and_by_readiness() {
    let server = start(Setup { min_free_disk_bytes: u64::MAX, ..Setup::default() }).await;
    let refused = server.post("/v1/videos", &json!({"model": "clips", "prompt": "a boat"})).await.expect(507);
    let error = &refused.json()["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!("insufficient_storage"), &json!("server_error")));
    assert!(error["message"].as_str().is_some_and(|text| text.contains("min_free_disk")), "{error}");
    let ready = server.get("/readyz").await.expect(200);
    assert!(ready.text().starts_with("ready, but for clips (insufficient_storage): "), "{}", ready.text());
    server.post("/v1/images/generations", &json!({"model": "pictures", "prompt": "a boat"})).await.expect(200);
}

#[tokio::test]
async fn a_folder_that_vanishes_fails_jobs_by_name_and_one_that_waited_makes_no_step() {
    let dir = tempfile::tempdir().expect("made");
    let path = dir.path().join("clips");
    let setup = Setup { clip_bytes: ALL_MEMORY, output_dir: Some(path.clone()), ..Setup::default() };
    let server = start(setup).await;
    server.hold.store(true, Relaxed);
    let running = order(&server, json!({"num_inference_steps": 1000})).await;
    let waiting = order(&server, json!({})).await;
    wait_for(&server, &running, "in_progress").await;
    std::fs::remove_dir(&path).expect("nothing is written yet");
    let mut seen = String::new();
    while !seen.contains("insufficient_storage") {
        seen = server.get("/readyz").await.text().to_owned();
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    server.hold.store(false, Relaxed);
    for id in [&running, &waiting] {
        let job = wait_for(&server, id, "failed").await;
        assert_eq!(job["error"]["code"], "insufficient_storage", "{job}");
    }
    let job = server.get(&format!("/v1/jobs/{waiting}/events")).await.expect(200);
    assert!(!job.text().contains("started"), "{}", job.text());
    std::fs::create_dir(&path).expect("made");
    let id = order(&server, json!({})).await;
    wait_for(&server, &id, "completed").await;
}

#[tokio::test]
async fn clips_are_their_owners_alone() {
    let dir = tempfile::tempdir().expect("made");
    let path = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(path.clone()), ..Setup::default() }).await;
    for format in ["mp4", "webm", "gif"] {
        let id = order(&server, json!({"output_format": format})).await;
        wait_for(&server, &id, "completed").await;
        assert!(path.join(format!("{id}.{format}")).exists());
    }
    let files: Vec<_> = std::fs::read_dir(&path).expect("there").map(|entry| entry.expect("readable").path()).collect();
    assert_eq!(files.len(), 15, "three clips, each with four stills");
    for file in files {
        let mode = std::fs::metadata(&file).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o700);
}

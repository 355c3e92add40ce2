//! Videos of several parts.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::frames::{picture, still};
use crate::support::{Server, Setup, server, start};
use crate::videos::{order, wait_for};

/// A video of 81 frames from a picture, of a model that was trained on 33.
fn long(extra: Value) -> Value {
    let mut body = json!({"model": "shots", "image": picture(64, 64), "size": "64x64", "num_frames": 81, "seed": 5});
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body
}

async fn events(server: &Server, id: &str) -> Vec<Value> {
    server.get(&format!("/v1/jobs/{id}/events")).await.expect(200).events()
}

/// Frames of an MP4 file: what its `stsz` box counts.
pub fn frames_of_mp4(file: &[u8]) -> u32 {
    let at = file.windows(4).position(|name| name == b"stsz").expect("an MP4");
    u32::from_be_bytes(file[at + 12..at + 16].try_into().expect("four bytes"))
}

#[tokio::test]
async fn a_long_video_is_made_of_parts_and_is_one_file() {
    let dir = tempfile::tempdir().expect("made");
    let server = start(Setup { output_dir: Some(dir.path().join("clips")), ..Setup::default() }).await;
    let id = order(&server, long(json!({}))).await;
    let job = wait_for(&server, &id, "completed").await;
    assert_eq!((&job["shot_method"], &job["overlap_frames"]), (&json!("continue"), &json!(1)));
    assert_eq!((&job["num_frames"], &job["seconds"]), (&json!(81), &json!("10.125")));
    assert!(job.get("warnings").is_none(), "{job}");
    let content = server.get(&format!("/v1/videos/{id}/content")).await.expect(200);
    assert_eq!(frames_of_mp4(&content.body), 81);
    let events = events(&server, &id).await;
    assert_eq!(events.iter().filter(|event| event["type"] == "started").count(), 1);
    let progress: Vec<&Value> = events.iter().filter(|event| event["type"] == "progress").collect();
    let percents: Vec<u64> = progress.iter().map(|event| event["percent"].as_u64().expect("a number")).collect();
    assert!(percents.is_sorted() && percents.last() == Some(&99), "{percents:?}");
    // Three parts of 29 frames, 4 steps each; what nobody has read is overtaken by what comes after.
    let denoising = progress.iter().filter(|event| event["phase"] == "denoise");
    let steps: Vec<_> = denoising.map(|event| (event["done"].as_u64(), event["total"].as_u64())).collect();
    assert!(steps.is_sorted() && steps.iter().all(|(_, total)| *total == Some(12)), "{steps:?}");
    assert_eq!(steps.last(), Some(&(Some(12), Some(12))));
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_way_that_was_asked_for_is_taken_and_a_doubtful_one_warns() {
    let server = server().await;
    let one = server.post("/v1/videos", &long(json!({"prompt": "x", "shot_method": "single_pass"}))).await;
    let one = one.expect(200).json();
    assert_eq!((&one["shot_method"], one.get("overlap_frames")), (&json!("single_pass"), None));
    let warning =
        "num_frames: 81 frames are made in one pass, and the model was trained on 33: motion may repeat or drift";
    assert_eq!(one["warnings"], json!([warning]));
    let faded = order(&server, long(json!({"overlap_frames": 9}))).await;
    let job = wait_for(&server, &faded, "completed").await;
    assert_eq!(job["overlap_frames"], 9);
    let content = server.get(&format!("/v1/videos/{faded}/content")).await.expect(200);
    assert_eq!(frames_of_mp4(&content.body), 81);
    let text = json!({"model": "clips", "prompt": "x", "num_frames": 81});
    assert!(server.post("/v1/videos", &text).await.expect(200).json()["warnings"].is_array());
    let refused = json!({"model": "clips", "prompt": "x", "shot_method": "continue"});
    let refused = server.post("/v1/videos", &refused).await.expect(400).json();
    assert_eq!(refused["error"]["param"], "shot_method");
}

#[tokio::test]
async fn a_chain_goes_through_its_key_pictures() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(outputs.clone()), ..Setup::default() }).await;
    let body = json!({
        "model": "between", "size": "64x64", "input_reference": picture(64, 64), "last_image": picture(64, 64),
        "key_images": [picture(64, 64), picture(32, 64)], "num_frames": 45,
    });
    let id = order(&server, body).await;
    let job = wait_for(&server, &id, "completed").await;
    assert_eq!((&job["shot_method"], &job["num_frames"]), (&json!("chain"), &json!(45)));
    let fitted: Vec<&str> =
        job["fitted_images"].as_array().expect("a list").iter().map(|of| of["field"].as_str().expect("text")).collect();
    assert_eq!(fitted, ["input_reference", "key_images", "key_images", "last_image"]);
    let content = server.get(&format!("/v1/videos/{id}/content")).await.expect(200);
    assert_eq!(frames_of_mp4(&content.body), 45);
    assert_eq!(still(&outputs, &id, "first"), still(&outputs, &id, "last"), "both ends are the same picture");
    let few = json!({"model": "between", "prompt": "x", "image": picture(64, 64), "last_image": picture(64, 64), "key_images": [picture(64, 64)], "num_frames": 5});
    let refused = server.post("/v1/videos", &few).await.expect(400).json();
    assert_eq!(refused["error"]["param"], "num_frames", "{refused}");
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_video_of_parts_can_be_stopped_in_any_of_them_and_leaves_nothing() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(outputs.clone()), ..Setup::default() }).await;
    for steps_done in [2, 6, 10] {
        let id = order(&server, long(json!({"num_inference_steps": 4}))).await;
        loop {
            let job = server.get(&format!("/v1/videos/{id}")).await.expect(200).json();
            if job["progress"].as_u64() >= Some(steps_done * 100 / 12) || job["status"] == "completed" {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.delete(&format!("/v1/videos/{id}")).await.expect(200);
        server.wait_until_empty().await;
        let begun = Instant::now();
        // The encoder hears of it at its next frame.
        while std::fs::read_dir(&outputs).expect("there").count() > 0 {
            assert!(begun.elapsed() < Duration::from_secs(10), "files stay");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn a_part_that_follows_needs_no_place_in_the_queue_and_is_made_while_the_server_drains() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let drain = Duration::from_secs(30);
    let setup = Setup { max_queued_sessions: 1, drain, output_dir: Some(outputs.clone()), ..Setup::default() };
    let mut server = start(setup).await;
    server.hold.store(true, Relaxed);
    let id = order(&server, long(json!({}))).await;
    server.wait_for_live(1).await;
    let other = server.post("/v1/videos", &json!({"model": "shots", "prompt": "x", "image": picture(64, 64)})).await;
    assert!([200, 429].contains(&other.status.as_u16()), "{other:?}");
    server.stop.take().expect("runs").send(()).expect("listens");
    server.hold.store(false, Relaxed);
    server.served.await.expect("ends").expect("ends well");
    let file = std::fs::read(outputs.join(format!("{id}.mp4"))).expect("it is whole");
    assert_eq!(frames_of_mp4(&file), 81);
}

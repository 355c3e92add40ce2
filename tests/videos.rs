//! Clips: ordered, followed, fetched, listed, deleted.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use tale_models::testing::SKIPPED_PASSES;

use crate::support::{Server, Setup, read, request, server, start};

pub async fn order(server: &Server, extra: Value) -> String {
    let mut body = json!({"model": "clips", "prompt": "a boat"});
    for (name, value) in extra.as_object().expect("fields") {
        body[name] = value.clone();
    }
    let job = server.post("/v1/videos", &body).await.expect(200).json();
    job["id"].as_str().expect("a name").to_owned()
}

pub async fn wait_for(server: &Server, id: &str, status: &str) -> Value {
    let begun = Instant::now();
    loop {
        let job = server.get(&format!("/v1/videos/{id}")).await.expect(200).json();
        if job["status"] == status {
            return job;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "not {status}: {job}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_form_as_the_openai_client_sends_it_makes_a_clip() {
    let server = server().await;
    let fields = [
        ("model", "clips"),
        ("prompt", "a boat"),
        ("seconds", "4"),
        ("size", "96x64"),
        ("seed", "5"),
        ("guidance_interval", "[0, 0.5]"),
        ("scheduler", "unipc"),
    ];
    let parts = fields
        .map(|(name, value)| format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"));
    let form = parts.concat() + "--b--\r\n";
    let created = server.call("POST", "/v1/videos", "multipart/form-data; boundary=b", form).await.expect(200);
    assert_eq!(created.header("openai-poll-after-ms"), "1000");
    let created = created.json();
    assert_eq!(
        (&created["object"], &created["status"], &created["progress"]),
        (&json!("video"), &json!("queued"), &json!(0))
    );
    let effective = json!({
        "model": "clips", "prompt": "a boat", "size": "96x64", "seconds": "4.125", "num_frames": 33, "fps": 8, "seed": 5,
        "num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": null, "max_sequence_length": 64,
        "output_format": "mp4", "codec": "h264", "quality": "high", "metadata": true, "guidance_interval": [0.0, 0.5], "acceleration": "none", "scheduler": "unipc",
    });
    for (name, value) in effective.as_object().expect("fields") {
        assert_eq!(&created[name], value, "{name}");
    }
    let id = created["id"].as_str().expect("a name");
    let job = wait_for(&server, id, "completed").await;
    assert_eq!(job["progress"], 100);
    assert!(job["completed_at"].as_u64() >= job["created_at"].as_u64());
    let content = server.get(&format!("/v1/videos/{id}/content?variant=video")).await.expect(200);
    assert_eq!(content.header("content-type"), "video/mp4");
    assert_eq!(&content.body[4..8], b"ftyp");
    assert_eq!(content.header("content-length"), content.body.len().to_string());
}

#[tokio::test]
async fn a_completed_video_says_what_a_cache_skipped() {
    let server = server().await;
    let rule = json!({"cache_method": "first_block", "cache_threshold": 0.1});
    for (extra, skipped) in [(rule, json!(SKIPPED_PASSES)), (json!({}), json!(null))] {
        let id = order(&server, extra).await;
        assert_eq!(wait_for(&server, &id, "completed").await["skipped_passes"], skipped);
    }
}

#[tokio::test]
async fn parts_of_a_clip_can_be_fetched() {
    let server = server().await;
    let id = order(&server, json!({"output_format": "webm"})).await;
    wait_for(&server, &id, "completed").await;
    let path = format!("/v1/videos/{id}/content");
    let whole = server.get(&path).await.expect(200);
    assert_eq!(whole.header("content-type"), "video/webm");
    let mut part = request("GET", &path, "", "");
    part.headers_mut().insert("range", "bytes=10-19".parse().expect("ASCII"));
    let part = read(server.send(part).await).await.expect(206);
    assert_eq!(part.body, whole.body[10..20]);
    assert_eq!(part.header("content-range"), format!("bytes 10-19/{}", whole.body.len()));
    let mut beyond = request("GET", &path, "", "");
    beyond.headers_mut().insert("range", "bytes=99999999-".parse().expect("ASCII"));
    read(server.send(beyond).await).await.expect(416);
    let poster = server.get(&format!("{path}?variant=poster")).await.expect(400).json();
    assert_eq!(poster["error"]["param"], "variant");
}

#[tokio::test]
async fn a_video_has_a_thumbnail_and_a_sheet_of_its_frames() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(outputs.clone()), ..Setup::default() }).await;
    server.hold.store(true, Relaxed);
    let id = order(&server, json!({"num_frames": 33, "size": "128x64"})).await;
    server.get(&format!("/v1/videos/{id}/content?variant=thumbnail")).await.expect(409);
    server.hold.store(false, Relaxed);
    wait_for(&server, &id, "completed").await;
    for (variant, media_type, size) in
        [("thumbnail", "image/webp", (128, 64)), ("spritesheet", "image/jpeg", (4 * 128, 4 * 64))]
    {
        let path = format!("/v1/videos/{id}/content?variant={variant}");
        let still = server.get(&path).await.expect(200);
        assert_eq!(still.header("content-type"), media_type);
        let picture = image::load_from_memory(&still.body).expect("a picture");
        assert_eq!((picture.width(), picture.height()), size, "{variant}");
        let mut part = request("GET", &path, "", "");
        part.headers_mut().insert("range", "bytes=0-3".parse().expect("ASCII"));
        assert_eq!(read(server.send(part).await).await.expect(206).body, still.body[..4]);
    }
    assert_eq!(std::fs::read_dir(&outputs).expect("there").count(), 5, "the clip and four stills");
    server.delete(&format!("/v1/videos/{id}")).await.expect(200);
    assert_eq!(std::fs::read_dir(&outputs).expect("there").count(), 0);
    server.get(&format!("/v1/videos/{id}/content?variant=thumbnail")).await.expect(404);
}

#[tokio::test]
async fn a_file_is_made_as_asked_and_says_how_it_was_made() {
    let server = server().await;
    let fetch = async |extra: Value| {
        let id = order(&server, extra).await;
        let job = wait_for(&server, &id, "completed").await;
        let content = server.get(&format!("/v1/videos/{id}/content")).await.expect(200);
        (job, content)
    };
    let (job, plain) = fetch(json!({"seed": 5, "quality": "best", "title": "Boats", "poster": true})).await;
    let echoed = ["output_format", "codec", "quality", "metadata", "title"].map(|name| job[name].clone());
    assert_eq!(echoed, [json!("mp4"), json!("h264"), json!("best"), json!(true), json!("Boats")]);
    assert!(job.get("output_fps").is_none(), "{job}");
    let holds = |content: &crate::support::Answer, text: &str| {
        content.body.windows(text.len()).any(|bytes| bytes == text.as_bytes())
    };
    let comment = r#"{"model":"clips","prompt":"a boat","#;
    assert!(holds(&plain, comment) && holds(&plain, "Boats"));
    assert!(job["poster"] == true && holds(&plain, "covr"));
    let (job, silent) = fetch(json!({"seed": 5, "metadata": false, "codec": "vp9", "output_fps": 24})).await;
    assert_eq!(
        (&job["output_format"], &job["output_fps"], &job["metadata"]),
        (&json!("webm"), &json!(24), &json!(false))
    );
    assert_eq!((&job["fps"], &job["num_frames"], &job["seconds"]), (&json!(8), &json!(9), &json!("1.125")));
    assert_eq!(silent.header("content-type"), "video/webm");
    assert!(!holds(&silent, "a boat") && !holds(&silent, "Tale"));
    let (job, usual) = fetch(json!({"seed": 5})).await;
    assert!(job.get("poster").is_none() && !holds(&usual, "covr"));
    let body = json!({"model": "clips", "prompt": "a boat", "poster": true, "output_format": "webm"});
    let refused = server.post("/v1/videos", &body).await.expect(400).json();
    assert_eq!(refused["error"]["param"], "poster");
}

#[tokio::test]
async fn events_tell_the_past_and_then_follow() {
    let server = server().await;
    let id = order(&server, json!({"num_inference_steps": 3, "output_format": "gif"})).await;
    let path = format!("/v1/jobs/{id}/events");
    let live = server.get(&path).await.expect(200);
    let kinds = |answer: &crate::support::Answer| -> Vec<String> {
        answer.text().lines().filter_map(|line| line.strip_prefix("event: ").map(str::to_owned)).collect()
    };
    let heard = kinds(&live);
    assert_eq!(&heard[..2], ["queued", "started"]);
    assert_eq!(heard.last().expect("some"), "finished");
    assert!(heard[2..heard.len() - 1].iter().all(|kind| kind == "progress"), "{heard:?}");
    let events = live.events();
    let denoised = events.iter().rfind(|event| event["phase"] == "denoise").expect("some");
    assert_eq!((&denoised["done"], &denoised["total"], &denoised["percent"]), (&json!(3), &json!(3), &json!(90)));
    assert!(events.last().expect("some")["bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    assert_eq!(live.body, server.get(&path).await.expect(200).body, "late followers hear the same");
    let mut again = request("GET", &path, "", "");
    again.headers_mut().insert("last-event-id", "1".parse().expect("ASCII"));
    assert_eq!(kinds(&read(server.send(again).await).await), heard[2..]);
}

#[tokio::test]
async fn previews_are_events_of_the_job_and_change_nothing_in_its_file() {
    let server = server().await;
    let mut files = Vec::new();
    for partial_images in [2, 0] {
        let asked = json!({"num_inference_steps": 6, "seed": 5, "size": "96x64", "partial_images": partial_images});
        let id = order(&server, asked).await;
        let job = wait_for(&server, &id, "completed").await;
        assert_eq!(job.get("partial_images"), (partial_images > 0).then_some(&json!(2)));
        let events = server.get(&format!("/v1/jobs/{id}/events")).await.expect(200).events();
        let previews: Vec<&Value> = events.iter().filter(|event| event["type"] == "preview").collect();
        assert_eq!(previews.len(), partial_images);
        for (index, preview) in previews.into_iter().enumerate() {
            assert_eq!(preview["partial_image_index"], index);
            assert_eq!((&preview["phase"], &preview["total"]), (&json!("denoise"), &json!(6)));
            assert_eq!((&preview["size"], &preview["output_format"]), (&json!("12x8"), &json!("jpeg")));
            let file = BASE64.decode(preview["b64_json"].as_str().expect("text")).expect("base64");
            let shown = image::load_from_memory(&file).expect("a picture");
            assert_eq!((shown.width(), shown.height()), (12, 8));
        }
        files.push(server.get(&format!("/v1/videos/{id}/content")).await.expect(200).body);
    }
    assert!(files[0] == files[1]);
    let body = json!({"model": "clips", "prompt": "a boat", "partial_images": 4});
    let refused = server.post("/v1/videos", &body).await.expect(400).json();
    assert_eq!(refused["error"]["param"], "partial_images");
}

#[tokio::test]
async fn deleting_a_running_job_stops_it_and_tells_its_followers() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let id = order(&server, json!({"num_inference_steps": 1000})).await;
    wait_for(&server, &id, "in_progress").await;
    let conflict = server.get(&format!("/v1/videos/{id}/content")).await.expect(409).json();
    assert_eq!(conflict["error"]["code"], "video_not_completed");
    let events = server.send(request("GET", &format!("/v1/jobs/{id}/events"), "", "")).await;
    let deleted = server.delete(&format!("/v1/videos/{id}")).await.expect(200).json();
    assert_eq!(deleted, json!({"id": id, "object": "video.deleted", "deleted": true}));
    assert_eq!(read(events).await.events().last().expect("some")["type"], "cancelled");
    server.wait_until_empty().await;
    server.get(&format!("/v1/videos/{id}")).await.expect(404);
    server.delete(&format!("/v1/videos/{id}")).await.expect(404);
}

#[tokio::test]
async fn a_failed_job_says_why() {
    let server = server().await;
    server.fail.store(true, Relaxed);
    let id = order(&server, json!({})).await;
    let job = wait_for(&server, &id, "failed").await;
    assert_eq!(job["error"]["code"], "not_finite");
    let events = server.get(&format!("/v1/jobs/{id}/events")).await.expect(200).events();
    assert_eq!(events.last().expect("some")["error"]["code"], "not_finite");
    server.get(&format!("/v1/videos/{id}/content")).await.expect(409);
}

#[tokio::test]
async fn the_list_has_pages() {
    let server = server().await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(order(&server, json!({"num_frames": 1})).await);
    }
    let newest = server.get("/v1/videos?limit=2").await.expect(200).json();
    assert_eq!(
        (&newest["first_id"], &newest["last_id"], &newest["has_more"]),
        (&json!(ids[2]), &json!(ids[1]), &json!(true))
    );
    let rest = server.get(&format!("/v1/videos?limit=2&after={}", ids[1])).await.expect(200).json();
    assert_eq!((&rest["first_id"], &rest["has_more"]), (&json!(ids[0]), &json!(false)));
    let oldest = server.get("/v1/videos?order=asc&limit=1").await.expect(200).json();
    assert_eq!(oldest["first_id"], json!(ids[0]));
}

#[tokio::test]
async fn a_job_goes_on_without_its_client() {
    let server = server().await;
    let body = json!({"model": "clips", "prompt": "x"}).to_string();
    let response = server.send(request("POST", "/v1/videos", "application/json", body)).await;
    drop(response);
    let listed = server.get("/v1/videos").await.expect(200).json();
    wait_for(&server, listed["data"][0]["id"].as_str().expect("a name"), "completed").await;
}

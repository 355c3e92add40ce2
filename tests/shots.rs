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
    let id = order(&server, long(json!({"partial_images": 1}))).await;
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
    // One of each part, counted over the whole.
    let previews: Vec<&Value> = events.iter().filter(|event| event["type"] == "preview").collect();
    let numbers: Vec<&Value> = previews.iter().map(|preview| &preview["partial_image_index"]).collect();
    assert_eq!(numbers, [0, 1, 2]);
    let percents: Vec<u64> = previews.iter().map(|event| event["percent"].as_u64().expect("a number")).collect();
    assert!(percents.is_sorted() && percents[0] < 33 && percents[2] >= 66, "{percents:?}");
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

/// Width and height of what a still shows, and its middle pixel.
fn middle(picture: &image::RgbImage) -> [u8; 3] {
    picture.get_pixel(picture.width() / 2, picture.height() / 2).0
}

#[tokio::test]
async fn a_video_goes_on_from_another_and_both_are_one_file() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(outputs.clone()), ..Setup::default() }).await;
    let source = order(&server, json!({"seed": 5, "num_frames": 17, "title": "Boats", "quality": "best"})).await;
    wait_for(&server, &source, "completed").await;
    // As the openai client sends it.
    let part =
        |name: &str, value: &str| format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    let form =
        part("video[id]", &source) + &part("prompt", "a storm") + &part("seconds", "1") + &part("model", "shots");
    let form = form + "--b--\r\n";
    let media_type = "multipart/form-data; boundary=b";
    let created = server.call("POST", "/v1/videos/extensions", media_type, form).await.expect(200).json();
    let id = created["id"].as_str().expect("a name").to_owned();
    let job = wait_for(&server, &id, "completed").await;
    assert_eq!(job["extended_from_video_id"], source);
    // Two seconds and a frame, and eight frames that are new.
    assert_eq!((&job["seconds"], &job["num_frames"], &job["prompt"]), (&json!("3.125"), &json!(9), &json!("a storm")));
    assert_eq!((&job["quality"], &job["title"], &job["size"]), (&json!("best"), &json!("Boats"), &json!("64x64")));
    let content = server.get(&format!("/v1/videos/{id}/content")).await.expect(200);
    assert_eq!(frames_of_mp4(&content.body), 25);
    assert_eq!(still(&outputs, &id, "first"), still(&outputs, &source, "first"));
    assert_ne!(still(&outputs, &id, "last"), still(&outputs, &source, "last"));
    let sheet = server.get(&format!("/v1/videos/{id}/content?variant=spritesheet")).await.expect(200);
    let sheet = image::load_from_memory(&sheet.body).expect("a picture").to_rgb8();
    assert_eq!((sheet.width(), sheet.height()), (256, 256));
    let tile =
        |index: u32| middle(&image::imageops::crop_imm(&sheet, index % 4 * 64, index / 4 * 64, 64, 64).to_image());
    // Frame 12 of the video before, as its own file shows it.
    let of_source = server.get(&format!("/v1/videos/{source}/content?variant=spritesheet")).await.expect(200);
    let of_source = image::load_from_memory(&of_source.body).expect("a picture").to_rgb8();
    let before = middle(&image::imageops::crop_imm(&of_source, 11 % 4 * 64, 11 / 4 * 64, 64, 64).to_image());
    let near = |a: [u8; 3], b: [u8; 3]| a.iter().zip(b).all(|(a, b)| a.abs_diff(b) < 12);
    assert!(near(tile(7), before) || near(tile(8), before), "{:?} {:?} {before:?}", tile(7), tile(8));
    // It goes on and on, by the model of the video before where none is named.
    server.delete(&format!("/v1/videos/{source}")).await.expect(200);
    let again = json!({"prompt": "calm", "num_frames": 65, "metadata": false});
    let again = server.post(&format!("/v1/videos/{id}/extend"), &again).await.expect(200).json();
    let job = wait_for(&server, again["id"].as_str().expect("a name"), "completed").await;
    assert_eq!(
        (&job["model"], &job["shot_method"], &job["seconds"]),
        (&json!("shots"), &json!("continue"), &json!("11.125"))
    );
    server.wait_until_empty().await;
}

#[tokio::test]
async fn what_cannot_go_on_is_refused_by_name() {
    let server = server().await;
    let source = order(&server, json!({})).await;
    let gif = order(&server, json!({"output_format": "gif"})).await;
    wait_for(&server, &source, "completed").await;
    wait_for(&server, &gif, "completed").await;
    let check = async |body: Value, status: u16, param: &str, problem: &str| {
        let error = server.post("/v1/videos/extensions", &body).await.expect(status).json()["error"].clone();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().expect("text").contains(problem), "{error}");
    };
    let of = |id: &str| json!({"id": id});
    check(json!({"prompt": "x"}), 400, "video", "is missing").await;
    check(json!({"video": source}), 400, "video", "must be {").await;
    check(json!({"video": of("video_x")}), 400, "video.id", "no such job").await;
    check(json!({"video": of(&gif), "model": "shots"}), 400, "video", "is a gif").await;
    check(json!({"video": of(&source)}), 400, "model", "from text alone").await;
    check(json!({"video": of(&source), "model": "pictures"}), 400, "model", "makes pictures").await;
    check(json!({"video": of(&source), "model": "shots", "size": "64x64"}), 400, "size", "of the video before").await;
    check(json!({"video": of(&source), "model": "shots", "fps": 9}), 400, "fps", "of the video before").await;
    check(json!({"video": of(&source), "model": "shots", "codec": "av1"}), 400, "codec", "of the video before").await;
    let short = |extra: Value| {
        let mut body = json!({"video": of(&source), "model": "shots", "prompt": "x"});
        body.as_object_mut().expect("fields").extend(extra.as_object().expect("fields").clone());
        body
    };
    check(short(json!({"num_frames": 1})), 400, "num_frames", "ends with").await;
    let slow = order(&server, json!({"output_fps": 1})).await;
    wait_for(&server, &slow, "completed").await;
    check(short(json!({"video": of(&slow), "num_frames": 5})), 400, "output_fps", "none of the 4 frames").await;
    check(json!({"video": of(&source), "model": "shots", "image": picture(8, 8)}), 400, "image", "of the video").await;
    let of_path = server.post(&format!("/v1/videos/{gif}/extend"), &json!({"model": "shots", "prompt": "x"})).await;
    assert_eq!(of_path.expect(400).json()["error"]["param"], "video");
    server.hold.store(true, Relaxed);
    let running = order(&server, json!({})).await;
    check(json!({"video": of(&running), "model": "shots"}), 409, "video.id", "once it is completed").await;
    server.hold.store(false, Relaxed);
}

#[tokio::test]
async fn a_remix_has_the_parameters_of_the_video_before_but_for_those_that_are_given() {
    let server = server().await;
    let first = json!({"seed": 5, "num_frames": 17, "codec": "vp9", "title": "Boats", "guidance_scale": 3.5});
    let source = order(&server, first).await;
    let path = format!("/v1/videos/{source}/remix");
    let remix = server.post(&path, &json!({"prompt": "a car"})).await.expect(200).json();
    assert_eq!(remix["remixed_from_video_id"], source);
    let same = ["model", "seed", "num_frames", "guidance_scale", "codec", "output_format", "title", "size", "seconds"];
    let before = server.get(&format!("/v1/videos/{source}")).await.expect(200).json();
    same.iter().for_each(|name| assert_eq!(remix[name], before[name], "{name}"));
    assert_eq!((&before["prompt"], &remix["prompt"]), (&json!("a boat"), &json!("a car")));
    let other = json!({"prompt": "a boat", "seconds": 1, "size": "32x32", "output_format": "gif", "seed": 6});
    let other = server.post(&path, &other).await.expect(200).json();
    let changed = ["num_frames", "size", "output_format", "seed", "prompt"].map(|name| other[name].clone());
    assert_eq!(changed, [json!(9), json!("32x32"), json!("gif"), json!(6), json!("a boat")]);
    assert_eq!((&other["metadata"], other.get("title")), (&json!(false), None));
    // Of a model from pictures it begins with a frame of the video before, which has to be there.
    wait_for(&server, &source, "completed").await;
    let shot = json!({"prompt": "a boat", "model": "shots", "input_reference": null, "last_image": null});
    let shot = server.post(&path, &shot).await.expect(200).json();
    assert_eq!((&shot["model"], &shot["fitted_images"][0]["fit"]), (&json!("shots"), &json!("exact")));
    let missing = server.post("/v1/videos/video_x/remix", &json!({"prompt": "x"})).await.expect(404).json();
    assert_eq!(missing["error"]["code"], "not_found");
    let wrong = server.post(&path, &json!({"prompt": "x", "video": {"id": source}})).await.expect(400).json();
    assert_eq!(wrong["error"]["param"], "video");
}

//! Videos that begin and end with pictures: files, or frames of other videos.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::support::{Server, Setup, server, start};
use crate::videos::{order, wait_for};

pub fn picture(width: u32, height: u32) -> String {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 90]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).expect("encodes");
    BASE64.encode(bytes.into_inner())
}

/// A still of a finished video, as it lies in the folder of finished videos.
pub fn still(outputs: &Path, id: &str, end: &str) -> image::RgbImage {
    image::open(outputs.join(format!("{id}.{end}.png"))).expect("lies there").to_rgb8()
}

async fn refusal(server: &Server, body: &Value, status: u16) -> Value {
    server.post("/v1/videos", body).await.expect(status).json()["error"].clone()
}

#[tokio::test]
async fn a_video_begins_and_ends_with_frames_of_others() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(outputs.clone()), ..Setup::default() }).await;
    let source = order(&server, json!({"seed": 5})).await;
    wait_for(&server, &source, "completed").await;
    let (first, last) = (still(&outputs, &source, "first"), still(&outputs, &source, "last"));
    assert_ne!(first, last);
    let frame = |end: &str| json!({"video_id": source, "frame": end});
    let shot = order(&server, json!({"model": "shots", "input_reference": frame("last")})).await;
    let job = wait_for(&server, &shot, "completed").await;
    assert_eq!(job["fitted_images"], json!([{"field": "input_reference", "size": "64x64", "fit": "exact"}]));
    assert_eq!(still(&outputs, &shot, "first"), last, "nothing is lost on the way");
    let back = json!({"model": "between", "image": frame("last"), "last_image": frame("first")});
    let back = order(&server, back).await;
    wait_for(&server, &back, "completed").await;
    assert_eq!((still(&outputs, &back, "first"), still(&outputs, &back, "last")), (last, first));
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_form_refers_to_frames_and_the_answer_says_how_pictures_were_fitted() {
    let server = server().await;
    let source = order(&server, json!({})).await;
    wait_for(&server, &source, "completed").await;
    let part =
        |name: &str, value: &str| format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    let form = part("model", "between")
        + &part("prompt", "x")
        + &part("size", "64x64")
        + &part("input_reference[video_id]", &source)
        + &part("input_reference[frame]", "first")
        + &part("last_image[image_url]", &format!("data:image/png;base64,{}", picture(90, 30)))
        + "--b--\r\n";
    let job = server.call("POST", "/v1/videos", "multipart/form-data; boundary=b", form).await.expect(200).json();
    let fitted = json!([
        {"field": "input_reference", "size": "64x64", "fit": "exact"},
        {"field": "last_image", "size": "90x30", "fit": "stretched"},
    ]);
    assert_eq!(job["fitted_images"], fitted);
    let plain = server.post("/v1/videos", &json!({"model": "clips", "prompt": "x"})).await.expect(200).json();
    assert!(plain.get("fitted_images").is_none(), "{plain}");
}

#[tokio::test]
async fn pictures_are_refused_under_the_name_that_the_client_gave_them() {
    let dir = tempfile::tempdir().expect("made");
    let outputs = dir.path().join("clips");
    let server = start(Setup { output_dir: Some(outputs.clone()), ..Setup::default() }).await;
    let done = order(&server, json!({})).await;
    wait_for(&server, &done, "completed").await;
    let broken = BASE64.encode("no picture");
    for name in ["image", "input_reference"] {
        let check = async |value: Value, param: String, status: u16, code: &str, problem: &str| {
            let error = refusal(&server, &json!({"model": "shots", "prompt": "x", name: value}), status).await;
            assert_eq!(
                (error["param"].as_str(), error["code"].as_str()),
                (Some(param.as_str()), Some(code)),
                "{error}"
            );
            let message = error["message"].as_str().expect("text");
            assert!(message.starts_with(&format!("{param}: ")) && message.contains(problem), "{message}");
        };
        let field = || name.to_owned();
        check(json!(broken), field(), 400, "invalid_value", "must be a PNG, JPEG or WebP picture").await;
        check(json!(7), field(), 400, "invalid_value", "must be a file, base64, a data URL or a frame").await;
        check(json!({"file_id": "x"}), field(), 400, "invalid_value", "no files are kept here").await;
        check(json!({"video_id": done}), field(), 400, "invalid_value", "without frame").await;
        let frame = |id: &str| json!({"video_id": id, "frame": "last"});
        let id = || format!("{name}.video_id");
        check(frame("video_x"), id(), 400, "invalid_value", "names no video").await;
        let other = json!({"video_id": done, "frame": "middle"});
        check(other, format!("{name}.frame"), 400, "invalid_value", "must be first or last").await;
        server.hold.store(true, Relaxed);
        let running = order(&server, json!({"num_inference_steps": 1000})).await;
        check(frame(&running), id(), 409, "video_not_completed", "once it is completed").await;
        server.hold.store(false, Relaxed);
        server.delete(&format!("/v1/videos/{running}")).await.expect(200);
    }
    let error = refusal(&server, &json!({"model": "clips", "prompt": "x", "image": picture(8, 8)}), 400).await;
    assert_eq!(error["param"], "image", "{error}");
    std::fs::remove_file(outputs.join(format!("{done}.last.png"))).expect("there");
    let frame = json!({"video_id": done, "frame": "last"});
    let gone = refusal(&server, &json!({"model": "shots", "prompt": "x", "image": frame}), 410).await;
    assert_eq!((&gone["param"], &gone["code"]), (&json!("image.video_id"), &json!("removed")));
    server.wait_until_empty().await;
}

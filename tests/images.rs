//! Pictures.

use base64::Engine;
use serde_json::{Value, json};
use tale::media::read_png_text;

use crate::support::server;

fn decode(image: &serde_json::Value) -> Vec<u8> {
    base64::engine::general_purpose::STANDARD.decode(image["b64_json"].as_str().expect("text")).expect("base64")
}

#[tokio::test]
async fn pictures_come_with_their_effective_parameters() {
    let server = server().await;
    let body = json!({"model": "pictures", "prompt": "a boat", "n": 3, "seed": 250, "size": "96x48"});
    let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
    let effective = json!({
        "model": "pictures", "output_format": "png", "size": "96x48", "width": 96, "height": 48,
        "num_inference_steps": 4, "guidance_scale": 0.0, "scheduler": "EulerDiscreteScheduler",
        "true_cfg_scale": 1.0, "guidance_interval": null, "max_sequence_length": 64, "seed": 250,
        "acceleration": "none",
    });
    for (name, value) in effective.as_object().expect("fields") {
        assert_eq!(&answer[name], value, "{name}");
    }
    assert_eq!((&answer["prompt"], &answer["metadata"]), (&json!("a boat"), &json!(true)));
    let data = answer["data"].as_array().expect("a list");
    assert_eq!(data.len(), 3);
    for (index, image) in data.iter().enumerate() {
        let picture = image::load_from_memory(&decode(image)).expect("a picture").to_rgb8();
        assert_eq!(picture.dimensions(), (96, 48));
        let seed = 250 + index as u64;
        assert_eq!(image["seed"], seed);
        assert_eq!(image["skipped_passes"], json!(null), "nothing may be skipped");
        assert_eq!(picture.get_pixel(95, 47).0, [(95 * 255 / 96) as u8, (47 * 255 / 48) as u8, (seed % 256) as u8]);
    }
}

#[tokio::test]
async fn the_scheduler_that_was_asked_for_is_echoed_with_what_is_its_own() {
    let server = server().await;
    for (asked, effective) in [
        (json!({"scheduler": "dpmpp_2m_sde_karras"}), json!(["dpmpp_2m_sde_karras", null, null])),
        (json!({"scheduler": "LCMScheduler"}), json!(["LCMScheduler", null, null])),
        (json!({"scheduler": "ddim"}), json!(["ddim", "leading", 0.0])),
        (json!({"scheduler": "euler", "timestep_spacing": "trailing"}), json!(["euler", "trailing", null])),
        (json!({"scheduler": "tcd", "eta": 0.3}), json!(["tcd", null, 0.3])),
    ] {
        let mut body = json!({"model": "pictures", "prompt": "a boat"});
        body.as_object_mut().expect("fields").extend(asked.as_object().expect("fields").clone());
        let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
        assert_eq!(json!([answer["scheduler"], answer["timestep_spacing"], answer["eta"]]), effective, "{body}");
    }
}

#[tokio::test]
async fn true_guidance_its_interval_and_acceleration_are_echoed() {
    let server = server().await;
    let body = json!({
        "model": "pictures", "prompt": "a boat", "negative_prompt": "", "true_cfg_scale": 4,
        "guidance_interval": [0.25, 0.5], "acceleration": "fast",
    });
    let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
    let effective = json!({
        "negative_prompt": "", "true_cfg_scale": 4.0, "guidance_interval": [0.25, 0.5], "acceleration": "fast",
    });
    for (name, value) in effective.as_object().expect("fields") {
        assert_eq!(&answer[name], value, "{name}");
    }
    assert_eq!(answer["data"][0]["skipped_passes"], 0);
}

#[tokio::test]
async fn every_format_is_what_it_says() {
    let server = server().await;
    let cases = [
        (json!({"output_format": "png"}), image::ImageFormat::Png),
        (json!({"output_format": "jpeg", "output_compression": 60}), image::ImageFormat::Jpeg),
        (json!({"output_format": "webp"}), image::ImageFormat::WebP),
    ];
    for (extra, format) in cases {
        let mut body = json!({"model": "pictures", "prompt": "x", "response_format": "b64_json", "size": "auto"});
        for (name, value) in extra.as_object().expect("fields") {
            body[name] = value.clone();
        }
        let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
        let bytes = decode(&answer["data"][0]);
        assert_eq!(image::guess_format(&bytes).expect("known"), format);
        assert_eq!(image::load_from_memory(&bytes).expect("a picture").width(), 64);
    }
}

#[tokio::test]
async fn what_a_file_says_makes_it_again() {
    let server = server().await;
    let body = json!({"model": "pictures", "prompt": "a \"café\" 😀", "n": 2, "seed": 9, "size": "96x48"});
    let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
    for image in answer["data"].as_array().expect("a list") {
        let file = decode(image);
        let text = read_png_text(&file, "parameters").expect("a PNG").expect("parameters");
        let parameters: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((&parameters["prompt"], &parameters["seed"]), (&body["prompt"], &image["seed"]));
        let again = server.post("/v1/images/generations", &parameters).await.expect(200).json();
        assert_eq!(decode(&again["data"][0]), file, "{text}");
    }
}

#[tokio::test]
async fn a_file_says_nothing_when_asked_not_to() {
    let server = server().await;
    let body = json!({"model": "pictures", "prompt": "secret boat", "metadata": false});
    let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
    let file = decode(&answer["data"][0]);
    assert_eq!(read_png_text(&file, "parameters").expect("a PNG"), None);
    assert_eq!(answer["metadata"], false);
    assert!(!file.windows(6).any(|bytes| bytes == b"secret"));
}

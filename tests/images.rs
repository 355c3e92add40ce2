//! Pictures.

use std::sync::atomic::Ordering::Relaxed;

use base64::Engine;
use serde_json::{Value, json};
use tale::media::read_png_text;
use tale_models::testing::SKIPPED_PASSES;

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
async fn true_guidance_its_interval_and_caches_are_echoed() {
    let server = server().await;
    let body = json!({
        "model": "pictures", "prompt": "a boat", "negative_prompt": "", "true_cfg_scale": 4,
        "guidance_interval": [0.25, 0.5], "cache_method": "magcache", "cache_threshold": 0.1, "cache_ratios": [1, 0.5],
    });
    let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
    let effective = json!({
        "negative_prompt": "", "true_cfg_scale": 4.0, "guidance_interval": [0.25, 0.5], "acceleration": "none",
        "cache_method": "magcache", "cache_threshold": 0.1, "cache_max_skips": 3, "cache_ratios": [1.0, 0.5],
    });
    for (name, value) in effective.as_object().expect("fields") {
        assert_eq!(&answer[name], value, "{name}");
    }
    assert_eq!(answer["data"][0]["skipped_passes"], SKIPPED_PASSES);
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

/// Events of a stream: name and data.
fn events(text: &str) -> Vec<(String, Value)> {
    let event = |block: &str| {
        let (name, data) = block.strip_prefix("event: ")?.split_once("\ndata: ")?;
        Some((name.to_owned(), serde_json::from_str(data).expect("JSON")))
    };
    text.split("\n\n").filter_map(event).collect()
}

#[tokio::test]
async fn a_stream_has_previews_and_ends_with_the_picture() {
    let server = server().await;
    let body = json!({"model": "pictures", "prompt": "a boat", "seed": 9, "size": "96x48", "num_inference_steps": 6});
    let plain = server.post("/v1/images/generations", &body).await.expect(200).json();
    for (partial_images, format, kind) in [
        (0, "png", image::ImageFormat::Png),
        (2, "png", image::ImageFormat::Png),
        (3, "jpeg", image::ImageFormat::Jpeg),
    ] {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["partial_images"] = json!(partial_images);
        body["output_format"] = json!(format);
        let answer = server.post("/v1/images/generations", &body).await.expect(200);
        assert!(answer.headers["content-type"].to_str().expect("text").starts_with("text/event-stream"));
        let events = events(answer.text());
        assert_eq!(events.len(), partial_images + 1, "{events:?}");
        for (index, (name, event)) in events.iter().enumerate() {
            let is_last = index == partial_images;
            let expected = if is_last { "image_generation.completed" } else { "image_generation.partial_image" };
            assert_eq!((name.as_str(), &event["type"]), (expected, &json!(expected)));
            assert_eq!((&event["size"], &event["output_format"]), (&json!("96x48"), &json!(format)));
            assert_eq!((&event["quality"], &event["background"]), (&json!("auto"), &json!("opaque")));
            assert!(event["created_at"].as_u64().is_some_and(|seconds| seconds > 1_700_000_000));
            let file = decode(event);
            assert_eq!(image::guess_format(&file).expect("known"), kind);
            let picture = image::load_from_memory(&file).expect("a picture").to_rgb8();
            assert_eq!(picture.dimensions(), (96, 48));
            // The blue of the scripted model is the seed, in previews too.
            assert!(picture.get_pixel(50, 20).0[2].abs_diff(9) <= 4, "{:?}", picture.get_pixel(50, 20));
            if !is_last {
                assert_eq!(event["partial_image_index"], json!(index));
                assert!(event.get("usage").is_none() && event.get("seed").is_none());
            }
        }
        let last = &events[partial_images].1;
        assert_eq!(
            (&last["seed"], &last["partial_images"], &last["usage"]["total_tokens"]),
            (&json!(9), &json!(partial_images), &json!(0))
        );
        if format == "png" {
            assert_eq!(last["b64_json"], plain["data"][0]["b64_json"], "the picture is the one without a stream");
        }
    }
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_its_error() {
    let server = server().await;
    server.hold.store(true, Relaxed);
    let body = json!({"model": "pictures", "prompt": "x", "stream": true, "num_inference_steps": 1000});
    let (answer, ()) = tokio::join!(server.post("/v1/images/generations", &body), async {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        server.fail.store(true, Relaxed);
        server.hold.store(false, Relaxed);
    });
    let text = answer.expect(200).text().to_owned();
    let last = text.rsplit("\n\n").find(|block| block.starts_with("data: ")).expect("an event");
    let error: Value = serde_json::from_str(&last["data: ".len()..]).expect("JSON");
    assert_eq!(error["error"]["code"], "not_finite", "{text}");
    server.wait_until_empty().await;
}

#[tokio::test]
async fn a_refiner_takes_over_where_the_request_says() {
    let server = server().await;
    let body = |denoising_end: Value| json!({"model": "pictures", "prompt": "x", "denoising_end": denoising_end});
    let answer = server.post("/v1/images/generations", &body(json!(0.5))).await.expect(200).json();
    assert_eq!(answer["denoising_end"], 0.5, "{answer}");
    let without =
        server.post("/v1/images/generations", &json!({"model": "pictures", "prompt": "x"})).await.expect(200).json();
    assert_eq!(without["denoising_end"], Value::Null, "{without}");
    for (value, message) in
        [(json!(1), "above 0 and below 1"), (json!(-0.5), "above 0 and below 1"), (json!("x"), "denoising_end")]
    {
        let error = &server.post("/v1/images/generations", &body(value)).await.expect(400).json()["error"];
        let said = error["message"].as_str().unwrap_or_default();
        assert!(error["param"] == "denoising_end" && said.contains(message), "{error}");
    }
}

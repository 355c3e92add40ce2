//! Pictures from pictures.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hyper::body::Bytes;
use serde_json::{Value, json};

use crate::support::{Answer, SECRET, Server, Setup, server, start};

const PATH: &str = "/v1/images/edits";

/// One part of a form; a file where `file` is set.
struct Part<'a> {
    name: &'a str,
    file: bool,
    bytes: Vec<u8>,
}

fn text<'a>(name: &'a str, value: &str) -> Part<'a> {
    Part { name, file: false, bytes: value.as_bytes().to_vec() }
}

fn file(name: &str, bytes: Vec<u8>) -> Part<'_> {
    Part { name, file: true, bytes }
}

fn form(parts: &[Part<'_>]) -> Bytes {
    let mut body = Vec::new();
    for Part { name, file, bytes } in parts {
        let file = if *file { "; filename=\"x.png\"\r\nContent-Type: image/png" } else { "" };
        body.extend_from_slice(
            format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(bytes);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--b--\r\n");
    body.into()
}

async fn post(server: &Server, parts: &[Part<'_>]) -> Answer {
    server.call("POST", PATH, "multipart/form-data; boundary=b", form(parts)).await
}

fn png(picture: image::DynamicImage) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, image::ImageFormat::Png).expect("encodes");
    bytes.into_inner()
}

fn photo(width: u32, height: u32) -> Vec<u8> {
    png(image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 90])).into())
}

/// Transparent in its left half.
fn cut_out(width: u32, height: u32) -> Vec<u8> {
    let alpha = |x| if x < width / 2 { 0 } else { 255 };
    png(image::RgbaImage::from_fn(width, height, |x, y| image::Rgba([x as u8, y as u8, 9, alpha(x)])).into())
}

/// One file, or several under a name with brackets, beside the picture that is edited.
#[tokio::test]
async fn a_form_may_hold_reference_pictures() {
    let server = server().await;
    for (name, number) in [("reference_images", 1), ("reference_images[]", 2)] {
        let mut parts = vec![text("model", "pictures"), text("prompt", "a boat"), text("ip_adapter_scale", "0.5")];
        parts.push(file("image", photo(64, 48)));
        parts.extend((0..number).map(|i| file(name, photo(9 + i, 20))));
        let answer = post(&server, &parts).await.expect(200).json();
        let found = (&answer["num_reference_images"], &answer["ip_adapter_scale"]);
        assert_eq!(found, (&json!(number), &json!(0.5)), "{answer}");
    }
    let (image, reference) = (file("image", photo(64, 48)), file("reference_images[]", SECRET.into()));
    let parts = [text("model", "pictures"), text("prompt", "a boat"), image, reference];
    let error = &post(&server, &parts).await.expect(400).json()["error"];
    assert_eq!(error["param"], "reference_images[0]", "{error}");
}

#[tokio::test]
async fn a_form_as_openais_client_sends_it_is_answered_with_its_effective_parameters() {
    let server = server().await;
    let fields = [("model", "pictures"), ("prompt", "a boat"), ("n", "2"), ("seed", "250"), ("strength", "0.8")];
    let fields = || fields.iter().map(|(name, value)| text(name, value));
    for image in ["image", "image[]"] {
        let mut parts: Vec<Part<'_>> = fields().collect();
        parts.extend([file(image, photo(70, 50)), file("mask", cut_out(70, 50))]);
        parts.push(text("metadata", "false"));
        let answer = post(&server, &parts).await.expect(200).json();
        let effective = json!({"size": "64x48", "strength": 0.8, "seed": 250, "metadata": false, "width": 64});
        for (name, value) in effective.as_object().expect("fields") {
            assert_eq!(&answer[name], value, "{name}: {answer}");
        }
        assert_eq!(answer["data"].as_array().map(Vec::len), Some(2));
    }
    let sized = [text("size", "32x80"), file("image", cut_out(64, 64))];
    let answer = post(&server, &fields().chain(sized).collect::<Vec<_>>()).await.expect(200).json();
    assert_eq!((&answer["size"], &answer["width"]), (&json!("32x80"), &json!(32)));
}

#[tokio::test]
async fn json_holds_pictures_as_base64_or_as_data_urls() {
    let server = server().await;
    let base64 = BASE64.encode(photo(64, 64));
    let url = format!("data:image/png;base64,{base64}");
    for image in [json!(base64), json!(url), json!([url])] {
        let body = json!({"model": "pictures", "prompt": "x", "image": image, "mask": BASE64.encode(cut_out(64, 64))});
        let answer = server.post(PATH, &body).await.expect(200).json();
        assert_eq!((&answer["strength"], &answer["size"]), (&json!(0.5), &json!("64x64")));
    }
}

#[track_caller]
fn refusal(answer: &Answer) -> (u16, String, String) {
    assert!(!answer.text().contains(SECRET), "repeats the client: {answer:?}");
    let error = &answer.json()["error"];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (answer.status.as_u16(), text("param"), text("message"))
}

fn golden_file(name: &str) -> Vec<u8> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/edits/files");
    std::fs::read(folder.join(name)).expect("committed")
}

#[tokio::test]
async fn wrong_pictures_are_refused_with_their_field() {
    let server = server().await;
    let image = || file("image", photo(64, 64));
    let cases: Vec<(Vec<Part<'_>>, &str, &str)> = vec![
        (vec![], "image", "is missing"),
        (vec![file("image[]", photo(64, 64)), file("image[]", photo(64, 64))], "image", "2 images; must be one"),
        (vec![image(), image()], "image", "given twice"),
        (vec![file("image", SECRET.into())], "image", "must be a PNG, JPEG or WebP"),
        (vec![text("image", SECRET)], "image", "must be a file, base64 or a data URL"),
        (vec![file("image", golden_file("long.png"))], "image", "65535x1"),
        (vec![file("image", golden_file("animated.gif"))], "image", "is a GIF"),
        (vec![file("image", golden_file("animated.png"))], "image", "is animated"),
        (vec![file("image", golden_file("animated.webp"))], "image", "is animated"),
        (vec![file("image", golden_file("cmyk.jpg"))], "image", "CMYK"),
        (vec![file("image", photo(15, 64))], "image", "give width and height"),
        (vec![file("image", photo(1024, 64))], "image", "give width and height"),
        (vec![image(), file("mask", cut_out(64, 48))], "mask", "is 64x48, but image is 64x64"),
        (vec![image(), file("mask", golden_file("animated.gif"))], "mask", "is a GIF"),
        (vec![image(), file("mask", png(image::GrayImage::new(64, 64).into()))], "mask", "marks nothing"),
        (vec![image(), text("strength", "1.5")], "strength", "0 to 1"),
        (vec![image(), text("strength", "-0.5")], "strength", "0 to 1"),
        (vec![image(), text("strength", "0.1")], "strength", "leaves no step of num_inference_steps (4)"),
        (
            vec![image(), text("loras[][name]", "x"), text("loras[][name]", "y")],
            "loras",
            "is not supported by this model",
        ),
        (
            vec![image(), text("loras.0.name", "x"), text("loras.0.weight", SECRET)],
            "loras[0].weight",
            "must be a number",
        ),
        (vec![image(), text("loras[0][name]", "x"), text("loras[2][name]", "y")], "loras[2][name]", "skips elements"),
        (vec![image(), text("seed", "18446744073709551616")], "seed", "is a whole number out of range"),
        (vec![image(), text("strength", SECRET)], "strength", "must be a number"),
        (vec![image(), text("seed", "1.5")], "seed", "must be a whole number"),
        (vec![image(), text("size", "64x50")], "size", "multiples of 16"),
        (vec![image(), text("n", "11")], "n", "1 to 10"),
        (vec![image(), text("input_fidelity", "high")], "input_fidelity", "is not supported"),
    ];
    for (mut parts, param, message) in cases {
        parts.extend([text("model", "pictures"), text("prompt", SECRET)]);
        let (status, found, said) = refusal(&post(&server, &parts).await);
        assert_eq!((status, found.as_str()), (400, param), "{said}");
        assert!(said.contains(message), "{param}: {said}");
    }
    let clip = post(&server, &[text("model", "clips"), text("prompt", "x"), image()]).await;
    assert_eq!(refusal(&clip).1, "model");
    server.wait_until_empty().await;
}

#[tokio::test]
async fn what_is_for_edits_is_not_for_generations() {
    let server = server().await;
    for (field, value) in [("image", json!(BASE64.encode(photo(64, 64)))), ("strength", json!(0.5))] {
        let body = json!({"model": "pictures", "prompt": "x", field: value});
        let (status, param, message) = refusal(&server.post("/v1/images/generations", &body).await);
        assert_eq!((status, param.as_str()), (400, field));
        assert!(message.contains("/v1/images/edits"), "{message}");
    }
}

/// Larger than other bodies may be, and smaller than these may.
#[tokio::test]
async fn bodies_with_pictures_may_be_larger_than_others() {
    let server = start(Setup::default()).await;
    let noise = |x: u32, y: u32| (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503) ^ (x * y) >> 3) as u8;
    let picture = image::RgbImage::from_fn(2000, 2000, |x, y| image::Rgb([noise(x, y), noise(y, x), noise(x + y, x)]));
    let large = png(picture.into());
    assert!(large.len() > tale::http::MAX_BODY_BYTES, "{} bytes", large.len());
    let parts = [text("model", "pictures"), text("prompt", "x"), text("size", "64x64"), file("image", large)];
    post(&server, &parts).await.expect(200);
    let huge =
        [text("model", "pictures"), text("prompt", "x"), file("image", vec![0; tale::http::MAX_PICTURE_BODY_BYTES])];
    let answer: Value = post(&server, &huge).await.expect(413).json();
    assert_eq!(answer["error"]["code"], "request_too_large");
}

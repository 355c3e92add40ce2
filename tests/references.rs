//! Pictures that follow reference pictures.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::support::{SECRET, server};

const PATH: &str = "/v1/images/generations";

fn picture(side: u32) -> String {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([x as u8, y as u8, 90]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).expect("encodes");
    BASE64.encode(bytes.into_inner())
}

fn body(fields: &Value) -> Value {
    let mut body = json!({"model": "pictures", "prompt": "x"});
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}

#[tokio::test]
async fn their_number_and_scale_are_echoed() {
    let server = server().await;
    let url = format!("data:image/png;base64,{}", picture(9));
    for (fields, number, scale) in [
        (json!({"reference_images": picture(33)}), json!(1), json!(1.0)),
        (json!({"reference_images": [url, picture(7)], "ip_adapter_scale": 0.25}), json!(2), json!(0.25)),
        (json!({}), Value::Null, Value::Null),
    ] {
        let answer = server.post(PATH, &body(&fields)).await.expect(200).json();
        assert_eq!((&answer["num_reference_images"], &answer["ip_adapter_scale"]), (&number, &scale), "{answer}");
        let mut streamed = body(&fields);
        streamed["stream"] = true.into();
        let events = server.post(PATH, &streamed).await.expect(200).events();
        let last = events.last().expect("a picture");
        assert_eq!((&last["num_reference_images"], &last["ip_adapter_scale"]), (&number, &scale), "{last}");
    }
}

#[tokio::test]
async fn wrong_ones_are_refused_with_their_field() {
    let server = server().await;
    let one = || json!([picture(8)]);
    let check = async |fields: Value, param: &str, message: &str| {
        let answer = server.post(PATH, &body(&fields)).await.expect(400);
        assert!(!answer.text().contains(SECRET), "repeats the client: {answer:?}");
        let error = &answer.json()["error"];
        let said = error["message"].as_str().unwrap_or_default();
        assert!(error["param"] == param && said.contains(message), "expected {param}, {message}: {error}");
    };
    check(json!({"reference_images": [picture(8), BASE64.encode(SECRET)]}), "reference_images[1]", "must be a PNG")
        .await;
    check(json!({"reference_images": [7]}), "reference_images[0]", "must be a file, base64, a data URL or a frame")
        .await;
    check(json!({"reference_images": vec![picture(2); 9]}), "reference_images", "has more than 8 elements").await;
    let large = picture(2400);
    check(json!({"reference_images": vec![large; 7]}), "reference_images", "pixels together; at most 33554432").await;
    check(json!({"ip_adapter_scale": 0.5}), "ip_adapter_scale", "has no effect without reference_images").await;
    check(json!({"reference_images": one(), "ip_adapter_scale": 1.5}), "ip_adapter_scale", "is 1.5; allowed: 0 to 1")
        .await;
    let clip = json!({"model": "clips", "prompt": "x", "reference_images": one()});
    assert_eq!(server.post("/v1/videos", &clip).await.expect(400).json()["error"]["param"], "reference_images");
    server.wait_until_empty().await;
}

//! Tiny models from their published layouts behind one server, all three media at once: what comes out is what the
//! reference makes, whatever else is running, and clients that go away leave nothing.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tale::engine::{Engine, EngineOptions, ModelSpec};
use tale::http::{AppState, ServerOptions};
use tale_models::ModelSource;
use tale_models::device::DeviceSpec;
use tale_models::family::LoadOptions;
use tale_models::runner::text::lookup::PromptLookup;

use crate::support::{Answer, Server, listen, request};

fn case(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn golden(name: &str) -> Value {
    let text = std::fs::read(case(name).join("golden.json")).expect("committed");
    serde_json::from_slice(&text).expect("JSON")
}

async fn server() -> Server {
    let models = [("words", "qwen2"), ("pictures", "flux-schnell"), ("clips", "wan-a")]
        .map(|(name, golden)| ModelSpec::new(name, ModelSource::at(case(golden).join("checkpoint"))));
    serve(models.into()).await
}

async fn serve(models: Vec<ModelSpec>) -> Server {
    serve_on(vec![DeviceSpec::Cpu], models).await
}

async fn serve_on(devices: Vec<DeviceSpec>, models: Vec<ModelSpec>) -> Server {
    let load = LoadOptions { kv_cache_bytes: 64 << 20, ..LoadOptions::default() };
    let options = EngineOptions { load, devices, ..EngineOptions::default() };
    let loading = tokio::task::spawn_blocking(move || Engine::load(models, options, |_, _| ()));
    let engine = loading.await.expect("no panic").expect("sound checkpoints");
    let state = AppState::new(ServerOptions::default()).expect("a temporary folder can be made");
    state.set_engine(engine.clone());
    let (address, stop, served) = listen(state, Duration::from_secs(30)).await;
    let fixed_bytes = engine.status().ledger_used_bytes();
    assert!(fixed_bytes > 0, "weights and caches are in the ledger");
    Server {
        address,
        engine,
        fixed_bytes,
        stop: Some(stop),
        served,
        hold: Default::default(),
        fail: Default::default(),
    }
}

/// Halves of the processor, with the pictures on one of them alone: answers are those of one device, whichever gave them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_devices_answer_as_one() {
    let halves = [0, 1].map(|part| DeviceSpec::CpuPart { part, of: 2 });
    let of = |name: &str, golden: &str| ModelSpec::new(name, ModelSource::at(case(golden).join("checkpoint")));
    let pictures = ModelSpec { devices: vec![halves[1]], ..of("pictures", "flux-schnell") };
    let server = serve_on(halves.into(), vec![of("words", "qwen2"), pictures]).await;
    let devices: Vec<_> = server.engine.models().iter().map(|model| model.devices.len()).collect();
    assert_eq!(devices, [2, 1]);
    let words =
        json!({"model": "words", "prompt": "a red boat", "max_tokens": 30, "temperature": 0, "ignore_eos": true});
    let picture = json!({"model": "pictures", "prompt": "x", "size": "32x32", "num_inference_steps": 1, "seed": 1});
    let mut asked = Vec::new();
    for index in 0..12 {
        let (path, body) =
            if index % 4 == 3 { ("/v1/images/generations", &picture) } else { ("/v1/completions", &words) };
        let request = request("POST", path, "application/json", body.to_string());
        asked.push(tokio::spawn(crate::support::send(server.address, request)));
    }
    let mut said = Vec::new();
    for asked in asked {
        let answer = crate::support::read(asked.await.expect("no panic")).await.expect(200).json();
        said.push((answer["choices"][0]["text"].clone(), answer["data"][0]["b64_json"].clone()));
    }
    for (index, found) in said.iter().enumerate() {
        assert_eq!(*found, said[if index % 4 == 3 { 3 } else { 0 }], "{index}");
    }
    let metrics = server.get("/metrics").await.expect(200).text().to_owned();
    for half in ["cpu:0/2", "cpu:1/2"] {
        assert!(metrics.contains(&format!("tale_device_alive{{device=\"{half}\"}} 1")), "{metrics}");
    }
    server.wait_until_empty().await;
}

/// Two devices that share a model say what one says; both have memory booked for it, and nothing else lies on them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_that_share_a_model_answer_as_one() {
    let thirds = [0, 1, 2].map(|part| DeviceSpec::CpuPart { part, of: 3 });
    let of = |name: &str, golden: &str| ModelSpec::new(name, ModelSource::at(case(golden).join("checkpoint")));
    let shared = ModelSpec { tensor_parallel: NonZeroUsize::new(2), ..of("shared", "qwen2-yarn") };
    let server = serve_on(thirds.into(), vec![of("alone", "qwen2-yarn"), shared]).await;
    let devices: Vec<_> = server.engine.models().iter().map(|model| model.devices.clone()).collect();
    assert_eq!(devices, [vec![thirds[2]], vec![thirds[0], thirds[1]]]);
    let used: Vec<_> = server.engine.status().devices.iter().map(|device| device.ledger_used_bytes).collect();
    // Half of the weights and of the cache, but for what both have.
    assert!(used[0] == used[1] && 2 * used[0] > used[2] && 3 * used[0] < 2 * used[2], "{used:?}");
    let ask = |model: &str, prompt: &str| {
        let body =
            json!({"model": model, "prompt": prompt, "max_tokens": 30, "seed": 5, "ignore_eos": true, "logprobs": 2});
        request("POST", "/v1/completions", "application/json", body.to_string())
    };
    let prompts = ["a red boat", "and on and on and on and on and on and on", "x"];
    let mut asked = Vec::new();
    for prompt in prompts {
        asked.push(
            ["alone", "shared"].map(|model| tokio::spawn(crate::support::send(server.address, ask(model, prompt)))),
        );
    }
    for (pair, prompt) in asked.into_iter().zip(prompts) {
        let mut said = Vec::new();
        for asked in pair {
            let answer = crate::support::read(asked.await.expect("no panic")).await.expect(200).json();
            said.push((answer["choices"][0]["text"].clone(), answer["choices"][0]["logprobs"]["tokens"].clone()));
        }
        assert_eq!(said[0], said[1], "{prompt}");
    }
    server.wait_until_empty().await;
}

/// The parameters of a recorded run as a request for `model`.
fn order(model: &str, run: &Value) -> Value {
    let mut body = run.clone();
    body["model"] = model.into();
    if body["negative_prompt"].is_null() {
        body.as_object_mut().expect("fields").remove("negative_prompt");
    }
    body
}

/// Of a model by the name of its golden, with a way of its own to guess tokens.
fn guessing(name: &str, golden: &str, prompt_lookup: Option<PromptLookup>) -> ModelSpec {
    let source = ModelSource::at(case(golden).join("checkpoint"));
    ModelSpec { prompt_lookup: Some(prompt_lookup), ..ModelSpec::new(name, source) }
}

/// Answers are the same, and the metrics tell who guesses.
#[tokio::test]
async fn one_model_of_several_may_guess_tokens() {
    let lookup = PromptLookup { num_speculative_tokens: 4, prompt_lookup_min: 1, prompt_lookup_max: 3 };
    let models = [("guesses", Some(lookup)), ("guesses-not", None)];
    let server = serve(models.map(|(name, lookup)| guessing(name, "qwen2", lookup)).into()).await;
    let ask = |model: &str| {
        let body = json!({"model": model, "prompt": "red red red red red red red red", "max_tokens": 40, "temperature": 0,
            "ignore_eos": true, "repetition_penalty": 1.0});
        let server = &server;
        async move { server.post("/v1/completions", &body).await.expect(200).json()["choices"][0]["text"].clone() }
    };
    assert_eq!(ask("guesses").await, ask("guesses-not").await);
    let metrics = server.get("/metrics").await.expect(200).text().to_owned();
    let guessed = |model: &str| {
        let line = format!("tale_draft_tokens_total{{model_name=\"{model}\"}} ");
        let count = metrics.lines().find_map(|found| found.strip_prefix(&line));
        count.map_or(0, |count| count.parse::<u64>().expect("a number"))
    };
    assert!(guessed("guesses") > 0 && guessed("guesses-not") == 0, "{metrics}");
}

#[tokio::test]
async fn a_model_without_tokens_guesses_none() {
    let models = vec![guessing("pictures", "flux-schnell", None)];
    let loading = tokio::task::spawn_blocking(move || Engine::load(models, EngineOptions::default(), |_, _| ()));
    let error = loading.await.expect("no panic").expect_err("refused").to_string();
    assert!(error.contains("flux") && error.contains("no tokens that could be guessed"), "{error}");
}

fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) / (squares / a.len() as f64).max(1e-12)).log10()
}

async fn check_words(server: &Server) {
    let golden = golden("qwen2");
    for (prompt, expected) in
        golden["prompts"].as_array().expect("a list").iter().zip(golden["greedy_text"].as_array().expect("a list"))
    {
        let body = json!({"model": "words", "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": true,
            "repetition_penalty": 1.0, "stream": true});
        let answer = server.post("/v1/completions", &body).await.expect(200);
        let events = answer.events();
        let text: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
        assert_eq!(&json!(text), expected);
        check_stop_string(server, body, &text).await;
    }
}

/// A stop string out of the middle of an answer ends it before, as a stream and as a whole, with fewer tokens.
async fn check_stop_string(server: &Server, mut body: Value, text: &str) {
    let middle = text.chars().count() / 2;
    let stop: String = text.chars().skip(middle).take(2).collect();
    let before = &text[..text.find(&stop).expect("it was taken from there")];
    body["stop"] = json!(["never in it", stop]);
    body["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &body).await.expect(200).events();
    let streamed: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    let reasons: Vec<_> = events.iter().filter_map(|event| event["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!((streamed.as_str(), &reasons[..]), (before, &["stop"][..]), "{stop:?}");
    let usage = events.iter().find_map(|event| event["usage"]["completion_tokens"].as_u64());
    body["stream"] = json!(false);
    body.as_object_mut().expect("fields").remove("stream_options");
    let whole = server.post("/v1/completions", &body).await.expect(200).json();
    assert_eq!(whole["choices"][0]["text"], before);
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["usage"]["completion_tokens"].as_u64(), usage);
    assert!(usage.is_some_and(|tokens| tokens < 48), "{usage:?}");
}

async fn check_pictures(server: &Server) {
    let golden = golden("flux-schnell");
    let tensors = std::fs::read(case("flux-schnell").join("golden.safetensors")).expect("committed");
    let tensors = SafeTensors::deserialize(&tensors).expect("sound");
    let answer = server.post("/v1/images/generations", &order("pictures", &golden["runs"][0])).await.expect(200).json();
    let found = psnr(&decode(&answer), tensors.tensor("run0.image").expect("recorded").data());
    assert!(found >= 50.0, "PSNR {found} dB");
}

fn decode(answer: &Value) -> Vec<u8> {
    let bytes = answer["data"][0]["b64_json"].as_str().expect("text");
    let bytes = base64::engine::general_purpose::STANDARD.decode(bytes).expect("base64");
    image::load_from_memory(&bytes).expect("a picture").to_rgb8().into_raw()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_with_different_loras_share_a_model() {
    let loras = Some(case("lora").join("sdxl"));
    let source = ModelSource { loras, ..ModelSource::at(case("sdxl-a").join("checkpoint")) };
    let server = serve(vec![ModelSpec::new("pictures", source)]).await;
    let tensors = std::fs::read(case("lora").join("golden.safetensors")).expect("committed");
    let tensors = SafeTensors::deserialize(&tensors).expect("sound");
    let golden = golden("lora");
    let runs = golden["runs"].as_array().expect("a list").iter().enumerate();
    let check = async |index: usize, run: &Value| {
        let mut body = order("pictures", run);
        for field in ["checkpoint", "files"] {
            body.as_object_mut().expect("fields").remove(field);
        }
        let answer = server.post("/v1/images/generations", &body).await.expect(200).json();
        assert_eq!(answer["loras"], run["loras"]);
        let image = tensors.tensor(&format!("run{index}.image")).expect("recorded");
        let found = psnr(&decode(&answer), image.data());
        assert!(found >= 50.0, "{}: PSNR {found} dB", run["loras"]);
    };
    let mut of_sdxl = runs.filter(|(_, run)| run["files"] == "sdxl" && run["image_of_run"].is_null());
    let mut next = || of_sdxl.next().expect("enough runs");
    let (a, b, c) = (next(), next(), next());
    tokio::join!(check(a.0, a.1), check(b.0, b.1), check(c.0, c.1));
    for (loras, param) in [
        (json!([{"name": "nobody"}]), "loras[0].name"),
        (json!([{"name": "peft"}, {"name": "peft"}]), "loras[1].name"),
        (json!([{"name": "../sdxl/peft"}]), "loras[0].name"),
        (json!([{"name": "peft", "weight": 11}]), "loras[0].weight"),
        (json!([{"name": "peft", "strength": 1}]), "loras[0].strength"),
        (json!([{"weight": 1}]), "loras[0].name"),
        (json!("peft"), "loras"),
    ] {
        let body = json!({"model": "pictures", "prompt": "x", "loras": loras});
        let answer = server.post("/v1/images/generations", &body).await.expect(400).json();
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
    server.wait_until_empty().await;
}

async fn check_clips(server: &Server) {
    let run = golden("wan-a")["runs"][0].clone();
    let job = server.post("/v1/videos", &order("clips", &run)).await.expect(200).json();
    let id = job["id"].as_str().expect("a name");
    let events: Answer = server.get(&format!("/v1/jobs/{id}/events")).await.expect(200);
    let events = events.events();
    assert_eq!(events.last().expect("some")["type"], "finished", "{events:?}");
    let denoised = events.iter().rfind(|event| event["phase"] == "denoise").expect("some");
    assert_eq!(denoised["done"], run["num_inference_steps"]);
    let content = server.get(&format!("/v1/videos/{id}/content")).await.expect(200);
    assert_eq!(&content.body[4..8], b"ftyp");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_media_at_once_are_what_the_reference_makes() {
    let server = server().await;
    tokio::join!(check_words(&server), check_pictures(&server), check_clips(&server));
    server.wait_until_empty().await;
}

/// The first picture in a form, under the name of OpenAI's client, and in JSON under its other name; without a size the video
/// has the picture's aspect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn videos_begin_with_pictures_and_end_with_them() {
    let models = [("first", "wan-i2v"), ("both", "wan-flf2v")]
        .map(|(name, golden)| ModelSpec::new(name, ModelSource::at(case(golden).join("checkpoint"))));
    let server = serve(models.into()).await;
    let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let short = json!({"prompt": "x", "num_inference_steps": 1, "num_frames": 5, "seed": 1});
    let with = |extra: Value| {
        let mut body = short.clone();
        body.as_object_mut().expect("fields").extend(extra.as_object().expect("fields").clone());
        body
    };

    let mut form = Vec::new();
    for (name, value) in [("model", "first"), ("prompt", "x"), ("num_inference_steps", "1"), ("num_frames", "5")] {
        form.extend(format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n").bytes());
    }
    let head = "--b\r\nContent-Disposition: form-data; name=\"input_reference\"; filename=\"x.png\"\r\nContent-Type: image/png\r\n\r\n";
    form.extend(head.bytes().chain(picture(&[64, 32])).chain(*b"\r\n--b--\r\n"));
    let job = server.call("POST", "/v1/videos", "multipart/form-data; boundary=b", form).await.expect(200).json();
    // About 832x480 pixels with the aspect of the picture, in multiples of 16.
    assert_eq!((&job["size"], &job["num_frames"]), (&json!("880x432"), &json!(5)));
    assert!(job.get("input_reference").is_none(), "pictures are not echoed: {job}");
    server.delete(&format!("/v1/videos/{}", job["id"].as_str().expect("a name"))).await.expect(200);

    let (first, last) = (base64(&picture(&[48, 32])), base64(&picture(&[20, 40])));
    let url = format!("data:image/png;base64,{last}");
    for body in [
        with(json!({"model": "first", "image": first, "size": "48x32"})),
        with(json!({"model": "both", "input_reference": first, "last_image": url, "size": "48x32"})),
    ] {
        let job = server.post("/v1/videos", &body).await.expect(200).json();
        let id = job["id"].as_str().expect("a name");
        let events = server.get(&format!("/v1/jobs/{id}/events")).await.expect(200).events();
        assert_eq!(events.last().expect("some")["type"], "finished", "{events:?}");
        assert!(events.iter().any(|event| event["phase"] == "vae_encode"), "{events:?}");
        let content = server.get(&format!("/v1/videos/{id}/content")).await.expect(200);
        assert_eq!(&content.body[4..8], b"ftyp");
    }
    for (body, param) in [
        (with(json!({"model": "first"})), "input_reference"),
        (with(json!({"model": "both", "image": first})), "last_image"),
        (with(json!({"model": "first", "image": first, "last_image": last})), "last_image"),
        (with(json!({"model": "first", "image": [first.clone(), first.clone()]})), "image"),
        (with(json!({"model": "first", "image": "aGVsbG8="})), "image"),
    ] {
        let answer = server.post("/v1/videos", &body).await.expect(400).json();
        assert_eq!(answer["error"]["param"], param, "{answer}");
    }
    server.wait_until_empty().await;
}

/// A PNG file of this width and height.
fn picture(&[width, height]: &[u32; 2]) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8 * 3, y as u8 * 5, 90]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).expect("encodes");
    bytes.into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_every_medium_that_go_away_leave_nothing() {
    let server = server().await;
    let long = json!({"model": "words", "prompt": "a", "max_tokens": 250, "ignore_eos": true, "n": 8});
    let picture =
        json!({"model": "pictures", "prompt": "a boat", "num_inference_steps": 500, "width": 64, "height": 64});
    let paths = [("/v1/completions", long, 8), ("/v1/images/generations", picture, 1)];
    for (path, body, sessions) in paths {
        let request = request("POST", path, "application/json", body.to_string());
        let waiting = tokio::spawn(crate::support::send(server.address, request));
        server.wait_for_live(sessions).await;
        waiting.abort();
        server.wait_until_empty().await;
    }
    let clip =
        json!({"model": "clips", "prompt": "a boat", "num_inference_steps": 500, "num_frames": 5, "size": "64x64"});
    let job = server.post("/v1/videos", &clip).await.expect(200).json();
    server.wait_for_live(1).await;
    server.delete(&format!("/v1/videos/{}", job["id"].as_str().expect("a name"))).await.expect(200);
    server.wait_until_empty().await;
}

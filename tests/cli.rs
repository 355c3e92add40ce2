//! The command line as a user meets it: the built `tale`, tiny published checkpoints, files and exit codes.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

fn tale(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tale"));
    command.args(args).env_remove("RUST_LOG").env_remove("HF_TOKEN").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    tale(args).output().unwrap()
}

fn succeed(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {stderr}");
    assert_eq!(stderr, "", "nothing but the answer in a pipe");
    String::from_utf8(output.stdout).unwrap()
}

/// The command fails with one line on stderr that contains every part.
fn check_failure(args: &[&str], exit_code: i32, parts: &[&str]) {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(exit_code), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.trim_end().lines().count() == 1, "one line: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "`{part}` is not in: {stderr}");
    }
}

/// A recorded case: its checkpoint and what the reference answered.
struct Golden {
    checkpoint: String,
    json: Value,
    tensors: Vec<u8>,
}

impl Golden {
    fn read(case: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(case);
        Self {
            checkpoint: dir.join("checkpoint").to_str().unwrap().to_owned(),
            json: serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap(),
            tensors: std::fs::read(dir.join("golden.safetensors")).unwrap(),
        }
    }

    fn ids(&self, name: &str) -> Vec<u64> {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let width = tensor.data().len() / tensor.shape().iter().product::<usize>();
        let id = |bytes: &[u8]| bytes.iter().rev().fold(0, |id, byte| id << 8 | u64::from(*byte));
        tensor.data().chunks(width).map(id).collect()
    }

    fn pixels(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.tensors).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// Height and width of a picture.
    fn size(&self, name: &str) -> [u32; 2] {
        let tensors = SafeTensors::deserialize(&self.tensors).unwrap();
        let shape = tensors.tensor(name).unwrap().shape().to_vec();
        [shape[0] as u32, shape[1] as u32]
    }

    /// Flags of a recorded run.
    fn flags(&self, run: usize) -> Vec<String> {
        let fields = self.json["runs"][run].as_object().unwrap();
        let flag = |name: &str, value: &Value| match value {
            Value::Null => None,
            Value::String(text) => Some(format!("--{}={text}", name.replace('_', "-"))),
            number => Some(format!("--{}={number}", name.replace('_', "-"))),
        };
        let known = [
            "prompt",
            "negative_prompt",
            "width",
            "height",
            "num_frames",
            "num_inference_steps",
            "guidance_scale",
            "seed",
            "max_sequence_length",
        ];
        known.iter().filter_map(|name| flag(name, fields.get(*name)?)).collect()
    }
}

fn json_numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

fn decode(path: &Path) -> Vec<u8> {
    image::open(path).unwrap().to_rgb8().into_raw()
}

fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) * a.len() as f64 / squares).log10()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn text_is_what_the_reference_generates() {
    for case in ["llama-tied", "qwen2"] {
        let golden = Golden::read(case);
        let prompt = golden.json["prompts"][0].as_str().unwrap();
        let args = [
            &["generate", "text", "--model", &golden.checkpoint, "--prompt", prompt][..],
            // The checkpoint asks for a penalty by default; the recorded tokens are those of bare logits.
            &["--max-tokens", "48", "--temperature", "0", "--repetition-penalty", "1", "--ignore-eos"],
        ]
        .concat();
        let answer: Value = serde_json::from_str(&succeed(&[&args[..], &["--json"]].concat())).unwrap();
        let keys: Vec<_> = answer.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["prompt_tokens", "tokens", "text"]);
        assert_eq!(json_numbers(&answer["prompt_tokens"]), golden.ids("prompt.0"), "{case}");
        assert_eq!(json_numbers(&answer["tokens"]), golden.ids("greedy.0"), "{case}");
        assert_eq!(succeed(&args), format!("{}\n", answer["text"].as_str().unwrap()), "streamed is whole");
    }
}

/// The answer to a prompt however it is given, and what `RUST_LOG=trace` shows of it.
#[test]
fn prompts_come_from_files_and_standard_input_and_no_library_logs_them() {
    let golden = Golden::read("qwen2");
    let generate = ["generate", "text", "--model", &golden.checkpoint, "--max-tokens", "4", "--temperature", "0"];
    let dir = tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "A small boat\n").unwrap();
    let file = file.to_str().unwrap();
    let expected = succeed(&[&generate[..], &["--prompt", "A small boat"]].concat());
    assert_eq!(succeed(&[&generate[..], &["--prompt-file", file]].concat()), expected);

    let mut command = tale(&[&generate[..], &["--prompt", "-"]].concat());
    command.env("RUST_LOG", "trace").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"A small boat\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    let logged = String::from_utf8(output.stderr).unwrap();
    assert!(!logged.contains("tokenizers") && !logged.contains("boat"), "{logged}");

    check_failure(&[&generate[..], &["--prompt-file", "/no/such"]].concat(), 1, &["/no/such: No such file"]);
    let picture = ["generate", "image", "--model", "x", "--output", "x.png", "--prompt", "-", "--negative-prompt", "-"];
    check_failure(&picture, 2, &["standard input holds one text only"]);
}

#[test]
fn the_same_seed_draws_the_same_text() {
    let golden = Golden::read("qwen2");
    let draw =
        |seed: &str| {
            succeed(&[
            &["generate", "text", "--model", &golden.checkpoint, "--prompt", "A small boat", "--seed", seed][..],
            &["--max-tokens", "24", "--temperature", "1.5", "--ignore-eos", "--json"],
        ]
        .concat())
        };
    assert_eq!(draw("3"), draw("3"));
    assert_ne!(draw("3"), draw("4"));
}

#[test]
fn conversations_go_through_the_chat_template() {
    let golden = Golden::read("qwen2");
    let dir = tempdir().unwrap();
    let file = dir.path().join("messages.json");
    std::fs::write(&file, golden.json["chats"][0]["messages"].to_string()).unwrap();
    let generate = ["generate", "text", "--model", &golden.checkpoint, "--max-tokens", "1", "--json"];
    let answer = succeed(&[&generate[..], &["--messages", file.to_str().unwrap()]].concat());
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(json_numbers(&answer["prompt_tokens"]), json_numbers(&golden.json["chats"][0]["ids"]));

    std::fs::write(&file, r#"[{"role": "user", "contents": "hi"}]"#).unwrap();
    let args = [&generate[..], &["--messages", file.to_str().unwrap()]].concat();
    check_failure(&args, 2, &["--messages: ", "messages.json", "[0]", "contents"]);
}

#[test]
fn a_picture_is_the_one_that_diffusers_makes() {
    let golden = Golden::read("flux-schnell");
    let dir = tempdir().unwrap();
    for (name, min_psnr) in [("out.png", 50.0), ("out.webp", 50.0), ("out.jpg", 25.0)] {
        let path = dir.path().join(name);
        let mut command = tale(&["generate", "image", "--model", &golden.checkpoint]);
        let output = command.args(golden.flags(0)).arg("--output").arg(&path).output().unwrap();
        assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
        let psnr = psnr(&decode(&path), &golden.pixels("run0.image"));
        assert!(psnr >= min_psnr, "{name}: {psnr:.1} dB");
    }
    assert_eq!(names(dir.path()), ["out.jpg", "out.png", "out.webp"]);
}

/// The transformer is a file of its own; everything else is in the folder of its base.
#[test]
fn a_single_file_takes_what_it_lacks_from_its_base() {
    let golden = Golden::read("flux-schnell");
    let file = format!("{}/transformer/diffusion_pytorch_model.safetensors", golden.checkpoint);
    let report: Value =
        serde_json::from_str(&succeed(&["inspect", &file, "--base", &golden.checkpoint, "--json"])).unwrap();
    assert_eq!((&report["family"], &report["loads"]), (&json!("flux"), &json!(true)));
    let dir = tempdir().unwrap();
    let path = dir.path().join("out.png");
    let flags = golden.flags(0);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let from_file = ["generate", "image", "--model", &file, "--base", &golden.checkpoint, "--output"];
    succeed(&[&from_file[..], &[path.to_str().unwrap()], &flags].concat());
    let psnr = psnr(&decode(&path), &golden.pixels("run0.image"));
    assert!(psnr >= 50.0, "{psnr:.1} dB");

    check_failure(&["inspect", &file], 1, &["holds FLUX.1's transformer and needs a base", "FluxPipeline"]);
    let with_base = ["inspect", &golden.checkpoint, "--base", &golden.checkpoint];
    check_failure(&with_base, 1, &["a base goes with a single file"]);
}

#[test]
fn a_picture_is_made_again_from_its_own_file() {
    let golden = Golden::read("flux-schnell");
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (first, again, other, bare) = (path("a.png"), path("b.png"), path("c.png"), path("d.png"));
    let image = ["generate", "image", "--model", &golden.checkpoint, "--output"];
    let flags = golden.flags(0);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    succeed(&[&image[..], &[&first], &flags].concat());
    let said: Value = serde_json::from_str(&succeed(&["inspect", &first])).unwrap();
    assert_eq!((&said["model"], &said["prompt"]), (&json!("checkpoint"), &golden.json["runs"][0]["prompt"]));
    succeed(&[&image[..], &[&again, "--parameters-from", &first]].concat());
    assert_eq!(std::fs::read(&again).unwrap(), std::fs::read(&first).unwrap());
    succeed(&[&image[..], &[&other, "--parameters-from", &first, "--seed", "1"]].concat());
    let pixels = |path: &str| decode(Path::new(path));
    assert!(psnr(&pixels(&other), &pixels(&first)) < 35.0);
    succeed(&[&image[..], &[&bare, "--no-metadata", "--parameters-from", &first]].concat());
    assert_eq!(pixels(&bare), pixels(&first));

    check_failure(&["inspect", &bare], 2, &["d.png: says nothing"]);
    check_failure(&[&image[..], &[&again, "--parameters-from", &bare]].concat(), 2, &["d.png: says nothing"]);
    let unsaid = String::from_utf8(run(&[&image[..], &[&again]].concat()).stderr).unwrap();
    assert!(unsaid.contains("--prompt <TEXT>") && unsaid.contains("--parameters-from <FILE>"), "{unsaid}");
    let config = format!("{}/model_index.json", golden.checkpoint);
    check_failure(&["inspect", &config], 1, &["model_index.json: is not a "]);
}

#[test]
fn a_picture_with_loras_is_the_one_that_diffusers_makes() {
    let (golden, checkpoint) = (Golden::read("lora"), Golden::read("sdxl-a").checkpoint);
    let run = golden.json["runs"]
        .as_array()
        .unwrap()
        .iter()
        .position(|run| run["files"] == "sdxl" && run["loras"].as_array().is_some_and(|loras| loras.len() == 2));
    let run = run.unwrap();
    let folder = format!("{}/sdxl", checkpoint.replace("sdxl-a/checkpoint", "lora"));
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (first, again) = (path("a.png"), path("b.png"));
    let mut fields = golden.json["runs"][run].clone();
    let loras = fields.as_object_mut().unwrap().remove("loras").unwrap();
    let of_golden = Golden { json: json!({"runs": [fields]}), ..golden };
    let flags: Vec<String> = of_golden
        .flags(0)
        .into_iter()
        .filter(|flag| !flag.starts_with("--checkpoint") && !flag.starts_with("--files"))
        .chain(
            loras
                .as_array()
                .unwrap()
                .iter()
                .map(|lora| format!("--lora={}:{}", lora["name"].as_str().unwrap(), lora["weight"])),
        )
        .collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let image = ["generate", "image", "--model", &checkpoint, "--loras", &folder, "--output"];
    succeed(&[&image[..], &[&first], &flags].concat());
    let psnr = psnr(&decode(Path::new(&first)), &of_golden.pixels(&format!("run{run}.image")));
    assert!(psnr >= 50.0, "{psnr:.1} dB");
    let said: Value = serde_json::from_str(&succeed(&["inspect", &first])).unwrap();
    assert_eq!(said["loras"], loras);
    succeed(&[&image[..], &[&again, "--parameters-from", &first]].concat());
    assert_eq!(std::fs::read(&again).unwrap(), std::fs::read(&first).unwrap());

    let refuse = |lora: &str, parts: &[&str]| {
        check_failure(&[&image[..], &[&again, "--prompt", "x", "--lora", lora]].concat(), 2, parts);
    };
    refuse("nobody", &["--lora: is not known; there are: before-peft, kohya"]);
    refuse("peft:11", &["--lora: is 11; allowed: -10 to 10"]);
    let unfit = run_image_with_flux_lora(&checkpoint, &folder.replace("lora/sdxl", "lora/flux"), &again);
    assert!(unfit.contains("--lora: `kohya` is not for this model: ") && unfit.contains("lora_unet_"), "{unfit}");
}

/// What it says on stderr.
fn run_image_with_flux_lora(checkpoint: &str, folder: &str, output: &str) -> String {
    let args = ["generate", "image", "--model", checkpoint, "--loras", folder, "--output", output, "--prompt", "x"];
    String::from_utf8(run(&[&args[..], &["--lora", "kohya"]].concat()).stderr).unwrap()
}

#[test]
fn a_picture_follows_reference_pictures() {
    let (golden, sdxl) = (Golden::read("ip-adapter"), Golden::read("sdxl-a").checkpoint);
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/ip-adapter/base");
    let (adapter, out) = (adapter.to_str().unwrap(), path("out.png"));
    let facts = &golden.json["runs"][1];
    assert_eq!((&facts["adapter"], &facts["references"]), (&json!("base"), &json!([1, 3])));
    for i in [1, 3] {
        let name = format!("picture{i}");
        let tensors = SafeTensors::deserialize(&golden.tensors).unwrap();
        let [height, width, 3] = *tensors.tensor(&name).unwrap().shape() else { panic!("a picture") };
        let picture = image::RgbImage::from_raw(width as u32, height as u32, golden.pixels(&name)).unwrap();
        picture.save(path(&format!("{name}.png"))).unwrap();
    }
    let model = ["generate", "image", "--model", &sdxl, "--output", &out];
    let (first, second) = (path("picture1.png"), path("picture3.png"));
    let follow = ["--ip-adapter", adapter, "--reference", &first, "--reference", &second, "--ip-adapter-scale", "0.5"];
    let flags = golden.flags(1);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    succeed(&[&model[..], &follow, &flags].concat());
    let found = psnr(&decode(Path::new(&out)), &golden.pixels("run1.image"));
    assert!(found >= 50.0, "{found:.1} dB");
    let said: Value = serde_json::from_str(&succeed(&["inspect", &out])).unwrap();
    assert_eq!(said["ip_adapter_scale"], 0.5);

    let refused = |extra: &[&str], parts: &[&str]| check_failure(&[&model[..], &flags, extra].concat(), 2, parts);
    refused(&["--reference", &first], &["served without an IP-Adapter"]);
    refused(&["--ip-adapter", adapter, "--reference", "Cargo.toml"], &["--reference: Cargo.toml must be a PNG"]);
    let listed = succeed(&["inspect", &sdxl, "--ip-adapter", adapter, "--json"]);
    assert!(listed.contains("image_encoder") && listed.contains("ip_adapter"), "{listed}");
    let flux = Golden::read("flux-schnell").checkpoint;
    let refused = run(&["inspect", &flux, "--ip-adapter", adapter]);
    let said = String::from_utf8(refused.stdout).unwrap();
    assert!(!refused.status.success() && said.contains("models of family flux take no IP-Adapter"), "{said}");
}

#[test]
fn pictures_are_made_from_a_picture() {
    let golden = Golden::read("flux-schnell");
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (input, mask, out) = (path("in.png"), path("mask.png"), path("out.png"));
    image::RgbImage::from_fn(50, 40, |x, y| image::Rgb([x as u8 * 5, y as u8 * 6, 90])).save(&input).unwrap();
    image::GrayImage::from_fn(50, 40, |x, _| image::Luma([if x < 24 { 255 } else { 0 }])).save(&mask).unwrap();
    let model = ["generate", "image", "--model", &golden.checkpoint, "--prompt", "a boat", "--output", &out];
    let edit = ["--image", &input, "--mask", &mask, "--strength", "0.8", "--seed", "7", "--n", "2"];
    succeed(&[&model[..], &edit].concat());
    assert_eq!(names(dir.path()), ["in.png", "mask.png", "out-0.png", "out-1.png"]);
    let said: Value = serde_json::from_str(&succeed(&["inspect", &path("out-1.png")])).unwrap();
    let expected = (&json!(8), &json!(0.8), &json!(48), &json!(40));
    assert_eq!((&said["seed"], &said["strength"], &said["width"], &said["height"]), expected);
    let [first, second] = ["out-0.png", "out-1.png"].map(|name| decode(Path::new(&path(name))));
    assert!(psnr(&first, &second) < 35.0);

    let refused = |extra: &[&str], parts: &[&str]| check_failure(&[&model[..], extra].concat(), 2, parts);
    check_failure(&[&model[..], &["--image", &path("none.png")]].concat(), 1, &["none.png"]);
    refused(&["--image", "Cargo.toml"], &["--image: Cargo.toml must be a PNG, JPEG or WebP picture"]);
    refused(&["--image", &input, "--mask", &path("out-0.png")], &["--mask: is 48x40, but image is 50x40"]);
    refused(&["--image", &input, "--strength", "2"], &["--strength: is 2; allowed: 0 to 1"]);
    refused(&["--mask", &mask], &["--mask: has no effect without image"]);
}

#[test]
fn a_clip_is_the_one_that_diffusers_makes() {
    let golden = Golden::read("wan-a");
    let dir = tempdir().unwrap();
    for name in ["frames/", "out.mp4", "out.webm", "out.gif"] {
        let path = dir.path().join(name);
        let mut command = tale(&["generate", "video", "--model", &golden.checkpoint]);
        let output = command.args(golden.flags(0)).arg("--output").arg(&path).output().unwrap();
        assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    }
    assert_eq!(names(dir.path()), ["frames", "out.gif", "out.mp4", "out.webm"]);
    let expected = golden.pixels("run0.frames");
    let frames = names(&dir.path().join("frames"));
    assert_eq!(frames.len() as u64, golden.json["runs"][0]["num_frames"].as_u64().unwrap());
    for (index, expected) in expected.chunks(expected.len() / frames.len()).enumerate() {
        let frame = dir.path().join(format!("frames/frame_{index:04}.png"));
        let psnr = psnr(&decode(&frame), expected);
        assert!(psnr >= 50.0, "frame {index}: {psnr:.1} dB");
    }
}

#[test]
fn a_clip_is_made_again_from_its_own_file() {
    let golden = Golden::read("wan-a");
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let clip = ["generate", "video", "--model", &golden.checkpoint, "--output"];
    let flags = golden.flags(0);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    for extension in ["mp4", "webm"] {
        let [first, again, other, bare] = ["a", "b", "c", "d"].map(|name| path(&format!("{name}.{extension}")));
        let bytes = |path: &str| std::fs::read(path).unwrap();
        succeed(&[&clip[..], &[&first], &flags].concat());
        let said: Value = serde_json::from_str(&succeed(&["inspect", &first])).unwrap();
        assert_eq!((&said["model"], &said["prompt"]), (&json!("checkpoint"), &golden.json["runs"][0]["prompt"]));
        assert_eq!(said["num_frames"], golden.json["runs"][0]["num_frames"]);
        succeed(&[&clip[..], &[&again, "--parameters-from", &first]].concat());
        assert!(bytes(&again) == bytes(&first), "{extension}");
        succeed(&[&clip[..], &[&other, "--parameters-from", &first, "--seed", "1"]].concat());
        assert!(bytes(&other) != bytes(&first), "{extension}");
        succeed(&[&clip[..], &[&bare, "--no-metadata", "--parameters-from", &first]].concat());
        let refused = format!("d.{extension}: says nothing of how it was made");
        check_failure(&[&clip[..], &[&again, "--parameters-from", &bare]].concat(), 2, &[&refused]);
    }
    // A poster is beside the frames, and no parameter of them.
    let poster = path("poster.mp4");
    succeed(&[&clip[..], &[&poster, "--poster", "--parameters-from", &path("a.mp4")]].concat());
    let poster_bytes = std::fs::read(&poster).unwrap();
    assert!(poster_bytes.windows(4).any(|bytes| bytes == b"covr"));
    let (poster, first) = (succeed(&["inspect", &poster]), succeed(&["inspect", &path("a.mp4")]));
    assert_eq!(poster, first);
    // A playlist that names another file is no clip.
    let list = path("list.mp4");
    std::fs::write(&list, "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mp4\n#EXT-X-ENDLIST\n").unwrap();
    check_failure(&[&clip[..], &[&path("b.mp4"), "--parameters-from", &list]].concat(), 2, &["list.mp4: "]);
}

/// A file of LoRA by name and weight, and steps one by one.
#[test]
fn a_clip_takes_loras_and_lists_of_sigmas() {
    let checkpoint = Golden::read("wan-a").checkpoint;
    let folder = checkpoint.replace("wan-a/checkpoint", "wan-lora/t2v");
    let (of_loras, of_steps) = (Golden::read("wan-lora"), Golden::read("given-steps"));
    let lora = &of_loras.json["runs"][1]["loras"][0];
    let lora = format!("--lora={}:{}", lora["name"].as_str().unwrap(), lora["weight"]);
    let steps = ["--sigmas=1,0.75,0.5,0.25", "--flow-shift=5", "--scheduler=flow_euler"].map(str::to_owned);
    for (golden, run, pixels, more) in [
        (&of_loras, 1, "run1.frames", vec![format!("--loras={folder}"), lora]),
        (&of_steps, 0, "run0.pixels", steps.to_vec()),
    ] {
        let dir = tempdir().unwrap();
        let flags = [golden.flags(run), more, vec![format!("--output={}/", dir.path().display())]].concat();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        succeed(&[&["generate", "video", "--model", &checkpoint], &flags[..]].concat());
        let frames = names(dir.path());
        let found: Vec<u8> = frames.iter().flat_map(|frame| decode(&dir.path().join(frame))).collect();
        let psnr = psnr(&found, &golden.pixels(pixels));
        assert!(psnr >= 50.0, "{pixels}: {psnr:.1} dB");
    }
    let clip = ["generate", "video", "--model", &checkpoint, "--prompt", "x", "--output", "x.mp4"];
    check_failure(
        &[&clip[..], &["--sigmas", "1,0.5,0.7"]].concat(),
        2,
        &["--sigmas", "is 0.7", "not below the one before"],
    );
    let said = run(&[&clip[..], &["--sigmas", "1,x"]].concat()).stderr;
    assert!(String::from_utf8(said).unwrap().contains("expected numbers, such as 1,0.75,0.5"));
}

#[test]
fn a_video_from_pictures_is_the_one_that_diffusers_makes() {
    let golden = Golden::read("wan-flf2v");
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let run = &golden.json["runs"][0];
    let pictures = json_numbers(&run["pictures"]);
    let mut flags = golden.flags(0);
    for (flag, index) in ["--image", "--last-image"].into_iter().zip(pictures) {
        let name = format!("picture{index}");
        let [height, width] = golden.size(&name);
        let picture = image::RgbImage::from_raw(width, height, golden.pixels(&name)).unwrap();
        picture.save(path(&format!("{name}.png"))).unwrap();
        flags.extend([flag.to_owned(), path(&format!("{name}.png"))]);
    }
    let mut command = tale(&["generate", "video", "--model", &golden.checkpoint, "--output", &path("frames/")]);
    let output = command.args(flags).output().unwrap();
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    let expected = golden.pixels("run0.frames");
    let frames = names(&dir.path().join("frames"));
    assert_eq!(frames.len() as u64, run["num_frames"].as_u64().unwrap());
    for (index, expected) in expected.chunks(expected.len() / frames.len()).enumerate() {
        let psnr = psnr(&decode(&dir.path().join(format!("frames/frame_{index:04}.png"))), expected);
        assert!(psnr >= 50.0, "frame {index}: {psnr:.1} dB");
    }
    let without = ["generate", "video", "--model", &golden.checkpoint, "--prompt", "x", "--output", &path("x.mp4")];
    check_failure(&without, 2, &["--image: is missing"]);
}

#[test]
fn wrong_requests_are_refused_in_one_line() {
    let (text, flux) = (Golden::read("llama-tied").checkpoint, Golden::read("flux-schnell").checkpoint);
    let generate = |medium, model, rest: &[&'static str]| {
        [&["generate", medium, "--model", model, "--prompt", "x"], rest]
            .concat()
            .into_iter()
            .map(String::from)
            .collect()
    };
    let check = |args: Vec<String>, parts: &[&str]| {
        check_failure(&args.iter().map(String::as_str).collect::<Vec<_>>(), 2, parts);
    };
    check(generate("text", &text, &["--temperature", "7"]), &["--temperature: is 7", "0 to 2"]);
    check(generate("text", &text, &["--presence-penalty", "-3"]), &["--presence-penalty: is -3"]);
    check(generate("text", &text, &["--max-tokens", "0"]), &["--max-tokens: is 0"]);
    check(generate("text", &flux, &[]), &["tale generate image"]);
    check(generate("image", &text, &["--output", "a.png"]), &["tale generate text"]);
    check(generate("image", &flux, &["--output", "a.bmp"]), &["a.bmp", ".png, .jpg, .jpeg or .webp"]);
    check(generate("image", &flux, &["--output", "/no/such/a.png"]), &["no folder /no/such"]);
    check(generate("image", &flux, &["--output", "a.png", "--width", "33"]), &["--width: is 33", "multiples of"]);
    check(generate("video", &flux, &["--output", "a.mov"]), &["a.mov", ".mp4, .webm or .gif"]);
    check(generate("video", &flux, &["--output", "a.mp4"]), &["tale generate image"]);
    check_failure(&["generate", "text", "--model", "/no/such", "--prompt", "x"], 1, &["/no/such"]);
}

#[test]
fn inspect_says_what_a_checkpoint_is() {
    for (case, family, makes) in [
        ("llama-tied", "llama", "text"),
        ("qwen2", "qwen2", "text"),
        ("flux-schnell", "flux", "image"),
        ("wan-a", "wan", "video"),
        ("hunyuan-video-b", "hunyuan_video", "video"),
    ] {
        let checkpoint = Golden::read(case).checkpoint;
        let report: Value = serde_json::from_str(&succeed(&["inspect", &checkpoint, "--json"])).unwrap();
        assert_eq!((report["family"].as_str(), report["makes"].as_str()), (Some(family), Some(makes)));
        assert_eq!(report["loads"], true, "{report}");
        let sum = |field: &str| -> u64 {
            report["components"].as_array().unwrap().iter().map(|component| component[field].as_u64().unwrap()).sum()
        };
        assert_eq!(report["parameters"], sum("parameters"));
        assert!(report["memory_bytes"].as_u64().unwrap() >= 2 * sum("parameters") * 9 / 10, "{report}");
        let text = succeed(&["inspect", &checkpoint]);
        assert!(text.contains(&format!("{family}, makes {makes}")) && text.contains("can be loaded"), "{text}");
        // Its licence is not for everybody.
        let has_note = family == "hunyuan_video";
        assert_eq!(
            report["licence_note"].as_str().is_some_and(|note| note.contains("South Korea")),
            has_note,
            "{report}"
        );
        assert_eq!(text.contains("European Union"), has_note, "{text}");
    }
}

#[test]
fn inspect_plans_a_published_configuration_without_files() {
    let inspect = |args: &[&str]| -> Value {
        let args = [&["inspect", "--preset", "wan2.1-flf2v-14b", "--device", "cuda:0", "--json"], args].concat();
        serde_json::from_str(&succeed(&args)).unwrap()
    };
    let (small, large) = (inspect(&["--memory", "24GiB"]), inspect(&["--memory", "80GiB"]));
    assert_eq!((small["path"].as_str(), small["loads"].as_bool()), (Some("wan2.1-flf2v-14b"), Some(true)));
    let needs = |report: &Value| report["request"]["memory_bytes"].as_u64().unwrap();
    let free = |report: &Value| report["request"]["free_bytes"].as_u64().unwrap();
    assert!(needs(&small) > free(&small) && needs(&large) <= free(&large), "{small} {large}");
    for (args, part) in [
        (&["--preset", "nobody"][..], "known: llama"),
        (&["--preset", "wan2.1-flf2v-14b", "x"], "cannot be used with"),
        (&[], "<PATH>"),
    ] {
        let output = run(&[&["inspect"], args].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(part), "{args:?}: {said}");
    }
}

/// Weights of 16 bits that no card has room for, on several of them.
#[test]
fn inspect_says_what_a_model_takes_on_each_of_several_cards() {
    let inspect = |args: &[&str]| -> Value {
        let args = [&["inspect", "--preset", "llama-3.1-70b", "--device", "cuda:0", "--json"], args].concat();
        serde_json::from_str(&succeed(&args)).unwrap()
    };
    let one = inspect(&["--memory", "80GiB"]);
    let of = |report: &Value, field: &str| report[field].as_u64().unwrap();
    let tokens = |report: &Value| report["context"]["tokens_beside_weights"]["bf16"].as_u64().unwrap();
    assert_eq!(tokens(&one), 0);
    for (count, memory) in [("2", "80GiB"), ("4", "40GiB")] {
        let shared = inspect(&["--tensor-parallel", count, "--memory", memory]);
        let count: u64 = count.parse().unwrap();
        assert_eq!((of(&shared, "tensor_parallel"), of(&shared, "parameters")), (count, of(&one, "parameters")));
        // But for the norms, which all have.
        let (own, whole) = (of(&shared, "memory_bytes") * count, of(&one, "memory_bytes"));
        assert!(own > whole && own < whole + (16 << 20), "{own} of {whole}");
        // Each has its share of every token, of which there are as many everywhere.
        assert_eq!(of(&shared["context"], "bytes_per_token") * count, of(&one["context"], "bytes_per_token"));
        println!("{count} of {memory}: {} bytes, {} tokens", of(&shared, "memory_bytes"), tokens(&shared));
        assert!(tokens(&shared) > 50_000, "{}", tokens(&shared));
    }
    let text = succeed(&["inspect", "--preset", "llama-3.1-70b", "--tensor-parallel", "2"]);
    assert!(text.contains("Shared by 2 devices; bytes and tokens are those of each of them."), "{text}");
    for (args, problem) in [
        (["--preset", "llama-3.1-70b", "--tensor-parallel", "3"], "num_attention_heads: 3 ranks cannot share out 64"),
        (
            ["--preset", "flux.1-dev", "--tensor-parallel", "2"],
            "models of family flux are not shared out among devices",
        ),
    ] {
        let output = run(&[&["inspect"][..], &args].concat());
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(!output.status.success() && said.contains(problem), "{said}");
    }
}

/// Bits, groups, and how many tokens a card has room for, as they are computed and in 8 bits.
#[test]
fn inspect_says_what_a_model_in_four_bits_takes_on_a_card() {
    for (preset, kept) in [
        ("llama-3.1-70b-awq-int4", "AWQ 4 bits, groups of 128 68.45 B"),
        ("llama-3.3-70b-w4a16", "compressed-tensors 4 bits, groups of 128 68.45 B"),
        ("qwen2.5-72b-awq", "AWQ 4 bits, groups of 128 70.46 B"),
        ("qwen2.5-72b-gptq-int4", "GPTQ 4 bits, groups of 128 70.46 B"),
    ] {
        let inspect = |args: &[&str]| succeed(&[&["inspect", "--preset", preset], args].concat());
        let text = inspect(&["--device", "cuda:0"]);
        for part in [kept, "Of 80.00 GiB the weights leave ", " in bf16", " in int8", " in fp8"] {
            assert!(text.contains(part), "{preset}: `{part}` is not in: {text}");
        }
        let report =
            |args: &[&str]| -> Value { serde_json::from_str(&inspect(&[&["--json"], args].concat())).unwrap() };
        let (on_gpu, on_cpu) = (report(&["--device", "cuda:0"]), report(&[]));
        // Those of a feed-forward layer.
        let largest = if preset.starts_with("qwen") { 8192 * 29_696 } else { 8192 * 28_672 };
        assert_eq!((on_gpu["widened_bytes"].as_u64(), on_cpu["widened_bytes"].as_u64()), (Some(largest * 2), Some(0)));
        let context = &on_gpu["context"];
        assert_eq!(report(&["--device", "cuda:0", "--memory", "80GiB"])["context"], *context, "{preset}");
        let number = |field: &str| context[field].as_u64().unwrap();
        let taken = on_gpu["memory_bytes"].as_u64().unwrap() + largest * 2;
        assert_eq!(number("free_bytes"), (80 << 30) - taken, "{preset}");
        let tokens = |format: &str| context["tokens_beside_weights"][format].as_u64().unwrap();
        // 80 layers of 8 heads of 128, keys and values.
        assert_eq!((number("memory_bytes"), number("bytes_per_token")), (80 << 30, 80 * 8 * 128 * 2 * 2), "{preset}");
        assert_eq!(tokens("bf16"), number("free_bytes") / number("bytes_per_token"), "{preset}");
        assert_eq!(tokens("int8"), number("free_bytes") / (80 * 8 * (128 + 4) * 2), "{preset}");
        assert_eq!(tokens("fp8"), tokens("int8"), "{preset}");
        assert!((100_000..140_000).contains(&tokens("bf16")), "{preset}: {context}");
        let small = inspect(&["--memory", "24GiB"]);
        assert!(small.contains("Of 24.00 GiB the weights do not leave room for a KV cache."), "{preset}: {small}");
    }
}

/// It needs an image, so that there is no plainest request whose memory could be told.
#[test]
fn inspect_says_that_a_refiner_can_be_loaded() {
    let refiner = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/edits/sdxl-refiner/checkpoint");
    let text = succeed(&["inspect", refiner]);
    assert!(text.contains("The checkpoint can be loaded."), "{text}");
}

/// The plan of a request with the model's own sizes: what each phase needs; where memory is short, text encoders that leave
/// the device, and tiles where a whole picture has no room even then.
#[test]
fn inspect_plans_the_memory_of_a_request() {
    let checkpoint = Golden::read("flux-schnell").checkpoint;
    let report = |args: &[&str]| -> Value {
        serde_json::from_str(&succeed(&[&["inspect", &checkpoint, "--json"], args].concat())).unwrap()
    };
    let whole = report(&[]);
    let phases = |report: &Value| -> Vec<(String, u64)> {
        let phases = report["request"]["phases"].as_array().unwrap().iter();
        phases.map(|of| (of["phase"].as_str().unwrap().into(), of["memory_bytes"].as_u64().unwrap())).collect()
    };
    let names: Vec<String> = phases(&whole).into_iter().map(|(phase, _)| phase).collect();
    assert_eq!(names, ["encode", "denoise", "vae_decode"]);
    let peak = phases(&whole).iter().map(|(_, bytes)| *bytes).max().unwrap();
    assert_eq!(whole["request"]["memory_bytes"], peak);
    assert_eq!((&whole["request"]["vae_tiling"], &whole["request"]["free_bytes"]), (&json!(false), &Value::Null));

    let decode = phases(&whole)[2].1;
    let memory = (whole["memory_bytes"].as_u64().unwrap() + decode / 2).to_string();
    let tiled = report(&["--memory", &memory]);
    let components = tiled["components"].as_array().unwrap().iter();
    let encoders = components.filter(|of| of["name"].as_str().unwrap().starts_with("text_encoder"));
    let encoder_bytes: u64 = encoders.map(|of| of["memory_bytes"].as_u64().unwrap()).sum();
    let request = &tiled["request"];
    assert_eq!((&request["vae_tiling"], &request["on_demand_bytes"]), (&json!(true), &json!(encoder_bytes)));
    assert_eq!(request["free_bytes"], decode / 2 + encoder_bytes);
    let names: Vec<String> = phases(&tiled).into_iter().map(|(phase, _)| phase).collect();
    assert_eq!(names, ["load", "encode", "denoise", "vae_decode"]);
    assert_eq!(phases(&tiled)[0].1, encoder_bytes);
    assert_eq!(phases(&tiled)[1].1, phases(&whole)[0].1 + encoder_bytes);
    assert!(phases(&tiled)[3].1 < decode / 2, "{tiled}");
    let text = succeed(&["inspect", &checkpoint, "--memory", &memory]);
    assert!(
        text.contains("its VAE in tiles") && text.contains("are read for each encoding") && text.contains("fit"),
        "{text}"
    );
    assert_eq!(whole["request"]["on_demand_bytes"], 0);
    assert_eq!(
        succeed(&["inspect", &Golden::read("qwen2").checkpoint, "--json"]).matches("\"request\": null").count(),
        1
    );
}

#[test]
fn inspect_says_by_which_schedulers_a_checkpoint_can_be_sampled() {
    let of = |case: &str| -> Value {
        let report = succeed(&["inspect", &Golden::read(case).checkpoint, "--json"]);
        serde_json::from_str::<Value>(&report).unwrap()["request"].take()
    };
    let sdxl = of("sdxl-a");
    assert_eq!(
        (&sdxl["scheduler"], &sdxl["schedulers"][4]),
        (&json!("EulerDiscreteScheduler"), &json!("dpmpp_2m_karras"))
    );
    assert_eq!(of("flux-dev")["schedulers"], json!(["flow_euler", "FlowMatchEulerDiscreteScheduler"]));
    let text = succeed(&["inspect", &Golden::read("wan-a").checkpoint]);
    let schedulers = "sampled by UniPCMultistepScheduler, or by unipc, flow_euler, FlowMatchEulerDiscreteScheduler.";
    assert!(text.contains(schedulers), "{text}");
}

/// A picture by another scheduler than the checkpoint's own, whose seeds reach the noise of its steps.
#[test]
fn a_named_scheduler_makes_the_picture_of_the_reference() {
    let golden = Golden::read("sdxl-schedulers");
    let (checkpoint, dir) = (Golden::read("sdxl-a").checkpoint, tempfile::tempdir().unwrap());
    let output = dir.path().join("picture.png").display().to_string();
    for run in [3, 7] {
        let fields = &golden.json["runs"][run];
        let mut flags = vec![format!("--scheduler={}", fields["scheduler"].as_str().unwrap())];
        flags.extend(fields["eta"].as_f64().map(|eta| format!("--eta={eta}")));
        for name in ["prompt", "negative_prompt", "width", "height", "guidance_scale"] {
            let value = &golden.json["request"][name];
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            flags.push(format!("--{}={value}", name.replace('_', "-")));
        }
        for name in ["num_inference_steps", "seed"] {
            flags.push(format!("--{}={}", name.replace('_', "-"), fields[name]));
        }
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        succeed(&[&["generate", "image", "--model", &checkpoint, "--output", &output][..], &flags].concat());
        let found = psnr(&decode(Path::new(&output)), &golden.pixels(&format!("run{run}.image")));
        assert!(found >= 50.0, "run {run}: {found:.1} dB");
        let said: Value = serde_json::from_str(&succeed(&["inspect", &output])).unwrap();
        assert_eq!((&said["scheduler"], said["eta"].as_f64()), (&fields["scheduler"], fields["eta"].as_f64()));
    }
}

/// Copies a checkpoint so that a test may damage it.
fn copy_of(case: &str) -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let copy = dir.path().join("checkpoint");
    let from = Golden::read(case).checkpoint;
    assert!(Command::new("cp").args(["-r", &from]).arg(&copy).status().unwrap().success());
    (dir, copy)
}

#[test]
fn inspect_fails_on_damaged_checkpoints_and_says_why() {
    let (_dir, shardless) = copy_of("llama-tied");
    std::fs::remove_file(shardless.join("model-00002-of-00005.safetensors")).unwrap();
    let (_dir2, wider) = copy_of("qwen2");
    let config = std::fs::read_to_string(wider.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["intermediate_size"] = (config["intermediate_size"].as_u64().unwrap() + 8).into();
    std::fs::write(wider.join("config.json"), config.to_string()).unwrap();
    let (_dir3, untold) = copy_of("qwen2");
    let (_dir4, nested) = copy_of("qwen2");
    let deep = "{% set ns = namespace(s=[]) %}{% for i in range(100000) %}{% set ns.s = [ns.s] %}{% endfor %}x";
    std::fs::write(nested.join("chat_template.jinja"), deep).unwrap();
    std::fs::write(untold.join("chat_template.jinja"), "{{ bos_token }}\n{{ messages | splat }}").unwrap();
    for (path, parts) in [
        (&shardless, &["model-00002-of-00005.safetensors"][..]),
        (&wider, &["cannot be loaded", "mlp", "has shape", "expected"]),
        (&untold, &["chat_template.jinja", "line 2: the filter `splat`"]),
        (&nested, &["the chat template cannot be rendered", "it nests lists and dictionaries deeper than 100"]),
    ] {
        let output = run(&["inspect", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        for part in parts {
            assert!(said.contains(part), "`{part}` is not in: {said}");
        }
    }
    let empty = tempdir().unwrap();
    check_failure(&["inspect", empty.path().to_str().unwrap()], 1, &["neither config.json nor model_index.json"]);
    std::fs::write(empty.path().join("config.json"), r#"{"architectures": ["GPT2LMHeadModel"]}"#).unwrap();
    check_failure(
        &["inspect", empty.path().to_str().unwrap()],
        1,
        &["GPT2LMHeadModel", "llama, qwen2, flux, sdxl, wan"],
    );
}

/// A copy of a golden's checkpoint without its weight files.
fn configurations_of(case: &str) -> (TempDir, String) {
    let (dir, copy) = copy_of(case);
    let deleted = Command::new("find").arg(&copy).args(["-name", "*.safetensors*", "-delete"]).status().unwrap();
    assert!(deleted.success());
    (dir, copy.to_str().unwrap().to_owned())
}

#[test]
fn configurations_alone_make_noise() {
    let (_dir, llama) = configurations_of("llama-untied");
    let text = ["generate", "text", "--model", &llama, "--prompt", "A", "--max-tokens", "8", "--ignore-eos", "--json"];
    check_failure(&text, 1, &["holds no weights"]);
    let noise = || succeed(&[&text[..], &["--load-format", "dummy", "--temperature", "0"]].concat());
    assert_eq!(noise(), noise(), "the same folder gives the same values");
    let inspect = |path: &str, format: &str| -> Value {
        serde_json::from_str(&succeed(&["inspect", path, "--json", "--load-format", format])).unwrap()
    };
    let published = inspect(&Golden::read("llama-untied").checkpoint, "auto");
    assert_eq!(inspect(&llama, "dummy")["parameters"], published["parameters"]);

    let (dir, flux) = configurations_of("flux-schnell");
    let output = dir.path().join("noise.png");
    let image = ["generate", "image", "--model", &flux, "--prompt", "x", "--width", "32", "--height", "32"];
    succeed(&[&image[..], &["--load-format", "dummy", "--output", output.to_str().unwrap()]].concat());
    assert_eq!(decode(&output).len(), 32 * 32 * 3);
}

/// The lines of `tale bench step --json`.
fn bench_lines(args: &[&str]) -> Vec<Value> {
    let printed = succeed(&[&["bench", "step", "--json", "--repeat", "1"], args].concat());
    printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn bench_step_measures_every_kind_of_step() {
    let steps =
        |lines: &[Value]| lines.iter().map(|line| line["step"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    let (_dir, llama) = configurations_of("llama-untied");
    let dummy = ["--model", &llama, "--load-format", "dummy", "--prompt-tokens", "8", "--batch", "1,2"];
    let lines = bench_lines(&dummy);
    assert_eq!(steps(&lines), ["load", "prefill", "decode", "decode"]);
    assert_eq!(lines[0]["family"], "llama");
    for line in &lines[1..] {
        for field in ["seconds", "flops", "bytes", "rate_per_second", "percent_of_roof", "peak_memory_bytes"] {
            assert!(line[field].as_f64().unwrap() > 0.0, "{field} in {line}");
        }
    }
    let one_layer = bench_lines(&[&dummy[..], &["--layers", "1"]].concat());
    assert!(one_layer[0]["weight_bytes"].as_u64() < lines[0]["weight_bytes"].as_u64());
    assert_eq!(one_layer[0]["max_layers"], 1);

    let wan = Golden::read("wan-a").checkpoint;
    let sizes = ["--model", &wan, "--width", "32", "--height", "32", "--frames", "5", "--prompt-tokens", "8"];
    assert_eq!(steps(&bench_lines(&sizes)), ["load", "encode", "denoise", "vae_decode"]);
    let table = succeed(&[&["bench", "step", "--repeat", "1"], &sizes[..]].concat());
    for part in ["(wan), cpu, dtype auto", "roofs: memory", "vae_decode 32x32, 5 frames", " ms ", " % "] {
        assert!(table.contains(part), "`{part}` is not in: {table}");
    }
}

#[test]
fn bench_prefix_says_what_the_cache_had() {
    let llama = Golden::read("llama-untied").checkpoint;
    let printed = succeed(&["bench", "prefix", "--model", &llama, "--prompt-tokens", "100", "--question-tokens", "5"]);
    let parts = ["0 of 105 tokens of the prompt cached", "96 of 105 tokens of the prompt cached", " times sooner"];
    for part in parts {
        assert!(printed.contains(part), "`{part}` is not in: {printed}");
    }
    check_failure(&["bench", "prefix", "--preset", "flux.1-schnell", "--layers", "1"], 2, &["no language model"]);
}

#[test]
fn bench_step_refuses_what_cannot_be_measured() {
    let check = |args: &[&str], exit_code: i32, parts: &[&str]| {
        check_failure(&[&["bench", "step"], args].concat(), exit_code, parts);
    };
    let wan = Golden::read("wan-a").checkpoint;
    for preset in
        ["llama-3.1-70b", "llama-3.1-70b-awq-int4", "llama-3.3-70b-w4a16", "qwen2.5-72b-awq", "qwen2.5-72b-gptq-int4"]
    {
        check(&["--preset", preset, "--memory", "1GiB"], 1, &["not enough memory", "1073741824 free"]);
    }
    check(&["--preset", "wan2.1-t2v-14b", "--width", "100"], 2, &["--width: is 100", "multiples of 16"]);
    check(&["--preset", "flux.1-dev", "--load-format", "auto"], 2, &["--load-format: a preset has no files"]);
    check(&["--model", &wan, "--layers", "1"], 2, &["--layers: ", "--load-format dummy"]);
    check(&["--model", &wan, "--prompt-tokens", "9999"], 2, &["--prompt-tokens: is 9999; allowed: 1 to"]);
    check(&["--preset", "tinyllama-1.1b", "--device", "cuda:4096"], 1, &["cuda:4096: "]);
    let unknown = run(&["bench", "step", "--preset", "gpt-2"]);
    let said = String::from_utf8(unknown.stderr).unwrap();
    assert!(unknown.status.code() == Some(2) && said.contains("flux.1-dev, flux.1-schnell"), "{said}");
}

#[test]
fn bench_kernels_prints_what_is_asked_for() {
    let table = succeed(&["bench", "kernels", "rms_norm"]);
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("roofs: memory"), "{table}");
    let names: Vec<_> = lines.map(|line| line.split(' ').next().unwrap()).collect();
    assert!(names.len() > 1 && names.iter().all(|name| name.contains("rms_norm")), "{table}");
}

fn signal(child: &Child, name: &str) {
    let kill = format!("kill -{name} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

fn wait_at_most(child: &mut Child, limit: Duration) -> i32 {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("still running after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn ctrl_c_stops_a_clip_and_leaves_nothing_behind() {
    let golden = Golden::read("wan-a");
    let dir = tempdir().unwrap();
    for (name, signal_name, exit_code) in [("out.mp4", "INT", 130), ("frames/", "TERM", 143)] {
        let mut command = tale(&["generate", "video", "--model", &golden.checkpoint, "--verbose"]);
        let flags = golden.flags(0).into_iter().filter(|flag| !flag.starts_with("--num-inference-steps"));
        command.args(flags).arg("--num-inference-steps=1000").arg("--output").arg(dir.path().join(name));
        command.stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // The note with the parameters is written when signals are caught and the work is about to begin.
        let mut note = [0; 1];
        child.stderr.as_mut().unwrap().read_exact(&mut note).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        signal(&child, signal_name);
        assert_eq!(wait_at_most(&mut child, Duration::from_secs(20)), exit_code);
        assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_work_quietly() {
    let golden = Golden::read("qwen2");
    let mut command = tale(&["generate", "text", "--model", &golden.checkpoint, "--prompt", "A small boat"]);
    let mut child = command.arg("--ignore-eos").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(wait_at_most(&mut child, Duration::from_secs(60)), 141);
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

/// Starts a server and waits for the line that names its address.
fn serve(args: &[&str]) -> (Child, String) {
    let mut command = tale(&[&["serve", "--state-dir", "none", "--listen", "127.0.0.1:0"], args].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let address = line.strip_prefix("listening on http://").expect("the address").trim().to_owned();
    (child, address)
}

/// Sends a request by hand and returns the whole answer.
fn ask(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "{request}\r\nhost: tale\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn serve_answers_until_it_is_told_to_stop() {
    let model = format!("tiny={}", Golden::read("qwen2").checkpoint);
    for signal_name in ["TERM", "INT"] {
        let (mut child, address) = serve(&["--model", &model]);
        assert!(ask(&address, "GET /readyz HTTP/1.1").starts_with("HTTP/1.1 200"));
        assert!(ask(&address, "GET /v1/models HTTP/1.1").contains("\"id\":\"tiny\""));
        signal(&child, signal_name);
        assert_eq!(wait_at_most(&mut child, Duration::from_secs(10)), 0);
    }
}

#[test]
fn serve_refuses_to_start_with_a_reason() {
    let qwen2 = Golden::read("qwen2").checkpoint;
    check_failure(&["serve"], 2, &["no model to serve"]);
    check_failure(&["serve", "--config", "/no/such.toml"], 2, &["/no/such.toml"]);
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    let model = format!("a={qwen2}");
    check_failure(&["serve", "--state-dir", "none", "--model", &model, "--listen", &address], 1, &[&address, "in use"]);
    check_failure(
        &["serve", "--state-dir", "none", "--model", "a=/no/such", "--listen", "127.0.0.1:0"],
        1,
        &["model `a`", "/no/such"],
    );
    let unwritable =
        ["serve", "--state-dir", "none", "--model", &model, "--listen", "127.0.0.1:0", "--output-dir", "/proc/self"];
    check_failure(&unwritable, 1, &["cannot serve: the folder for finished clips cannot be written"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_server_leaves_no_core_dumps_unless_it_is_allowed_to() {
    let core_limit = |pid: u32| {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        line.split_whitespace().skip(4).take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    let model = format!("tiny={}", Golden::read("qwen2").checkpoint);
    for (flags, expected) in [(&[][..], vec!["0".into(); 2]), (&["--allow-core-dumps"], core_limit(std::process::id()))]
    {
        let (mut child, _) = serve(&[&["--model", &model], flags].concat());
        assert_eq!(core_limit(child.id()), expected, "{flags:?}");
        signal(&child, "TERM");
        assert_eq!(wait_at_most(&mut child, Duration::from_secs(10)), 0);
    }
}

/// No machine has this GPU, and a build without CUDA has none at all: either way one line names it, and the checkpoint,
/// which is not there, is not looked at.
#[test]
fn a_gpu_that_cannot_be_used_is_refused_before_anything_is_loaded() {
    let refused = |args: &[&str]| check_failure(&[args, &["--device", "cuda:4096"]].concat(), 1, &["cuda:4096: "]);
    refused(&["serve", "--state-dir", "none", "--model", "a=/no/such", "--listen", "127.0.0.1:0"]);
    refused(&["generate", "text", "--model", "/no/such", "--prompt", "x"]);
    refused(&["generate", "image", "--model", "/no/such", "--prompt", "x", "--output", "a.png"]);
}

/// `inspect` opens no device: it says on any machine what a GPU would need.
#[test]
fn inspect_computes_for_a_gpu_that_is_not_there() {
    let checkpoint = Golden::read("llama-tied").checkpoint;
    let bytes = |args: &[&str]| {
        let report = succeed(&[&["inspect", &checkpoint, "--json"], args].concat());
        let report: Value = serde_json::from_str(&report).unwrap();
        report["memory_bytes"].as_u64().unwrap()
    };
    let whole = bytes(&["--device", "cuda:4096", "--dtype", "f32"]);
    assert_eq!(bytes(&["--device", "cuda:4096"]) * 2, whole);
    assert_eq!(bytes(&["--device", "cuda:4096", "--dtype", "f16"]) * 2, whole);
    // Norms stay in f32 on the CPU.
    assert!(bytes(&["--dtype", "bf16"]) > whole / 2);
}

#[cfg(feature = "pull")]
mod pull {
    use super::*;

    /// Answers as the hub does, for `org/tiny` at `main`; returns its address. Ends with the test process.
    fn spawn_hub(files: &'static [(&'static str, &'static [u8])]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer_as_hub(stream.unwrap(), files);
            }
        });
        endpoint
    }

    fn answer_as_hub(mut stream: TcpStream, files: &[(&str, &[u8])]) {
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
            request.push(byte[0]);
        }
        let request = String::from_utf8(request).unwrap().to_lowercase();
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (status, headers, body) = if path == "/api/models/org/tiny/revision/main" {
            let siblings: Vec<_> = files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
            (
                "200 OK",
                String::new(),
                serde_json::json!({"sha": "abc123", "siblings": siblings}).to_string().into_bytes(),
            )
        } else if let Some((name, bytes)) =
            files.iter().find(|(name, _)| path == format!("/org/tiny/resolve/abc123/{name}"))
        {
            let range = request.split("range: bytes=").nth(1).unwrap().split("\r\n").next().unwrap();
            let (first, last) = range.split_once('-').unwrap();
            let (first, last) = (first.parse().unwrap(), last.parse().unwrap_or(bytes.len() - 1));
            let etag = name.replace(['/', '.'], "-");
            let range = format!("content-range: bytes {first}-{last}/{}", bytes.len());
            (
                "206 Partial Content",
                format!("x-repo-commit: abc123\r\netag: \"{etag}\"\r\n{range}\r\n"),
                bytes[first..=last].to_vec(),
            )
        } else {
            ("404 Not Found", String::new(), Vec::new())
        };
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n");
        stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
    }

    #[test]
    fn pull_fetches_a_checkpoint_and_nothing_else() {
        let hub = spawn_hub(&[
            ("config.json", b"{}"),
            ("model.safetensors", &[7; 100_000]),
            ("sub/spiece.model", b"pieces"),
            ("pytorch_model.bin", b"a pickle"),
            ("readme.md", b"words"),
        ]);
        let dir = tempdir().unwrap();
        let pull = |args: &[&str], endpoint: &str| {
            let mut command = tale(&[&["pull"], args].concat());
            let output =
                command.current_dir(dir.path()).env("HF_ENDPOINT", endpoint).env("HF_HOME", dir.path()).output();
            output.unwrap()
        };
        let output = pull(&["org/tiny", "--output", "models/mine"], &hub);
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert_eq!(output.stdout, b"models/mine\n");
        let mine = dir.path().join("models/mine");
        assert_eq!(names(&mine), ["config.json", "model.safetensors", "sub"]);
        assert_eq!(std::fs::read(mine.join("model.safetensors")).unwrap(), [7; 100_000]);
        assert_eq!(std::fs::read(mine.join("sub/spiece.model")).unwrap(), b"pieces");

        let unknown = pull(&["org/other"], &hub);
        assert_eq!(unknown.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&unknown.stderr).contains("org/other: not found"));
        // A port that was just free: nobody answers.
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let offline = String::from_utf8(pull(&["org/tiny"], &format!("http://{nobody}")).stderr).unwrap();
        assert!(offline.contains("Connection refused") && offline.lines().count() == 1, "{offline}");
    }
}

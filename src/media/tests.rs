//! Every format is written, decoded again with FFmpeg, and compared with what went in.

use std::path::Path;

use ffmpeg_next::{codec, color, format, media};
use tempfile::tempdir;

use super::*;

/// A moving gradient: smooth in space and time like a clip, every channel different.
fn gradient(width: usize, height: usize, time: usize) -> Frame {
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            rgb.push(((x * 255 / width) + time * 4).min(255) as u8);
            rgb.push((y * 255 / height) as u8);
            rgb.push((128 + ((x + y + time) % 64)) as u8);
        }
    }
    Frame { width, height, rgb }
}

fn flat(width: usize, height: usize, colour: [u8; 3]) -> Frame {
    Frame { width, height, rgb: colour.repeat(width * height) }
}

fn gradients(width: usize, height: usize, count: usize) -> Vec<Frame> {
    (0..count).map(|time| gradient(width, height, time)).collect()
}

fn encode(path: &Path, format: ClipFormat, fps: usize, frames: &[Frame]) {
    encode_as(path, &ClipSettings::new(Encoding::usual(format), fps), frames);
}

fn encode_as(path: &Path, settings: &ClipSettings, frames: &[Frame]) {
    let mut clip = ClipEncoder::create(path, settings, frames[0].width, frames[0].height).unwrap();
    for frame in frames {
        clip.push(frame).unwrap();
    }
    clip.finish().unwrap();
}

fn mp4(fps: usize) -> ClipSettings {
    ClipSettings::new(Encoding::usual(ClipFormat::Mp4), fps)
}

/// A decoded file: what a player sees.
struct Played {
    codec: codec::Id,
    profile: codec::Profile,
    /// As the container names the codec.
    tag: [u8; 4],
    size: (u32, u32),
    /// What the container says of itself.
    text: Vec<(String, String)>,
    tags: (color::Space, color::Range, color::Primaries, color::TransferCharacteristic),
    /// Seconds, as the container states it.
    duration: f64,
    /// Seconds of each frame.
    times: Vec<f64>,
    frames: Vec<ffmpeg_next::frame::Video>,
}

impl Played {
    fn says(&self, name: &str) -> Option<String> {
        self.text.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.clone())
    }
}

fn play(path: &Path) -> Played {
    ffmpeg::init().unwrap();
    let mut input = format::input(path).unwrap();
    let stream = input.streams().best(media::Type::Video).unwrap();
    let time_base = f64::from(stream.time_base());
    let context = codec::Context::from_parameters(stream.parameters()).unwrap();
    let mut decoder = context.decoder().video().unwrap();
    let mut played = Played {
        codec: decoder.id(),
        profile: decoder.profile(),
        // SAFETY: the stream's parameters live as long as it does.
        tag: unsafe { (*stream.parameters().as_ptr()).codec_tag }.to_le_bytes(),
        size: (decoder.width(), decoder.height()),
        text: input.metadata().iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        tags: (
            decoder.color_space(),
            decoder.color_range(),
            decoder.color_primaries(),
            decoder.color_transfer_characteristic(),
        ),
        duration: input.duration() as f64 / 1e6,
        times: Vec::new(),
        frames: Vec::new(),
    };
    let mut collect = |decoder: &mut ffmpeg_next::decoder::Video| {
        let mut frame = ffmpeg_next::frame::Video::empty();
        while decoder.receive_frame(&mut frame).is_ok() {
            played.times.push(frame.timestamp().unwrap() as f64 * time_base);
            played.frames.push(frame.clone());
        }
    };
    for (_, packet) in input.packets() {
        decoder.send_packet(&packet).unwrap();
        collect(&mut decoder);
    }
    decoder.send_eof().unwrap();
    collect(&mut decoder);
    played
}

/// BT.709 limited range (ITU-R BT.709-6, items 3.2 to 3.5), written out independently of swscale.
fn bt709(rgb: [f64; 3]) -> [f64; 3] {
    let [r, g, b] = rgb.map(|value| value / 255.0);
    let luma = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    [16.0 + 219.0 * luma, 128.0 + 224.0 * (b - luma) / 1.8556, 128.0 + 224.0 * (r - luma) / 1.5748]
}

fn inverse_bt709([y, cb, cr]: [f64; 3]) -> [f64; 3] {
    let (y, cb, cr) = ((y - 16.0) / 219.0, (cb - 128.0) / 224.0, (cr - 128.0) / 224.0);
    let (r, b) = (y + 1.5748 * cr, y + 1.8556 * cb);
    [r, (y - 0.2126 * r - 0.0722 * b) / 0.7152, b].map(|value| (value * 255.0).clamp(0.0, 255.0))
}

/// The pixel of a decoded frame: Y, Cb, Cr of 4:2:0, or R, G, B of a GIF.
fn sample(frame: &ffmpeg_next::frame::Video, x: usize, y: usize) -> [f64; 3] {
    let at = |plane: usize, x: usize, y: usize| f64::from(frame.data(plane)[y * frame.stride(plane) + x]);
    match frame.format() {
        format::Pixel::YUV420P => [at(0, x, y), at(1, x / 2, y / 2), at(2, x / 2, y / 2)],
        format::Pixel::BGRA => [at(0, 4 * x + 2, y), at(0, 4 * x + 1, y), at(0, 4 * x, y)],
        other => panic!("decoded to {other:?}"),
    }
}

fn psnr(sent: &Frame, shown: &ffmpeg_next::frame::Video) -> f64 {
    let mut squares = 0.0;
    for (index, expected) in sent.rgb.chunks_exact(3).enumerate() {
        let pixel = sample(shown, index % sent.width, index / sent.width);
        let rgb = if shown.format() == format::Pixel::BGRA { pixel } else { inverse_bt709(pixel) };
        squares += rgb.iter().zip(expected).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>();
    }
    10.0 * (255.0f64.powi(2) * sent.rgb.len() as f64 / squares).log10()
}

/// Frames, times, duration and pixels of a clip are those that went in.
fn check_clip(format: ClipFormat, size: (usize, usize), fps: usize, count: usize, min_psnr: f64) -> Played {
    check_encoding(Encoding::usual(format), size, fps, count, min_psnr)
}

fn check_encoding(
    encoding: Encoding,
    (width, height): (usize, usize),
    fps: usize,
    count: usize,
    min_psnr: f64,
) -> Played {
    let dir = tempdir().unwrap();
    let format = encoding.format();
    let path = dir.path().join("clip").with_extension(format.as_str());
    let sent = gradients(width, height, count);
    encode_as(&path, &ClipSettings::new(encoding, fps), &sent);
    let played = play(&path);
    assert_eq!(played.frames.len(), count, "frames of {format:?}");
    for (index, time) in played.times.iter().enumerate() {
        // WebM counts milliseconds, GIF hundredths of a second.
        assert!((time - index as f64 / fps as f64).abs() <= 0.0051, "frame {index} of {format:?} at {time} s");
    }
    assert!((played.duration - count as f64 / fps as f64).abs() <= 0.0101, "{format:?} lasts {} s", played.duration);
    for (index, (sent, shown)) in sent.iter().zip(&played.frames).enumerate() {
        let psnr = psnr(sent, shown);
        assert!(psnr >= min_psnr, "frame {index} of {format:?}: {psnr:.1} dB");
    }
    assert_eq!(fs_names(dir.path()), [path.file_name().unwrap().to_str().unwrap()], "only the clip is left");
    played
}

fn fs_names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const BT709_TAGS: (color::Space, color::Range, color::Primaries, color::TransferCharacteristic) =
    (color::Space::BT709, color::Range::MPEG, color::Primaries::BT709, color::TransferCharacteristic::BT709);

#[test]
fn mp4_is_h264_high_with_bt709_tags_and_the_frames_that_went_in() {
    let played = check_clip(ClipFormat::Mp4, (96, 64), 16, 21, 33.0);
    assert_eq!(played.codec, codec::Id::H264);
    assert_eq!(played.profile, codec::Profile::H264(codec::profile::H264::High));
    assert_eq!(played.tags, BT709_TAGS);
}

#[test]
fn webm_is_vp9_with_bt709_tags_and_the_frames_that_went_in() {
    let played = check_clip(ClipFormat::Webm, (96, 64), 16, 21, 33.0);
    assert_eq!(played.codec, codec::Id::VP9);
    assert_eq!(played.tags, BT709_TAGS);
}

/// Of those that this machine's FFmpeg has, which in Debian are all.
#[test]
fn every_codec_has_the_frames_that_went_in_in_every_format_that_holds_it() {
    for (format, codec, id, tag) in [
        (ClipFormat::Mp4, Codec::H265, codec::Id::HEVC, Some(*b"hvc1")),
        (ClipFormat::Mp4, Codec::Av1, codec::Id::AV1, Some(*b"av01")),
        (ClipFormat::Webm, Codec::Av1, codec::Id::AV1, None),
    ] {
        let encoding = match Encoding::choose(Some(format), Some(codec), None) {
            Ok(encoding) => encoding,
            Err(BadEncoding { problem, .. }) => {
                println!("NOT RUN: {problem}");
                continue;
            }
        };
        for (size, fps, count) in [((96, 64), 16, 21), ((48, 32), 8, 1), ((35, 49), 24, 3), ((67, 65), 24, 3)] {
            if let Err(bad) = encoding.check_size(size.0, size.1) {
                assert!(codec == Codec::H265 && size.1 < 64, "{size:?}: {}", bad.problem);
                continue;
            }
            let played = check_encoding(encoding, size, fps, count, 30.0);
            assert_eq!((played.codec, played.tags), (id, BT709_TAGS), "{codec:?}");
            tag.inspect(|tag| assert_eq!(played.tag, *tag, "{codec:?}"));
        }
    }
}

#[test]
fn better_quality_is_more_bytes_and_less_loss() {
    let dir = tempdir().unwrap();
    let frames = gradients(96, 64, 9);
    for codec in [Codec::H264, Codec::H265, Codec::Av1, Codec::Vp9] {
        let mut found = Vec::new();
        for name in Quality::NAMES {
            let encoding = match Encoding::choose(None, Some(codec), Quality::named(name)) {
                Ok(encoding) => encoding,
                Err(BadEncoding { problem, .. }) => {
                    println!("NOT RUN: {problem}");
                    continue;
                }
            };
            let path = dir.path().join(name);
            encode_as(&path, &ClipSettings::new(encoding, 16), &frames);
            let played = play(&path);
            let psnr = frames.iter().zip(&played.frames).map(|(sent, shown)| psnr(sent, shown)).sum::<f64>();
            found.push((std::fs::metadata(&path).unwrap().len(), psnr / frames.len() as f64));
        }
        assert!(found.is_sorted_by(|worse, better| worse.0 < better.0 && worse.1 < better.1), "{codec:?}: {found:?}");
    }
}

#[test]
fn another_rate_shows_frames_again_or_leaves_them_out_and_lasts_as_long() {
    let dir = tempdir().unwrap();
    let frames: Vec<Frame> = (0..16).map(|index| flat(64, 64, [index * 16, 128, 255 - index * 16])).collect();
    for (format, fps, output_fps, expected) in [
        (ClipFormat::Mp4, 8, 24, 48),
        (ClipFormat::Mp4, 16, 24, 24),
        (ClipFormat::Webm, 16, 8, 8),
        (ClipFormat::Gif, 16, 20, 20),
    ] {
        let path = dir.path().join("a").with_extension(format.as_str());
        let settings = ClipSettings { output_fps: Some(output_fps), ..ClipSettings::new(Encoding::usual(format), fps) };
        encode_as(&path, &settings, &frames);
        let played = play(&path);
        assert_eq!(played.frames.len(), expected, "{format:?} {fps} to {output_fps}");
        assert!((played.duration - 16.0 / fps as f64).abs() <= 0.0101, "{format:?} lasts {} s", played.duration);
        for (index, shown) in played.frames.iter().enumerate() {
            let sent = &frames[index * fps / output_fps];
            let psnr = psnr(sent, shown);
            assert!(psnr > 30.0, "frame {index} of {format:?} {fps} to {output_fps}: {psnr:.1} dB");
        }
    }
}

/// A frame that is shown again is converted once; the file is the one that has it several times. A gif's palette is another,
/// since it sees such a frame once.
#[test]
fn frames_shown_again_make_the_file_of_frames_sent_again() {
    let dir = tempdir().unwrap();
    let frames = gradients(64, 48, 6);
    for format in [ClipFormat::Mp4, ClipFormat::Webm] {
        let path = |name: &str| dir.path().join(name).with_extension(format.as_str());
        let settings = ClipSettings::new(Encoding::usual(format), 8);
        encode_as(&path("shown"), &ClipSettings { output_fps: Some(20), ..settings.clone() }, &frames);
        let sent: Vec<Frame> = (0..15).map(|index| frames[index * 8 / 20].clone()).collect();
        encode_as(&path("sent"), &ClipSettings { fps: 20, ..settings }, &sent);
        let [shown, sent] = ["shown", "sent"].map(|name| std::fs::read(path(name)).unwrap());
        assert!(shown == sent, "{format:?}: {} and {} bytes", shown.len(), sent.len());
    }
}

#[test]
fn a_clip_says_of_itself_what_it_was_told() {
    let dir = tempdir().unwrap();
    let comment = format!(r#"{{"prompt": "한국 😀 \"caf\u00e9\" {}"}}"#, "long ".repeat(5000));
    let text = ClipText { title: Some("Szene 1 – Übung".into()), comment: Some(comment.clone()) };
    for (format, software) in [(ClipFormat::Mp4, "encoder"), (ClipFormat::Webm, "software")] {
        let path = dir.path().join("a").with_extension(format.as_str());
        let settings = ClipSettings::new(Encoding::usual(format), 8);
        let frames = gradients(64, 64, 5);
        encode_as(&path, &ClipSettings { text: text.clone(), ..settings.clone() }, &frames);
        let played = play(&path);
        assert_eq!((played.frames.len(), played.says("title")), (5, text.title.clone()));
        assert_eq!(played.says("comment"), Some(comment.clone()), "{format:?}");
        let tale = concat!("Tale ", env!("CARGO_PKG_VERSION")).to_owned();
        assert_eq!(played.says(software), Some(tale), "{format:?}: {:?}", played.text);
        encode_as(&path, &settings, &frames);
        let silent = play(&path);
        let said = ["title", "comment"].map(|name| silent.says(name));
        assert_eq!(said, [None, None], "{format:?}");
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(4).any(|bytes| bytes == b"Tale"), "{format:?}");
    }
}

#[test]
fn gif_has_the_frames_that_went_in() {
    let played = check_clip(ClipFormat::Gif, (96, 64), 16, 21, 26.0);
    assert_eq!(played.codec, codec::Id::GIF);
}

#[test]
fn a_clip_of_one_frame_lasts_one_frame() {
    for format in [ClipFormat::Mp4, ClipFormat::Webm] {
        check_clip(format, (64, 64), 8, 1, 33.0);
    }
}

#[test]
fn a_gif_of_one_frame_is_a_still_picture() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.gif");
    encode(&path, ClipFormat::Gif, 8, &[flat(48, 32, [9, 90, 200])]);
    let still = decode_picture(&std::fs::read(&path).unwrap());
    assert!(largest_error(&still, &flat(48, 32, [9, 90, 200])) <= 1);
}

#[test]
fn odd_sizes_are_padded_by_repeating_the_edge() {
    for format in [ClipFormat::Mp4, ClipFormat::Webm] {
        let played = check_clip(format, (35, 49), 24, 3, 30.0);
        assert_eq!(played.size, (36, 50));
        let (inside, padded) = (sample(&played.frames[0], 34, 20)[0], sample(&played.frames[0], 35, 20)[0]);
        assert!((inside - padded).abs() <= 4.0, "last column {inside}, its copy {padded}");
        let (inside, padded) = (sample(&played.frames[0], 10, 48)[0], sample(&played.frames[0], 10, 49)[0]);
        assert!((inside - padded).abs() <= 4.0, "last row {inside}, its copy {padded}");
    }
    assert_eq!(check_clip(ClipFormat::Gif, (35, 49), 10, 3, 26.0).size, (35, 49));
}

#[test]
fn colours_are_converted_with_the_matrix_that_the_tags_name() {
    let dir = tempdir().unwrap();
    let colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 60, 30]];
    for format in [ClipFormat::Mp4, ClipFormat::Webm] {
        for colour in colours {
            let path = dir.path().join("flat");
            encode(&path, format, 16, &[flat(64, 64, colour)]);
            let found = sample(&play(&path).frames[0], 31, 31);
            let expected = bt709(colour.map(f64::from));
            // BT.601 would be off by 20 and more for the primaries.
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 1.6, "{format:?} {colour:?}: {found} against {expected:.1}");
            }
        }
    }
}

/// Position of an MP4 box of the top level.
fn box_offset(mp4: &[u8], kind: &[u8; 4]) -> usize {
    let mut offset = 0;
    while offset < mp4.len() {
        let length = u32::from_be_bytes(mp4[offset..offset + 4].try_into().unwrap()) as usize;
        if &mp4[offset + 4..offset + 8] == kind {
            return offset;
        }
        offset += length;
    }
    panic!("no {kind:?} box");
}

#[test]
fn mp4_can_start_playing_before_it_is_whole() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.mp4");
    encode(&path, ClipFormat::Mp4, 16, &gradients(64, 64, 5));
    let mp4 = std::fs::read(&path).unwrap();
    assert!(box_offset(&mp4, b"moov") < box_offset(&mp4, b"mdat"));
}

#[test]
fn gif_loops_for_ever() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.gif");
    encode(&path, ClipFormat::Gif, 16, &gradients(32, 32, 3));
    let gif = std::fs::read(&path).unwrap();
    let extension = gif.windows(11).position(|bytes| bytes == b"NETSCAPE2.0").expect("a loop extension");
    assert_eq!(gif[extension + 11..extension + 16], [3, 1, 0, 0, 0]);
}

#[test]
fn gif_rates_above_its_limit_play_slower() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.gif");
    encode(&path, ClipFormat::Gif, 100, &gradients(32, 32, 4));
    let times = play(&path).times;
    assert!((times[3] - 3.0 / MAX_GIF_FPS as f64).abs() < 1e-9, "{times:?}");
}

#[test]
fn the_same_frames_give_the_same_bytes() {
    let dir = tempdir().unwrap();
    // Wide enough for VP9 to use tiles and so threads.
    let frames = gradients(576, 64, 12);
    // What another clip leaves in the process's memory must not matter.
    encode(&dir.path().join("another"), ClipFormat::Mp4, 16, &gradients(96, 64, 9));
    for format in [ClipFormat::Mp4, ClipFormat::Webm, ClipFormat::Gif] {
        let files = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            encode(&path, format, 16, &frames);
            std::fs::read(path).unwrap()
        });
        assert!(files[0] == files[1], "{format:?} differs from run to run");
    }
}

#[test]
fn a_dropped_clip_leaves_nothing_and_spares_what_was_there() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.mp4");
    std::fs::write(&path, "an earlier clip").unwrap();
    let mut clip = ClipEncoder::create(&path, &mp4(16), 64, 64).unwrap();
    clip.push(&gradient(64, 64, 0)).unwrap();
    drop(clip);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "an earlier clip");
    assert_eq!(fs_names(dir.path()), ["a.mp4"]);
}

#[test]
fn bad_clips_are_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("a.mp4");
    let create = |path: &Path, width, fps| ClipEncoder::create(path, &mp4(fps), width, 64).err();
    assert!(matches!(create(&path, 64, 0), Some(MediaError::NoFrameRate)));
    assert!(matches!(create(&path, 0, 16), Some(MediaError::BadFrame { .. })));
    assert!(matches!(create(&path, 1 << 20, 16), Some(MediaError::BadFrame { .. })));
    let missing = dir.path().join("no/such/folder/a.mp4");
    assert!(matches!(create(&missing, 64, 16), Some(MediaError::Io { .. })));

    let mut clip = ClipEncoder::create(&path, &mp4(16), 64, 64).unwrap();
    assert!(matches!(clip.push(&gradient(32, 64, 0)), Err(MediaError::FrameSize { .. })));
    let torn = Frame { width: 64, height: 64, rgb: vec![0; 17] };
    assert!(matches!(clip.push(&torn), Err(MediaError::BadFrame { bytes: 17, .. })));
    assert!(matches!(clip.finish(), Err(MediaError::Empty)));
    assert!(fs_names(dir.path()).is_empty());
}

/// `image` decodes what was written (lossy WebP too, with a decoder that is not libwebp).
fn decode_picture(bytes: &[u8]) -> Frame {
    let picture = image::load_from_memory(bytes).unwrap().to_rgb8();
    Frame { width: picture.width() as usize, height: picture.height() as usize, rgb: picture.into_raw() }
}

fn largest_error(a: &Frame, b: &Frame) -> u8 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    a.rgb.iter().zip(&b.rgb).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn png_and_plain_webp_are_lossless() {
    let picture = gradient(37, 21, 3);
    for (format, compression) in
        [(PictureFormat::Png, None), (PictureFormat::Png, Some(100)), (PictureFormat::Webp, None)]
    {
        let bytes = encode_picture(&picture, format, compression, None).unwrap();
        assert_eq!(image::guess_format(&bytes).unwrap().to_mime_type(), format.media_type());
        assert_eq!(decode_picture(&bytes), picture, "{format}");
    }
}

#[test]
fn a_png_says_what_it_was_told_and_shows_the_same_pixels() {
    let picture = gradient(37, 21, 3);
    let text = r#"{"prompt": "한국 😀 \"caf\u00e9\""}"#;
    let with = encode_picture(&picture, PictureFormat::Png, None, Some(("parameters", text.into()))).unwrap();
    assert_eq!(decode_picture(&with), picture);
    assert_eq!(read_png_text(&with, "parameters").unwrap().as_deref(), Some(text));
    assert_eq!(read_png_text(&with, "Software").unwrap(), Some(concat!("Tale ", env!("CARGO_PKG_VERSION")).to_owned()));
    let without = encode_picture(&picture, PictureFormat::Png, None, None).unwrap();
    assert_eq!(read_png_text(&without, "parameters").unwrap(), None);
    assert_eq!(read_png_text(&without, "Software").unwrap(), None);
    for damaged in [&with[..with.len() / 2], b"GIF89a", b""] {
        assert!(matches!(read_png_text(damaged, "parameters"), Err(MediaError::NotPng { .. })));
    }
}

#[test]
fn lossy_pictures_show_the_colours_that_went_in() {
    for format in [PictureFormat::Jpeg, PictureFormat::Webp] {
        for colour in [[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 60, 30]] {
            let picture = flat(33, 17, colour);
            let bytes = encode_picture(&picture, format, Some(90), None).unwrap();
            assert_eq!(image::guess_format(&bytes).unwrap().to_mime_type(), format.media_type());
            let error = largest_error(&decode_picture(&bytes), &picture);
            assert!(error <= 5, "{format} {colour:?}: off by {error}");
        }
    }
}

#[test]
fn less_compression_quality_means_fewer_bytes() {
    for format in [PictureFormat::Jpeg, PictureFormat::Webp] {
        let sizes = [0, 50, 100]
            .map(|quality| encode_picture(&gradient(128, 128, 0), format, Some(quality), None).unwrap().len());
        assert!(sizes.is_sorted() && sizes[0] < sizes[2] / 2, "{format}: {sizes:?}");
    }
}

#[test]
fn impossible_pictures_are_refused() {
    let picture = gradient(16, 16, 0);
    for (format, compression) in [(PictureFormat::Png, 99), (PictureFormat::Jpeg, 101), (PictureFormat::Webp, 101)] {
        let refused = encode_picture(&picture, format, Some(compression), None);
        assert!(matches!(refused, Err(MediaError::Compression { .. })), "{format} {compression}");
    }
    for (width, height, bytes) in [(0, 0, 0), (4, 4, 47), (usize::MAX, 2, 6)] {
        let torn = Frame { width, height, rgb: vec![0; bytes] };
        assert!(matches!(encode_picture(&torn, PictureFormat::Png, None, None), Err(MediaError::BadFrame { .. })));
    }
    // WebP ends at 16384 pixels a side, with losses at 16383.
    let long = flat(16_385, 1, [1, 2, 3]);
    assert!(matches!(encode_picture(&long, PictureFormat::Webp, None, None), Err(MediaError::Picture { .. })));
    assert!(matches!(encode_picture(&long, PictureFormat::Webp, Some(50), None), Err(MediaError::Ffmpeg { .. })));
}

#[test]
fn a_folder_holds_the_frames_of_the_last_clip_only() {
    let dir = tempdir().unwrap();
    let folder = dir.path().join("deep/frames");
    write_frames(&folder, &gradients(16, 16, 5)).unwrap();
    let frames = gradients(24, 16, 3);
    write_frames(&folder, &frames).unwrap();
    assert_eq!(fs_names(&folder), ["frame_0000.png", "frame_0001.png", "frame_0002.png"]);
    for (name, frame) in fs_names(&folder).iter().zip(&frames) {
        assert_eq!(&decode_picture(&std::fs::read(folder.join(name)).unwrap()), frame);
    }
}

#[test]
fn a_dropped_folder_leaves_nothing_of_its_own() {
    let dir = tempdir().unwrap();
    let (new, old) = (dir.path().join("new"), dir.path().join("old"));
    std::fs::create_dir(&old).unwrap();
    std::fs::write(old.join("frame_0000.png"), "of an earlier clip").unwrap();
    for path in [&new, &old] {
        let mut folder = FrameFolder::create(path).unwrap();
        folder.push(&gradient(16, 16, 0)).unwrap();
    }
    assert!(!new.exists());
    assert_eq!(fs_names(&old), ["frame_0000.png"]);
    assert_eq!(std::fs::read_to_string(old.join("frame_0000.png")).unwrap(), "of an earlier clip");
    assert!(matches!(write_frames(&new, []), Err(MediaError::Empty)));
}

/// Files of other programs, and what PIL makes of them.
fn input_file(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/edits/files");
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn input_pictures_are_read_as_pil_reads_them() {
    let golden: serde_json::Value = serde_json::from_slice(&input_file("golden.json")).unwrap();
    let tensors = input_file("golden.safetensors");
    let tensors = safetensors::SafeTensors::deserialize(&tensors).unwrap();
    for name in golden["read"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()) {
        let found = super::decode_picture(&input_file(name)).unwrap_or_else(|error| panic!("{name} {error}"));
        let expected = tensors.tensor(name).unwrap();
        assert_eq!([found.frame.height, found.frame.width, 3], expected.shape(), "{name}");
        let error = found.frame.rgb.iter().zip(expected.data()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        // Decoders of lossy formats may round their own way.
        let allowed = if name.ends_with(".jpg") || name.starts_with("lossy") { 4 } else { 0 };
        assert!(error <= allowed, "{name} is off by {error}");
        let alpha = tensors.tensor(&format!("{name}.alpha")).ok();
        assert_eq!(found.alpha.as_deref(), alpha.as_ref().map(|alpha| alpha.data()), "{name}");
    }
}

#[test]
fn input_files_that_are_not_one_picture_are_refused() {
    for (name, expected) in [
        ("cmyk.jpg", "is a JPEG in CMYK"),
        ("still.gif", "is a GIF"),
        ("animated.gif", "is a GIF"),
        ("other.bmp", "is a BMP"),
        ("animated.png", "is animated"),
        ("animated.webp", "is animated"),
        ("long.png", "has 65535x1 pixels; at most 16384 on a side"),
    ] {
        let error = super::decode_picture(&input_file(name)).expect_err(name).to_string();
        assert!(error.starts_with(expected), "{name}: {error}");
    }
    for bytes in [&b""[..], b"nothing", b"%PDF-1.4", b"<svg xmlns=\"http://www.w3.org/2000/svg\"/>"] {
        assert_eq!(
            super::decode_picture(bytes).expect_err("no picture").to_string(),
            super::InputError::Unknown.to_string()
        );
    }
    // Torn in the middle, or damaged in its header.
    for name in ["rgb.png", "rgb.jpg", "rgb.webp", "wide.png"] {
        let whole = input_file(name);
        for bytes in [&whole[..whole.len() / 2], &whole[..20]] {
            let error = super::decode_picture(bytes).expect_err(name).to_string();
            assert!(error.starts_with("cannot be read as"), "{name}: {error}");
        }
    }
}

/// As PIL, which raises `image file is truncated`, also where nothing but the marker of the end is missing.
#[test]
fn input_pictures_that_end_early_are_refused_wherever_they_end() {
    for name in
        ["rgb.jpg", "grey.jpg", "turned.jpg", "restarts.jpg", "progressive.jpg", "rgb.png", "wide.png", "rgb.webp"]
    {
        let whole = input_file(name);
        let cuts = (1..100).map(|percent| whole.len() * percent / 100);
        let last = if name.ends_with(".png") { 0 } else { whole.len() - 1 };
        for len in cuts.chain([last.saturating_sub(1), last]) {
            let cut = super::decode_picture(&whole[..len]);
            // The last 12 bytes of a PNG, which say that it ends, are not missed by PIL either.
            let is_taken_by_pil = name.ends_with(".png") && len + 12 >= whole.len();
            assert!(is_taken_by_pil || cut.is_err(), "{name} of {len} bytes of {} is taken", whole.len());
        }
    }
    let mut jpeg = input_file("restarts.jpg");
    let expected = super::decode_picture(&jpeg).unwrap();
    jpeg.extend_from_slice(b"what cameras write behind the picture");
    assert_eq!(super::decode_picture(&jpeg).unwrap(), expected);
    let error = super::decode_picture(&jpeg[..900]).unwrap_err().to_string();
    assert_eq!(error, "cannot be read as JPEG: the file is truncated");
}

/// A header is believed before a pixel: sizes that no memory could hold are refused as fast as others.
#[test]
fn huge_input_pictures_are_refused_by_their_header() {
    let mut png = input_file("rgb.png");
    png[16..24].copy_from_slice(&[0, 0, 0x40, 0, 0, 0, 0x40, 0]);
    let crc = crc32(&png[12..29]).to_be_bytes();
    png[29..33].copy_from_slice(&crc);
    let error = super::decode_picture(&png).expect_err("16384 squared").to_string();
    assert!(error.starts_with("has 16384x16384 pixels"), "{error}");
    let mut jpeg = input_file("rgb.jpg");
    let frame = jpeg.windows(2).position(|bytes| bytes == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    let error = super::decode_picture(&jpeg).expect_err("65535 squared").to_string();
    assert!(error.starts_with("has 65535x65535 pixels"), "{error}");
}

/// Of a PNG chunk (ISO 3309).
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[test]
fn a_mask_is_what_is_transparent_or_white() {
    let mask = |name: &str| super::decode_picture(&input_file(name)).unwrap().into_mask();
    let opaque_at = |name: &str| super::decode_picture(&input_file(name)).unwrap().alpha.unwrap();
    let by_alpha = mask("rgba.png").unwrap();
    let inverted: Vec<u8> = opaque_at("rgba.png").iter().map(|alpha| 255 - alpha).collect();
    assert_eq!((by_alpha.width, by_alpha.height, by_alpha.grey), (24, 16, inverted));
    let by_colour = mask("bits.png").unwrap();
    assert!(by_colour.grey.contains(&255) && by_colour.grey.contains(&0));
    let transparent = super::decode_picture(&input_file("rgba.png")).unwrap().transparent();
    assert_eq!(transparent, Some(mask("rgba.png").unwrap()));
    assert_eq!(super::decode_picture(&input_file("rgb.png")).unwrap().transparent(), None);
    // Opaque, or black, from edge to edge: nothing to make anew.
    for alpha in [Some(vec![255; 4]), None] {
        let nothing = super::InputPicture { frame: flat(2, 2, [0, 0, 0]), alpha };
        assert_eq!(nothing.transparent(), None);
        assert!(matches!(nothing.into_mask(), Err(super::InputError::EmptyMask)));
    }
}

/// A clip whose end is made later has the frames, the times and the duration of one that is made at once.
fn check_joined(encoding: Encoding, fps: usize, output_fps: Option<usize>) {
    let dir = tempdir().unwrap();
    let frames = gradients(96, 64, 20);
    let [whole, first, second] = ["whole", "first", "second"].map(|name| dir.path().join(name));
    let settings = ClipSettings { output_fps, ..ClipSettings::new(encoding, fps) };
    encode_as(&whole, &settings, &frames);
    encode_as(&first, &settings, &frames[..13]);
    let before = OpenClip::open(&first).unwrap();
    std::fs::remove_file(&first).unwrap();
    let rest = ClipSettings { frames_before: 13, ..settings.clone() };
    encode_as(&second, &rest, &frames[13..]);
    join(&before, &frames[0], &second, &rest, Readers::AsUsual).unwrap();
    let (whole, joined) = (play(&whole), play(&second));
    let millis = |played: &Played| played.times.iter().map(|time| (time * 1e3).round()).collect::<Vec<_>>();
    assert_eq!(millis(&whole), millis(&joined), "{encoding:?}");
    assert!((whole.duration - joined.duration).abs() < 1e-3, "{} {}", whole.duration, joined.duration);
    assert_eq!((whole.codec, whole.tag, whole.size), (joined.codec, joined.tag, joined.size));
    assert_eq!(whole.tags, joined.tags);
    for (index, shown) in joined.frames.iter().enumerate() {
        let source = (index * fps / output_fps.unwrap_or(fps)).min(19);
        let found = psnr(&frames[source], shown);
        assert!(found > 34.0, "{encoding:?}: frame {index}: {found} dB");
    }
}

#[test]
fn a_clip_goes_on_in_one_file_without_a_seam_of_times() {
    for codec in Codec::NAMES.iter().map(|name| Codec::named(name)) {
        let Ok(encoding) = Encoding::choose(None, codec, None) else { continue };
        check_joined(encoding, 16, None);
        check_joined(encoding, 16, Some(24));
        check_joined(encoding, 24, Some(16));
    }
}

#[test]
fn a_player_can_begin_at_every_key_frame() {
    let dir = tempdir().unwrap();
    // Longer than the distance of key frames, and hard to predict.
    let noise = |time: usize| {
        let value = |at: usize| (((at / 24).wrapping_mul(2_654_435_761) >> 7).wrapping_add(time * 5) % 256) as u8;
        Frame { width: 64, height: 64, rgb: (0..3 * 64 * 64).map(value).collect() }
    };
    let frames: Vec<Frame> = (0..280).map(noise).collect();
    for (codec, idr) in [("h264", 5..=5), ("h265", 19..=20)] {
        let Ok(encoding) = Encoding::choose(None, Codec::named(codec), None) else { continue };
        let path = dir.path().join(codec);
        encode_as(&path, &ClipSettings::new(encoding, 16), &frames);
        let mut input = format::input(&path).unwrap();
        let mut keys = 0;
        for packet in input.packets().map(|(_, packet)| packet).filter(ffmpeg_next::Packet::is_key) {
            keys += 1;
            let (mut data, mut kinds) = (packet.data().unwrap(), Vec::new());
            while let [a, b, c, d, header, ..] = *data {
                let kind = if codec == "h264" { header & 31 } else { header >> 1 & 63 };
                kinds.push(kind);
                data = &data[4 + u32::from_be_bytes([a, b, c, d]) as usize..];
            }
            assert!(kinds.iter().any(|kind| idr.contains(kind)), "{codec}: {kinds:?}");
        }
        assert!(keys > 1, "{codec}");
    }
}

#[test]
fn clips_of_other_settings_are_not_joined() {
    let dir = tempdir().unwrap();
    let [first, second] = ["first.mp4", "second.mp4"].map(|name| dir.path().join(name));
    encode_as(&first, &mp4(8), &gradients(96, 64, 3));
    encode_as(&second, &mp4(8), &gradients(64, 64, 3));
    let refused =
        join(&OpenClip::open(&first).unwrap(), &flat(96, 64, [0; 3]), &second, &mp4(8), Readers::AsUsual).unwrap_err();
    assert!(matches!(refused, MediaError::OtherHeader), "{refused}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside them");
}

#[test]
fn frames_of_a_clip_can_be_looked_at() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("clip.mp4");
    let frames = gradients(50, 31, 12);
    encode_as(&path, &mp4(8), &frames);
    let found = OpenClip::open(&path).unwrap().frames(&[0, 5, 11, 99], (50, 31)).unwrap();
    assert_eq!(found.len(), 3);
    for (found, number) in found.iter().zip([0, 5, 11]) {
        let difference: u64 = found.rgb.iter().zip(&frames[number].rgb).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        assert!(difference / (found.rgb.len() as u64) < 4, "frame {number}: {difference}");
    }
}

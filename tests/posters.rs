//! Posters of mp4 files: there where asked for, once, and no obstacle to anything else.

use std::path::Path;

use ffmpeg_next::format::{self, stream::Disposition};
use tale::media::{
    ClipEncoder, ClipFormat, ClipSettings, Codec, Encoding, OpenClip, Readers, decode_picture, join, within,
};
use tale_models::request::Frame;

const FPS: usize = 8;

/// Red grows to the right, green downwards, blue with time.
fn frames((width, height): (usize, usize), count: usize) -> Vec<Frame> {
    let share = |at: usize, of: usize| (at * 255 / of) as u8;
    let frame = |time: usize| {
        let pixel = |at: usize| [share(at % width, width), share(at / width, height), share(time, count)];
        Frame { width, height, rgb: (0..width * height).flat_map(pixel).collect() }
    };
    (0..count).map(frame).collect()
}

fn encode(path: &Path, settings: &ClipSettings, frames: &[Frame]) {
    let mut clip = ClipEncoder::create(path, settings, frames[0].width, frames[0].height).expect("begins");
    frames.iter().for_each(|frame| clip.push(frame).expect("encoded"));
    clip.finish().expect("whole");
}

/// When a packet is shown, for how long, and what is in it.
type Packet = (Option<i64>, i64, Vec<u8>);

/// What a reader of a file finds.
struct Found {
    posters: Vec<Frame>,
    /// Of every stream but the posters': its packets.
    streams: Vec<Vec<Packet>>,
    duration: i64,
}

fn read(path: &Path) -> Found {
    let mut input = format::input(path).expect("a file");
    let is_poster: Vec<bool> =
        input.streams().map(|stream| stream.disposition().contains(Disposition::ATTACHED_PIC)).collect();
    let mut found = Found { posters: Vec::new(), streams: Vec::new(), duration: input.duration() };
    found.streams.resize_with(is_poster.iter().filter(|is_poster| !**is_poster).count(), Vec::new);
    for (stream, packet) in input.packets() {
        let data = packet.data().expect("some").to_vec();
        match is_poster[stream.index()] {
            true => found.posters.push(decode_picture(&data).expect("a picture").frame),
            false => found.streams[stream.index()].push((packet.pts(), packet.duration(), data)),
        }
    }
    found
}

/// The mean difference of their bytes.
fn difference(a: &Frame, b: &Frame) -> f64 {
    assert_eq!((a.width, a.height), (b.width, b.height));
    let total: u64 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
    total as f64 / a.rgb.len() as f64
}

#[test]
fn an_mp4_has_its_first_frame_for_a_poster_where_that_is_asked() {
    let dir = tempfile::tempdir().expect("made");
    let [plain, with_poster] = ["plain.mp4", "poster.mp4"].map(|name| dir.path().join(name));
    let frames = frames((1030, 64), 12);
    for codec in ["h264", "h265", "av1"] {
        let Ok(encoding) = Encoding::choose(Some(ClipFormat::Mp4), Codec::named(codec), None) else { continue };
        let settings = ClipSettings::new(encoding, FPS);
        encode(&plain, &settings, &frames);
        encode(&with_poster, &ClipSettings { has_poster: true, ..settings.clone() }, &frames);
        let (plain, found) = (read(&plain), read(&with_poster));
        assert_eq!((plain.posters.len(), found.posters.len()), (0, 1), "{codec}");
        assert_eq!((found.posters[0].width, found.posters[0].height), (512, 31));
        let off = difference(&found.posters[0], &within(&frames[0], 512).expect("smaller"));
        assert!(off < 4.0, "{codec}: {off}");
        // Nothing else is another.
        assert!(plain.streams.len() == 1 && plain.streams == found.streams, "{codec}");
        assert_eq!(plain.duration, found.duration, "{codec}");
        let shown = OpenClip::open(&with_poster).expect("there").frames(&[0, 11], (1030, 64)).expect("decoded");
        assert!(difference(&shown[0], &frames[0]) < 4.0 && difference(&shown[1], &frames[11]) < 4.0, "{codec}");
    }
    for format in [ClipFormat::Webm, ClipFormat::Gif] {
        let other = ClipSettings { has_poster: true, ..ClipSettings::new(Encoding::usual(format), FPS) };
        assert_eq!(other.check((64, 64), 5).expect_err("no place for it").field, "poster");
    }
}

#[test]
fn a_clip_that_goes_on_has_the_poster_of_its_first_frame_once() {
    let dir = tempfile::tempdir().expect("made");
    let [first, second] = ["first.mp4", "second.mp4"].map(|name| dir.path().join(name));
    let frames = frames((96, 64), 20);
    let settings = ClipSettings::new(Encoding::usual(ClipFormat::Mp4), FPS);
    for (before_has, has_poster) in [(true, true), (false, true), (true, false)] {
        encode(&first, &ClipSettings { has_poster: before_has, ..settings.clone() }, &frames[..13]);
        let rest = ClipSettings { frames_before: 13, has_poster, ..settings.clone() };
        encode(&second, &rest, &frames[13..]);
        assert!(read(&second).posters.is_empty(), "a part has none of its own");
        let before = OpenClip::open(&first).expect("there");
        join(&before, &frames[0], &second, &rest, Readers::AsUsual).expect("joined");
        let found = read(&second);
        assert_eq!(found.posters.len(), usize::from(has_poster));
        assert_eq!((found.streams.len(), found.streams[0].len()), (1, 20));
        assert!(found.posters.iter().all(|poster| difference(poster, &frames[0]) < 4.0));
    }
}

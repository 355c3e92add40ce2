//! Clips as files: MP4, WebM and GIF through FFmpeg, in process, frame by frame.
//!
//! Colours: frames are full-range sRGB. MP4 and WebM hold them as limited-range BT.709 YUV 4:2:0, converted with that
//! matrix and tagged so. Odd sizes become even there by repeating the last column or row, since 4:2:0 has no odd ones.
//!
//! The same frames give the same bytes on every machine with the same FFmpeg: thread counts are fixed (they shape what
//! the encoders decide), and muxers write no dates, versions or random ids.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::path::Path;

use ffmpeg_next::codec::threading;
use ffmpeg_next::{Dictionary, Packet, Rational, codec, color, encoder, format};
use tale_models::request::Frame;

use self::rate::Rate;
use super::ffmpeg::{Filters, frame_duration, is_drained, to_rgb24};
use super::partial::{PartialFile, Readers};
use super::{MediaError, Result, SOFTWARE, check_frame};

pub(super) mod poster;
mod rate;
mod recipe;

pub use recipe::{BadEncoding, ClipFormat, Codec, Encoding, MAX_GIF_FPS, Quality};

/// Threads of one encoder. A constant and not the number of cores, for the sake of equal bytes everywhere.
const ENCODER_THREADS: usize = 4;

/// How frames become a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClipSettings {
    /// Format, codec and quality.
    pub encoding: Encoding,
    /// Frames that come in for each second, at least 1.
    pub fps: usize,
    /// Frames that each second of the file has, if not as many: some are shown again, or left out.
    pub output_fps: Option<usize>,
    /// Frames of the clip that stand before these, in another file: see [`join`](super::join). Only the conversion of the rate
    /// counts them.
    pub frames_before: usize,
    /// What the file says of itself; nothing unless told.
    pub text: ClipText,
    /// Whether an mp4 has its first frame once more, small, as the picture that players show of it.
    pub has_poster: bool,
}

/// What players and programs are told of a clip.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClipText {
    /// Shown by players.
    pub title: Option<String>,
    /// How it was made, with the name and version of this program beside it.
    pub comment: Option<String>,
}

/// Most frames of a file, whatever frames are shown again.
const MAX_FILE_FRAMES: usize = 4096;
/// Most bytes that FFmpeg holds of a gif, whose palette is made of all frames: 4 for each of their pixels.
const MAX_GIF_BYTES: usize = 1 << 30;

impl ClipSettings {
    /// Refuses what these settings cannot make of `num_frames` frames of this size, behind those that are there before.
    pub fn check(&self, (width, height): (usize, usize), num_frames: usize) -> Result<(), BadEncoding> {
        let bad = |field: &'static str, problem: String| Err(BadEncoding { field, problem });
        self.encoding.check_size(width, height)?;
        let is_gif = self.encoding.format() == ClipFormat::Gif;
        let (field, file_fps) = self.output_fps.map_or(("fps", self.fps), |output_fps| ("output_fps", output_fps));
        if is_gif && file_fps > MAX_GIF_FPS {
            return bad(field, format!("is {file_fps}; gif plays at most {MAX_GIF_FPS}"));
        }
        let file_frames = self.file_frame(self.frames_before.saturating_add(num_frames));
        if file_frames == self.file_frame(self.frames_before) {
            return bad(field, format!("is {file_fps}; so few show none of the {num_frames} frames that are new"));
        }
        if file_frames > MAX_FILE_FRAMES {
            return bad(field, format!("makes a file of {file_frames} frames; at most {MAX_FILE_FRAMES}"));
        }
        // A frame that is shown again is kept once.
        let kept_frames = file_frames.min(self.frames_before.saturating_add(num_frames));
        let gif_bytes = width.saturating_mul(height).saturating_mul(4 * kept_frames);
        if is_gif && gif_bytes > MAX_GIF_BYTES {
            return bad(
                field,
                format!(
                    "makes a gif of {file_frames} frames that takes {gif_bytes} bytes to encode; at most {MAX_GIF_BYTES}"
                ),
            );
        }
        if self.has_poster && !self.encoding.holds_poster() {
            return bad("poster", "only an mp4 holds one; leave it out".into());
        }
        match &self.text.title {
            Some(_) if !self.encoding.holds_text() => bad("title", "a gif has none; leave it out".into()),
            Some(title) if title.contains('\0') => bad("title", "has a character of code 0".into()),
            _ => Ok(()),
        }
    }

    /// Without a conversion of the rate, and without a text.
    pub fn new(encoding: Encoding, fps: usize) -> Self {
        Self { encoding, fps, output_fps: None, frames_before: 0, text: ClipText::default(), has_poster: false }
    }

    /// Frames of each second of the file.
    pub(super) fn file_fps(&self) -> usize {
        self.output_fps.unwrap_or(self.fps).min(self.encoding.max_fps())
    }

    /// Which frame of the file shows frame `number` of the clip, or the next one where that is left out.
    pub fn file_frame(&self, number: usize) -> usize {
        number.saturating_mul(self.output_fps.unwrap_or(self.fps)).div_ceil(self.fps.max(1))
    }
}

/// Writes a clip frame by frame. The file appears under its name when [`ClipEncoder::finish`] returns; dropped before,
/// nothing of it stays.
pub struct ClipEncoder {
    /// Of the frames that come in.
    size: (usize, usize),
    /// Of the clip: even where the format asks for it.
    coded_size: (usize, usize),
    rate: Rate,
    /// Whether the first frame, which is still to come, is the poster too.
    needs_poster: bool,
    /// Frames that went into the filters, and how often the file shows each that is still there.
    num_filtered: usize,
    shown: VecDeque<usize>,
    /// Frames of the file: those that are due, and those that are encoded.
    num_due: usize,
    num_encoded: usize,
    time_base: Rational,
    stream_time_base: Rational,
    filters: Filters,
    encoder: encoder::video::Encoder,
    // Dropped (closed) before the file is removed or renamed.
    muxer: format::context::Output,
    file: PartialFile,
}

impl ClipEncoder {
    /// Begins a clip of `width` x `height` pixels. An existing file is replaced at the end, not before.
    pub fn create(path: &Path, settings: &ClipSettings, width: usize, height: usize) -> Result<Self> {
        Self::create_for(Readers::AsUsual, path, settings, (width, height))
    }

    /// As [`ClipEncoder::create`], readable for `readers`.
    pub fn create_for(
        readers: Readers,
        path: &Path,
        settings: &ClipSettings,
        (width, height): (usize, usize),
    ) -> Result<Self> {
        let ClipSettings { encoding, fps, output_fps, .. } = *settings;
        if fps == 0 || output_fps == Some(0) {
            return Err(MediaError::NoFrameRate);
        }
        encoding.check_size(width, height).map_err(|bad| MediaError::BadSize { problem: bad.problem })?;
        let coded_size = check_size(encoding, width, height)?;
        let rate = Rate::new(fps, output_fps.unwrap_or(fps), settings.frames_before);
        let fps = settings.file_fps();
        let filters = Filters::new(coded_size.0, coded_size.1, fps, encoding.filters())?;
        let file = PartialFile::create(path, readers)?;
        let muxer_name = encoding.format().as_str();
        let mut muxer = format::output_as(&file.url()?, muxer_name).map_err(MediaError::ffmpeg("open the file"))?;
        let global_header = muxer.format().flags().contains(format::Flags::GLOBAL_HEADER);
        let encoder = open_encoder(encoding, coded_size, fps, global_header)?;
        set_text(&mut muxer, &settings.text);
        begin_stream(&mut muxer, &encoder, fps)?;
        // A part that others come before has no first frame.
        let needs_poster = settings.has_poster && settings.frames_before == 0;
        if needs_poster {
            poster::add_stream(&mut muxer, (width, height))?;
        }
        let stream_time_base = write_header(&mut muxer, encoding)?;
        Ok(Self {
            size: (width, height),
            coded_size,
            rate,
            needs_poster,
            num_filtered: 0,
            shown: VecDeque::new(),
            num_due: 0,
            num_encoded: 0,
            time_base: frame_duration(fps),
            stream_time_base,
            filters,
            encoder,
            muxer,
            file,
        })
    }

    /// Adds the next frame.
    pub fn push(&mut self, frame: &Frame) -> Result<()> {
        check_frame(frame)?;
        let found = (frame.width, frame.height);
        if found != self.size {
            return Err(MediaError::FrameSize { expected: self.size, found });
        }
        if std::mem::take(&mut self.needs_poster) {
            poster::write(&mut self.muxer, frame)?;
        }
        let shown = self.rate.shown();
        if shown == 0 {
            return Ok(());
        }
        let mut input = to_rgb24(frame, self.coded_size.0, self.coded_size.1);
        input.set_pts(Some(self.num_filtered as i64));
        self.num_filtered += 1;
        self.shown.push_back(shown);
        self.num_due += shown;
        self.filters.push(&input)?;
        self.encode_filtered()
    }

    /// Writes what is still held back, closes the file and gives it its name.
    pub fn finish(mut self) -> Result<()> {
        if self.num_due == 0 {
            return Err(MediaError::Empty);
        }
        self.filters.flush()?;
        self.encode_filtered()?;
        self.encoder.send_eof().map_err(MediaError::ffmpeg("encode the last frames"))?;
        self.write_packets()?;
        if self.num_encoded != self.num_due {
            return Err(MediaError::FrameCount { pushed: self.num_due, encoded: self.num_encoded });
        }
        self.muxer.write_trailer().map_err(MediaError::ffmpeg("finish the file"))?;
        drop(self.muxer);
        self.file.keep()
    }

    fn encode_filtered(&mut self) -> Result<()> {
        while let Some(mut frame) = self.filters.pull()? {
            frame.set_kind(ffmpeg_next::picture::Type::None);
            // Frames come out of the filters in order, one for one. One too many would be found at the end.
            for _ in 0..self.shown.pop_front().unwrap_or(1) {
                // Their number in the file is their time.
                frame.set_pts(Some(self.num_encoded as i64));
                self.num_encoded += 1;
                self.encoder.send_frame(&frame).map_err(MediaError::ffmpeg("encode a frame"))?;
                self.write_packets()?;
            }
        }
        Ok(())
    }

    fn write_packets(&mut self) -> Result<()> {
        let mut packet = Packet::empty();
        loop {
            match self.encoder.receive_packet(&mut packet) {
                Ok(()) => {}
                Err(error) if is_drained(&error) => return Ok(()),
                Err(source) => return Err(MediaError::Ffmpeg { action: "encode a frame", source }),
            }
            packet.set_stream(0);
            // Without it the last frame, and so a clip of one frame, would last no time.
            packet.set_duration(1);
            packet.rescale_ts(self.time_base, self.stream_time_base);
            // In the order of time, as the one stream that has times comes.
            packet.write(&mut self.muxer).map_err(MediaError::ffmpeg("write the file"))?;
        }
    }
}

/// The size of the coded picture. FFmpeg counts in `i32`, and no format here goes beyond 16 bits.
fn check_size(encoding: Encoding, width: usize, height: usize) -> Result<(usize, usize)> {
    let fits = |pixels: usize| (1..=usize::from(u16::MAX) - 1).contains(&pixels);
    if !fits(width) || !fits(height) {
        return Err(MediaError::BadFrame { width, height, bytes: 0 });
    }
    let even = |pixels: usize| pixels.next_multiple_of(2);
    Ok(if encoding.is_yuv420() { (even(width), even(height)) } else { (width, height) })
}

fn open_encoder(
    encoding: Encoding,
    (width, height): (usize, usize),
    fps: usize,
    global_header: bool,
) -> Result<encoder::video::Encoder> {
    let name = encoding.encoder();
    let codec = encoder::find_by_name(name).ok_or(MediaError::MissingInFfmpeg { name })?;
    let mut settings =
        codec::Context::new_with_codec(codec).encoder().video().map_err(MediaError::ffmpeg("set the encoder up"))?;
    settings.set_width(width as u32);
    settings.set_height(height as u32);
    settings.set_time_base(frame_duration(fps));
    settings.set_frame_rate(Some(frame_duration(fps).invert()));
    settings.set_aspect_ratio(Rational::new(1, 1));
    settings.set_threading(threading::Config::count(ENCODER_THREADS));
    // No frame behind a key frame refers to one before it: players that seek there fail otherwise, and so would a part that is
    // joined to another.
    let mut flags = codec::Flags::CLOSED_GOP;
    flags.set(codec::Flags::GLOBAL_HEADER, global_header);
    settings.set_flags(flags);
    if let Some(tag) = encoding.mp4_tag() {
        // SAFETY: the context is ours and not open yet, which is when this field may be set.
        unsafe { (*settings.as_mut_ptr()).codec_tag = u32::from_le_bytes(tag) };
    }
    if encoding.is_yuv420() {
        settings.set_format(format::Pixel::YUV420P);
        settings.set_colorspace(color::Space::BT709);
        settings.set_color_range(color::Range::MPEG);
        settings.set_color_primaries(color::Primaries::BT709);
        settings.set_color_transfer_characteristic(color::TransferCharacteristic::BT709);
    } else {
        settings.set_format(format::Pixel::PAL8);
    }
    let options = encoding.encoder_options((width, height));
    settings.open_with(dictionary(&options)).map_err(MediaError::ffmpeg("open the encoder"))
}

fn dictionary<'a>(options: &[(&str, Cow<'static, str>)]) -> Dictionary<'a> {
    let mut dictionary = Dictionary::new();
    options.iter().for_each(|(name, value)| dictionary.set(name, value));
    dictionary
}

/// Without a text nothing is written, not even this program's name.
pub(super) fn set_text(muxer: &mut format::context::Output, text: &ClipText) {
    let mut metadata = Dictionary::new();
    if let Some(title) = &text.title {
        metadata.set("title", title);
    }
    if let Some(comment) = &text.comment {
        metadata.set("comment", comment);
        // As MP4 and as WebM call it.
        metadata.set("encoding_tool", SOFTWARE);
        metadata.set("software", SOFTWARE);
    }
    muxer.set_metadata(metadata);
}

/// Says that a frame lasts for `frame_time`.
pub(super) fn set_rate(stream: &mut format::stream::StreamMut<'_>, frame_time: Rational) {
    stream.set_time_base(frame_time);
    stream.set_rate(frame_time.invert());
    stream.set_avg_frame_rate(frame_time.invert());
}

/// Adds the stream of the frames.
fn begin_stream(muxer: &mut format::context::Output, encoder: &encoder::video::Encoder, fps: usize) -> Result<()> {
    let mut stream = muxer.add_stream_with(encoder).map_err(MediaError::ffmpeg("add a stream"))?;
    set_rate(&mut stream, frame_duration(fps));
    Ok(())
}

/// Writes the header, and returns the time base that the muxer chose for the frames.
pub(super) fn write_header(muxer: &mut format::context::Output, encoding: Encoding) -> Result<Rational> {
    muxer
        .write_header_with(encoding.muxer_options().iter().collect())
        .map_err(MediaError::ffmpeg("write the file's header"))?;
    let stream = muxer.stream(0).expect("a stream was added before: this is a bug");
    Ok(stream.time_base())
}

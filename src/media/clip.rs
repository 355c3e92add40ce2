//! Clips as files: MP4, WebM and GIF through FFmpeg, in process, frame by frame.
//!
//! Colours: frames are full-range sRGB. MP4 and WebM hold them as limited-range BT.709 YUV 4:2:0, converted with that
//! matrix and tagged so. Odd sizes become even there by repeating the last column or row, since 4:2:0 has no odd ones.
//!
//! The same frames give the same bytes on every machine with the same FFmpeg: thread counts are fixed (they shape what
//! x264 and libvpx decide), and muxers write no dates, versions or random ids.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ffmpeg_next::codec::threading;
use ffmpeg_next::{Dictionary, Packet, Rational, codec, color, encoder, format, frame};
use tale_models::request::Frame;

use super::ffmpeg::{Filters, frame_duration, is_drained, to_rgb24};
use super::{MediaError, Result, check_frame};

/// Threads of one encoder. A constant and not the number of cores, for the sake of equal bytes everywhere.
const ENCODER_THREADS: usize = 4;

/// Most frames per second of a GIF. Its delays are hundredths of a second, and viewers slow anything under two of them
/// down to a tenth of a second.
pub const MAX_GIF_FPS: usize = 50;

/// The accurate variants of every stage; the fast ones drop half of the chroma samples on the way in.
const BT709_FILTERS: &str =
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp,format=yuv420p";

/// One palette for the whole clip, so that still parts stay still; errors are diffused. FFmpeg holds all frames until
/// the last one is in (4 bytes per pixel).
const GIF_FILTERS: &str = "split[a][b];[a]palettegen=stats_mode=full[palette];[b][palette]paletteuse=dither=sierra2_4a";

/// File formats of a clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClipFormat {
    /// H.264 High in MP4, index in front: plays everywhere.
    Mp4,
    /// VP9 in WebM: free of patents.
    Webm,
    /// 256 colours, loops for ever, at most [`MAX_GIF_FPS`]: higher rates play slower. Rates that do not divide 100 are
    /// kept on average: delays differ by a hundredth of a second. One frame makes a still picture.
    Gif,
}

/// How a format is made with FFmpeg.
struct Recipe {
    muxer: &'static str,
    muxer_options: &'static [(&'static str, &'static str)],
    encoder: &'static str,
    encoder_options: &'static [(&'static str, &'static str)],
    filters: &'static str,
    /// 4:2:0 with its BT.709 tags, against the palette of GIF.
    is_yuv420: bool,
    max_fps: usize,
}

const MP4: Recipe = Recipe {
    muxer: "mp4",
    muxer_options: &[("movflags", "+faststart"), ("fflags", "+bitexact")],
    encoder: "libx264",
    encoder_options: &[("preset", "medium"), ("profile", "high"), ("crf", "18")],
    filters: BT709_FILTERS,
    is_yuv420: true,
    max_fps: usize::MAX,
};

const WEBM: Recipe = Recipe {
    muxer: "webm",
    muxer_options: &[("fflags", "+bitexact")],
    encoder: "libvpx-vp9",
    // Bit rate 0 is what makes `crf` mean constant quality. Tiles give threads work without changing with their number;
    // row-based threading is not promised to be deterministic.
    encoder_options: &[
        ("b", "0"),
        ("crf", "22"),
        ("deadline", "good"),
        ("cpu-used", "3"),
        ("tile-columns", "2"),
        ("row-mt", "0"),
    ],
    filters: BT709_FILTERS,
    is_yuv420: true,
    max_fps: usize::MAX,
};

const GIF: Recipe = Recipe {
    muxer: "gif",
    muxer_options: &[("loop", "0"), ("fflags", "+bitexact")],
    encoder: "gif",
    encoder_options: &[],
    filters: GIF_FILTERS,
    is_yuv420: false,
    max_fps: MAX_GIF_FPS,
};

impl ClipFormat {
    /// The format that a file name's extension (without the dot, any case) stands for.
    pub fn from_extension(extension: &str) -> Option<Self> {
        match extension.to_ascii_lowercase().as_str() {
            "mp4" => Some(Self::Mp4),
            "webm" => Some(Self::Webm),
            "gif" => Some(Self::Gif),
            _ => None,
        }
    }

    /// Lower-case name, which is also the extension.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mp4 => "mp4",
            Self::Webm => "webm",
            Self::Gif => "gif",
        }
    }

    /// Media type for HTTP.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Mp4 => "video/mp4",
            Self::Webm => "video/webm",
            Self::Gif => "image/gif",
        }
    }

    fn recipe(self) -> &'static Recipe {
        match self {
            Self::Mp4 => &MP4,
            Self::Webm => &WEBM,
            Self::Gif => &GIF,
        }
    }
}

/// Writes a clip frame by frame. The file appears under its name when [`ClipEncoder::finish`] returns; dropped before,
/// nothing of it stays.
pub struct ClipEncoder {
    /// Of the frames that come in.
    size: (usize, usize),
    /// Of the clip: even where the format asks for it.
    coded_size: (usize, usize),
    num_pushed: usize,
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
    /// Begins a clip of `width` x `height` pixels at a constant `fps`. An existing file is replaced at the end, not
    /// before.
    pub fn create(path: &Path, format: ClipFormat, width: usize, height: usize, fps: usize) -> Result<Self> {
        Self::create_for(Readers::AsUsual, path, format, (width, height), fps)
    }

    /// As [`ClipEncoder::create`], readable for `readers`.
    pub fn create_for(
        readers: Readers,
        path: &Path,
        format: ClipFormat,
        (width, height): (usize, usize),
        fps: usize,
    ) -> Result<Self> {
        if fps == 0 {
            return Err(MediaError::NoFrameRate);
        }
        let recipe = format.recipe();
        let fps = fps.min(recipe.max_fps);
        let coded_size = check_size(recipe, width, height)?;
        let filters = Filters::new(coded_size.0, coded_size.1, fps, recipe.filters)?;
        let file = PartialFile::create(path, readers)?;
        let mut muxer = format::output_as(&file.url()?, recipe.muxer).map_err(MediaError::ffmpeg("open the file"))?;
        let global_header = muxer.format().flags().contains(format::Flags::GLOBAL_HEADER);
        let encoder = open_encoder(recipe, coded_size, fps, global_header)?;
        let stream_time_base = begin_stream(&mut muxer, &encoder, fps, recipe)?;
        Ok(Self {
            size: (width, height),
            coded_size,
            num_pushed: 0,
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
        let mut input = to_rgb24(frame, self.coded_size.0, self.coded_size.1);
        input.set_pts(Some(self.num_pushed as i64));
        self.num_pushed += 1;
        self.filters.push(&input)?;
        self.encode_filtered()
    }

    /// Writes what is still held back, closes the file and gives it its name.
    pub fn finish(mut self) -> Result<()> {
        if self.num_pushed == 0 {
            return Err(MediaError::Empty);
        }
        self.filters.flush()?;
        self.encode_filtered()?;
        self.encoder.send_eof().map_err(MediaError::ffmpeg("encode the last frames"))?;
        self.write_packets()?;
        if self.num_encoded != self.num_pushed {
            return Err(MediaError::FrameCount { pushed: self.num_pushed, encoded: self.num_encoded });
        }
        self.muxer.write_trailer().map_err(MediaError::ffmpeg("finish the file"))?;
        drop(self.muxer);
        self.file.keep()
    }

    fn encode_filtered(&mut self) -> Result<()> {
        while let Some(mut frame) = self.filters.pull()? {
            self.prepare(&mut frame);
            self.encoder.send_frame(&frame).map_err(MediaError::ffmpeg("encode a frame"))?;
            self.write_packets()?;
        }
        Ok(())
    }

    /// Frames come out of the filters in order, one for one, so that their number is their time.
    fn prepare(&mut self, frame: &mut frame::Video) {
        frame.set_pts(Some(self.num_encoded as i64));
        frame.set_kind(ffmpeg_next::picture::Type::None);
        self.num_encoded += 1;
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
            packet.write_interleaved(&mut self.muxer).map_err(MediaError::ffmpeg("write the file"))?;
        }
    }
}

/// The size of the coded picture. FFmpeg counts in `i32`, and no format here goes beyond 16 bits.
fn check_size(recipe: &Recipe, width: usize, height: usize) -> Result<(usize, usize)> {
    let fits = |pixels: usize| (1..=usize::from(u16::MAX) - 1).contains(&pixels);
    if !fits(width) || !fits(height) {
        return Err(MediaError::BadFrame { width, height, bytes: 0 });
    }
    let even = |pixels: usize| pixels.next_multiple_of(2);
    Ok(if recipe.is_yuv420 { (even(width), even(height)) } else { (width, height) })
}

fn open_encoder(
    recipe: &Recipe,
    (width, height): (usize, usize),
    fps: usize,
    global_header: bool,
) -> Result<encoder::video::Encoder> {
    let codec = encoder::find_by_name(recipe.encoder).ok_or(MediaError::MissingInFfmpeg { name: recipe.encoder })?;
    let mut settings =
        codec::Context::new_with_codec(codec).encoder().video().map_err(MediaError::ffmpeg("set the encoder up"))?;
    settings.set_width(width as u32);
    settings.set_height(height as u32);
    settings.set_time_base(frame_duration(fps));
    settings.set_frame_rate(Some(frame_duration(fps).invert()));
    settings.set_aspect_ratio(Rational::new(1, 1));
    settings.set_threading(threading::Config::count(ENCODER_THREADS));
    if global_header {
        settings.set_flags(codec::Flags::GLOBAL_HEADER);
    }
    if recipe.is_yuv420 {
        settings.set_format(format::Pixel::YUV420P);
        settings.set_colorspace(color::Space::BT709);
        settings.set_color_range(color::Range::MPEG);
        settings.set_color_primaries(color::Primaries::BT709);
        settings.set_color_transfer_characteristic(color::TransferCharacteristic::BT709);
    } else {
        settings.set_format(format::Pixel::PAL8);
    }
    settings
        .open_with(recipe.encoder_options.iter().chain(steady_x264(recipe)).collect::<Dictionary<'_>>())
        .map_err(MediaError::ffmpeg("open the encoder"))
}

/// x264 164's AVX-512 code for macroblock trees reads memory that nobody wrote, so that a clip's bytes depend on what the
/// process did before. Its AVX2 code does not; every processor with AVX-512 has AVX2.
fn steady_x264(recipe: &Recipe) -> Option<&'static (&'static str, &'static str)> {
    #[cfg(target_arch = "x86_64")]
    if recipe.encoder == "libx264" && std::arch::is_x86_feature_detected!("avx512f") {
        return Some(&("x264-params", "asm=AVX2"));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = recipe;
    None
}

/// Adds the one stream, writes the header, and returns the time base that the muxer chose.
fn begin_stream(
    muxer: &mut format::context::Output,
    encoder: &encoder::video::Encoder,
    fps: usize,
    recipe: &Recipe,
) -> Result<Rational> {
    let mut stream = muxer.add_stream_with(encoder).map_err(MediaError::ffmpeg("add a stream"))?;
    stream.set_time_base(frame_duration(fps));
    stream.set_rate(frame_duration(fps).invert());
    stream.set_avg_frame_rate(frame_duration(fps).invert());
    muxer
        .write_header_with(recipe.muxer_options.iter().collect())
        .map_err(MediaError::ffmpeg("write the file's header"))?;
    let stream = muxer.stream(0).expect("a stream was added above: this is a bug");
    Ok(stream.time_base())
}

/// Extension of a file that is not whole yet, behind its own.
pub const PARTIAL_EXTENSION: &str = "partial";

/// Who may read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Those whom the process's `umask` lets.
    AsUsual,
    /// This user alone.
    Owner,
}

/// Whether nobody writes a file under a temporary name any more, in this process or another one.
pub fn is_abandoned(partial: &Path) -> bool {
    File::open(partial).is_ok_and(|file| file.try_lock().is_ok())
}

/// A file under a temporary name beside its final one; removed on drop unless kept.
struct PartialFile {
    path: PathBuf,
    partial: PathBuf,
    kept: bool,
    /// Locked, so that others see that it is being written.
    _lock: File,
}

impl PartialFile {
    fn create(path: &Path, readers: Readers) -> Result<Self> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".");
        name.push(PARTIAL_EXTENSION);
        let partial = path.with_file_name(name);
        let mode = match readers {
            Readers::AsUsual => 0o666,
            Readers::Owner => 0o600,
        };
        // FFmpeg opens it again; here the system's reason is still known when it cannot be made.
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&partial);
        let file = file.map_err(MediaError::io(&partial))?;
        // Where a file system has no locks, an earlier process's files stay.
        let _ = file.try_lock();
        Ok(Self { path: path.to_path_buf(), partial, kept: false, _lock: file })
    }

    /// The path as FFmpeg takes it: with its scheme, or `rtmp:` and the like in a name would mean a protocol.
    fn url(&self) -> Result<String> {
        match self.partial.to_str() {
            Some(path) => Ok(format!("file:{path}")),
            None => Err(MediaError::PathEncoding { path: self.partial.clone() }),
        }
    }

    fn keep(mut self) -> Result<()> {
        fs::rename(&self.partial, &self.path).map_err(MediaError::io(&self.path))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.kept {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

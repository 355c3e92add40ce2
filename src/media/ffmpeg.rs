//! What clips and lossy pictures share of FFmpeg: start-up, frames in its memory, a filter chain.
//!
//! Knows nothing of containers and encoders.

use std::path::Path;
use std::sync::Once;

use ffmpeg_next::util::log;
use ffmpeg_next::{Error, Rational, filter, format, frame};
use tale_models::request::Frame;

use super::{MediaError, Result};

/// Starts FFmpeg once; its chatter (x264 prints a report for every file) stays out of our logs.
pub fn init() -> Result<()> {
    static QUIET: Once = Once::new();
    ffmpeg_next::init().map_err(MediaError::ffmpeg("start"))?;
    QUIET.call_once(|| log::set_level(log::Level::Error));
    Ok(())
}

/// Does something that FFmpeg would complain of on stderr, beside the error that it returns.
pub fn quietly<T>(work: impl FnOnce() -> T) -> T {
    log::set_level(log::Level::Quiet);
    let done = work();
    log::set_level(log::Level::Error);
    done
}

/// Whether FFmpeg only wants to be asked again later (more input, or nothing left).
pub fn is_drained(error: &Error) -> bool {
    matches!(error, Error::Eof | Error::Other { errno: ffmpeg_next::error::EAGAIN })
}

/// Copies `frame` into FFmpeg's memory at `width` x `height`, which may be one pixel more than the frame has: the last
/// column and row are repeated then.
pub fn to_rgb24(frame: &Frame, width: usize, height: usize) -> frame::Video {
    let mut copy = frame::Video::new(format::Pixel::RGB24, width as u32, height as u32);
    let stride = copy.stride(0);
    let rows = copy.data_mut(0).chunks_exact_mut(stride).take(height);
    for (y, row) in rows.enumerate() {
        let source_row = y.min(frame.height - 1);
        let source = &frame.rgb[source_row * frame.width * 3..][..frame.width * 3];
        row[..source.len()].copy_from_slice(source);
        if width > frame.width {
            row[source.len()..width * 3].copy_from_slice(&source[source.len() - 3..]);
        }
    }
    copy
}

/// A chain of FFmpeg filters from RGB frames to what an encoder takes.
pub struct Filters(filter::Graph);

impl Filters {
    /// Builds the chain `description` (FFmpeg's filter syntax) for RGB24 input of this size and rate.
    pub fn new(width: usize, height: usize, fps: usize, description: &str) -> Result<Self> {
        Self::from_input(&format!("video_size={width}x{height}:pix_fmt=rgb24:time_base=1/{fps}"), description)
    }

    /// From decoded frames of our clips, which are limited-range BT.709 YUV 4:2:0, to RGB24.
    pub fn from_yuv420(width: usize, height: usize) -> Result<Self> {
        let input = format!("video_size={width}x{height}:pix_fmt=yuv420p:time_base=1/1");
        Self::from_input(&input, "scale=in_color_matrix=bt709:in_range=tv:flags=bicubic+accurate_rnd,format=rgb24")
    }

    fn from_input(input: &str, description: &str) -> Result<Self> {
        init()?;
        let mut graph = filter::Graph::new();
        // SAFETY: the graph was allocated above and has no filters yet, which is when this field may be set.
        unsafe { (*graph.as_mut_ptr()).nb_threads = 1 };
        let input = format!("{input}:pixel_aspect=1/1");
        graph.add(&find("buffer")?, "in", &input).map_err(MediaError::ffmpeg("take frames"))?;
        graph.add(&find("buffersink")?, "out", "").map_err(MediaError::ffmpeg("give frames back"))?;
        let parser = graph.output("in", 0).and_then(|parser| parser.input("out", 0));
        parser.and_then(|parser| parser.parse(description)).map_err(MediaError::ffmpeg("build its filters"))?;
        graph.validate().map_err(MediaError::ffmpeg("connect its filters"))?;
        Ok(Self(graph))
    }

    /// Puts a frame in at one end.
    pub fn push(&mut self, frame: &frame::Video) -> Result<()> {
        self.end("in").source().add(frame).map_err(MediaError::ffmpeg("filter a frame"))
    }

    /// Says that no frame follows.
    pub fn flush(&mut self) -> Result<()> {
        self.end("in").source().flush().map_err(MediaError::ffmpeg("filter the last frames"))
    }

    /// Takes the next frame out of the other end, if one is ready.
    pub fn pull(&mut self) -> Result<Option<frame::Video>> {
        let mut frame = frame::Video::empty();
        match self.end("out").sink().frame(&mut frame) {
            Ok(()) => Ok(Some(frame)),
            Err(error) if is_drained(&error) => Ok(None),
            Err(source) => Err(MediaError::Ffmpeg { action: "filter a frame", source }),
        }
    }

    fn end(&mut self, name: &str) -> filter::Context {
        self.0.get(name).expect("both ends were added in `new`: this is a bug")
    }
}

fn find(name: &'static str) -> Result<filter::Filter> {
    filter::find(name).ok_or(MediaError::MissingInFfmpeg { name })
}

/// `1/fps` seconds.
pub fn frame_duration(fps: usize) -> Rational {
    Rational::new(1, fps as i32)
}

/// A path as FFmpeg takes it: with its scheme, or `rtmp:` and the like in a name would mean a protocol.
pub fn url(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(path) => Ok(format!("file:{path}")),
        None => Err(MediaError::PathEncoding { path: path.to_path_buf() }),
    }
}

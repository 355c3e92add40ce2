//! Clips that go on from a finished one: both in one file, without encoding the first again.
//!
//! Owns: reading of our own clips and of what they say of themselves, the joining of two by their packets, and single frames
//! of one. Frames of both have the same settings, so that one header serves them; times go on frame by frame. Does not know:
//! jobs.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use ffmpeg_next::{Dictionary, Rational, Rescale, codec, format, frame, media};
use tale_models::request::Frame;

use super::clip::{ClipSettings, poster};
use super::ffmpeg::{Filters, frame_duration, quietly, url};
use super::partial::{PartialFile, Readers};
use super::{MediaError, Result, clip};

/// What FFmpeg calls the formats whose files say how they were made.
const CLIP_DEMUXERS: &str = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm";

/// A finished clip that is held open: it can be read even when its file has been removed.
#[derive(Debug)]
pub struct OpenClip(File);

impl OpenClip {
    /// Opens a file that [`ClipEncoder`](super::ClipEncoder) has made.
    pub fn open(path: &Path) -> io::Result<Self> {
        File::open(path).map(Self)
    }

    fn input(&self) -> Result<format::context::Input> {
        super::ffmpeg::init()?;
        // Opened anew, with a position of its own.
        let url = format!("file:/proc/self/fd/{}", self.0.as_raw_fd());
        format::input(&url).map_err(MediaError::ffmpeg("open the clip"))
    }

    /// Frames `numbers` of the file, counted from 0 and in ascending order, `width` x `height` pixels each. Those that the
    /// file has not are left out.
    pub fn frames(&self, numbers: &[usize], (width, height): (usize, usize)) -> Result<Vec<Frame>> {
        let failed = MediaError::ffmpeg;
        let mut input = self.input()?;
        let stream = video(&input)?;
        let index = stream.index();
        let context = codec::Context::from_parameters(stream.parameters()).map_err(failed("read the clip"))?;
        let mut decoder = context.decoder().video().map_err(failed("decode the clip"))?;
        let coded = (decoder.width() as usize, decoder.height() as usize);
        let mut filters = Filters::from_yuv420(coded.0, coded.1)?;
        let (mut found, mut count) = (Vec::with_capacity(numbers.len()), 0);
        let mut collect = |decoder: &mut ffmpeg_next::decoder::Video| -> Result<()> {
            let mut decoded = frame::Video::empty();
            while decoder.receive_frame(&mut decoded).is_ok() {
                if numbers.binary_search(&count).is_ok() {
                    decoded.set_pts(Some(count as i64));
                    filters.push(&decoded)?;
                    found.extend(filters.pull()?.map(|shown| cropped(&shown, width, height)));
                }
                count += 1;
            }
            Ok(())
        };
        for (stream, packet) in input.packets() {
            if stream.index() == index {
                decoder.send_packet(&packet).map_err(failed("decode the clip"))?;
                collect(&mut decoder)?;
            }
        }
        decoder.send_eof().map_err(failed("decode the clip"))?;
        collect(&mut decoder)?;
        Ok(found)
    }
}

/// What the clip at `path`, which somebody hands us, says of how it was made; `None` where it says nothing.
pub fn read_clip_comment(path: &Path) -> Result<Option<String>> {
    super::ffmpeg::init()?;
    // No format that names other files, and nothing but a file.
    let options = Dictionary::from_iter([("format_whitelist", CLIP_DEMUXERS), ("protocol_whitelist", "file")]);
    let url = url(path)?;
    let input =
        quietly(|| format::input_with_dictionary(&url, options)).map_err(MediaError::ffmpeg("open the clip"))?;
    Ok(input.metadata().get("comment").map(str::to_owned))
}

/// Puts `before`, which begins with `first_frame`, in front of the clip at `path`, which has the same settings and keeps
/// its name.
pub fn join(
    before: &OpenClip,
    first_frame: &Frame,
    path: &Path,
    settings: &ClipSettings,
    readers: Readers,
) -> Result<()> {
    let failed = MediaError::ffmpeg;
    let mut inputs = [before.input()?, format::input(&url(path)?).map_err(failed("open the clip"))?];
    let [first, second] = &inputs;
    let parameters = video(first)?.parameters();
    if header(&parameters) != header(&video(second)?.parameters()) {
        return Err(MediaError::OtherHeader);
    }
    let frame_time = frame_duration(settings.file_fps());
    let file = PartialFile::create(path, readers)?;
    let name = settings.encoding.format().as_str();
    let mut muxer = format::output_as(&file.url()?, name).map_err(failed("open the file"))?;
    clip::set_text(&mut muxer, &settings.text);
    let mut stream = muxer.add_stream(ffmpeg_next::encoder::find(codec::Id::None)).map_err(failed("add a stream"))?;
    stream.set_parameters(parameters);
    clip::set_rate(&mut stream, frame_time);
    let tag = settings.encoding.mp4_tag().map_or(0, u32::from_le_bytes);
    // SAFETY: the stream is ours, and its header is not written yet, which is when these fields may be set.
    unsafe {
        let parameters = (*stream.as_mut_ptr()).codecpar;
        // The muxer's own, but where it has to be said.
        (*parameters).codec_tag = tag;
        // Of one of the files alone.
        (*parameters).bit_rate = 0;
    }
    if settings.has_poster {
        poster::add_stream(&mut muxer, (first_frame.width, first_frame.height))?;
    }
    let time_base = clip::write_header(&mut muxer, settings.encoding)?;
    if settings.has_poster {
        poster::write(&mut muxer, first_frame)?;
    }
    let mut num_frames = 0;
    for input in &mut inputs {
        num_frames = copy(input, &mut muxer, num_frames, frame_time, time_base)?;
    }
    muxer.write_trailer().map_err(failed("finish the file"))?;
    drop(muxer);
    file.keep()
}

/// Copies the packets of `input` behind `num_frames` frames, and says how many frames there are then. Times are counted in
/// frames meanwhile, since a container may have rounded them.
fn copy(
    input: &mut format::context::Input,
    muxer: &mut format::context::Output,
    num_frames: i64,
    frame_time: Rational,
    time_base: Rational,
) -> Result<i64> {
    let index = video(input)?.index();
    let mut end = num_frames;
    for (stream, mut packet) in input.packets() {
        if stream.index() != index {
            continue;
        }
        let behind = |time: i64| time.rescale(stream.time_base(), frame_time) + num_frames;
        let (shown, decoded) = (packet.pts().map(behind), packet.dts().map(behind));
        end = end.max(shown.unwrap_or(end) + 1);
        packet.set_pts(shown);
        packet.set_dts(decoded);
        packet.set_duration(1);
        packet.set_stream(0);
        packet.set_position(-1);
        packet.rescale_ts(frame_time, time_base);
        packet.write(muxer).map_err(MediaError::ffmpeg("write the file"))?;
    }
    Ok(end)
}

fn video(input: &format::context::Input) -> Result<format::stream::Stream<'_>> {
    input.streams().best(media::Type::Video).ok_or(MediaError::Empty)
}

/// What a decoder is told before the first packet.
fn header(parameters: &codec::Parameters) -> (codec::Id, i32, i32, Vec<u8>) {
    // SAFETY: the parameters live as long as their owner, and FFmpeg's extradata have the size that stands beside them.
    unsafe {
        let of = &*parameters.as_ptr();
        let extradata = match of.extradata.is_null() {
            true => Vec::new(),
            false => std::slice::from_raw_parts(of.extradata, of.extradata_size.max(0) as usize).to_vec(),
        };
        (parameters.id(), of.width, of.height, extradata)
    }
}

/// The upper left `width` x `height` pixels of an RGB24 frame.
fn cropped(shown: &frame::Video, width: usize, height: usize) -> Frame {
    let rows = shown.data(0).chunks(shown.stride(0)).take(height);
    let rgb = rows.flat_map(|row| &row[..3 * width]).copied().collect();
    Frame { width, height, rgb }
}

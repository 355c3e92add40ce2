//! How each kind of clip is made with FFmpeg: containers, codecs, and what a quality means for a codec.
//!
//! Owns: the table of them, and which go together. Does not know: frames, files, requests.

use std::borrow::Cow;

use ffmpeg_next::encoder;

use crate::media::ffmpeg;

/// Most frames per second of a GIF. Its delays are hundredths of a second, and viewers slow anything under two of them
/// down to a tenth of a second.
pub const MAX_GIF_FPS: usize = 50;

/// The accurate variants of every stage; the fast ones drop half of the chroma samples on the way in.
const BT709_FILTERS: &str =
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_inp,format=yuv420p";

/// One palette for the whole clip, so that still parts stay still; errors are diffused. FFmpeg holds all frames until
/// the last one is in (4 bytes per pixel).
const GIF_FILTERS: &str = "split[a][b];[a]palettegen=stats_mode=full[palette];[b][palette]paletteuse=dither=sierra2_4a";

/// x265 takes no narrower or lower pictures: version 3.5 writes past its buffers there, so that some files are broken.
const MIN_X265_SIDE: usize = 64;

/// Pictures with so many pixels on each side are two tiles wide and high for libaom.
const LIBAOM_TILED_SIDE: usize = 256;

/// File formats of a clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClipFormat {
    /// Index in front, so that it plays while it comes.
    Mp4,
    /// Free of patents with either of its codecs.
    Webm,
    /// 256 colours, loops for ever, at most [`MAX_GIF_FPS`]: higher rates play slower. Rates that do not divide 100 are
    /// kept on average: delays differ by a hundredth of a second. One frame makes a still picture.
    Gif,
}

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

    /// The codecs that it holds, the usual one first.
    fn codecs(self) -> &'static [Codec] {
        match self {
            Self::Mp4 => &[Codec::H264, Codec::H265, Codec::Av1],
            Self::Webm => &[Codec::Vp9, Codec::Av1],
            Self::Gif => &[],
        }
    }
}

/// Codecs of MP4 and WebM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// High profile: plays everywhere.
    H264,
    /// About a third smaller; plays on recent devices.
    H265,
    /// Smaller still, and slower to make.
    Av1,
    /// Plays in every browser.
    Vp9,
}

impl Codec {
    /// All names.
    pub const NAMES: &'static [&'static str] = &["h264", "h265", "av1", "vp9"];
    const ALL: [Self; 4] = [Self::H264, Self::H265, Self::Av1, Self::Vp9];

    /// The codec of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.as_str() == name)
    }

    /// Its name, lower case and without a point.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::H264 => "h264",
            Self::H265 => "h265",
            Self::Av1 => "av1",
            Self::Vp9 => "vp9",
        }
    }

    /// FFmpeg's name of its encoder.
    fn encoder(self) -> &'static str {
        match self {
            Self::H264 => "libx264",
            Self::H265 => "libx265",
            Self::Av1 => "libaom-av1",
            Self::Vp9 => "libvpx-vp9",
        }
    }

    /// The format that it is at home in.
    fn own_format(self) -> ClipFormat {
        match self {
            Self::H264 | Self::H265 | Self::Av1 => ClipFormat::Mp4,
            Self::Vp9 => ClipFormat::Webm,
        }
    }

    /// The encoder's constant rate factor, which means another thing for each. The steps of a row look alike: those of
    /// x265 and of libaom are where their authors put the same quality as x264's 18, 23 and 28.
    fn crf(self, quality: Quality) -> u8 {
        let [low, medium, high, best] = match self {
            Self::H264 => [28, 23, 18, 12],
            Self::H265 => [32, 27, 21, 15],
            Self::Av1 => [42, 34, 25, 15],
            Self::Vp9 => [40, 32, 22, 14],
        };
        match quality {
            Quality::Low => low,
            Quality::Medium => medium,
            Quality::High => high,
            Quality::Best => best,
        }
    }

    /// What the encoder is told beside the quality.
    fn options(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::H264 => &[("preset", "medium"), ("profile", "high")],
            Self::H265 => &[("preset", "medium")],
            // Bit rate 0 is what makes `crf` mean constant quality. Tiles give threads work without changing with their
            // number; row-based threading is not promised to be deterministic.
            Self::Av1 => &[("b", "0"), ("cpu-used", "6"), ("row-mt", "0")],
            Self::Vp9 => &[("b", "0"), ("deadline", "good"), ("cpu-used", "3"), ("tile-columns", "2"), ("row-mt", "0")],
        }
    }
}

/// How much a lossy clip may lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    /// Visible losses, smallest files.
    Low,
    /// What most of the web has.
    Medium,
    /// Hardly visible losses.
    High,
    /// For further work.
    Best,
}

impl Quality {
    /// All names, from the worst to the best.
    pub const NAMES: &'static [&'static str] = &["low", "medium", "high", "best"];
    const ALL: [Self; 4] = [Self::Low, Self::Medium, Self::High, Self::Best];

    /// The quality of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quality| quality.as_str() == name)
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        Self::NAMES[self as usize]
    }
}

/// What a clip is made as: a format, and a codec and a quality where the format has those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoding {
    format: ClipFormat,
    lossy: Option<(Codec, Quality)>,
}

/// What does not go together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadEncoding {
    /// `codec`, `quality` or the like: what the caller said.
    pub field: &'static str,
    /// Why not; follows the field's name.
    pub problem: String,
}

impl Encoding {
    /// What was asked for, and what is usual where nothing was: the format that the codec is at home in, mp4 without one;
    /// the format's first codec; high quality. Refused where they do not go together, or where this machine's FFmpeg lacks
    /// the encoder.
    pub fn choose(
        format: Option<ClipFormat>,
        codec: Option<Codec>,
        quality: Option<Quality>,
    ) -> Result<Self, BadEncoding> {
        Self::choose_of(format, codec, quality, |encoder| {
            ffmpeg::init().is_ok() && encoder::find_by_name(encoder).is_some()
        })
    }

    /// As [`Encoding::choose`], of a file that was made elsewhere: whether this machine could make it does not matter.
    pub fn of_file(format: ClipFormat, codec: Option<Codec>, quality: Option<Quality>) -> Result<Self, BadEncoding> {
        Self::choose_of(Some(format), codec, quality, |_| true)
    }

    fn choose_of(
        format: Option<ClipFormat>,
        codec: Option<Codec>,
        quality: Option<Quality>,
        has_encoder: impl Fn(&str) -> bool,
    ) -> Result<Self, BadEncoding> {
        let format = format.or(codec.map(Codec::own_format)).unwrap_or(ClipFormat::Mp4);
        let refuse = |field, problem: String| Err(BadEncoding { field, problem });
        let Some(usual) = format.codecs().first() else {
            return match (codec, quality) {
                (Some(_), _) => refuse("codec", format!("{} has none to choose; leave it out", format.as_str())),
                (None, Some(_)) => refuse("quality", format!("{} has none to choose; leave it out", format.as_str())),
                (None, None) => Ok(Self { format, lossy: None }),
            };
        };
        let codec = codec.unwrap_or(*usual);
        if !format.codecs().contains(&codec) {
            let allowed: Vec<&str> = format.codecs().iter().map(|codec| codec.as_str()).collect();
            let problem =
                format!("{} does not hold {}; allowed: {}", format.as_str(), codec.as_str(), allowed.join(", "));
            return refuse("codec", problem);
        }
        if !has_encoder(codec.encoder()) {
            let problem = format!("this machine's FFmpeg has no {}, which makes {}", codec.encoder(), codec.as_str());
            return refuse("codec", problem);
        }
        Ok(Self { format, lossy: Some((codec, quality.unwrap_or(Quality::High))) })
    }

    /// The usual one of a format.
    pub fn usual(format: ClipFormat) -> Self {
        Self { format, lossy: format.codecs().first().map(|codec| (*codec, Quality::High)) }
    }

    /// The format of the file.
    pub fn format(self) -> ClipFormat {
        self.format
    }

    /// The codec, where the format has several.
    pub fn codec(self) -> Option<Codec> {
        self.lossy.map(|(codec, _)| codec)
    }

    /// The quality, where the codec has several.
    pub fn quality(self) -> Option<Quality> {
        self.lossy.map(|(_, quality)| quality)
    }

    /// Whether the file can say how it was made.
    pub fn holds_text(self) -> bool {
        self.format != ClipFormat::Gif
    }

    /// Whether the file can hold a picture for players to show.
    pub fn holds_poster(self) -> bool {
        self.format == ClipFormat::Mp4
    }

    /// Whether more frames can be put behind those of a file without encoding them again.
    pub fn can_go_on(self) -> bool {
        self.format != ClipFormat::Gif
    }

    /// 4:2:0 with its BT.709 tags, against the palette of GIF.
    pub(super) fn is_yuv420(self) -> bool {
        self.lossy.is_some()
    }

    pub(super) fn max_fps(self) -> usize {
        if self.format == ClipFormat::Gif { MAX_GIF_FPS } else { usize::MAX }
    }

    pub(super) fn filters(self) -> &'static str {
        if self.is_yuv420() { BT709_FILTERS } else { GIF_FILTERS }
    }

    pub(in crate::media) fn muxer_options(self) -> &'static [(&'static str, &'static str)] {
        match self.format {
            ClipFormat::Mp4 => &[("movflags", "+faststart"), ("fflags", "+bitexact")],
            ClipFormat::Webm => &[("fflags", "+bitexact")],
            ClipFormat::Gif => &[("loop", "0"), ("fflags", "+bitexact")],
        }
    }

    /// Refuses frames that are too small for the codec.
    pub fn check_size(self, width: usize, height: usize) -> Result<(), BadEncoding> {
        if self.codec() != Some(Codec::H265) || width.min(height) >= MIN_X265_SIDE {
            return Ok(());
        }
        let problem = format!("h265 takes {MIN_X265_SIDE} pixels on each side at least; this is {width}x{height}");
        Err(BadEncoding { field: "codec", problem })
    }

    pub(super) fn encoder(self) -> &'static str {
        self.lossy.map_or("gif", |(codec, _)| codec.encoder())
    }

    /// Options of the encoder for frames of this size.
    pub(super) fn encoder_options(self, (width, height): (usize, usize)) -> Vec<(&'static str, Cow<'static, str>)> {
        let Some((codec, quality)) = self.lossy else { return Vec::new() };
        let own = codec.options().iter().map(|(name, value)| (*name, Cow::from(*value)));
        let mut options: Vec<_> = own.collect();
        options.push(("crf", codec.crf(quality).to_string().into()));
        match codec {
            Codec::H264 => options.extend(steady_x264()),
            Codec::H265 => options.push(("x265-params", x265_params().into())),
            // libaom refuses more tiles than fit, where libvpx makes fewer.
            Codec::Av1 if width.min(height) >= LIBAOM_TILED_SIDE => {
                options.extend([("tile-columns", "1".into()), ("tile-rows", "1".into())]);
            }
            Codec::Av1 | Codec::Vp9 => (),
        }
        options
    }

    /// The four characters by which MP4 names the codec, where FFmpeg's own choice does not play everywhere: Apple's
    /// players take H.265 under this one alone.
    pub(in crate::media) fn mp4_tag(self) -> Option<[u8; 4]> {
        (self.codec() == Some(Codec::H265) && self.format == ClipFormat::Mp4).then_some(*b"hvc1")
    }
}

/// x264 164's AVX-512 code for macroblock trees reads memory that nobody wrote, so that a clip's bytes depend on what the
/// process did before. Its AVX2 code does not; every processor with AVX-512 has AVX2.
fn steady_x264() -> Option<(&'static str, Cow<'static, str>)> {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        return Some(("x264-params", "asm=AVX2".into()));
    }
    None
}

/// Silent, in as many threads as the other encoders, and without the message in which it names the processor.
fn x265_params() -> String {
    format!("log-level=none:info=0:open-gop=0:pools={}", super::ENCODER_THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(format: Option<&str>, codec: Option<&str>, quality: Option<&str>) -> Result<String, String> {
        let format = format.map(|name| ClipFormat::from_extension(name).unwrap());
        let codec = codec.map(|name| Codec::named(name).unwrap());
        let quality = quality.map(|name| Quality::named(name).unwrap());
        let chosen = Encoding::choose_of(format, codec, quality, |encoder| encoder != "libx265");
        chosen
            .map(|of| format!("{} {:?} {:?}", of.format.as_str(), of.codec(), of.quality()))
            .map_err(|error| format!("{}: {}", error.field, error.problem))
    }

    #[test]
    fn what_was_not_said_is_what_is_usual() {
        for (format, codec, quality, expected) in [
            (None, None, None, "mp4 Some(H264) Some(High)"),
            (Some("webm"), None, Some("low"), "webm Some(Vp9) Some(Low)"),
            (Some("gif"), None, None, "gif None None"),
            (None, Some("vp9"), None, "webm Some(Vp9) Some(High)"),
            (None, Some("av1"), Some("best"), "mp4 Some(Av1) Some(Best)"),
            (Some("webm"), Some("av1"), None, "webm Some(Av1) Some(High)"),
        ] {
            assert_eq!(chosen(format, codec, quality).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_by_name() {
        for (format, codec, quality, expected) in [
            (Some("mp4"), Some("vp9"), None, "codec: mp4 does not hold vp9; allowed: h264, h265, av1"),
            (Some("webm"), Some("h264"), None, "codec: webm does not hold h264; allowed: vp9, av1"),
            (Some("gif"), Some("h264"), None, "codec: gif has none to choose; leave it out"),
            (Some("gif"), None, Some("low"), "quality: gif has none to choose; leave it out"),
            (None, Some("h265"), None, "codec: this machine's FFmpeg has no libx265, which makes h265"),
        ] {
            assert_eq!(chosen(format, codec, quality), Err(expected.to_owned()));
        }
    }

    #[test]
    fn names_are_read_back_and_better_quality_has_a_lower_factor() {
        for codec in Codec::ALL {
            assert_eq!(Codec::named(codec.as_str()), Some(codec));
            assert!(Codec::NAMES.contains(&codec.as_str()));
            let factors = Quality::ALL.map(|quality| codec.crf(quality));
            assert!(factors.is_sorted_by(|worse, better| worse > better), "{factors:?}");
        }
        for quality in Quality::ALL {
            assert_eq!(Quality::named(quality.as_str()), Some(quality));
        }
    }
}

//! Pictures that a video begins with, goes through and ends with.
//!
//! Owns: `input_reference`, `key_images` and `last_image`, which of them a model takes, and how they are fitted to the video. Does not
//! know: what a network makes of them.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::parameter::{Declaration, Options, Parameter, VIDEOS};
use crate::resample::Filter;

use super::canvas::{Canvas, CanvasSupport, SizeRule};

/// See [`Keyframes::first`].
pub static INPUT_REFERENCE: Parameter<Arc<Frame>> = Parameter::image(
    "input_reference",
    "Picture that the video begins with: PNG, JPEG or WebP. It is stretched to the video's size; without a size the video \
     has its aspect (Wan2.1) or the model's own size (CogVideoX).",
)
.only_for(VIDEOS)
.flag("image");

/// See [`Keyframes::last`].
pub static LAST_IMAGE: Parameter<Arc<Frame>> =
    Parameter::image("last_image", "Picture that the video ends with, stretched to its size as the first one.")
        .only_for(VIDEOS);

/// Most pictures that a video goes through.
pub const MAX_KEY_IMAGES: usize = 15;

/// See [`Keyframes::middle`].
pub static KEY_IMAGES: Parameter<Vec<Arc<Frame>>> = Parameter::images(
    "key_images",
    MAX_KEY_IMAGES,
    "Pictures that the video goes through on its way from the first to the last, evenly in time, stretched to its size.",
)
.only_for(VIDEOS);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] =
    &[&INPUT_REFERENCE.declaration, &LAST_IMAGE.declaration, &KEY_IMAGES.declaration];

/// Which pictures a model of videos takes. It makes nothing without those that it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyframeSupport {
    /// The one that the video begins with.
    First,
    /// That and the one that it ends with.
    FirstAndLast,
}

impl KeyframeSupport {
    /// Whether videos end with a picture, too.
    pub fn takes_last(self) -> bool {
        self == Self::FirstAndLast
    }
}

/// The pictures of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Keyframes {
    /// What the video begins with.
    pub first: Keyframe,
    /// What it goes through, in order of time; each ends one part of the video and begins the next.
    pub middle: Vec<Keyframe>,
    /// What it ends with.
    pub last: Option<Keyframe>,
}

/// A picture in two sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct Keyframe {
    /// As the client gave it.
    pub given: Arc<Frame>,
    /// In the width and height of the video.
    pub fitted: Arc<Frame>,
}

impl Keyframe {
    /// A picture that has the size of the video.
    pub fn exact(picture: Arc<Frame>) -> Self {
        Self { given: picture.clone(), fitted: picture }
    }
}

/// How a picture came to the size of its video.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fitting {
    /// The parameter that brought it.
    pub field: &'static str,
    /// Its own width and height in pixels.
    pub size: (usize, usize),
    /// Whether that is not the video's: then it was stretched, without a margin and without a cut, as diffusers'
    /// `VideoProcessor` does it.
    pub is_stretched: bool,
}

impl Keyframes {
    /// How they came to the size of the video.
    pub fn fittings(&self) -> Vec<Fitting> {
        let fitting = |field, Keyframe { given, fitted }: &Keyframe| {
            let size = (given.width, given.height);
            Fitting { field, size, is_stretched: size != (fitted.width, fitted.height) }
        };
        let first = fitting(INPUT_REFERENCE.declaration.name, &self.first);
        let middle = self.middle.iter().map(|picture| fitting(KEY_IMAGES.declaration.name, picture));
        let last = self.last.iter().map(|picture| fitting(LAST_IMAGE.declaration.name, picture));
        std::iter::once(first).chain(middle).chain(last).collect()
    }

    /// All of them, in the order of time.
    pub fn iter(&self) -> impl Iterator<Item = &Keyframe> {
        std::iter::once(&self.first).chain(&self.middle).chain(&self.last)
    }

    /// One picture to begin with.
    pub fn from_first(first: Keyframe) -> Self {
        Self { first, middle: Vec::new(), last: None }
    }

    /// The two pictures between which part `index` of the video is, if there is that part.
    pub fn part(&self, index: usize) -> Option<Self> {
        let mut pictures = self.iter().skip(index).cloned();
        let first = pictures.next()?;
        let last = Some(pictures.next()?);
        Some(Self { first, middle: Vec::new(), last })
    }
}

/// The pictures that a request asks for, before the size of the video is known.
pub(super) struct Asked {
    first: Arc<Frame>,
    middle: Vec<Arc<Frame>>,
    last: Option<Arc<Frame>>,
}

/// What the options ask for; `support` is `None` for models that take no pictures.
pub(super) fn asked(support: Option<KeyframeSupport>, options: &Options) -> Result<Option<Asked>> {
    let (first, last) = (options.get(&INPUT_REFERENCE), options.get(&LAST_IMAGE));
    let middle = options.get(&KEY_IMAGES).unwrap_or_default();
    let refuse = |field: &str, problem: &str| Err(Error::invalid(field, problem));
    if !middle.is_empty() && support != Some(KeyframeSupport::FirstAndLast) {
        return refuse("key_images", "this model does not go from picture to picture; leave them out");
    }
    match (support, first, last) {
        (None, None, None) => Ok(None),
        (None, Some(_), _) => refuse("input_reference", "this model makes videos from text alone; leave it out"),
        (None, None, Some(_)) => refuse("last_image", "this model makes videos from text alone; leave it out"),
        (Some(_), None, _) => refuse("input_reference", "is missing; this model only makes videos from pictures"),
        (Some(KeyframeSupport::First), _, Some(_)) => {
            refuse("last_image", "this model takes no picture to end with; leave it out")
        }
        (Some(KeyframeSupport::FirstAndLast), _, None) => {
            refuse("last_image", "is missing; this model goes from a first picture to a last one")
        }
        (Some(_), Some(first), last) => Ok(Some(Asked { first, middle, last })),
    }
}

impl Asked {
    /// How many they are.
    pub(super) fn count(&self) -> usize {
        1 + self.middle.len() + usize::from(self.last.is_some())
    }

    /// Width and height of a video that was given none. As the model says it has the aspect of the first picture and about
    /// as many pixels as the model makes unless told otherwise: source, the published example of diffusers'
    /// `WanImageToVideoPipeline`. Or it has the model's own size, as in `CogVideoXImageToVideoPipeline`.
    pub(super) fn own_size(&self, canvas: &CanvasSupport) -> (usize, usize) {
        if canvas.sizes != SizeRule::AspectOfPicture {
            return (canvas.default_width, canvas.default_height);
        }
        let pixels = (canvas.default_width * canvas.default_height) as f64;
        let aspect = self.first.height as f64 / self.first.width as f64;
        let side = |length: f64| {
            let length = (length.round_ties_even() as usize).clamp(canvas.size_multiple, canvas.max_side);
            length - length % canvas.size_multiple
        };
        (side((pixels / aspect).sqrt()), side((pixels * aspect).sqrt()))
    }

    /// The pictures on this canvas. Resizes them, which takes time.
    pub(super) fn resolve(self, canvas: &Canvas) -> Result<Keyframes> {
        if self.last.is_some() && canvas.num_frames < 2 {
            let problem = format!("is {}; a video between two pictures has at least 2", canvas.num_frames);
            return Err(Error::invalid("num_frames", problem));
        }
        let fit = |given: Arc<Frame>| Keyframe {
            fitted: Arc::new(given.resized(canvas.width, canvas.height, Filter::Lanczos)),
            given,
        };
        let middle = self.middle.into_iter().map(fit).collect();
        Ok(Keyframes { first: fit(self.first), middle, last: self.last.map(fit) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::canvas::FrameSupport;

    fn canvas() -> CanvasSupport {
        CanvasSupport {
            default_width: 832,
            default_height: 480,
            size_multiple: 16,
            max_side: 1536,
            max_pixels: 1280 * 768,
            sizes: SizeRule::AspectOfPicture,
            frames: Some(FrameSupport {
                default_num_frames: 81,
                default_fps: 16,
                multiple: 4,
                max_frames: 257,
                trained_frames: 81,
                has_one_length: false,
            }),
        }
    }

    fn picture(width: usize, height: usize) -> Arc<Frame> {
        Arc::new(Frame { width, height, rgb: vec![0; 3 * width * height] })
    }

    /// `round(sqrt(480 * 832 * aspect)) // 16 * 16` of the example.
    #[test]
    fn without_a_size_a_video_has_the_aspect_of_its_picture() {
        for ((width, height), expected) in
            [((832, 480), (832, 480)), ((100, 100), (624, 624)), ((90, 160), (464, 832)), ((9000, 3), (1536, 16))]
        {
            let asked = Asked { first: picture(width, height), middle: Vec::new(), last: None };
            assert_eq!(asked.own_size(&canvas()), expected, "{width}x{height}");
        }
    }

    #[test]
    fn a_model_says_which_pictures_it_takes() {
        let first = || Options::default().with(&INPUT_REFERENCE, picture(4, 4));
        let both = || first().with(&LAST_IMAGE, picture(4, 4));
        let field = |support, options: Options| match asked(support, &options) {
            Ok(asked) => asked.map_or("none", |asked| if asked.last.is_some() { "both" } else { "first" }).to_owned(),
            Err(error) => error.to_string().split(':').next().unwrap_or_default().to_owned(),
        };
        use KeyframeSupport::{First, FirstAndLast};
        assert_eq!(field(None, Options::default()), "none");
        assert_eq!(field(None, both()), "input_reference");
        assert_eq!(field(Some(First), Options::default()), "input_reference");
        assert_eq!(field(Some(First), first()), "first");
        assert_eq!(field(Some(First), both()), "last_image");
        assert_eq!(field(Some(FirstAndLast), first()), "last_image");
        assert_eq!(field(Some(FirstAndLast), both()), "both");
    }
}

//! Size and length of what is made.
//!
//! Owns: `width`, `height`, `num_frames` and `fps`, and what a model allows of them.

use crate::error::{Error, Result};
use crate::memory::MAX_UNREAD_FRAME_BYTES;
use crate::parameter::{Declaration, Options, Parameter, VIDEOS, check_range};

/// Largest side that any model makes, in pixels.
const MAX_SIDE: usize = 16_384;
/// Longest video that any model makes, in frames.
const MAX_FRAMES: usize = 100_000;
/// Highest frame rate.
pub const MAX_FPS: usize = 120;

/// See [`Canvas::width`].
pub static WIDTH: Parameter<usize> = Parameter::integer(
    "width",
    1,
    MAX_SIDE,
    "Pixels; a multiple of what the model says. The model's own default when absent, of an edit the image's own width.",
)
.narrowed_by_models();

/// See [`Canvas::height`].
pub static HEIGHT: Parameter<usize> =
    Parameter::integer("height", 1, MAX_SIDE, "Pixels, as `width`; one may be given without the other.")
        .narrowed_by_models();

/// See [`Canvas::num_frames`].
pub static NUM_FRAMES: Parameter<usize> = Parameter::integer(
    "num_frames",
    1,
    MAX_FRAMES,
    "Frames of the video: one more than a multiple of what the model says, such as 4k+1.",
)
.only_for(VIDEOS)
.narrowed_by_models();

/// See [`Canvas::fps`].
pub static FPS: Parameter<usize> =
    Parameter::integer("fps", 1, MAX_FPS, "Frames per second of the file; changes no frame.").only_for(VIDEOS);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] =
    &[&WIDTH.declaration, &HEIGHT.declaration, &NUM_FRAMES.declaration, &FPS.declaration];

/// Size of an image, or size and length of a video.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canvas {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Frames of a video; 1 for an image.
    pub num_frames: usize,
    /// Frames per second of a video; 0 for an image.
    pub fps: usize,
}

impl Canvas {
    /// Of one frame.
    pub fn frame_bytes(&self) -> usize {
        3 * self.width * self.height
    }

    /// Most bytes of frames that a session keeps, of which so many are under way at a time: those, as many that have just become
    /// whole, and those that nobody has taken.
    pub fn kept_frame_bytes(&self, under_way: usize) -> usize {
        let all = self.num_frames * self.frame_bytes();
        all.min(2 * under_way * self.frame_bytes() + MAX_UNREAD_FRAME_BYTES)
    }

    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&WIDTH, self.width);
        options.set(&HEIGHT, self.height);
        if self.fps > 0 {
            options.set(&NUM_FRAMES, self.num_frames);
            options.set(&FPS, self.fps);
        }
    }
}

/// What a model can make, and what it makes unless told otherwise.
#[derive(Debug, Clone, Copy)]
pub struct CanvasSupport {
    /// Pixels.
    pub default_width: usize,
    /// Pixels.
    pub default_height: usize,
    /// Width and height must be multiples of this.
    pub size_multiple: usize,
    /// Largest width and height.
    pub max_side: usize,
    /// Most pixels of one frame.
    pub max_pixels: usize,
    /// What else there is to say of sizes.
    pub sizes: SizeRule,
    /// Of models that make videos.
    pub frames: Option<FrameSupport>,
}

/// Which of the sizes within its bounds a model makes, and which one unless told otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeRule {
    /// All of them; without a size a video has the aspect of the picture that it begins with.
    AspectOfPicture,
    /// Those of at most so many pixels across and down; without a size the default one.
    Within {
        /// Largest width.
        width: usize,
        /// Largest height.
        height: usize,
    },
    /// The default one.
    OnlyDefault,
}

/// The frames that a model of videos can make.
#[derive(Debug, Clone, Copy)]
pub struct FrameSupport {
    /// Where the client gives no `num_frames`.
    pub default_num_frames: usize,
    /// Where the client gives no `fps`.
    pub default_fps: usize,
    /// `num_frames` must be `multiple * k + 1`.
    pub multiple: usize,
    /// Most frames that are made at once.
    pub max_frames: usize,
    /// Most frames that the model was trained to make at once.
    pub trained_frames: usize,
    /// Whether that is the only number of frames that the model has positions for.
    pub has_one_length: bool,
}

impl CanvasSupport {
    /// `image`: the field and the size of the image that the request begins from. As in diffusers the result has that size,
    /// down to what the model can make, unless the client gives another.
    /// A video has `num_frames`, which have been checked.
    pub(super) fn resolve(
        &self,
        options: &Options,
        image: Option<(&str, (usize, usize))>,
        num_frames: usize,
    ) -> Result<Canvas> {
        let own = |side: usize| side - side % self.size_multiple;
        let (default_width, default_height) = match image {
            Some((_, (width, height))) => (own(width), own(height)),
            None => (self.default_width, self.default_height),
        };
        let fps = self.frames.map_or(Ok(0), |frames| frames.fps(options))?;
        let canvas = Canvas {
            width: options.get(&WIDTH).unwrap_or(default_width),
            height: options.get(&HEIGHT).unwrap_or(default_height),
            num_frames,
            fps,
        };
        let has_own_size = !options.has(&WIDTH) && !options.has(&HEIGHT);
        self.check_size(&canvas).map_err(|error| match image {
            Some((field, (width, height))) if has_own_size => {
                let problem = format!("is {width}x{height}, a size that this model does not make");
                Error::invalid(field, format!("{problem} ({error}); give width and height"))
            }
            _ => error,
        })?;
        Ok(canvas)
    }

    fn check_size(&self, canvas: &Canvas) -> Result<()> {
        let [max_width, max_height] = match self.sizes {
            SizeRule::Within { width, height } => [width.min(self.max_side), height.min(self.max_side)],
            SizeRule::AspectOfPicture | SizeRule::OnlyDefault => [self.max_side; 2],
        };
        let sides = [
            ("width", canvas.width, self.default_width, max_width),
            ("height", canvas.height, self.default_height, max_height),
        ];
        for (field, pixels, own, max) in sides {
            let multiple = self.size_multiple;
            let problem = if self.sizes == SizeRule::OnlyDefault && pixels != own {
                format!("is {pixels}; allowed: {own}, the only size that this model was made for")
            } else if pixels == 0 || pixels % multiple != 0 || pixels > max {
                format!("is {pixels}; allowed: multiples of {multiple} from {multiple} to {max}")
            } else {
                continue;
            };
            return Err(Error::invalid(field, problem));
        }
        let Canvas { width, height, .. } = canvas;
        let pixels = width * height;
        if pixels > self.max_pixels {
            let problem = format!("{width}x{height} has {pixels} pixels; at most {}", self.max_pixels);
            return Err(Error::invalid("size", problem));
        }
        Ok(())
    }
}

impl FrameSupport {
    /// Refuses a number of frames that no video of at most `max_frames` has.
    pub(super) fn check(&self, num_frames: usize, max_frames: usize) -> Result<()> {
        let multiple = self.multiple;
        if num_frames == 0 || num_frames % multiple != 1 % multiple || num_frames > max_frames {
            let problem = format!("is {num_frames}; allowed: {multiple}k+1 from 1 to {max_frames}");
            return Err(Error::invalid("num_frames", problem));
        }
        Ok(())
    }

    /// Frames per second.
    fn fps(&self, options: &Options) -> Result<usize> {
        let fps = options.get(&FPS).unwrap_or(self.default_fps);
        check_range("fps", fps, 1, MAX_FPS)?;
        Ok(fps)
    }
}

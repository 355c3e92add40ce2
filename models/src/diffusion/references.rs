//! Images whose look is followed.
//!
//! Owns: `reference_images` and `ip_adapter_scale`. Does not know: what an adapter makes of them.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::frame::Frame;
use crate::parameter::{Declaration, IMAGES, Options, Parameter};

/// Most reference images of one request.
pub const MAX_REFERENCE_IMAGES: usize = 8;
/// Most pixels of all of them together.
pub const MAX_REFERENCE_PIXELS: usize = 1 << 25;
/// As diffusers loads an adapter.
const DEFAULT_IP_ADAPTER_SCALE: f64 = 1.0;

/// See [`References::images`].
pub static REFERENCE_IMAGES: Parameter<Vec<Arc<Frame>>> = Parameter::images(
    "reference_images",
    MAX_REFERENCE_IMAGES,
    "Images whose look is followed, in any sizes, for models that are served with an IP-Adapter.",
)
.only_for(IMAGES)
.flag("reference");

/// See [`References::scale`].
pub static IP_ADAPTER_SCALE: Parameter<f64> = Parameter::number(
    "ip_adapter_scale",
    0.0,
    1.0,
    "How much of the reference images is followed; 1 when absent, as in diffusers.",
)
.only_for(IMAGES);

/// The parameters of this capability.
pub(super) static PARAMETERS: &[&Declaration] = &[&REFERENCE_IMAGES.declaration, &IP_ADAPTER_SCALE.declaration];

/// Images that an IP-Adapter follows.
#[derive(Debug, Clone, PartialEq)]
pub struct References {
    /// In any sizes, at least one.
    pub images: Vec<Arc<Frame>>,
    /// How much of them is followed: diffusers' scale of the adapter.
    pub scale: f64,
}

impl References {
    /// The images themselves are not echoed.
    pub(super) fn echo(&self, options: &mut Options) {
        options.set(&IP_ADAPTER_SCALE, self.scale);
    }

    pub(super) fn resolve(is_supported: bool, options: &Options) -> Result<Option<Self>> {
        let images = options.get(&REFERENCE_IMAGES).unwrap_or_default();
        let scale = options.get(&IP_ADAPTER_SCALE);
        if !is_supported && (!images.is_empty() || scale.is_some()) {
            let field = if images.is_empty() { "ip_adapter_scale" } else { "reference_images" };
            return Err(Error::invalid(field, "this model is served without an IP-Adapter; leave it out"));
        }
        if images.is_empty() {
            return match scale {
                None => Ok(None),
                Some(_) => {
                    Err(Error::invalid("ip_adapter_scale", "has no effect without reference_images; leave it out"))
                }
            };
        }
        let pixels: usize = images.iter().map(|image| image.width * image.height).sum();
        if pixels > MAX_REFERENCE_PIXELS {
            let problem = format!("have {pixels} pixels together; at most {MAX_REFERENCE_PIXELS}");
            return Err(Error::invalid("reference_images", problem));
        }
        Ok(Some(Self { images, scale: scale.unwrap_or(DEFAULT_IP_ADAPTER_SCALE) }))
    }
}

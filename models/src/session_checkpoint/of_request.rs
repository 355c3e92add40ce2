//! What makes two requests the same: every parameter, every pixel of their pictures, the content of their LoRA files.

use std::fmt::Write;

use sha2::{Digest as _, Sha256};

use super::Digest;
use crate::diffusion::{DiffusionRequest, Edit, Keyframes, References};
use crate::frame::{Frame, Mask};

/// Of a request for a picture or a clip. Parameters count as they are printed, which says all of them.
pub fn digest_of(request: &DiffusionRequest) -> Digest {
    // By name, so that whoever adds one has to say what of it is not printed.
    let DiffusionRequest {
        prompt,
        canvas,
        sampling,
        guidance,
        acceleration,
        cache,
        loras,
        vae_tiling,
        partial_images,
        edit,
        references,
        keyframes,
        shot,
        refinement,
    } = request;
    let mut printed = Printed(Sha256::new());
    printed.add(&(prompt, canvas, sampling, guidance, acceleration, cache, vae_tiling, partial_images));
    printed.add(&(edit, references, keyframes, shot, refinement));
    for lora in loras {
        printed.add(&(&lora.name, lora.weight.to_bits(), lora.file.digest()));
    }
    let Printed(mut digest) = printed;
    if let Some(Edit { image, mask, .. }) = edit {
        add_frame(&mut digest, image);
        mask.iter().for_each(|mask| add_mask(&mut digest, mask));
    }
    if let Some(References { images, .. }) = references {
        images.iter().for_each(|image| add_frame(&mut digest, image));
    }
    if let Some(Keyframes { first, middle, last }) = keyframes {
        for keyframe in std::iter::once(first).chain(middle).chain(last) {
            add_frame(&mut digest, &keyframe.given);
            add_frame(&mut digest, &keyframe.fitted);
        }
    }
    digest.finalize().into()
}

/// What is printed goes straight into the digest: matrices of ratios are long.
struct Printed(Sha256);

impl Printed {
    fn add(&mut self, value: &dyn std::fmt::Debug) {
        writeln!(self, "{value:?}").expect("a digest takes everything: this is a bug");
    }
}

impl Write for Printed {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.update(text.as_bytes());
        Ok(())
    }
}

// Sizes are printed with the parameters.
fn add_frame(digest: &mut Sha256, Frame { rgb, .. }: &Frame) {
    digest.update(rgb);
}

fn add_mask(digest: &mut Sha256, Mask { grey, .. }: &Mask) {
    digest.update(grey);
}

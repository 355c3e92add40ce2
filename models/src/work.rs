//! What a step has to do at least, counted from configurations and shapes: the yardstick of its time.
//!
//! Operations are multiplications and additions of matrix products, convolutions and attention; norms, activations and
//! rotations are left out, being some per cent at most. Bytes are those of weights, once per pass, and of the keys and
//! values that decoding looks at; activations are left out, since a good kernel keeps most of them from memory.

use std::iter::Sum;
use std::ops::Add;

/// Least work of a step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StepWork {
    /// Multiplications and additions, each counted.
    pub flops: f64,
    /// Bytes read from the device's memory.
    pub bytes: f64,
}

impl Add for StepWork {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Sum for StepWork {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::default(), Add::add)
    }
}

/// Of `rows` vectors times a matrix of so many elements.
pub(crate) fn linear_flops(rows: usize, elements: usize) -> f64 {
    2.0 * rows as f64 * elements as f64
}

/// Of `pairs` of a query and a key that it looks at, over all heads together `width` wide: the score and the sum.
pub(crate) fn attention_flops(pairs: f64, width: usize) -> f64 {
    4.0 * pairs * width as f64
}

/// Of a convolution of `taps` values per channel that gives `positions` vectors.
pub(crate) fn conv_flops(in_channels: usize, out_channels: usize, taps: usize, positions: usize) -> f64 {
    linear_flops(positions, in_channels * out_channels * taps)
}

#[cfg(test)]
mod tests {
    //! Held against counts that were made elsewhere, for the published sizes.

    use serde::de::DeserializeOwned;

    use crate::checkpoint::{CONFIG, Folder, Manifest};
    use crate::encoders::t5::{T5Config, T5Kind};
    use crate::families::flux::transformer::FluxTransformerConfig;
    use crate::families::sdxl::config::UNetConfig;
    use crate::families::wan::WanConfig;
    use crate::layers::decoder::StepSizes;
    use crate::presets::{Configurations, Preset};
    use crate::vae::kl::KlConfig;
    use crate::vae::wan::WanVaeConfig;

    fn folder(preset: &str) -> Configurations {
        Configurations::of_preset(preset.parse::<&Preset>().expect("is in the table")).expect("can be written")
    }

    fn config<T: DeserializeOwned>(preset: &str, component: &str) -> T {
        let folder = folder(preset);
        let manifest = Manifest::read(folder.path()).expect("a checkpoint");
        manifest.component(component).expect("is there").config().expect("is sound")
    }

    /// To the digits that are given.
    #[track_caller]
    fn check(flops: f64, tera_flops: f64, tolerance: f64) {
        let found = flops / 1e12;
        assert!((found - tera_flops).abs() <= tolerance, "{found} TFLOP, expected {tera_flops}");
    }

    #[test]
    fn flux_has_the_operations_of_its_size() {
        let dev: FluxTransformerConfig = config("flux.1-dev", "transformer");
        check(dev.flops(512, 4096), 74.4, 0.05);
        let schnell: FluxTransformerConfig = config("flux.1-schnell", "transformer");
        check(schnell.flops(256, 4096), 69.5, 0.05);
        check(config::<KlConfig>("flux.1-dev", "vae").decode_flops(128, 128), 10.47, 0.05);
        let folder = folder("flux.1-dev");
        let folder = Folder::new(folder.path().join("text_encoder_2"));
        let fields = folder.whole().fields(CONFIG).expect("is there");
        let t5 = T5Config::read(&fields, T5Kind::T5).expect("is sound");
        check(t5.flops(512), 5.0, 0.5);
    }

    #[test]
    fn sdxl_has_the_operations_of_its_size() {
        let unet: UNetConfig = config("sdxl", "unet");
        check(unet.flops(77, (128, 128)), 6.76, 0.02);
        check(config::<KlConfig>("sdxl", "vae").decode_flops(128, 128), 10.47, 0.05);
    }

    #[test]
    fn wan_has_the_operations_of_its_size() {
        // 480 x 832 is 60 x 104 latents; 81 frames are 21.
        let small: WanConfig = config("wan2.1-t2v-1.3b", "transformer");
        check(small.flops(21 * 60 * 104, 512), 283.0, 0.5);
        let large: WanConfig = config("wan2.1-t2v-14b", "transformer");
        check(large.flops(21 * 60 * 104, 512), 1678.0, 1.0);
        check(large.flops(21 * 90 * 160, 512), 6523.0, 1.5);
        let vae: WanVaeConfig = config("wan2.1-t2v-14b", "vae");
        let clip = |frames: usize, height, width| {
            vae.decode_flops(height, width, true) + (frames - 1) as f64 * vae.decode_flops(height, width, false)
        };
        check(clip(21, 60, 104), 275.0, 2.0);
        check(clip(21, 90, 160), 639.0, 5.0);
        check(clip(33, 60, 104), 438.0, 3.0);
    }

    #[test]
    fn a_token_takes_two_operations_for_each_parameter() {
        let folder = folder("llama-3.1-8b");
        let manifest = Manifest::read(folder.path()).expect("a checkpoint");
        let config = crate::families::llama::decoder_config(&manifest).expect("is sound");
        // 8.03 B parameters, of which the embedding is looked up.
        let mut decode = StepSizes::default();
        decode.push(0, 1, true);
        check(config.flops(&decode), 2.0 * (8.030 - 0.525) * 1e-3, 1e-5);
        // A prompt of 2048 tokens: 30.7 TFLOP is the count for 7.5 B and no attention; ours has no logits but one.
        let mut prefill = StepSizes::default();
        prefill.push(0, 2048, true);
        let attention = 32.0 * 4.0 * (2048.0 * 2049.0 / 2.0) * 4096.0;
        check(config.flops(&prefill) - attention, 2.0 * 2048.0 * 6.98e-3, 0.01);
    }

    #[test]
    fn a_sequence_adds_what_it_looks_at() {
        let mut sizes = StepSizes::default();
        sizes.push(10, 1, true);
        sizes.push(0, 3, false);
        assert_eq!(sizes, StepSizes { rows: 4, attended: 11 + 6, context: 11 + 3, logit_rows: 1 });
    }
}

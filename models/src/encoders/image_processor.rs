//! Pictures of any size to what CLIP's vision encoder sees: resized, cropped in the middle, normalised.
//!
//! Owns: `preprocessor_config.json` and the arithmetic of the reference. Does not know: files, encoders, filters. Source:
//! transformers `CLIPImageProcessor` (`image_transforms.py`: `get_resize_output_image_size`, `center_crop`).

use std::ops::Range;

use candle_core::{Device, Tensor};
use serde::Deserialize;

use crate::checkpoint::{CONFIG, Component};
use crate::config::bounds::MAX_SCALE;
use crate::config::{Bound, Bounded};
use crate::error::{Error, Result};
use crate::request::Frame;
use crate::resample::Filter;

const FILE_NAME: &str = "preprocessor_config.json";
/// Names that the class has had.
const CLASSES: [&str; 4] =
    ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"];
/// Pillow's number of the bicubic filter.
const BICUBIC: u32 = 3;
/// What a side may be.
const MAX_SIDE: usize = 1 << 12;

/// `CLIPImageProcessor`, ready to use.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipImageProcessor {
    size: Size,
    /// Height and width of what comes out.
    crop: (usize, usize),
    rescale_factor: f64,
    mean: [f32; 3],
    std: [f32; 3],
}

/// What a picture is resized to before it is cropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Size {
    ShortestEdge(usize),
    Exactly { height: usize, width: usize },
}

/// `preprocessor_config.json`; absent fields have the class's defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Config {
    #[serde(alias = "feature_extractor_type")]
    image_processor_type: String,
    do_resize: bool,
    do_center_crop: bool,
    do_rescale: bool,
    do_normalize: bool,
    size: Edges,
    crop_size: Edges,
    resample: u32,
    rescale_factor: f64,
    image_mean: [f32; 3],
    image_std: [f32; 3],
}

/// One number, or numbers by name.
#[derive(Deserialize, Clone, Copy)]
#[serde(untagged)]
enum Edges {
    One(usize),
    Shortest { shortest_edge: usize },
    Both { height: usize, width: usize },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            image_processor_type: CLASSES[0].to_owned(),
            do_resize: true,
            do_center_crop: true,
            do_rescale: true,
            do_normalize: true,
            size: Edges::One(224),
            crop_size: Edges::One(224),
            resample: BICUBIC,
            rescale_factor: 1.0 / 255.0,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        }
    }
}

impl Bounded for Config {
    /// Sizes may be named in an object, and are looked at where all their spellings are known.
    const BOUNDS: &'static [Bound] = &[
        Bound::scale("rescale_factor"),
        Bound::number("image_mean", -MAX_SCALE, MAX_SCALE),
        Bound::scale("image_std"),
    ];
}

impl ClipImageProcessor {
    /// What `preprocessor_config.json` of the component says, for an encoder of pictures of this side. Where there is none,
    /// what diffusers takes: the class's defaults with the encoder's own size.
    pub fn read_or_default(component: Component<'_>, image_size: usize) -> Result<Self> {
        let side = Edges::One(image_size);
        let (config, file) = match component.fields_if_present(FILE_NAME)? {
            Some(fields) => (fields.all()?, FILE_NAME),
            None => (Config { size: side, crop_size: side, ..Config::default() }, CONFIG),
        };
        Self::new(&config, image_size).map_err(|problem| Error::checkpoint(component.path(file), problem))
    }

    fn new(config: &Config, image_size: usize) -> std::result::Result<Self, String> {
        if !CLASSES.contains(&config.image_processor_type.as_str()) {
            return Err(format!("is of a {}; supported is CLIPImageProcessor", config.image_processor_type));
        }
        let stages = [
            ("do_resize", config.do_resize),
            ("do_center_crop", config.do_center_crop),
            ("do_rescale", config.do_rescale),
            ("do_normalize", config.do_normalize),
        ];
        if let Some((field, _)) = stages.into_iter().find(|(_, wanted)| !wanted) {
            return Err(format!("{field} is false; only true is supported"));
        }
        if config.resample != BICUBIC {
            return Err(format!("resample is {}; only {BICUBIC} (bicubic) is supported", config.resample));
        }
        let size = match config.size {
            Edges::One(edge) | Edges::Shortest { shortest_edge: edge } => Size::ShortestEdge(edge),
            Edges::Both { height, width } => Size::Exactly { height, width },
        };
        let crop = match config.crop_size {
            Edges::One(side) => (side, side),
            Edges::Both { height, width } => (height, width),
            Edges::Shortest { .. } => return Err("crop_size has no height and width".to_owned()),
        };
        if crop != (image_size, image_size) {
            let (height, width) = crop;
            return Err(format!("crop_size is {height}x{width}, but image_size of the encoder is {image_size}"));
        }
        let (Size::ShortestEdge(a) | Size::Exactly { height: a, .. }) = size;
        let (Size::ShortestEdge(b) | Size::Exactly { width: b, .. }) = size;
        if [a, b, image_size].into_iter().any(|side| !(1..=MAX_SIDE).contains(&side)) {
            return Err(format!("a size is not in 1 to {MAX_SIDE}"));
        }
        let (mean, std) = (config.image_mean, config.image_std);
        Ok(Self { size, crop, rescale_factor: config.rescale_factor, mean, std })
    }

    /// `pixel_values [1, 3, height, width]`, f32.
    pub fn pixel_values(&self, picture: &Frame, device: &Device) -> Result<Tensor> {
        let (height, width) = self.crop;
        let bytes = self.cropped(picture);
        let mut values = Vec::with_capacity(bytes.len());
        for (mean, std) in self.mean.iter().zip(self.std) {
            let channel = values.len() / (height * width);
            let bytes = bytes.iter().skip(channel).step_by(3);
            values.extend(bytes.map(|byte| ((f64::from(*byte) * self.rescale_factor) as f32 - mean) / std));
        }
        Ok(Tensor::from_vec(values, (1, 3, height, width), device)?)
    }

    /// RGB bytes of the crop, row by row. Of the resized picture only what the crop shows is computed, so that a very long
    /// one costs no more than its own pixels. A picture that is smaller than the crop lies in the middle of zeros.
    fn cropped(&self, picture: &Frame) -> Vec<u8> {
        let (crop_height, crop_width) = self.crop;
        let (height, width) = self.resized(picture.height, picture.width);
        let ((columns, left), (rows, top)) = (shown(width, crop_width), shown(height, crop_height));
        let part = picture.resized_part((width, columns), (height, rows), Filter::Bicubic);
        let mut cropped = vec![0; 3 * crop_height * crop_width];
        let targets = cropped.chunks_exact_mut(3 * crop_width).skip(top);
        for (target, row) in targets.zip(part.rgb.chunks_exact(3 * part.width)) {
            target[3 * left..][..row.len()].copy_from_slice(row);
        }
        cropped
    }

    /// Height and width before the crop; the longer side is rounded down.
    fn resized(&self, height: usize, width: usize) -> (usize, usize) {
        match self.size {
            Size::Exactly { height, width } => (height, width),
            Size::ShortestEdge(edge) if width <= height => (edge * height / width, edge),
            Size::ShortestEdge(edge) => (edge, edge * width / height),
        }
    }
}

/// What the middle `crop` of `all` pixels shows, and where in the crop that begins.
fn shown(all: usize, crop: usize) -> (Range<usize>, usize) {
    let start = (all as isize - crop as isize).div_euclid(2);
    let first = start.max(0) as usize;
    (first..all.min(first + crop), start.min(0).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Fields;

    fn processor(config: Value, image_size: usize) -> std::result::Result<ClipImageProcessor, String> {
        let fields = Fields::of("preprocessor_config.json".into(), config.to_string().as_bytes());
        let config = fields.and_then(|fields| fields.all()).map_err(|error| error.to_string())?;
        ClipImageProcessor::new(&config, image_size)
    }

    #[test]
    fn sizes_are_read_in_all_spellings() {
        let (shortest, both) = (json!({"shortest_edge": 30}), json!({"height": 30, "width": 30}));
        let expected = processor(json!({"size": 30, "crop_size": 30}), 30).expect("numbers");
        assert_eq!(processor(json!({"size": shortest, "crop_size": both}), 30).expect("names"), expected);
        assert_eq!(expected.resized(37, 53), (30, 42));
        assert_eq!(expected.resized(53, 37), (42, 30));
        let exactly = processor(json!({"size": both, "crop_size": both}), 30).expect("names");
        assert_eq!(exactly.resized(37, 53), (30, 30));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let check = |config: Value, image_size: usize, expected: &str| {
            let error = processor(config, image_size).expect_err("is refused");
            assert!(error.contains(expected), "expected `{expected}` in: {error}");
        };
        check(json!({}), 336, "crop_size is 224x224, but image_size of the encoder is 336");
        check(json!({"resample": 2}), 224, "resample is 2");
        check(json!({"do_center_crop": false}), 224, "do_center_crop");
        check(json!({"image_processor_type": "SiglipImageProcessor"}), 224, "SiglipImageProcessor");
        check(json!({"size": 0}), 224, "a size");
        check(json!({"image_std": [0.2, 0, 0.2]}), 224, "image_std");
        check(json!({"rescale_factor": 0}), 224, "rescale_factor");
    }

    /// `center_crop` of transformers: a picture that is smaller than the crop lies in the middle of zeros, the odd row
    /// above it.
    #[test]
    fn small_pictures_are_padded_with_zeros() {
        let small = processor(json!({"size": 2, "crop_size": 5}), 5).expect("sound");
        let picture = Frame { width: 2, height: 2, rgb: vec![200; 12] };
        let rows: Vec<Vec<u8>> =
            small.cropped(&picture).chunks(15).map(|row| row.iter().step_by(3).copied().collect()).collect();
        let (empty, full) = (vec![0; 5], vec![0, 0, 200, 200, 0]);
        assert_eq!(rows, [empty.clone(), empty.clone(), full.clone(), full, empty]);
    }

    /// A crop of one pixel's row of a picture thousands of times as wide as high reads what it shows, and no more.
    #[test]
    fn a_long_picture_costs_what_its_crop_shows() {
        let processor = processor(json!({}), 224).expect("sound");
        let picture = Frame { width: 60_000, height: 2, rgb: vec![77; 60_000 * 2 * 3] };
        assert_eq!(processor.resized(2, 60_000), (224, 6_720_000));
        assert!(processor.cropped(&picture).iter().all(|byte| *byte == 77));
    }
}

//! Where the tokens of a CogVideoX model stand: rotations of queries and keys, or a vector that is added to each token, or
//! both.
//!
//! Owns: both tables, and which model has which. Does not know: the network. Source: diffusers `models/embeddings.py`
//! (`CogVideoXPatchEmbed`, `get_3d_sincos_pos_embed`, `get_3d_rotary_pos_embed`), `pipelines/cogvideo/pipeline_cogvideox.py`
//! (`_prepare_rotary_positional_embeddings`). A grid is frames, rows and columns of patches.

use candle_core::{Device, Tensor};

use super::config::CogVideoXConfig;
use crate::error::Result;
use crate::linspace::torch_linspace;
use crate::weights::Weights;

/// Base of the frequencies of rotations and of sinusoids.
const THETA: f64 = 10_000.0;

/// What a model has beside rotations.
pub(super) enum Positions {
    /// Nothing.
    None,
    /// Sinusoids of frame, row and column.
    Computed,
    /// A learned vector of each token of one grid, of text and video: `[1, s + l, dim]`. Another number of frames takes
    /// sinusoids, as in the reference.
    Learned(Tensor),
}

/// Vectors that are added to tokens.
pub(super) struct Table {
    /// `[1, s, dim]` in the compute dtype; nothing is added without it.
    pub(super) text: Option<Tensor>,
    /// `[1, l, dim]`
    pub(super) video: Tensor,
}

/// By how much the heads of each token are turned: text not at all.
#[derive(Debug)]
pub struct Rotations {
    /// f32 `[s + l, head_dim / 2]`.
    pub(super) cos: Tensor,
    /// f32 `[s + l, head_dim / 2]`.
    pub(super) sin: Tensor,
}

impl Positions {
    /// Tensor `pos_embedding`, where it is learned.
    pub(super) fn load(patch_embed: &Weights, config: &CogVideoXConfig) -> Result<Self> {
        if config.use_learned_positional_embeddings {
            let tokens = config.max_text_seq_length + config.own_grid().iter().product::<usize>();
            return Ok(Self::Learned(patch_embed.get(&[1, tokens, config.dim()], "pos_embedding")?));
        }
        // Some conversions keep what is computed.
        patch_embed.ignore("pos_embedding");
        Ok(if config.use_rotary_positional_embeddings { Self::None } else { Self::Computed })
    }

    /// Of a grid, which has the model's own rows and columns where they are learned.
    pub(super) fn table(&self, grid: [usize; 3], config: &CogVideoXConfig, device: &Device) -> Result<Option<Table>> {
        match self {
            Self::None => Ok(None),
            Self::Learned(table) if config.is_own(grid) => {
                let text = config.max_text_seq_length;
                Ok(Some(Table {
                    text: Some(table.narrow(1, 0, text)?),
                    video: table.narrow(1, text, table.dim(1)? - text)?,
                }))
            }
            Self::Learned(_) | Self::Computed => {
                Ok(Some(Table { text: None, video: sinusoids(grid, config, device)? }))
            }
        }
    }

    /// Of a grid behind so many tokens of text; `None` where nothing is turned.
    pub(super) fn rotations(
        &self,
        grid: [usize; 3],
        text: usize,
        config: &CogVideoXConfig,
        device: &Device,
    ) -> Result<Option<Rotations>> {
        let new = || rotations(grid, text, config, device);
        config.use_rotary_positional_embeddings.then(new).transpose()
    }
}

/// f32 `[1, l, dim]`: a quarter of each vector of the frame, three eighths of the column, as many of the row; of each
/// first sines, then cosines.
fn sinusoids([frames, rows, columns]: [usize; 3], config: &CogVideoXConfig, device: &Device) -> Result<Tensor> {
    let dim = config.dim();
    let (of_time, of_side) = (dim / 4, 3 * dim / 8);
    let table = |count: usize, scale: f64, width: usize| -> Result<Tensor> {
        let mut values = Vec::with_capacity(count * width);
        for index in 0..count {
            let position = f64::from(index as f32 / scale as f32);
            let angles = (0..width / 2).map(|i| position / THETA.powf(i as f64 / (width as f64 / 2.0)));
            values.extend(angles.clone().map(|angle| angle.sin() as f32));
            values.extend(angles.map(|angle| angle.cos() as f32));
        }
        Ok(Tensor::from_vec(values, (count, width), device)?)
    };
    let along = |table: Tensor, dims: [usize; 4], width: usize| -> Result<Tensor> {
        Ok(table.reshape((dims[0], dims[1], dims[2], width))?.broadcast_as((frames, rows, columns, width))?)
    };
    let spatial = config.spatial_interpolation_scale;
    let time = table(frames, config.temporal_interpolation_scale, of_time)?;
    let parts = [
        along(time, [frames, 1, 1, of_time], of_time)?,
        along(table(columns, spatial, of_side)?, [1, 1, columns, of_side], of_side)?,
        along(table(rows, spatial, of_side)?, [1, rows, 1, of_side], of_side)?,
    ];
    Ok(Tensor::cat(&parts, 3)?.reshape((1, frames * rows * columns, dim))?)
}

fn rotations(
    [frames, rows, columns]: [usize; 3],
    text: usize,
    config: &CogVideoXConfig,
    device: &Device,
) -> Result<Rotations> {
    let head_dim = config.attention_head_dim;
    let whole = |count: usize| (0..count).map(|index| index as f32).collect();
    let [of_rows, of_columns] = match config.patch_size_t {
        Some(_) => [whole(rows), whole(columns)],
        None => stretched([rows, columns], config),
    };
    // A quarter of each head turns with time, three eighths each with rows and columns.
    let (of_time, of_side) = (head_dim / 4, head_dim / 8 * 3);
    let axes = [angles(&whole(frames), of_time), angles(&of_rows, of_side), angles(&of_columns, of_side)];
    let len = (text + frames * rows * columns) * head_dim / 2;
    let still = text * head_dim / 2;
    let (mut cos, mut sin) = (vec![1f32; still], vec![0f32; still]);
    cos.reserve(len - still);
    sin.reserve(len - still);
    for frame in 0..frames {
        for row in 0..rows {
            for column in 0..columns {
                for ((cosines, sines, width), position) in axes.iter().zip([frame, row, column]) {
                    let place = position * width..(position + 1) * width;
                    cos.extend_from_slice(&cosines[place.clone()]);
                    sin.extend_from_slice(&sines[place]);
                }
            }
        }
    }
    let table = |values| Tensor::from_vec(values, (len / (head_dim / 2), head_dim / 2), device);
    Ok(Rotations { cos: table(cos)?, sin: table(sin)? })
}

/// Cosines and sines of the angles at each position of one axis, so many for a position. Rounded to f32 as the reference
/// rounds them.
fn angles(positions: &[f32], dim: usize) -> (Vec<f32>, Vec<f32>, usize) {
    let width = dim / 2;
    let frequency = |pair: usize| 1.0 / (THETA.powf(f64::from((2 * pair) as f32 / dim as f32)) as f32);
    let frequencies: Vec<f32> = (0..width).map(frequency).collect();
    let angles = positions.iter().flat_map(|position| frequencies.iter().map(move |frequency| position * frequency));
    let (cosines, sines) = angles.map(|angle| (f64::from(angle).cos() as f32, f64::from(angle).sin() as f32)).unzip();
    (cosines, sines, width)
}

/// Positions of rows and columns of another grid than the model's own: its picture is fitted into that of the model's, and
/// stands in the middle of it (`get_resize_crop_region_for_grid`).
fn stretched([rows, columns]: [usize; 2], config: &CogVideoXConfig) -> [Vec<f32>; 2] {
    let [_, own_rows, own_columns] = config.own_grid().map(|count| count as f64);
    let aspect = rows as f64 / columns as f64;
    let (height, width) = match aspect > own_rows / own_columns {
        true => (own_rows, (own_rows / rows as f64 * columns as f64).round_ties_even()),
        false => ((own_columns / columns as f64 * rows as f64).round_ties_even(), own_columns),
    };
    let top = ((own_rows - height) / 2.0).round_ties_even();
    let left = ((own_columns - width) / 2.0).round_ties_even();
    [evenly(top, top + height, rows), evenly(left, left + width, columns)]
}

/// `count` positions from `start` on, up to but without `end` if that is a step of them further.
fn evenly(start: f64, end: f64, count: usize) -> Vec<f32> {
    torch_linspace(start as f32, (end * (count - 1) as f64 / count as f64) as f32, count)
}

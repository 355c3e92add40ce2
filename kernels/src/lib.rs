//! One function per operation on tensors; the CPU version is the specification.
//!
//! Owns: matrix products, attention, norms, rotary embeddings, activations, convolutions. Does not know: models,
//! requests, checkpoints. Activations are f32 on the CPU; weight matrices may be f32, bf16, f16 or quantised. Every function
//! checks its shapes and names the operation in its error.
//!
//! Rows are independent and computed in one order: row i of a result has the same bits whatever else is in the batch.

// Tiles in registers are indexed by constants once loops are unrolled; iterators over them are harder to see through.
#![allow(clippy::needless_range_loop)]

mod activation;
mod attention;
#[doc(hidden)]
pub mod bench;
mod change;
mod conv;
mod dot;
mod e4m3;
mod flash;
#[cfg(gpu)]
mod gpu;
mod group_norm;
mod heap;
mod layout;
mod linear;
mod math;
mod norm;
mod outer;
mod paged;
mod parallel;
mod recording;
mod rope;
mod row;
mod sample;
mod simd;
mod sum;
#[cfg(test)]
mod testing;
mod upsample;
mod view;
pub mod work;

pub use activation::{Gelu, geglu, gelu_erf, gelu_tanh, quick_gelu, silu, silu_mul};
pub use attention::{AttentionOptions, attention};
pub use change::relative_l1;
pub use conv::{CausalOptions, CausalPadding, ConvOptions, causal_conv3d, conv_weight, conv2d, conv3d};
#[cfg(feature = "emulator")]
pub use gpu::emulated;
pub use group_norm::{
    SpatialNorm, group_norm, group_norm_silu, rms_norm_channels, rms_norm_channels_silu, spatial_norm_silu,
};
pub use heap::{give_back_freed_memory, keep_freed_memory, share_one_heap};
pub use layout::{cat, transpose};
pub use linear::{
    Code, CodeScales, PackedMatrix, QuantisedMatrix, embedding, embedding_quantised, linear, linear_packed,
    linear_quantised,
};
pub use norm::{add_rms_norm, gated_sum, layer_norm, modulated_layer_norm, rms_norm};
pub use paged::{ByteFormat, PagedBatch, PagedCache, PreparedBatch, paged_attention, write_kv};
pub use recording::{Recording, can_record, copy_into};
pub use rope::{Layout as RopeLayout, Norm as QkNorm, norm_rope, rope_half, rope_interleaved};
pub use sample::{Choice, Draw, Mask, Penalties, sample};
pub use simd::{Isa, isa};
pub use sum::{sum, sum_channels};
pub use upsample::upsample_nearest2d;

//! Blocks of quantised values that lie in a safetensors file, where they are bytes to its header.
//!
//! Owns: which tensors are such, and what they stand for. Does not know: what is in a block.
//!
//! Source of the convention: ComfyUI-CogVideoX-MZ, `mz_gguf_loader.py` (`WQLinear_GGUF`), in which CogVideoX is shared: in place
//! of a layer's `weight [out, in]` there is `Q4_0_qweight [out, bytes]`, the rows of a GGUF file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::quantized::GgmlDType;
use memmap2::Mmap;
use safetensors::Dtype;

use super::mapped::Located;
use super::stored::Stored;
use crate::error::{Error, Result};

/// What lies in place of a layer's weight, and the type of its blocks. No other is shared.
const BYTES: &str = "Q4_0_qweight";
const BLOCKS: GgmlDType = GgmlDType::Q4_0;

/// Gives the weights that lie as bytes their name, shape and type.
pub(super) fn take_blocks(files: &[(PathBuf, Mmap)], tensors: &mut BTreeMap<String, Located>) -> Result<()> {
    let named = tensors.keys().filter(|name| name.rsplit('.').next() == Some(BYTES));
    for name in named.cloned().collect::<Vec<_>>() {
        let Some(located) = tensors.remove(&name) else { continue };
        let (block_values, block_bytes) = (BLOCKS.block_size(), BLOCKS.type_size());
        let problem = match (&located.shape[..], located.stored) {
            ([rows, bytes], Stored::Plain(Dtype::U8)) if bytes.is_multiple_of(block_bytes) => {
                let shape = vec![*rows, bytes / block_bytes * block_values];
                let weight = format!("{}weight", name.strip_suffix(BYTES).unwrap_or_default());
                let blocks = Located { stored: Stored::Blocks(BLOCKS), shape, ..located.clone() };
                match tensors.insert(weight.clone(), blocks) {
                    None => continue,
                    Some(_) => format!("`{weight}` is there too"),
                }
            }
            (shape, stored) => format!("{stored} {shape:?} is no rows of blocks of {block_bytes} bytes"),
        };
        return Err(Error::checkpoint(&files[located.file].0, format!("tensor `{name}`: {problem}")));
    }
    Ok(())
}

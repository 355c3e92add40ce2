//! Weight files for a checkpoint of which only the configurations exist: published shapes, random values. For benches,
//! which need sizes and not sense.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::json;

use crate::device::{DeviceSpec, Placement, WeightDtype};
use crate::error::{Error, Result};
use crate::family::wanted_tensors;

/// Writes `model.safetensors` into each component folder of the checkpoint at `root`, in `dtype` (F32, F16 or BF16), and
/// returns the bytes of all tensors.
///
/// Matrices are uniform with variance `1 / columns`, norm weights near 1, so that activations neither vanish nor grow.
pub fn write(root: &Path, dtype: Dtype) -> Result<usize> {
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto)?;
    let mut bytes = 0;
    for wanted in wanted_tensors(root, &placement)? {
        let path = root.join(&wanted.component).join("model.safetensors");
        bytes += write_file(&path, &wanted.tensors, dtype).map_err(|e| Error::checkpoint(path, e))?;
    }
    Ok(bytes)
}

fn write_file(path: &Path, tensors: &[(String, Vec<usize>)], dtype: Dtype) -> std::io::Result<usize> {
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
        header
            .insert(name.clone(), json!({"dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for (_, shape) in tensors {
        let (centre, spread) = match shape.as_slice() {
            [_] => (1.0, 0.1),
            [_, columns @ ..] => (0.0, (3.0 / columns.iter().product::<usize>() as f32).sqrt()),
            [] => (0.0, 1.0),
        };
        for _ in 0..shape.iter().product::<usize>() {
            let value = centre + spread * noise.next();
            match dtype {
                Dtype::BF16 => file.write_all(&bf16::from_f32(value).to_le_bytes())?,
                Dtype::F16 => file.write_all(&f16::from_f32(value).to_le_bytes())?,
                _ => file.write_all(&value.to_le_bytes())?,
            }
        }
    }
    file.flush()?;
    Ok(end)
}

/// xorshift64; uniform in -1..1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

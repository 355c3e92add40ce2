//! Networks that compute in fewer than 32 bits, and what is not finite of what they compute.

use candle_core::Tensor;

use super::course::Expert;
use crate::error::Result;
use crate::request::Phase;

/// What a family adds some of whose networks compute in fewer than 32 bits.
pub trait NarrowNetworks {
    /// Components of the checkpoint whose networks do the work of `phase` for `expert` in fewer than 32 bits, so that f32
    /// may help where it is not finite; none where they compute in f32 anyway.
    fn components(&self, phase: Phase, expert: Expert) -> &'static [&'static str];
}

/// For each tensor (f32, on one device) whether all its values are finite. One number for each leaves the device.
pub fn are_finite(tensors: &[Tensor]) -> Result<Vec<bool>> {
    // Zero times what is finite is zero, and NaN otherwise.
    let sums = tensors.iter().map(|x| x.affine(0.0, 0.0)?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(Tensor::stack(&sums, 0)?.to_vec1::<f32>()?.into_iter().map(|sum| sum == 0.0).collect())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_not_finite_is_found() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).expect("a tensor");
        let tensors = [
            tensor(&[0.0, -3e38]),
            tensor(&[1.0, f32::NAN]),
            tensor(&[f32::INFINITY]),
            tensor(&[f32::NEG_INFINITY, 1.0]),
        ];
        assert_eq!(are_finite(&tensors).expect("sums"), [true, false, false, false]);
    }
}

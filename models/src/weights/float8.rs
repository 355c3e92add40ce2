//! Numbers of eight bits: the two formats, and their values. All of a tensor may be multiplied with one scale.
//!
//! Owns: widening. Does not know: which tensor is a scale.

use half::f16;
use safetensors::Dtype;

/// How a tensor has its values in a byte each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Float8 {
    format: Format,
    /// Bits of an f32.
    scale: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Four bits of exponent, three of the fraction; no infinities (`torch.float8_e4m3fn`).
    E4m3,
    /// The upper half of an f16.
    E5m2,
}

impl Float8 {
    /// Of a dtype of safetensors, without a scale.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        let format = match dtype {
            Dtype::F8_E4M3 => Format::E4m3,
            Dtype::F8_E5M2 => Format::E5m2,
            _ => return None,
        };
        Some(Self { format, scale: 1f32.to_bits() })
    }

    /// The same with values that are so many times as large.
    pub(super) fn scaled_by(self, scale: f32) -> Self {
        Self { scale: scale.to_bits(), ..self }
    }

    /// Whether its values are more than eight bits can hold.
    pub(super) fn is_scaled(self) -> bool {
        self.scale() != 1.0
    }

    fn scale(self) -> f32 {
        f32::from_bits(self.scale)
    }

    /// The value of each byte, in f32.
    pub(super) fn values(self) -> [f32; 256] {
        std::array::from_fn(|byte| self.scale() * self.format.value(byte as u8))
    }

    /// As the dtype is called.
    pub(super) fn name(self) -> &'static str {
        match self.format {
            Format::E4m3 => "F8_E4M3",
            Format::E5m2 => "F8_E5M2",
        }
    }
}

impl Format {
    fn value(self, byte: u8) -> f32 {
        let magnitude = byte & 0x7f;
        match self {
            Self::E5m2 => f16::from_bits(u16::from(byte) << 8).to_f32(),
            Self::E4m3 if magnitude == 0x7f => f32::NAN,
            Self::E4m3 => {
                let (exponent, fraction) = (i32::from(magnitude >> 3), f32::from(magnitude & 7));
                // The bias is 7; numbers without an exponent have no leading one.
                let value = match exponent {
                    0 => fraction / 8.0 * 2f32.powi(-6),
                    _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
                };
                if byte & 0x80 == 0 { value } else { -value }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of torch's dtypes by their bytes.
    #[test]
    fn bytes_are_the_numbers_of_torch() {
        let e4m3 = Float8::of(Dtype::F8_E4M3).expect("known").values();
        for (byte, value) in
            [(0x00, 0.0), (0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0), (0x7e, 448.0), (0xc1, -2.25)]
        {
            assert_eq!(e4m3[byte], value, "{byte:#x}");
        }
        assert!(e4m3[0x7f].is_nan() && e4m3[0xff].is_nan());
        let e5m2 = Float8::of(Dtype::F8_E5M2).expect("known").values();
        for (byte, value) in [(0x3c, 1.0), (0x01, 2f32.powi(-16)), (0x7b, 57_344.0), (0xc2, -3.0)] {
            assert_eq!(e5m2[byte], value, "{byte:#x}");
        }
        assert!(e5m2[0x7c].is_infinite());
        assert_eq!(Float8::of(Dtype::F32), None);
        let scaled = Float8::of(Dtype::F8_E4M3).expect("known").scaled_by(0.25);
        assert!(scaled.is_scaled() && scaled.values()[0x38] == 0.25);
    }
}

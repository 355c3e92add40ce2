//! Floats of 8 bits, four of them of the exponent, three of the fraction, and no infinities (`torch.float8_e4m3fn`), as a cache
//! holds them.
//!
//! Owns: rounding and widening, by the operations of `common.cuh`, so that both give the same bits. Does not know: scales.

use crate::simd::{Element, Simd, e4m3_to_f32};

/// The largest of them.
pub(crate) const LARGEST: f32 = 448.0;
/// The smallest whose first digit is not zero, 2^-6, as bits of an f32; the distance of those below it is 2^-9.
const SMALLEST_NORMAL: u32 = 0x3c80_0000;
/// The code of [`LARGEST`]; the one above is NaN.
const LARGEST_CODE: u32 = 0x7e;
/// What is taken from an exponent of an f32 to be one of these.
const BIAS: u32 = 127 - 7;

/// A value by its code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct E4m3(u8);

impl E4m3 {
    /// The nearest one of a number that is not NaN, of two the one with an even code; the largest of what is beyond it.
    pub(crate) fn round(value: f32) -> Self {
        let all = value.to_bits();
        let bits = all & 0x7fff_ffff;
        let code = match bits < SMALLEST_NORMAL {
            // Eight of these steps are the smallest normal one, whose code is eight as well.
            true => (f32::from_bits(bits) * 512.0).round_ties_even() as u32,
            false => ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (BIAS << 3),
        };
        Self((all >> 24 & 0x80 | code.min(LARGEST_CODE)) as u8)
    }

    /// Its bits.
    pub(crate) fn code(self) -> u8 {
        self.0
    }

    /// Codes as values.
    pub(crate) fn of_codes(codes: &[u8]) -> &[Self] {
        // SAFETY: the same bytes, borrowed as long; the type is a byte, and any byte is a code.
        unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), codes.len()) }
    }
}

impl Element for E4m3 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { Self::load_partial(s, from, S::LANES) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        e4m3_to_f32(u32::from(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By its digits.
    fn value(code: u8) -> f32 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        let magnitude = match exponent {
            0 => fraction / 8.0 * 2f32.powi(-6),
            _ => (1.0 + fraction / 8.0) * 2f32.powi(exponent - 7),
        };
        if code < 128 { magnitude } else { -magnitude }
    }

    fn codes() -> impl Iterator<Item = u8> {
        (0..=255u8).filter(|code| code & 0x7f != 0x7f)
    }

    #[test]
    fn every_code_is_widened_to_its_value_and_rounded_to_itself() {
        for code in codes() {
            let codes = [code];
            let [found] = E4m3::of_codes(&codes) else { panic!("one code is one value") };
            assert_eq!(found.widen().to_bits(), value(code).to_bits(), "{code:#x}");
            assert_eq!(E4m3::round(value(code)).code(), code);
        }
        assert_eq!(value(LARGEST_CODE as u8), LARGEST);
    }

    #[test]
    fn what_lies_between_goes_to_the_nearest_and_ties_to_even_codes() {
        for code in 0..LARGEST_CODE as u8 {
            let (below, above) = (value(code), value(code + 1));
            let middle = (below + above) / 2.0;
            let even = if code % 2 == 0 { code } else { code + 1 };
            for (number, expected) in [(middle, even), (middle.next_down(), code), (middle.next_up(), code + 1)] {
                assert_eq!(E4m3::round(number).code(), expected, "{number}");
                assert_eq!(E4m3::round(-number).code(), expected | 0x80, "-{number}");
            }
        }
        for beyond in [LARGEST.next_up(), 464.0, 500.0, f32::MAX, f32::INFINITY] {
            assert_eq!([beyond, -beyond].map(|beyond| E4m3::round(beyond).code()), [0x7e, 0xfe], "{beyond}");
        }
    }
}

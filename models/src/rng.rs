//! torch's CPU random number generator, so that a seed gives the picture that it gives in diffusers.
//!
//! Owns: MT19937 and torch's normal distribution, bit for bit as torch computes it on x86-64 with AVX2 (which torch
//! also takes on AVX-512 machines). torch's build for older CPUs differs from its own AVX2 build by up to 3e-6 per
//! value, so there is no single truth to equal; AVX2 is what users have. Deliberately does not know: latent shapes.
//!
//! Source: ATen `MT19937RNGEngine.h`, `DistributionTemplates.h` (`normal_fill`), `DistributionsHelper.h`
//! (`normal_distribution`); the polynomials are those of Cephes `logf`, `sinf` and `cosf` (Moshier 1989), as in
//! `avx_mathfun.h`, with the multiply-adds that torch's compiler fuses.

/// Length from which torch draws normals in blocks of this many instead of one by one.
const BLOCK: usize = 16;

/// `torch.Generator("cpu")`: MT19937 and torch's normal distribution.
#[derive(Debug, Clone)]
pub struct TorchGenerator {
    engine: Mt19937,
    /// Second half of the last Box-Muller pair that was drawn one by one. It outlives draws in blocks.
    cached_normal: Option<f64>,
}

impl TorchGenerator {
    /// `torch.Generator("cpu").manual_seed(seed)`. Like torch, uses the low 32 bits only.
    pub fn new(seed: u64) -> Self {
        Self { engine: Mt19937::new(seed as u32), cached_normal: None }
    }

    /// All that decides its further draws: the words of its state, how many of them are given out, and the normal that
    /// waits.
    pub fn state(&self) -> (&[u32; Mt19937::LEN], usize, Option<f64>) {
        (&self.engine.state, self.engine.used, self.cached_normal)
    }

    /// The generator with this state; `None` where no generator has it.
    pub fn with_state(words: &[u32], used: usize, cached_normal: Option<f64>) -> Option<Self> {
        let state = Box::new(<[u32; Mt19937::LEN]>::try_from(words).ok()?);
        (used <= Mt19937::LEN).then_some(Self { engine: Mt19937 { state, used }, cached_normal })
    }

    /// `torch.randn(len, generator=self)` in f32. Two draws of 16 are not one draw of 32 if a length is no multiple
    /// of 16: torch draws the last 16 values of such a tensor anew.
    pub fn randn(&mut self, len: usize) -> Vec<f32> {
        if len < BLOCK {
            return (0..len).map(|_| self.normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..len).map(|_| self.uniform_f32()).collect();
        values.chunks_exact_mut(BLOCK).for_each(box_muller_block);
        if !len.is_multiple_of(BLOCK) {
            let last = &mut values[len - BLOCK..];
            last.fill_with(|| self.uniform_f32());
            box_muller_block(last);
        }
        values
    }

    /// One normal in f64 by Box-Muller, which makes two: the second waits for the next call.
    fn normal(&mut self) -> f64 {
        if let Some(second) = self.cached_normal.take() {
            return second;
        }
        let (u1, u2) = (self.uniform_f64(), self.uniform_f64());
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = 2.0 * std::f64::consts::PI * u1;
        self.cached_normal = Some(radius * theta.sin());
        radius * theta.cos()
    }

    /// Uniform in `[0, 1)` with 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.engine.next_u32() & 0x00ff_ffff) as f32 * 2f32.powi(-24)
    }

    /// Uniform in `[0, 1)` with 53 bits; the first word is the high one.
    fn uniform_f64(&mut self) -> f64 {
        let (high, low) = (self.engine.next_u32(), self.engine.next_u32());
        let bits = (u64::from(high) << 32 | u64::from(low)) & ((1 << 53) - 1);
        bits as f64 * 2f64.powi(-53)
    }
}

/// Sixteen uniforms to sixteen normals: elements `j` and `j + 8` are a pair.
fn box_muller_block(block: &mut [f32]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let u1 = 1.0 - *a; // (0, 1], for the logarithm
        let radius = (-2.0 * ln(u1)).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * *b);
        (*a, *b) = (radius * cos, radius * sin);
    }
}

/// Natural logarithm of a positive normal number, Cephes `logf`: `x = m 2^e` with `m` in `[sqrt(1/2), sqrt(2))`, and a
/// polynomial in `m - 1`. `ln 2` is split in two so that `e ln 2` loses nothing.
fn ln(x: f32) -> f32 {
    const POLYNOMIAL: [f32; 8] = [
        -1.151_461e-1,
        1.167_699_87e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const MANTISSA: u32 = 0x007f_ffff;
    let bits = x.to_bits();
    let mut exponent = ((bits >> 23) as i32 - 126) as f32;
    let mantissa = f32::from_bits((bits & MANTISSA) | 0.5f32.to_bits());
    let mut m = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        m += mantissa;
    }
    let square = m * m;
    let series = POLYNOMIAL.iter().fold(7.037_683_6e-2f32, |y, &c| y.mul_add(m, c)) * m;
    let y = series.mul_add(square, exponent * LN_2_LOW);
    let y = (-square).mul_add(0.5, y);
    exponent.mul_add(LN_2_HIGH, m + y)
}

/// Sine and cosine of an angle in `[0, 2 pi]`, Cephes `sinf` and `cosf`: reduce by multiples of `pi/4` (split in
/// three), then one polynomial for each, swapped and signed by the octant.
fn sin_cos(x: f32) -> (f32, f32) {
    const PI_4_PARTS: [f32; 3] = [-0.785_156_25, -2.418_756_5e-4, -3.774_895e-8];
    let octant = ((x * 1.273_239_5) as i32 + 1) & !1;
    let steps = octant as f32;
    let x = PI_4_PARTS.iter().fold(x, |x, &part| steps.mul_add(part, x));
    let z = x * x;
    let c = 2.443_315_7e-5f32.mul_add(z, -1.388_731_6e-3).mul_add(z, 4.166_664_6e-2) * z;
    let c = c.mul_add(z, -(z * 0.5)) + 1.0;
    let s = (-1.951_529_6e-4f32).mul_add(z, 8.332_161e-3).mul_add(z, -1.666_665_5e-1) * z;
    let s = s.mul_add(x, x);
    let (sin, cos) = if octant & 2 == 0 { (s, c) } else { (c, s) };
    let sin = if octant & 4 == 0 { sin } else { -sin };
    let cos = if (octant - 2) & 4 == 0 { -cos } else { cos };
    (sin, cos)
}

/// The Mersenne Twister of Matsumoto and Nishimura (1998), 32 bits.
#[derive(Debug, Clone)]
struct Mt19937 {
    state: Box<[u32; Self::LEN]>,
    /// Words of `state` already given out.
    used: usize,
}

impl Mt19937 {
    const LEN: usize = 624;
    const SHIFT: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = Box::new([seed; Self::LEN]);
        for i in 1..Self::LEN {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, used: Self::LEN }
    }

    fn next_u32(&mut self) -> u32 {
        if self.used == Self::LEN {
            self.twist();
        }
        let mut y = self.state[self.used];
        self.used += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..Self::LEN {
            let next = self.state[(i + 1) % Self::LEN];
            let mixed = (self.state[i] & 0x8000_0000) | (next & 0x7fff_ffff);
            let flip = if next & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + Self::SHIFT) % Self::LEN] ^ (mixed >> 1) ^ flip;
        }
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Expected bits: `torch.randn(n, generator=torch.Generator("cpu").manual_seed(seed))` of torch 2.15, AVX2.
    fn check(found: &[f32], expected_bits: &[u32]) {
        let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
        assert_eq!(bits, expected_bits, "{found:?}");
    }

    #[test]
    fn short_draws_go_one_by_one() {
        check(&TorchGenerator::new(0).randn(3), &[0x3fc5_3f5c, 0xbe96_3c50, 0xc00b_7149]);
        check(&TorchGenerator::new(0).randn(15)[12..], &[0xbf5b_4f07, 0x3f8c_e099, 0xbf89_1cab]);
    }

    #[test]
    fn long_draws_go_in_blocks_and_redo_the_last_sixteen() {
        check(&TorchGenerator::new(0).randn(16)[..4], &[0xbf90_1b85, 0xbf93_808a, 0xbe80_4bd6, 0xbede_255d]);
        check(&TorchGenerator::new(0).randn(17)[..4], &[0xbf90_1b85, 0xbfd9_1446, 0x3f11_1004, 0x3f4b_235d]);
        check(&TorchGenerator::new(42).randn(31)[27..], &[0xbf19_e472, 0xbfa3_1763, 0x4007_dbb6, 0xbf9e_091d]);
    }

    #[test]
    fn the_waiting_second_normal_outlives_a_draw_in_blocks() {
        let mut generator = TorchGenerator::new(7);
        generator.randn(3);
        generator.randn(20);
        check(&generator.randn(1), &[0xbf8e_a2d3]);
        check(&generator.randn(1), &[0xbeea_673d]);
        generator.randn(16);
        check(&generator.randn(2), &[0xbf39_7715, 0xbf7b_d578]);
    }

    #[test]
    fn a_hundred_thousand_values_have_the_bits_of_torch() {
        let fnv = |hash: u64, x: &f32| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3);
        let values = TorchGenerator::new(1234).randn(100_003);
        assert_eq!(values.iter().fold(0xcbf2_9ce4_8422_2325, fnv), 0xea1a_f4b2_d8cd_263a);
    }

    #[test]
    fn seeds_count_modulo_two_to_the_32() {
        check(&TorchGenerator::new((1 << 32) + 5).randn(2), &[0xbef9_3b54, 0xbf1a_940d]);
        check(&TorchGenerator::new(u64::MAX).randn(2), &[0x3f9c_2132, 0xbec9_349b]);
        assert_eq!(TorchGenerator::new(5).randn(64), TorchGenerator::new((9 << 32) + 5).randn(64));
    }

    #[test]
    fn moments_are_those_of_a_standard_normal() {
        let n = 1 << 18;
        let values = TorchGenerator::new(9).randn(n);
        let moment = |p: i32| values.iter().map(|x| f64::from(*x).powi(p)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02 && (moment(4) - 3.0).abs() < 0.1);
    }
}

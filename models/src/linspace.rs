//! Evenly spaced values, to the last bit as the libraries have them that the references take them from.
//!
//! Owns: `numpy.linspace` and `torch.linspace`. Does not know: what the values are.

/// `numpy.linspace` in f64: one value is the start; the end is set exactly.
pub fn numpy_linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = (end - start) / (n.max(2) - 1) as f64;
    let mut values: Vec<f64> = (0..n).map(|i| i as f64 * step + start).collect();
    if n > 1 {
        values[n - 1] = end;
    }
    values
}

/// `torch.linspace` in f32 on the CPU: from both ends to the middle, with a fused multiply-add. One value is the start.
pub fn torch_linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    if n == 1 {
        return vec![start];
    }
    let step = (end - start) / (n.max(2) - 1) as f32;
    let value = |i: usize| match i < n / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((n - i - 1) as f32, end),
    };
    (0..n).map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits that `torch.linspace(start, end, n)` and `numpy.linspace(start, end, n)` print.
    #[test]
    fn values_are_those_of_the_libraries_to_the_last_bit() {
        for (start, end, expected) in TORCH {
            let found: Vec<u32> = torch_linspace(start, end, expected.len()).into_iter().map(f32::to_bits).collect();
            assert_eq!(found, expected, "{start} to {end}");
        }
        for (start, end, expected) in NUMPY {
            let found: Vec<u64> = numpy_linspace(start, end, expected.len()).into_iter().map(f64::to_bits).collect();
            assert_eq!(found, expected, "{start} to {end}");
        }
        assert!(torch_linspace(1.0, 2.0, 0).is_empty() && numpy_linspace(1.0, 2.0, 0).is_empty());
    }

    const TORCH: [(f32, f32, &[u32]); 5] = [
        (0.0, 44.0, &[0x0]),
        (7.0, 23.5, &[0x40e00000]),
        (-3.0, 52.3, &[0xc0400000, 0x40c6eeee, 0x4176eeee, 0x41c53334, 0x42077778, 0x422c5555, 0x42513333]),
        (
            2.0,
            25.666666,
            &[
                0x40000000, 0x4084d936, 0x40c9b26c, 0x410745d1, 0x4129b26c, 0x414c1f07, 0x416e8ba3, 0x41887c1f,
                0x4199b26c, 0x41aae8ba, 0x41bc1f08, 0x41cd5555,
            ],
        ),
        (
            0.0,
            0.33333334,
            &[
                0x0, 0x3d17b426, 0x3d97b426, 0x3de38e39, 0x3e17b426, 0x3e3da130, 0x3e638e3a, 0x3e84bda2, 0x3e97b426,
                0x3eaaaaab,
            ],
        ),
    ];
    const NUMPY: [(f64, f64, &[u64]); 3] = [
        (
            1.0,
            0.14285714285714285,
            &[
                0x3ff0000000000000,
                0x3feb6db6db6db6db,
                0x3fe6db6db6db6db6,
                0x3fe2492492492492,
                0x3fdb6db6db6db6da,
                0x3fd2492492492490,
                0x3fc2492492492492,
            ],
        ),
        (0.3, 0.9, &[0x3fd3333333333333]),
        (
            0.0,
            999.0,
            &[0x0, 0x4068f9999999999a, 0x4078f9999999999a, 0x4082bb3333333334, 0x4088f9999999999a, 0x408f380000000000],
        ),
    ];
}

use super::*;
use crate::linear;
use crate::testing::{On, bits, for_each_device, random, values};

const CODES: [Code; 3] = [Code::Bits4, Code::Bits8, Code::Float8];

/// A matrix, and its values.
struct Case {
    code: Code,
    dims: (usize, usize),
    group_size: usize,
    rows_per_scale: usize,
    scale_dtype: DType,
    has_zeros: bool,
    has_order: bool,
}

/// Any number below `below` for two numbers.
fn hash(a: usize, b: usize, below: u32) -> u32 {
    let mixed = (a as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (b as u64 + 7).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed ^ mixed >> 29).wrapping_mul(0x94d0_49bb_1331_11eb) >> 40) as u32 % below
}

impl Case {
    fn code_at(&self, row: usize, column: usize) -> u8 {
        let code = hash(row, column, if self.code == Code::Bits4 { 16 } else { 256 }) as u8;
        // No NaN.
        if self.code == Code::Float8 && code & 0x7f == 0x7f { code - 1 } else { code }
    }

    fn order(&self) -> Option<Vec<u32>> {
        let mut order: Vec<u32> = (0..self.dims.1 as u32).collect();
        order.sort_by_key(|column| hash(*column as usize, 3, 1 << 20));
        self.has_order.then_some(order)
    }

    fn scales(&self) -> CodeScales {
        let (rows, columns) = (self.dims.0.div_ceil(self.rows_per_scale), self.dims.1.div_ceil(self.group_size));
        let scales =
            ((random(&[rows, columns], 4) * 0.01).unwrap() + 0.02).unwrap().to_dtype(self.scale_dtype).unwrap();
        let zeros = self.has_zeros.then(|| (0..rows * columns).map(|at| hash(at, 9, 16) as u8).collect());
        CodeScales { scales, zeros, group_size: self.group_size, rows_per_scale: self.rows_per_scale }
    }

    fn matrix(&self, device: &Device) -> PackedMatrix {
        let code_at = |row, column| self.code_at(row, column);
        PackedMatrix::new(self.code, self.dims, self.scales(), self.order(), device, code_at).expect("is sound")
    }

    /// The values one by one, as the formats define them.
    fn values(&self) -> Tensor {
        let ((rows, columns), scales, order) = (self.dims, self.scales(), self.order());
        let (groups, zeros) = (columns.div_ceil(self.group_size), scales.zeros);
        let factors = values(&scales.scales);
        let mut dense = vec![0f32; rows * columns];
        for row in 0..rows {
            for column in 0..columns {
                let at = row / self.rows_per_scale * groups + column / self.group_size;
                let code = self.code_at(row, column);
                let value = match self.code {
                    Code::Float8 => e4m3(code),
                    _ => f32::from(code) - zeros.as_ref().map_or(0.0, |zeros| f32::from(zeros[at])),
                };
                let place = order.as_ref().map_or(column, |order| order[column] as usize);
                dense[row * columns + place] = value * factors[at];
            }
        }
        Tensor::from_vec(dense, (rows, columns), &Device::Cpu).unwrap()
    }
}

fn e4m3(code: u8) -> f32 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let magnitude = if exponent == 0 { fraction * 2f32.powi(-6) } else { (1.0 + fraction) * 2f32.powi(exponent - 7) };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Sizes that fill no tile, groups within tiles and over them, one scale for many rows.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for code in CODES {
        for (dims, group_size, rows_per_scale) in [
            ((37, 200), 32, 1),
            ((16, 64), 64, 1),
            ((50, 1100), 128, 1),
            ((33, 96), 96, 1),
            ((40, 72), 24, 1),
            ((20, 640), 16, 1),
            ((70, 300), 128, 32),
            ((3, 5), 5, 3),
        ] {
            for (scale_dtype, has_order) in [(DType::F16, false), (DType::BF16, true), (DType::F32, false)] {
                let has_zeros = code != Code::Float8 && !(has_order && group_size == 128);
                cases.push(Case { code, dims, group_size, rows_per_scale, scale_dtype, has_zeros, has_order });
            }
        }
    }
    cases
}

#[test]
fn values_are_those_of_codes_zeros_and_scales() {
    for case in cases() {
        let what = format!("{:?} {:?} {}", case.code, case.dims, case.group_size);
        let found = case.matrix(&Device::Cpu).dequantise(DType::F32).expect("dequantised");
        assert_eq!(values(&found), values(&case.values()), "{what}");
    }
}

/// One row is widened in registers, more rows in panels; alone, in a batch and beside others a row has the same bits. They are
/// those of the dense product over the columns in the tiles' order.
#[test]
fn a_row_has_the_same_bits_in_any_company() {
    for case in cases() {
        let what = format!("{:?} {:?} {}", case.code, case.dims, case.group_size);
        let (out, inner) = case.dims;
        let (weight, bias) = (case.matrix(&Device::Cpu), random(&[out], 3));
        let dense = linear(&random(&[40, inner], 1), &case.values(), Some(&bias)).expect("computed");
        let x = random(&[40, inner], 1);
        let all = linear_packed(&x, &weight, Some(&bias)).expect("computed");
        crate::testing::assert_close(&all, &dense, 1e-5);
        for (first, rows) in [(0, 1), (39, 1), (7, 5), (2, 30)] {
            let some = linear_packed(&x.narrow(0, first, rows).unwrap(), &weight, Some(&bias)).expect("computed");
            assert_eq!(bits(&some), bits(&all.narrow(0, first, rows).unwrap()), "{what}: {rows} from {first}");
        }
    }
}

#[test]
fn long_rows_of_large_matrices_come_in_their_order() {
    let columns = 5000;
    let case = Case {
        code: Code::Bits4,
        dims: (150, columns),
        group_size: 128,
        rows_per_scale: 1,
        scale_dtype: DType::F16,
        has_zeros: true,
        has_order: false,
    };
    let (x, weight) = (random(&[70, columns], 1), case.matrix(&Device::Cpu));
    let all = linear_packed(&x, &weight, None).expect("computed");
    crate::testing::assert_close(&all, &linear(&x, &case.values(), None).expect("computed"), 2e-5);
    for rows in [1, 3] {
        let some = x.narrow(0, 0, rows).unwrap();
        for count in [1, 2, 3] {
            let found = crate::testing::threads(count, || linear_packed(&some, &weight, None).expect("computed"));
            assert_eq!(bits(&found), bits(&all.narrow(0, 0, rows).unwrap()), "{rows} rows, {count} threads");
        }
    }
}

#[test]
fn memory_is_that_of_codes_scales_and_zeros() {
    let case = Case {
        code: Code::Bits4,
        dims: (256, 1024),
        group_size: 128,
        rows_per_scale: 1,
        scale_dtype: DType::F16,
        has_zeros: true,
        has_order: false,
    };
    let bytes = case.matrix(&Device::Cpu).size_in_bytes();
    assert_eq!(bytes, 256 * 1024 / 2 + 256 * 8 * (2 + 1));
    for case in cases() {
        let matrix = case.matrix(&Device::Cpu);
        let scales = case.scales();
        let each = scales.scales.dtype().size_in_bytes() + usize::from(case.has_zeros);
        let expected = PackedMatrix::bytes_of(case.code, case.dims, scales.scales.elem_count(), each, case.has_order);
        assert_eq!(matrix.size_in_bytes(), expected, "{:?} {:?}", case.code, case.dims);
    }
}

for_each_device!(a_device_has_the_values_of_the_cpu, |on: &On| {
    for case in cases() {
        let expected = on.rounded(&case.values());
        let matrix = case.matrix(on.tensor(&random(&[1], 1)).device());
        let found = on.run(|| matrix.dequantise(on.dtype));
        assert_eq!(bits(&on.as_is_on_cpu(&found)), bits(&expected), "{:?} {:?}", case.code, case.dims);
        let x = random(&[5, case.dims.1], 2);
        let expected = linear(&on.rounded(&x), &expected, None).expect("computed");
        let x = on.tensor(&x);
        on.assert_close(&on.run(|| linear_packed(&x, &matrix, None)), &expected, case.dims.1);
    }
});

#[test]
fn what_does_not_fit_is_refused() {
    let one = |dims: &[usize]| Tensor::ones(dims, DType::F16, &Device::Cpu).unwrap();
    let made = |scales: Tensor, zeros: Option<Vec<u8>>, code, order| {
        let scales = CodeScales { scales, zeros, group_size: 32, rows_per_scale: 1 };
        PackedMatrix::new(code, (4, 64), scales, order, &Device::Cpu, |_, _| 1)
    };
    let refused = |found: Result<PackedMatrix>, expected: &str| {
        let error = found.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(made(one(&[4, 3]), None, Code::Bits4, None), "scales of [4, 64] are [4, 2]");
    refused(made(one(&[4, 2]), Some(vec![0; 7]), Code::Bits4, None), "as many zeros as scales");
    refused(made(one(&[4, 2]), Some(vec![0; 8]), Code::Float8, None), "floats have no zeros");
    refused(made(one(&[4, 2]), None, Code::Bits4, Some(vec![0; 64])), "column 0 of 64 is not there once");
    refused(made(one(&[4, 2]), None, Code::Bits4, Some((0..63).collect())), "an order of 63 columns");
    let scales = CodeScales { scales: one(&[4, 2]), zeros: None, group_size: 32, rows_per_scale: 1 };
    let nan = |row, column| if (row, column) == (2, 40) { 0xff } else { 1 };
    refused(PackedMatrix::new(Code::Float8, (4, 64), scales, None, &Device::Cpu, nan), "is NaN");
    let weight = made(one(&[4, 2]), None, Code::Bits4, None).expect("is sound");
    let error = linear_packed(&random(&[2, 32], 1), &weight, None).unwrap_err().to_string();
    assert!(error.contains("[2, 32]") && error.contains("[4, 64]"), "{error}");
}

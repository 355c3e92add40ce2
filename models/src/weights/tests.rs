//! Tests of the view by name: what it gives, records and refuses.

use std::collections::BTreeMap;
use std::fs::File;

use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

use super::mapped::{Files, Slice, as_values, to_bf16};
use super::names::Extent;
use super::*;
use crate::device::{DeviceSpec, WeightDtype};

fn placement(dtype: WeightDtype) -> Placement {
    Placement::open(DeviceSpec::Cpu, dtype).expect("the CPU is always there")
}

/// A folder with `model.safetensors` that holds `a.weight` [2, 3] in bf16 and `a.bias` [2] in f32.
fn sound_folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    let weight: Vec<u8> = (0..6).flat_map(|i| bf16::from_f32(i as f32 - 2.5).to_le_bytes()).collect();
    let bias: Vec<u8> = [0.1f32, -7.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensors = [
        ("a.weight", TensorView::new(Dtype::BF16, vec![2, 3], &weight).expect("view")),
        ("a.bias", TensorView::new(Dtype::F32, vec![2], &bias).expect("view")),
    ];
    serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).expect("write");
    dir
}

fn error_of<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn matrices_keep_the_published_dtype_and_vectors_widen() {
    let dir = sound_folder();
    let weights = Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open").pp("a");
    let matrix = weights.matrix(2, 3, "weight").expect("matrix");
    assert_eq!(matrix.dtype(), DType::BF16);
    assert_eq!(weights.get(&[2], "bias").expect("bias").to_vec1::<f32>().expect("f32"), [0.1, -7.0]);
    let widened = matrix.to_dtype(DType::F32).expect("cast").to_vec2::<f32>().expect("f32");
    assert_eq!(widened, [[-2.5, -1.5, -0.5], [0.5, 1.5, 2.5]]);
    for (dtype, expected) in [(WeightDtype::F32, DType::F32), (WeightDtype::F16, DType::F16)] {
        let weights = Weights::open(dir.path(), &placement(dtype)).expect("open").pp("a");
        assert_eq!(weights.matrix(2, 3, "weight").expect("matrix").dtype(), expected);
    }
}

#[test]
fn a_network_may_compute_in_another_dtype_than_its_neighbours() {
    let dir = sound_folder();
    let on_gpu = Placement::in_host_memory(DeviceSpec::Cuda(0), WeightDtype::F16);
    let weights = Weights::open(dir.path(), &on_gpu).expect("open").pp("a");
    let dtypes = |weights: &Weights| {
        let (matrix, bias) = (weights.matrix(2, 3, "weight"), weights.get(&[2], "bias"));
        (matrix.expect("matrix").dtype(), bias.expect("bias").dtype())
    };
    assert_eq!(dtypes(&weights), (DType::F16, DType::F16));
    assert_eq!(dtypes(&weights.computing_in(DType::BF16)), (DType::BF16, DType::BF16));
}

/// What is copied to a GPU without a detour is what the detour gives; values that lie askew take the detour.
#[test]
fn values_are_seen_where_they_lie_if_they_can_be() {
    let values: Vec<u16> = (0..64).map(|i| bf16::from_f32(i as f32 - 7.5).to_bits()).collect();
    let mut buffer = vec![0u8; 2 * values.len() + 2];
    // An even address, wherever the allocator has put the buffer.
    let even = buffer.as_ptr().align_offset(2);
    for (to, value) in buffer[even..].chunks_exact_mut(2).zip(&values) {
        to.copy_from_slice(&value.to_le_bytes());
    }
    let bytes = &buffer[even..even + 2 * values.len()];
    assert_eq!(as_values::<bf16>(bytes).expect("aligned"), to_bf16(Dtype::BF16, bytes));
    assert!(as_values::<bf16>(&bytes[1..bytes.len() - 1]).is_none(), "at an odd address");
    assert!(as_values::<bf16>(&bytes[..3]).is_none(), "half a value is left");
}

#[test]
fn the_report_names_what_was_not_used() {
    let dir = sound_folder();
    let weights = Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open");
    weights.pp("a").matrix(2, 3, "weight").expect("matrix");
    let report = weights.report();
    assert_eq!(report.unused, ["a.bias"]);
    assert_eq!((report.num_parameters, report.resident_bytes), (8, 12));
    weights.ignore("a.bias");
    assert!(weights.report().unused.is_empty());
}

#[test]
fn a_dry_view_records_every_problem_and_takes_no_memory() {
    let dir = sound_folder();
    let weights = Weights::open_dry(dir.path(), &placement(WeightDtype::Auto)).expect("open");
    let huge = weights.matrix(1 << 20, 1 << 20, "a.weight").expect("placeholder");
    assert_eq!(huge.dims(), [1 << 20, 1 << 20]);
    weights.get(&[1 << 40], "b").expect("placeholder");
    let problems: Vec<String> = weights.report().problems.iter().map(Error::to_string).collect();
    assert!(problems[0].contains("`a.weight` has shape [2, 3], expected [1048576, 1048576]"), "{problems:?}");
    assert!(problems[1].contains("`b` is missing"), "{problems:?}");
}

/// As many layers as a configuration says, whatever the files hold: nobody waits for the last of a million.
#[test]
fn a_dry_view_gives_up_after_a_thousand_problems() {
    let dir = sound_folder();
    let weights = Weights::open_dry(dir.path(), &placement(WeightDtype::Auto)).expect("open");
    let layers = (0..1_000_000).map(|layer| weights.pp(layer).get(&[1], "weight"));
    let (built, error) = layers.enumerate().find_map(|(i, layer)| Some((i, layer.err()?))).expect("gives up");
    assert_eq!(built, 1024);
    assert!(error.to_string().contains("`1024.weight` is missing"), "{error}");
    assert_eq!(weights.report().problems.len(), 1024);
}

#[test]
fn wrong_shapes_and_missing_tensors_name_file_and_tensor() {
    let dir = sound_folder();
    let weights = Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open");
    let error = error_of(weights.matrix(3, 2, "a.weight"));
    assert!(error.contains("model.safetensors: tensor `a.weight` has shape [2, 3], expected [3, 2]"), "{error}");
    assert!(error_of(weights.get(&[1], "a.gain")).contains("tensor `a.gain` is missing"));
}

#[test]
fn damaged_files_are_refused_with_the_reason() {
    let check = |damage: &dyn Fn(&Path), expected: &str| {
        let dir = sound_folder();
        damage(&dir.path().join("model.safetensors"));
        let error = error_of(Weights::open(dir.path(), &placement(WeightDtype::Auto)));
        assert!(error.contains(expected), "expected `{expected}` in: {error}");
    };
    let rewrite = |path: &Path, from: &str, to: &str| {
        let bytes = std::fs::read(path).expect("read");
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect("pattern is there");
        let mut changed = bytes.clone();
        changed[at..at + from.len()].copy_from_slice(to.as_bytes());
        std::fs::write(path, changed).expect("write");
    };
    let truncate = |path: &Path, len: u64| {
        File::options().write(true).open(path).expect("open").set_len(len).expect("truncate");
    };
    check(&|path| truncate(path, 4), "header too small");
    let many = |path: &Path| {
        let header = format!("[{}]", ",".repeat(5 << 20));
        std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).expect("write");
    };
    check(&many, "its header has 5242882 values; a header may have 4194304");
    check(&|path| truncate(path, 40), "header length points past the end");
    let shortened = |path: &Path| truncate(path, std::fs::metadata(path).expect("stat").len() - 2);
    check(&shortened, "its tensors end at byte 20, the file has 18 bytes");
    check(
        &|path| rewrite(path, "[2,3]", "[2,4]"),
        "tensor `a.weight` of shape [2, 4] and dtype BF16 needs 16 bytes, its offsets give 12",
    );
    check(&|path| rewrite(path, "[2,3]", "[2,x]"), "invalid JSON in header");
    check(&|path| std::fs::write(path, (1u64 << 60).to_le_bytes()).expect("write"), "header too large");
}

#[test]
fn pickles_and_empty_folders_are_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let open = || error_of(Weights::open(dir.path(), &placement(WeightDtype::Auto)));
    assert!(open().contains("holds no weights"));
    std::fs::write(dir.path().join("pytorch_model.bin"), b"\x80\x02").expect("write");
    assert!(open().contains("is a pickle"), "{}", open());
}

#[test]
fn shards_must_all_be_there_and_hold_what_the_index_says() {
    let dir = sound_folder();
    let path = |name: &str| dir.path().join(name);
    std::fs::rename(path("model.safetensors"), path("model-00001-of-00002.safetensors")).expect("rename");
    let write_index = |map: &str| {
        std::fs::write(path("model.safetensors.index.json"), format!("{{\"weight_map\":{map}}}")).expect("write");
    };
    let open = || Weights::open(dir.path(), &placement(WeightDtype::Auto));
    let shard = "model-00001-of-00002.safetensors";
    write_index(&format!(r#"{{"a.weight":"{shard}","a.bias":"{shard}"}}"#));
    open().expect("all shards are there").get(&[2], "a.bias").expect("bias");
    write_index(&format!(r#"{{"a.weight":"{shard}","a.bias":"model-00002-of-00002.safetensors"}}"#));
    assert!(error_of(open()).contains("model-00002-of-00002.safetensors: this shard is missing"));
    write_index(&format!(r#"{{"a.gain":"{shard}"}}"#));
    assert!(error_of(open()).contains("tensor `a.gain` is missing"));
    write_index(r#"{"a.weight":"../model.safetensors"}"#);
    assert!(error_of(open()).contains("outside its folder"));
    let many: Vec<String> = (0..1025).map(|i| format!(r#""{i}":"{i}.safetensors""#)).collect();
    write_index(&format!("{{{}}}", many.join(",")));
    assert!(error_of(open()).contains("names 1025 shards; at most 1024"));
}

/// Packed formats keep integers: who asks for bytes has them, who asks for numbers is told what they are.
#[test]
fn integers_are_had_as_they_lie_and_not_as_numbers() {
    let dir = tempfile::tempdir().expect("temp dir");
    let values: Vec<u8> = [7i32, -1, i32::MIN, 0x7654_3210].iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensors = [("q.qweight", TensorView::new(Dtype::I32, vec![2, 2], &values).expect("view"))];
    serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).expect("write");
    let open = || Weights::open(dir.path(), &placement(WeightDtype::Auto)).expect("open").pp("q");
    let weights = open();
    assert_eq!(weights.stored("qweight"), Some(Stored::Plain(Dtype::I32)));
    let bytes = weights.packed(&[2, 2], "qweight", |bytes, _| Ok(bytes.to_vec())).expect("is there");
    assert_eq!(bytes, Some(values));
    let report = weights.report();
    assert_eq!((report.resident_bytes, report.unused), (16, Vec::<String>::new()));

    let weights = open();
    assert!(error_of(weights.matrix(2, 2, "qweight")).contains("`q.qweight` has dtype I32; read are F32"));
    assert!(error_of(weights.packed(&[4], "qweight", |_, _| Ok(()))).contains("has shape [2, 2], expected [4]"));
    assert!(error_of(weights.packed(&[4], "scales", |_, _| Ok(()))).contains("`q.scales` is missing"));
    let dry = Weights::open_dry(dir.path(), &placement(WeightDtype::Auto)).expect("open").pp("q");
    assert_eq!(dry.packed(&[2, 2], "qweight", |_, _| Ok(())).expect("is noted"), None);
    assert_eq!(dry.packed(&[4], "scales", |_, _| Ok(())).expect("is noted"), None);
    let report = dry.report();
    assert_eq!((report.resident_bytes, report.problems.len()), (16, 1));
}

/// A network with a large table, a vector and packed bytes.
fn ask(weights: &Weights) -> Vec<Tensor> {
    let packed = weights.packed(&[4], "bytes", |bytes, device| Ok(Tensor::new(bytes, device)?)).expect("bytes");
    let asked = [weights.matrix(8, 4, "table"), weights.get(&[3], "vector"), weights.get(&[2], "vector.2")];
    asked.into_iter().map(|tensor| tensor.expect("is there")).chain(packed).collect()
}

fn folder_to_ask() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    let table: Vec<u8> = (0..32).flat_map(|i| bf16::from_f32(i as f32).to_le_bytes()).collect();
    let vector: Vec<u8> = [1f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensors = [
        ("a.bytes", TensorView::new(Dtype::U8, vec![4], &[7, 8, 9, 10]).expect("view")),
        ("a.table", TensorView::new(Dtype::BF16, vec![8, 4], &table).expect("view")),
        ("a.vector", TensorView::new(Dtype::F32, vec![3], &vector).expect("view")),
        ("a.vector.2", TensorView::new(Dtype::F32, vec![2], &vector[..8]).expect("view")),
    ];
    serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).expect("write");
    dir
}

/// Whatever the budget of a step is, no step reads more, and what comes is what comes without steps. A row of the table has
/// 8 bytes.
#[test]
fn what_is_read_ahead_is_read_in_bounded_steps_and_found() {
    let dir = folder_to_ask();
    let values = |tensors: Vec<Tensor>| -> Vec<Vec<f32>> {
        let values = |x: Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        tensors.into_iter().map(|tensor| values(tensor).expect("values")).collect()
    };
    for dtype in [WeightDtype::Auto, WeightDtype::F32, WeightDtype::F16] {
        let placement = placement(dtype);
        let view = || Weights::open(dir.path(), &placement).expect("open").pp("a");
        let plain = values(ask(&view()));
        for (budget, steps) in [(1000, 1), (88, 1), (64, 3), (20, 6), (12, 11)] {
            let ahead = Arc::new(Ahead::new(&placement.device));
            let dry = Weights::open_dry(dir.path(), &placement).expect("open").pp("a");
            ask(&dry.with_ahead(&ahead, "network"));
            assert_eq!(ahead.num_steps(budget), steps, "{budget} bytes a step");
            let mut taken = 0;
            let mut left = ahead.bytes_left();
            assert_eq!(left, 64 + 12 + 8 + 4);
            loop {
                let goes_on = ahead.advance(budget).expect("reads");
                taken += 1;
                assert!(left - ahead.bytes_left() <= budget, "step {taken} of {budget} bytes");
                left = ahead.bytes_left();
                if !goes_on {
                    break;
                }
            }
            assert_eq!((taken, left), (steps, 0), "{budget} bytes a step");
            let ready = view().with_ahead(&ahead, "network");
            assert_eq!(values(ask(&ready)), plain, "{budget} bytes a step");
            assert_eq!(ready.report().resident_bytes, view_report(&view()));
        }
    }
}

fn view_report(weights: &Weights) -> usize {
    ask(weights);
    weights.report().resident_bytes
}

/// A table of random values is made in as many steps as one that is read, and has the same values.
#[test]
fn random_values_are_made_in_bounded_steps() {
    let placement = placement(WeightDtype::F16);
    let path = Path::new("nowhere");
    let ask = |weights: Weights| weights.pp("a").matrix(8, 4, "table").expect("is made");
    let whole = ask(Weights::dummy(path, DType::BF16, &placement));
    let ahead = Arc::new(Ahead::new(&placement.device));
    ask(Weights::dummy_dry(path, DType::BF16, &placement).with_ahead(&ahead, "network"));
    let (budget, steps) = (20, 4);
    assert_eq!(ahead.num_steps(budget), steps);
    for step in 1..=steps {
        let left = ahead.bytes_left();
        assert_eq!(ahead.advance(budget).expect("makes"), step < steps);
        assert!(left - ahead.bytes_left() <= budget, "step {step}");
    }
    let ready = ask(Weights::dummy(path, DType::BF16, &placement).with_ahead(&ahead, "network"));
    let values = |x: &Tensor| x.to_dtype(DType::F32).and_then(|x| x.to_vec2::<f32>()).expect("values");
    assert_eq!(values(&ready), values(&whole));
}

/// What a network asks for that it had not asked for, or that another component has, is read as ever.
#[test]
fn what_is_not_ready_is_read_there_and_then() {
    let dir = folder_to_ask();
    let placement = placement(WeightDtype::Auto);
    let ahead = Arc::new(Ahead::new(&placement.device));
    let dry = Weights::open_dry(dir.path(), &placement).expect("open").pp("a");
    dry.with_ahead(&ahead, "network").get(&[3], "vector").expect("is noted");
    assert!(!ahead.advance(1000).expect("reads"));
    let view = Weights::open(dir.path(), &placement).expect("open").pp("a");
    for component in ["another", "network"] {
        assert_eq!(ask(&view.clone().with_ahead(&ahead, component)).len(), 4);
    }
}

/// A file whose one tensor is all that a network asks for, or this part of it.
struct Part(Extent);

impl Names for Part {
    fn mark(&self) -> &'static str {
        "there"
    }

    fn place(&self, _: &str) -> Option<Place> {
        Some(Place { name: self.mark().to_owned(), part: self.0 })
    }
}

/// Rows of two heads of four, whole and in steps of three rows.
#[test]
fn rows_that_alternate_between_halves_are_read_half_by_half() {
    let dir = tempfile::tempdir().expect("temp dir");
    let rows: Vec<u8> = (0..16u8).flat_map(|i| bf16::from_f32(f32::from(i)).to_le_bytes()).collect();
    let there = TensorView::new(Dtype::BF16, vec![8, 2], &rows).expect("view");
    serialize_to_file([("there", there)], None, &dir.path().join("model.safetensors")).expect("write");
    let placement = placement(WeightDtype::Auto);
    let halves = || Part(Extent::AlternatingHalves { heads: 2 });
    let ahead = Arc::new(Ahead::new(&placement.device));
    let dry = Weights::open_dry(dir.path(), &placement).expect("open").or_named(halves());
    dry.with_ahead(&ahead, "network").matrix(8, 2, "here").expect("is noted");
    while ahead.advance(3 * 4).expect("reads") {}
    let view = Weights::open(dir.path(), &placement).expect("open").or_named(halves());
    for view in [view.clone(), view.with_ahead(&ahead, "network")] {
        let rows: Vec<Vec<f32>> =
            view.matrix(8, 2, "here").and_then(|rows| Ok(rows.to_dtype(DType::F32)?.to_vec2()?)).expect("is read");
        let first: Vec<f32> = rows.iter().map(|row| row[0] / 2.0).collect();
        assert_eq!(first, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    }
}

/// Three rows of 48 values are four and a half blocks.
#[test]
fn parts_that_end_within_a_block_are_refused_by_name() {
    let dir = sound_folder();
    let path = dir.path().join("model.safetensors");
    let mmap = crate::files::map(&path).expect("mapped");
    let tensors = BTreeMap::new();
    let files = Files { files: Arc::new(vec![(path, mmap)]), tensors, beginning: String::new(), must_fit: false };
    let check = |shape: [usize; 2], part: Extent| {
        let bytes = 0..shape.iter().product::<usize>() / 32 * 34;
        let stored = Stored::Blocks(candle_core::quantized::GgmlDType::Q8_0);
        let located = Located { file: 0, stored, shape: shape.to_vec(), bytes };
        files.check_is_whole("x", &Slice::new(&located, part))
    };
    let rows = |first, count, of| Extent::Rows(names::Rows { first, count, of });
    for (shape, part) in [
        ([6, 48], rows(0, 1, 2)),
        ([6, 48], rows(1, 1, 2)),
        ([4, 16], rows(1, 3, 4)),
        ([2, 16], Extent::SwappedHalves),
        ([4, 48], Extent::AlternatingHalves { heads: 1 }),
    ] {
        let error = error_of(check(shape, part));
        assert!(error.contains("tensor `x`: a part of it ends within a block of Q8_0"), "{part:?}: {error}");
    }
    for (shape, part) in [
        ([6, 48], Extent::Whole),
        ([8, 48], rows(1, 1, 4)),
        ([4, 16], Extent::SwappedHalves),
        ([4, 32], Extent::AlternatingHalves { heads: 1 }),
    ] {
        check(shape, part).unwrap_or_else(|error| panic!("{part:?}: {error}"));
    }
}

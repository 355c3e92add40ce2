//! CogVideoX in other files than diffusers' folders: its transformer as one file under the same names, in eight bits, and in
//! blocks that lie in a safetensors file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use tale_models::ModelCard;
use tale_models::device::WeightDtype;
use tale_models::request::Frame;

use crate::cogvideox;
use crate::files::{
    assert_clean, check_refused, checkpoint, inspect, load, read_component, remove_weights, write_file,
};
use crate::support::{clips, copy_folder, golden_tensors, psnr};

const CASE: &str = "cogvideox-a";
const MIN_PSNR: f64 = 60.0;

fn clip(path: &Path, base: Option<&Path>) -> Vec<Frame> {
    let mut model = load(path, base, WeightDtype::Auto);
    let ModelCard::Diffusion(card) = &model.card else { panic!("makes clips") };
    let (_, request) = cogvideox::requests(CASE, card).into_iter().next().unwrap();
    clips(&mut *model.runner, &[request]).remove(0)
}

/// A base without a transformer, and the file in which that is.
struct Files {
    base: tempfile::TempDir,
    path: PathBuf,
}

fn file_of(tensors: HashMap<String, Tensor>) -> Files {
    let base = tempfile::tempdir().unwrap();
    copy_folder(&checkpoint(CASE), base.path());
    remove_weights(&base.path().join("transformer"));
    let path = base.path().join("CogVideoX_5b.safetensors");
    write_file(&path, tensors);
    Files { base, path }
}

fn transformer() -> HashMap<String, Tensor> {
    read_component(&checkpoint(CASE).join("transformer"))
}

fn is_narrowed(name: &str, tensor: &Tensor) -> bool {
    let is_matrix = tensor.rank() == 2 && name.ends_with(".weight");
    is_matrix && (name.contains(".attn1.") || name.contains(".ff.")) && tensor.dim(1).unwrap().is_multiple_of(32)
}

/// As the folder makes it.
#[test]
fn a_transformer_may_be_one_file() {
    for beginning in ["", "model.diffusion_model."] {
        let named = transformer().into_iter().map(|(name, tensor)| (format!("{beginning}{name}"), tensor));
        let files = file_of(named.collect());
        assert_clean(&inspect(&files.path, None));
        let found = clip(&files.path, None);
        for (at, frame) in found.iter().enumerate() {
            let expected = golden_tensors(CASE)["run0.frames"].get(at).unwrap();
            let expected: Vec<u8> = expected.flatten_all().unwrap().to_vec1().unwrap();
            let found = psnr(&frame.rgb, &expected);
            assert!(found >= MIN_PSNR, "frame {at}: {found:.1} dB");
        }
    }
}

/// What the file says of numbers is what they are: the clips of the narrowed ones, from a folder, and of their bytes.
#[test]
fn bytes_make_the_clips_of_their_numbers() {
    let plain = clip(&checkpoint(CASE), None);
    type Narrow = fn(&Tensor) -> (&'static str, Tensor, Tensor);
    let eight_bits: Narrow = |tensor| {
        let bytes = tensor.to_dtype(DType::F8E4M3).unwrap();
        let numbers = bytes.to_dtype(DType::F32).unwrap();
        ("weight", bytes, numbers)
    };
    let blocks: Narrow = |tensor| {
        let quantised = QTensor::quantize(&tensor.to_dtype(DType::F32).unwrap(), GgmlDType::Q4_0).unwrap();
        let bytes = Tensor::new(&*quantised.data().unwrap(), &Device::Cpu).unwrap();
        let bytes = bytes.reshape((tensor.dim(0).unwrap(), ())).unwrap();
        ("Q4_0_qweight", bytes, quantised.dequantize(&Device::Cpu).unwrap())
    };
    for (what, dtype, narrow) in [("eight bits", "F8_E4M3", eight_bits), ("blocks", "Q4_0", blocks)] {
        let mut in_bytes = HashMap::new();
        let mut in_numbers = HashMap::new();
        for (name, tensor) in transformer() {
            if !is_narrowed(&name, &tensor) {
                in_bytes.insert(name.clone(), tensor.clone());
                in_numbers.insert(name, tensor);
                continue;
            }
            let (leaf, bytes, numbers) = narrow(&tensor);
            in_bytes.insert(format!("{}{leaf}", name.strip_suffix("weight").unwrap()), bytes);
            in_numbers.insert(name, numbers);
        }
        let numbers = file_of(in_numbers);
        let expected = clip(&numbers.path, None);
        assert!(psnr(&expected[0].rgb, &plain[0].rgb) < 55.0, "{what} round to other clips");
        let files = file_of(in_bytes);
        let inspection = inspect(&files.path, None);
        assert_clean(&inspection);
        let (_, report) = inspection.components.iter().find(|(name, _)| name == "transformer").unwrap();
        assert!(report.dtypes.contains_key(dtype), "{:?}", report.dtypes);
        for (found, expected) in clip(&files.path, None).iter().zip(&expected) {
            let distance = psnr(&found.rgb, &expected.rgb);
            println!("{what}: {distance:.1} dB");
            assert!(distance >= MIN_PSNR, "{what}: {distance:.1} dB");
        }
        // In the folder of its component too.
        std::fs::rename(&files.path, files.base.path().join("transformer/CogVideoX_5b_GGUF_Q4_0.safetensors")).unwrap();
        assert_clean(&inspect(files.base.path(), None));
    }
}

#[test]
fn bytes_that_are_no_blocks_are_refused_by_name() {
    let with = |name: &str, shape: (usize, usize)| {
        let mut tensors = transformer();
        let layer = "transformer_blocks.1.attn1.to_q";
        if name == "moved" {
            tensors.remove(&format!("{layer}.weight"));
        }
        tensors.insert(format!("{layer}.Q4_0_qweight"), Tensor::zeros(shape, DType::U8, &Device::Cpu).unwrap());
        file_of(tensors)
    };
    for (name, shape, expected) in [
        ("moved", (32, 17), "U8 [32, 17] is no rows of blocks of 18 bytes"),
        ("moved", (32, 36), "has shape [32, 64], expected [32, 32]"),
        ("there", (32, 18), "`transformer_blocks.1.attn1.to_q.weight` is there too"),
    ] {
        check_refused(&with(name, shape).path, None, &["transformer_blocks.1.attn1.to_q", expected]);
    }
    let files = file_of(transformer());
    check_refused(&files.path, Some(&checkpoint("wan-a")), &["is a WanPipeline", "holds CogVideoX's transformer"]);
}

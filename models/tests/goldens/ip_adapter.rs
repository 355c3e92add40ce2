//! IP-Adapter against diffusers, stage by stage, from the reference pictures' bytes to the final picture.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tale_models::device::{DeviceSpec, Placement, WeightDtype};
use tale_models::encoders::image_processor::ClipImageProcessor;
use tale_models::families::sdxl::ip_adapter::{IpAdapter, IpAdapterFiles};
use tale_models::request::Frame;
use tale_models::runner::diffusion::references::FromReferences;
use tale_models::weights::Weights;

use crate::support::{assert_close, case_dir, golden_json, golden_tensors};

const CASE: &str = "ip-adapter";
const ADAPTERS: [(&str, usize); 2] = [("base", 30), ("plus", 28)];
/// Width of the text of the UNet that the adapters are for.
const TEXT_DIM: usize = 64;

/// Resizing rounds to bytes as Pillow does; the rest is the same arithmetic in f32.
#[test]
fn pictures_are_processed_to_the_bit() {
    let tensors = golden_tensors(CASE);
    for (adapter, image_size) in ADAPTERS {
        let folder = case_dir(CASE).join(adapter).join("image_encoder");
        let processor = ClipImageProcessor::read_or_default(&folder, image_size).unwrap();
        for (i, picture) in pictures(&tensors).iter().enumerate() {
            let found = processor.pixel_values(picture, &Device::Cpu).unwrap();
            let name = format!("{adapter}.pixel_values{i}");
            assert_close(&name, &found, &tensors[&name], 0.0);
        }
    }
}

#[test]
fn tokens_of_both_branches_are_the_reference_ones() {
    let (tensors, golden) = (golden_tensors(CASE), golden_json(CASE));
    let pictures = pictures(&tensors);
    for (run, facts) in golden["runs"].as_array().unwrap().iter().enumerate() {
        let adapter = open_adapter(facts["adapter"].as_str().unwrap());
        let references: Vec<Arc<Frame>> = indices(&facts["references"]).map(|i| pictures[i].clone()).collect();
        let found = adapter.encode(&references, true).unwrap();
        assert_eq!(found.positive.dim(1).unwrap(), references.len() * adapter.num_tokens());
        assert_close(&format!("run {run} tokens"), &found.positive, &tensors[&format!("run{run}.tokens")], 1e-5);
        let negative = found.negative.unwrap();
        assert_close(&format!("run {run} negative"), &negative, &tensors[&format!("run{run}.negative_tokens")], 1e-5);
        assert!(adapter.encode(&references, false).unwrap().negative.is_none());
    }
}

fn indices(value: &serde_json::Value) -> impl Iterator<Item = usize> {
    value.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as usize)
}

fn open_adapter(name: &str) -> IpAdapter {
    let files = IpAdapterFiles::find(&case_dir(CASE).join(name), None).unwrap();
    let placement = Placement::open(DeviceSpec::Cpu, WeightDtype::Auto).unwrap();
    let open = |path: &PathBuf| Weights::open(path, &placement).unwrap();
    let (adapter, encoder) = (open(&files.adapter), open(&files.image_encoder));
    IpAdapter::load(&files, &files.image_encoder, &adapter, &encoder, TEXT_DIM).unwrap()
}

fn pictures(tensors: &HashMap<String, Tensor>) -> Vec<Arc<Frame>> {
    let picture = |tensor: &Tensor| {
        let (height, width, _) = tensor.dims3().unwrap();
        Arc::new(Frame { width, height, rgb: tensor.flatten_all().unwrap().to_vec1().unwrap() })
    };
    (0..).map_while(|i| tensors.get(&format!("picture{i}"))).map(picture).collect()
}

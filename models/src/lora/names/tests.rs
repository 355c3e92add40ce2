use super::*;
use crate::weights::names::Place;

/// What the layers of [`names`] are called originally.
struct Original;

impl elsewhere::Names for Original {
    fn mark(&self) -> &'static str {
        ""
    }

    fn place(&self, name: &str) -> Option<Place> {
        let third = |first| elsewhere::Extent::Rows(elsewhere::Rows { first, count: 1, of: 3 });
        let (name, part) = match name {
            "blocks.0.attn.to_q.weight" => ("double.0.qkv.weight", third(0)),
            "blocks.0.attn.to_k.weight" => ("double.0.qkv.weight", third(1)),
            "blocks.0.attn.to_v.weight" => ("double.0.qkv.weight", third(2)),
            "norm_out.linear.weight" => ("final.adaLN.weight", elsewhere::Extent::SwappedHalves),
            _ => return None,
        };
        Some(Place { name: name.to_owned(), part })
    }

    fn layer(&self, name: &str) -> Option<Place> {
        if name == "blocks.0.table" {
            return Some(Place::whole("double.0.modulation"));
        }
        let place = self.place(&format!("{name}.weight"))?;
        Some(Place { name: place.name.strip_suffix(".weight")?.to_owned(), ..place })
    }
}

/// A network of an attention, a convolution, norms, a table, patches and a modulation, all four values wide, and a text
/// encoder.
fn names() -> LoraNames {
    let [net, text] = [Arc::<Sites>::default(), Arc::default()];
    let linear = LayerShape::Linear { in_features: 4, out_features: 4 };
    for layer in ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"] {
        net.enter(&format!("blocks.0.{layer}"), linear);
    }
    net.enter("conv_in", LayerShape::Conv2d { in_channels: 4, out_channels: 4, kernel: 3 });
    net.enter("norm_out.linear", linear);
    net.enter("blocks.0.norm", LayerShape::Norm { dim: 4, has_bias: true });
    net.enter("blocks.0.norm_q", LayerShape::Norm { dim: 4, has_bias: false });
    net.enter("blocks.0.table", LayerShape::Table { dims: [1, 6, 4] });
    let patches = LayerShape::Patches { channels: 36, bare_channels: 16, patch: [1, 2, 2], out_features: 4 };
    net.enter("patches", patches);
    text.enter("text_model.encoder.layers.1.self_attn.out_proj", linear);
    LoraNames::new(vec![NetworkNames::denoiser(&net, &Original, []), NetworkNames::first_text_encoder(&text)])
}

fn terms(tensors: &[(&str, &[usize])]) -> Result<Vec<Term>, String> {
    let tensors = tensors.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect();
    names().terms(&tensors).map_err(|mismatch| mismatch.0)
}

/// A pair of matrices under these names is one term of this layer.
#[track_caller]
fn check(down: &str, up: &str, layer: &str) {
    let found = terms(&[(down, &[2, 4]), (up, &[4, 2])]).expect("it is for this model");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].part.layer, layer);
    assert_eq!(found[0].addend.pair().map(|pair| pair.rank), Some(2));
}

#[test]
fn every_dialect_names_the_same_layers() {
    let q = "blocks.0.attn.to_q";
    check("unet.blocks.0.attn.to_q.lora_A.weight", "unet.blocks.0.attn.to_q.lora_B.weight", q);
    check("blocks.0.attn.to_q.lora_A.default.weight", "blocks.0.attn.to_q.lora_B.default.weight", q);
    check("transformer.blocks.0.attn.to_q.lora.down.weight", "transformer.blocks.0.attn.to_q.lora.up.weight", q);
    check("unet.blocks.0.attn.processor.to_q_lora.down.weight", "unet.blocks.0.attn.processor.to_q_lora.up.weight", q);
    check("lora_unet_blocks_0_attn_to_q.lora_down.weight", "lora_unet_blocks_0_attn_to_q.lora_up.weight", q);
    let out = "blocks.0.attn.to_out.0";
    check("blocks.0.attn.processor.to_out_lora.down.weight", "blocks.0.attn.processor.to_out_lora.up.weight", out);
    check("lora_unet_blocks_0_attn_to_out_0.lora_down.weight", "lora_unet_blocks_0_attn_to_out_0.lora_up.weight", out);
    let text = "text_model.encoder.layers.1.self_attn.out_proj";
    for name in ["text_encoder.text_model.encoder.layers.1.self_attn", "text_encoder.encoder.layers.1.self_attn"] {
        check(&format!("{name}.out_proj.lora_A.weight"), &format!("{name}.out_proj.lora_B.weight"), text);
        check(&format!("{name}.to_out_lora.down.weight"), &format!("{name}.to_out_lora.up.weight"), text);
        let new = format!("{name}.out_proj.lora_linear_layer");
        check(&format!("{new}.down.weight"), &format!("{new}.up.weight"), text);
    }
    let flat = "lora_te1_text_model_encoder_layers_1_self_attn_out_proj";
    check(&format!("{flat}.lora_down.weight"), &format!("{flat}.lora_up.weight"), text);
}

#[test]
fn a_fused_layer_is_a_term_for_each_of_its_parts() {
    for name in ["diffusion_model.double.0.qkv.lora_A.weight", "lora_unet_double_0_qkv.lora_down.weight"] {
        let up = name.replace("lora_A", "lora_B").replace("lora_down", "lora_up");
        let found = terms(&[(name, &[3, 4]), (&up, &[12, 3])]).expect("it is for this model");
        let parts: Vec<_> = found.iter().map(|term| (term.part.layer.as_str(), term.part.rows.clone())).collect();
        let expected = [("blocks.0.attn.to_k", 4..8), ("blocks.0.attn.to_q", 0..4), ("blocks.0.attn.to_v", 8..12)];
        assert_eq!(parts, expected);
    }
    let swapped = terms(&[("final.adaLN.lora_A.weight", &[1, 4]), ("final.adaLN.lora_B.weight", &[4, 1])]);
    assert!(swapped.expect("it is for this model")[0].part.swap_halves);
}

/// The shape that one tensor must have to be the difference of this layer, and what it is added to.
#[track_caller]
fn check_difference(tensor: &str, shape: &[usize], layer: &str, is_bias: bool) {
    let found = terms(&[(tensor, shape)]).expect("it is for this model");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].part.layer, layer);
    let expected = match is_bias {
        true => Addend::Bias { tensor: tensor.to_owned(), of: None },
        false => Addend::Weight(tensor.to_owned()),
    };
    assert_eq!(found[0].addend, expected);
    let error = terms(&[(tensor, &[&[5], shape].concat())]).expect_err("another shape");
    assert!(error.contains(tensor) && error.contains(&format!("takes {shape:?}")), "{error}");
}

#[test]
fn differences_of_weights_biases_norms_and_tables_are_terms() {
    check_difference("blocks.0.attn.to_q.diff", &[4, 4], "blocks.0.attn.to_q", false);
    check_difference("lora_unet_blocks_0_attn_to_q.diff_b", &[4], "blocks.0.attn.to_q", true);
    check_difference("conv_in.diff", &[4, 4, 3, 3], "conv_in", false);
    check_difference("transformer.blocks.0.norm.diff", &[4], "blocks.0.norm", false);
    check_difference("transformer.blocks.0.norm.diff_b", &[4], "blocks.0.norm", true);
    check_difference("diffusion_model.double.0.diff_m", &[1, 6, 4], "blocks.0.table", false);
    let error = terms(&[("blocks.0.norm_q.diff_b", &[4])]).expect_err("it has no bias");
    assert!(error.contains("blocks.0.norm_q") && error.contains("has no bias"), "{error}");
    let error = terms(&[("blocks.0.norm.lora_A.weight", &[1, 4]), ("blocks.0.norm.lora_B.weight", &[4, 1])]);
    assert!(error.expect_err("of low rank").contains("multiplies with no matrix"));
}

#[test]
fn a_bias_of_the_second_matrix_counts_as_much_as_the_pair() {
    let [down, up, bias] =
        ["lora_A.weight", "lora_B.weight", "lora_B.bias"].map(|of| format!("blocks.0.attn.to_q.{of}"));
    let found = terms(&[(&down, &[2, 4]), (&up, &[4, 2]), (&bias, &[4])]).expect("it is for this model");
    let Addend::LowRank(pair) = &found[0].addend else { panic!("{found:?}") };
    assert_eq!(found[1].addend, Addend::Bias { tensor: bias, of: Some(pair.clone()) });
    assert_eq!(found.len(), 2);
}

/// A network with pictures among its channels takes the files of one without: nothing is added for the pictures.
#[test]
fn patches_take_all_channels_or_those_that_are_no_pictures() {
    for channels in [16, 36] {
        let shape = [4, channels, 1, 2, 2];
        assert!(terms(&[("patches.diff", &shape)]).is_ok());
        let pair =
            [("patches.lora_A.weight", &[2, channels, 1, 2, 2][..]), ("patches.lora_B.weight", &[4, 2, 1, 1, 1])];
        assert!(terms(&pair).is_ok());
    }
    assert!(terms(&[("patches.diff", &[4, 20, 1, 2, 2])]).is_err());
}

#[test]
fn linear_layers_take_convolutions_of_one_position_and_convolutions_their_own_kernel() {
    let pair = |layer: &str| [format!("{layer}.lora_A.weight"), format!("{layer}.lora_B.weight")];
    let [down, up] = pair("blocks.0.attn.to_q");
    assert!(terms(&[(&down, &[2, 4, 1, 1]), (&up, &[4, 2, 1, 1])]).is_ok());
    assert!(terms(&[(&down, &[2, 4, 3, 3]), (&up, &[4, 2, 1, 1])]).is_err());
    assert!(terms(&[(&down, &[0, 4]), (&up, &[4, 0])]).is_err());
    let [down, up] = pair("conv_in");
    assert!(terms(&[(&down, &[2, 4, 3, 3]), (&up, &[4, 2, 1, 1])]).is_ok());
    let error = terms(&[(&down, &[2, 4, 1, 1]), (&up, &[4, 2, 1, 1])]).expect_err("another kernel");
    assert!(error.contains("[2, 4, 1, 1]") && error.contains("[2, 4, 3, 3]"), "{error}");
}

#[test]
fn nothing_is_dropped() {
    let sound: [(&str, &[usize]); 2] =
        [("blocks.0.attn.to_q.lora_A.weight", &[2, 4]), ("blocks.0.attn.to_q.lora_B.weight", &[4, 2])];
    for (extra, expected) in [
        ("blocks.1.attn.to_q.lora_A.weight", "1 of its 3 tensors belong to no layer"),
        ("lora_te2_text_model_encoder_layers_1_self_attn_out_proj.alpha", "belong to no layer"),
        ("blocks.0.attn.to_k.alpha", "`blocks.0.attn.to_k` has no lora_A"),
        ("blocks.0.attn.norm_q.weight", "are not LoRA's"),
        ("diffusion_model.blocks.1.attn.to_q.diff", "1 of its 3 tensors belong to no layer"),
        ("conv_in.lora_up.bias", "`conv_in` has no lora_A"),
        ("blocks.0.attn.to_q.lora_mid.weight", "Tucker"),
    ] {
        let error = terms(&[&sound[..], &[(extra, &[4])]].concat()).expect_err(extra);
        assert!(error.contains(expected), "{extra}: {error}");
    }
    assert!(terms(&[]).is_err());
    let many: Vec<String> = (0..20).map(|i| format!("blocks.{}.x.lora_A.weight", 7 + i)).collect();
    let many: Vec<(&str, &[usize])> = many.iter().map(|name| (name.as_str(), &[2usize, 4][..])).collect();
    assert!(terms(&many).expect_err("unknown").ends_with("and 12 more"));
}

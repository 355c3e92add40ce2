//! The document is whole.

use std::collections::BTreeSet;

use super::*;
use crate::http::routes;

const TASKS: [(Task, &str); 6] = [
    (Task::Chat, "ChatRequest"),
    (Task::Completion, "CompletionRequest"),
    (Task::Response, "ResponseRequest"),
    (Task::ImageGeneration, "ImageGenerationRequest"),
    (Task::ImageEdit, "ImageEditRequest"),
    (Task::Video, "VideoRequest"),
];

#[test]
fn every_route_is_in_the_document_and_no_other_path() {
    let served: BTreeSet<String> = routes().into_iter().map(|(path, _)| path.replace("{*", "{")).collect();
    let documented = document()["paths"].as_object().expect("paths").keys().cloned().collect();
    assert_eq!(served, documented);
}

#[test]
fn every_declared_field_is_in_the_schema_of_its_bodies_and_no_other() {
    for (task, name) in TASKS {
        let schema = &document()["components"]["schemas"][name];
        for declaration in TEXT_PARAMETERS.iter().chain(PARAMETERS.iter()).chain(videos::OWN).chain(images::OWN) {
            let property = &schema["properties"][declaration.name];
            let is_of_task = fields(task).iter().any(|field| std::ptr::eq(*field, *declaration));
            let has_doc = property["description"].as_str().is_some_and(|text| text.starts_with(declaration.doc));
            assert_eq!(has_doc, is_of_task, "{name}: {}: {property}", declaration.name);
            let required = schema["required"].as_array().expect("a list");
            if is_of_task {
                assert_eq!(required.contains(&declaration.name.into()), declaration.is_required, "{name}");
            }
        }
        assert_eq!(schema["additionalProperties"], false, "{name}");
    }
}

#[test]
fn every_reference_leads_somewhere_and_every_component_is_used() {
    let text = document().to_string();
    let mut referenced = BTreeSet::new();
    for part in text.split("\"$ref\":\"#").skip(1) {
        let pointer = part.split('"').next().expect("ends");
        assert!(document().pointer(pointer).is_some(), "{pointer}");
        referenced.insert(pointer.to_owned());
    }
    for (kind, components) in document()["components"].as_object().expect("components") {
        for name in components.as_object().expect("named").keys() {
            assert!(referenced.contains(&format!("/components/{kind}/{name}")), "{kind}/{name} is never used");
        }
    }
}

#[test]
fn null_is_as_good_as_an_absent_field_in_json_alone() {
    let schemas = &document()["components"]["schemas"];
    let strength = |name: &str| &schemas[name]["properties"]["strength"]["type"];
    assert_eq!(*strength("ImageEditRequest"), json!(["number", "null"]));
    assert_eq!(*strength("ImageEditForm"), "number");
    let properties = &schemas["ImageGenerationRequest"]["properties"];
    assert_eq!(properties["prompt"]["type"], "string");
    assert_eq!(properties["acceleration"]["enum"], json!(["none", "safe", "fast", null]));
    assert_eq!(properties["vae_tiling"]["enum"], json!([true, false, "auto", null]));
}

#[test]
fn files_of_a_form_are_binary_and_what_is_no_plain_value_is_json() {
    let properties = &document()["components"]["schemas"]["ImageEditForm"]["properties"];
    assert_eq!(properties["image"]["format"], "binary");
    assert_eq!(properties["reference_images[]"]["items"]["format"], "binary");
    assert_eq!(properties["loras"]["contentSchema"]["items"]["required"], json!(["name"]));
}

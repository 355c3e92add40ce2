//! The direction of dependencies: the server knows no tensors, the models know no network.

use std::path::Path;

/// Names under `[dependencies]` of a manifest.
fn dependencies(manifest: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(manifest);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let manifest: toml::Table = text.parse().expect("a manifest is TOML");
    manifest["dependencies"].as_table().expect("a table").keys().cloned().collect()
}

#[track_caller]
fn check(manifest: &str, must_not_know: &[&str]) {
    let known = dependencies(manifest);
    assert!(!known.is_empty(), "{manifest} has no dependencies; was it read?");
    for name in must_not_know {
        assert!(!known.iter().any(|known| known.starts_with(name)), "{manifest} depends on {name}");
    }
}

#[test]
fn the_server_knows_no_tensors() {
    check("Cargo.toml", &["candle", "tale-kernels", "tokenizers", "safetensors"]);
}

#[test]
fn the_models_know_no_network() {
    check("models/Cargo.toml", &["tokio", "axum", "hyper", "hf-hub", "reqwest", "ureq"]);
}

#[test]
fn the_kernels_know_no_models() {
    check("kernels/Cargo.toml", &["tale", "tokio", "axum", "tokenizers", "safetensors"]);
}

/// Files of Rust under a folder.
fn sources(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn databases_are_spoken_to_by_the_store_alone() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for dir in ["src", "models/src", "kernels/src"] {
        sources(&root.join(dir), &mut found);
    }
    let (store, others): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|path| path.starts_with(root.join("src/job/store")));
    let speaks = |path: &std::path::PathBuf| {
        let text = std::fs::read_to_string(path).expect("readable").to_lowercase();
        ["sqlx::", "select * from", "insert into ", "delete from ", "create table "]
            .into_iter()
            .find(|word| text.contains(word))
    };
    assert!(store.iter().any(|path| speaks(path).is_some()), "were the sources read?");
    for path in others {
        assert_eq!(speaks(&path), None, "{}", path.display());
    }
    check("models/Cargo.toml", &["sqlx", "rusqlite"]);
}

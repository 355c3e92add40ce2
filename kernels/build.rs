//! Compiles `src/*.cu`: with the feature `cuda` by nvcc into one fatbin per file, with the feature `emulator` by a C++
//! compiler for the CPU. Without either it does nothing, and `cfg(gpu)` is off.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Machine code for each of these, and PTX of the last for GPUs that come after.
const COMPUTE_CAPABILITIES: [&str; 4] = ["80", "86", "89", "90"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(gpu)");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=emulator");
    let (cuda, emulator) = (is_enabled("CUDA"), is_enabled("EMULATOR"));
    if cuda || emulator {
        println!("cargo::rustc-cfg=gpu");
    }
    let sources = sources();
    if cuda {
        compile_fatbins(&sources);
    }
    if emulator {
        #[cfg(feature = "emulator")]
        compile_emulator(&sources);
    }
}

fn is_enabled(feature: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{feature}")).is_some()
}

fn sources() -> Vec<PathBuf> {
    let mut sources: Vec<PathBuf> = std::fs::read_dir("src")
        .expect("the crate has sources")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    sources
}

/// One nvcc per core at a time.
fn compile_fatbins(sources: &[PathBuf]) {
    for variable in ["CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "NVCC_APPEND_FLAGS", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let (nvcc, next) = (nvcc(), AtomicUsize::new(0));
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Relaxed)) {
                    compile_fatbin(&nvcc, source, &out_dir);
                }
            });
        }
    });
}

fn nvcc() -> PathBuf {
    let home = env::var_os("CUDA_HOME").or_else(|| env::var_os("CUDA_PATH"));
    home.map_or_else(|| "nvcc".into(), |home| Path::new(&home).join("bin/nvcc"))
}

fn compile_fatbin(nvcc: &Path, source: &Path, out_dir: &Path) {
    let to = out_dir.join(source.file_stem().expect("a file")).with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--extended-lambda", "-Xfatbin", "-compress-all", "-o"]);
    command.arg(&to).arg(source);
    for capability in COMPUTE_CAPABILITIES {
        command.arg(format!("-gencode=arch=compute_{capability},code=sm_{capability}"));
    }
    let newest = COMPUTE_CAPABILITIES[COMPUTE_CAPABILITIES.len() - 1];
    command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    if let Some(compiler) = env::var_os("NVCC_CCBIN") {
        command.arg("-ccbin").arg(compiler);
    }
    let status = command.status().unwrap_or_else(|error| {
        panic!("cannot run {}: {error}; scripts/cuda-toolkit installs it", nvcc.display());
    });
    assert!(status.success(), "nvcc could not compile {}", source.display());
}

/// As one archive that is linked whole: the kernels register themselves before `main`.
#[cfg(feature = "emulator")]
fn compile_emulator(sources: &[PathBuf]) {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).include("emulator").include("src");
    // Kernels read memory in other types than it was written in, as CUDA allows.
    build.flag("-x").flag("c++").flag("-Wno-unknown-pragmas").flag("-fno-strict-aliasing");
    // nvcc joins no explicitly rounded operations (__fmul_rn and its like) either.
    build.flag("-ffp-contract=off");
    build.file("emulator/emulator.cc").files(sources);
    build.link_lib_modifier("+whole-archive").compile("tale_emulator");
}

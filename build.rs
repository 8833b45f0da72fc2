//! Compiles the CUDA kernels when the feature `cuda` asks for them, and does nothing otherwise.
//!
//! Environment: `NXS_NVCC`, `NXS_CUDA_ARCHS`, and the ecosystem's own variables; the README has the table.

#[path = "build/archs.rs"]
mod archs;
#[path = "build/compile.rs"]
mod compile;
#[path = "build/toolkit.rs"]
mod toolkit;

use std::env;
use std::path::{Path, PathBuf};
use std::process::exit;

use archs::Archs;
use toolkit::Toolkit;

/// Folders of `kernels/` that are always compiled.
const CORE: [&str; 2] = ["common", "random"];
/// Folders of `kernels/` that are compiled when the feature of the same name is on.
const FAMILIES: [&str; 3] = ["attention", "quantization", "verification"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(nxs_kernels)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    println!("cargo::metadata=include={}", manifest.join("kernels/include").display());
    let built = if env::var_os("CARGO_FEATURE_EMULATE").is_some() {
        build_emulator(&manifest)
    } else if env::var_os("CARGO_FEATURE_CUDA").is_none() || env::var_os("DOCS_RS").is_some() {
        // Documentation needs the API, which does not depend on the kernels.
        Ok(())
    } else {
        build_kernels(&manifest.join("kernels"))
    };
    if let Err(message) = built {
        // The message is for a person; a panic would bury it under a backtrace.
        eprintln!("\nnextscale: {message}\n");
        exit(1);
    }
}

/// The folders of `kernels/` that this build compiles.
fn folders() -> impl Iterator<Item = &'static str> {
    let chosen = |family: &&str| env::var_os(format!("CARGO_FEATURE_{}", family.to_uppercase())).is_some();
    CORE.into_iter().chain(FAMILIES.into_iter().filter(chosen))
}

/// The kernels as C++ for the CPU: the emulator's folder of instructions stands before the real one.
fn build_emulator(manifest: &Path) -> Result<(), String> {
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        return Err("the features `emulate` and `cuda` define the same symbols: choose one".into());
    }
    let (kernels, emulator) = (manifest.join("kernels"), manifest.join("emulator"));
    if !emulator.is_dir() {
        return Err("the feature `emulate` is for maintainers: the emulator is not part of the published crate".into());
    }
    println!("cargo::rerun-if-changed={}", kernels.display());
    println!("cargo::rerun-if-changed={}", emulator.display());
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).debug(false).warnings(false);
    // No contraction: the kernels' additions and multiplications are those of the GPU, bit for bit. A register that a
    // kernel reads before it writes it has a pattern.
    for flag in
        ["-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-Wno-unknown-pragmas", "-Wno-psabi", "-x", "c++"]
    {
        build.flag(flag);
    }
    build.include(emulator.join("include")).include(&kernels).include(kernels.join("include"));
    for folder in folders() {
        build.files(compile::sources_in(&kernels.join(folder), "cu")?);
    }
    build.files(compile::sources_in(&emulator.join("src"), "cpp")?);
    build.try_compile("nextscale_emulated").map_err(|e| e.to_string())?;
    println!("cargo::rustc-cfg=nxs_kernels");
    Ok(())
}

fn build_kernels(kernels: &Path) -> Result<(), String> {
    for variable in toolkit::VARIABLES.iter().chain(&archs::VARIABLES).chain(&[compile::CACHE]) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed={}", kernels.display());

    let lookup = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let (toolkit, warning) = Toolkit::find(&lookup)?;
    if let Some(warning) = warning {
        println!("cargo::warning={warning}");
    }
    let archs = Archs::choose(&lookup, &toolkit)?;

    let mut sources = Vec::new();
    for folder in folders() {
        sources.extend(compile::sources_in(&kernels.join(folder), "cu")?);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let report = compile::compile(&toolkit, &archs, kernels, &sources, &out)?;

    println!("cargo::rustc-cfg=nxs_kernels");
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=nextscale_kernels");
    println!("cargo::rustc-link-search=native={}", toolkit.libraries.display());
    // -bundle: the final link takes cudart once, and the rlib stays small.
    println!("cargo::rustc-link-lib=static:-bundle=cudart_static");
    if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        for library in ["dl", "rt", "pthread"] {
            println!("cargo::rustc-link-lib={library}");
        }
    }
    // For our own gates (tests/kernels.rs) and for dependants' build scripts (DEP_NEXTSCALE_*).
    println!("cargo::rustc-env=NXS_PTXAS_REPORT={}", report.display());
    println!("cargo::rustc-env=NXS_KERNEL_LIBRARY={}", out.join("libnextscale_kernels.a").display());
    println!("cargo::rustc-env=NXS_CUDA_ROOT={}", toolkit.root.display());
    println!("cargo::metadata=archs={archs}");
    println!("cargo::metadata=lib={}", out.display());
    println!("cargo::metadata=cuda_lib={}", toolkit.libraries.display());
    Ok(())
}

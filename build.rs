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
const FAMILIES: [&str; 1] = ["quantization"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(nxs_kernels)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    println!("cargo::metadata=include={}", manifest.join("kernels/include").display());
    // Documentation needs the API, which does not depend on the kernels.
    if env::var_os("CARGO_FEATURE_CUDA").is_none() || env::var_os("DOCS_RS").is_some() {
        return;
    }
    if let Err(message) = build_kernels(&manifest.join("kernels")) {
        // The message is for a person; a panic would bury it under a backtrace.
        eprintln!("\nnextscale: {message}\n");
        exit(1);
    }
}

fn build_kernels(kernels: &Path) -> Result<(), String> {
    for variable in toolkit::VARIABLES.iter().chain(&archs::VARIABLES) {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed={}", kernels.display());

    let lookup = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let (toolkit, warning) = Toolkit::find(&lookup)?;
    if let Some(warning) = warning {
        println!("cargo::warning={warning}");
    }
    let archs = Archs::choose(&lookup, &toolkit)?;

    let folders = CORE.into_iter().chain(
        FAMILIES.into_iter().filter(|family| env::var_os(format!("CARGO_FEATURE_{}", family.to_uppercase())).is_some()),
    );
    let mut sources = Vec::new();
    for folder in folders {
        sources.extend(compile::sources_in(&kernels.join(folder))?);
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

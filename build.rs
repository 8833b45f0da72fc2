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
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::exit;

use archs::Archs;
use toolkit::Toolkit;

/// Folders of `kernels/` that are always compiled.
const CORE: [&str; 2] = ["common", "random"];
/// Folders of `kernels/` that are compiled when the feature of the same name is on.
const FAMILIES: [&str; 4] = ["attention", "quantization", "verification", "compression"];

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
        build_kernels(&manifest)
    };
    if let Err(message) = built {
        // The message is for a person; a panic would bury it under a backtrace.
        eprintln!("\nnextscale: {message}\n");
        exit(1);
    }
}

/// The files of `kernels/` that this build compiles.
fn sources(kernels: &Path) -> Result<Vec<PathBuf>, String> {
    let chosen = |family: &&str| env::var_os(format!("CARGO_FEATURE_{}", family.to_uppercase())).is_some();
    let mut sources = Vec::new();
    for folder in CORE.into_iter().chain(FAMILIES.into_iter().filter(chosen)) {
        sources.extend(compile::sources_in(&kernels.join(folder), "cu")?);
    }
    Ok(sources)
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
    println!("cargo::rerun-if-env-changed={}", compile::CACHE);
    let host = cc::Build::new().cpp(true).cargo_metadata(false).try_get_compiler();
    let host = host.map_err(|e| format!("the emulator needs a C++ compiler: {e}"))?;
    let mut command: Vec<OsString> = vec![host.path().into()];
    // No contraction: the kernels' additions and multiplications are those of the GPU, bit for bit. A register that a
    // kernel reads before it writes it has a pattern.
    command.extend(
        "-std=c++20 -O2 -fPIC -ffp-contract=off -ftrivial-auto-var-init=pattern -w -Wno-unknown-pragmas -x c++"
            .split(' ')
            .map(OsString::from),
    );
    let roots = vec![emulator.join("include"), kernels.clone(), kernels.join("include")];
    for folder in &roots {
        command.extend(["-I".into(), folder.into()]);
    }
    let compiler = compile::Compiler { command, version: String::new(), roots };
    let mut sources = sources(&kernels)?;
    sources.extend(compile::sources_in(&emulator.join("src"), "cpp")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    compile::compile(&compiler, manifest, &sources, &out, "nextscale_emulated")?;
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=nextscale_emulated");
    println!("cargo::rustc-link-lib=stdc++");
    println!("cargo::rustc-cfg=nxs_kernels");
    Ok(())
}

fn build_kernels(manifest: &Path) -> Result<(), String> {
    let kernels = manifest.join("kernels");
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

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let compiler = compile::nvcc(&toolkit, &archs, &kernels)?;
    let report = compile::compile(&compiler, manifest, &sources(&kernels)?, &out, "nextscale_kernels")?;

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

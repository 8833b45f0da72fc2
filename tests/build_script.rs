//! The pure parts of the build script.

#![allow(dead_code)]

#[path = "../build/archs.rs"]
mod archs;
#[path = "../build/toolkit.rs"]
mod toolkit;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use archs::Archs;
use toolkit::Toolkit;

fn flags(text: &str) -> String {
    Archs::parse(text).map_or_else(|e| e, |archs| archs.to_string())
}

#[test]
fn architectures_are_read_in_every_usual_spelling() {
    assert_eq!(flags("80;86;89;90a;+ptx80"), "80;86;89;90a;+ptx80");
    assert_eq!(flags("8.0, 9.0"), "80;90a");
    assert_eq!(flags("sm_90"), "90a");
    assert_eq!(flags("86 86"), "86");
    assert_eq!(flags("120"), "120");
    assert_eq!(
        Archs::parse("90;+ptx80").unwrap().flags(),
        ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80"]
    );
}

#[test]
fn bad_architectures_say_why() {
    for (text, why) in [
        ("hopper", "\"hopper\" is not a compute capability"),
        ("90aa", "\"90aa\" is not a compute capability"),
        ("9", "\"9\" is not a compute capability"),
        ("75", "need compute capability 8.0"),
        ("", "empty"),
        (" ; ", "empty"),
    ] {
        assert!(flags(text).contains(why), "{text}: {}", flags(text));
    }
}

#[test]
fn versions_are_read() {
    assert_eq!(toolkit::parse_version("Cuda compilation tools, release 13.0, V13.0.88\n"), Some((13, 0)));
    assert_eq!(toolkit::parse_version("something else"), None);
}

/// A folder that looks like a toolkit: an `nvcc` that answers `--version`, and a runtime library.
#[cfg(unix)]
fn fake(folder: &Path, release: &str, with_runtime: bool) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(folder.join("bin")).unwrap();
    fs::create_dir_all(folder.join("lib64")).unwrap();
    let nvcc = folder.join("bin/nvcc");
    fs::write(&nvcc, format!("#!/bin/sh\necho 'release {release}, V{release}.1'\n")).unwrap();
    fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755)).unwrap();
    if with_runtime {
        fs::write(folder.join("lib64/libcudart_static.a"), "").unwrap();
    }
    nvcc
}

#[cfg(unix)]
fn find(variables: &[(&str, &Path)]) -> Result<(Toolkit, Option<String>), String> {
    let variables: HashMap<&str, OsString> = variables.iter().map(|(k, v)| (*k, v.as_os_str().into())).collect();
    Toolkit::find(&|name| variables.get(name).cloned())
}

#[cfg(unix)]
#[test]
fn the_toolkit_is_found_in_order() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("toolkits");
    let _ = fs::remove_dir_all(&root);
    let (home, path, venv) = (root.join("home"), root.join("path"), root.join("venv"));
    let site = venv.join("lib/python3.11/site-packages/nvidia/cu13");
    let (in_home, on_path, in_venv) = (fake(&home, "12.8", true), fake(&path, "13.0", true), fake(&site, "13.0", true));
    let nowhere = root.join("nowhere");

    let (toolkit, warning) = find(&[("CUDA_HOME", &home), ("PATH", &path.join("bin"))]).unwrap();
    assert_eq!((toolkit.nvcc, toolkit.version, warning), (in_home, (12, 8), None));

    // A variable that points nowhere is passed over, and said.
    let (toolkit, warning) = find(&[("CUDA_HOME", &nowhere), ("PATH", &path.join("bin"))]).unwrap();
    assert_eq!(toolkit.nvcc, on_path);
    let warning = warning.unwrap();
    assert!(warning.contains("CUDA_HOME=") && warning.contains("path/bin/nvcc"), "{warning}");

    let (toolkit, _) = find(&[("NXS_NVCC", &on_path), ("CUDA_HOME", &home)]).unwrap();
    assert_eq!(toolkit.nvcc, on_path);
    let (toolkit, _) = find(&[("NVCC", Path::new("nvcc")), ("PATH", &path.join("bin"))]).unwrap();
    assert_eq!(toolkit.nvcc, on_path);

    // A compiler that was named and is not there is an error, not a reason to take another.
    let error = find(&[("NXS_NVCC", &nowhere), ("CUDA_HOME", &home)]).unwrap_err();
    assert!(error.contains("NXS_NVCC=") && error.contains("is not a file"), "{error}");

    if !Path::new("/usr/local/cuda/bin/nvcc").exists() && !Path::new("/opt/cuda/bin/nvcc").exists() {
        let (toolkit, _) = find(&[("VIRTUAL_ENV", &venv)]).unwrap();
        assert_eq!(toolkit.nvcc, in_venv);
        let error = find(&[("CUDA_HOME", &nowhere)]).unwrap_err();
        for part in
            ["none was found", "nowhere/bin/nvcc", "pip install nvidia-cuda-nvcc", "NXS_NVCC", "without the feature"]
        {
            assert!(error.contains(part), "{error}");
        }
    }

    fake(&root.join("old"), "11.8", true);
    let error = find(&[("CUDA_HOME", &root.join("old"))]).unwrap_err();
    assert!(error.contains("is CUDA 11.8") && error.contains("12.4 or newer"), "{error}");
    fake(&root.join("bare"), "13.0", false);
    if !Path::new("/usr/lib/x86_64-linux-gnu/libcudart_static.a").exists() {
        let error = find(&[("CUDA_HOME", &root.join("bare"))]).unwrap_err();
        assert!(error.contains("no libcudart_static"), "{error}");
    }
}

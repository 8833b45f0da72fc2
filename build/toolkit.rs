//! Where the CUDA toolkit is.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every variable that this search reads.
pub(crate) const VARIABLES: [&str; 9] = [
    "NXS_NVCC",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_ROOT",
    "CUDA_TOOLKIT_ROOT_DIR",
    "PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
];

/// Older toolkits lack C++17 features and PTX that the kernels use.
const OLDEST: (u32, u32) = (12, 4);

const NVCC: &str = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };

/// A toolkit that can compile and link.
#[derive(Debug, Clone)]
pub(crate) struct Toolkit {
    pub(crate) nvcc: PathBuf,
    pub(crate) root: PathBuf,
    /// Holds `libcudart_static`.
    pub(crate) libraries: PathBuf,
    pub(crate) version: (u32, u32),
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Toolkit {
    /// The first usable toolkit, and a warning if a variable pointed nowhere.
    pub(crate) fn find(env: Lookup) -> Result<(Self, Option<String>), String> {
        let (nvcc, warning) = find_nvcc(env)?;
        // Follow links: /usr/local/cuda/bin/nvcc and a distribution's /usr/bin/nvcc lie elsewhere.
        let real = nvcc.canonicalize().map_err(|e| format!("{}: {e}", nvcc.display()))?;
        let root = real.parent().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default();
        let version = version_of(&nvcc)?;
        if version < OLDEST {
            return Err(format!(
                "{} is CUDA {}.{}, and the kernels need {}.{} or newer.\n{REMEDY}",
                nvcc.display(),
                version.0,
                version.1,
                OLDEST.0,
                OLDEST.1
            ));
        }
        let libraries = find_cudart(&root).ok_or_else(|| {
            format!(
                "found {}, but no libcudart_static under {}.\n\
                 Install the runtime of the same toolkit (PyPI: nvidia-cuda-runtime; Debian: nvidia-cuda-dev).",
                nvcc.display(),
                root.display()
            )
        })?;
        Ok((Toolkit { nvcc, root, libraries, version }, warning))
    }
}

const REMEDY: &str = "\
Any of these helps:
  - install NVIDIA's toolkit and set CUDA_HOME to its folder;
  - without root: pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl
    in a virtual environment, and build with that environment active;
  - set NXS_NVCC to the nvcc to use;
  - build without the feature `cuda`: the host path needs no toolkit.";

fn find_nvcc(env: Lookup) -> Result<(PathBuf, Option<String>), String> {
    let mut searched = Vec::new();
    let mut misled = Vec::new();
    // A path to the compiler itself is an order: no second guess if it is wrong.
    for variable in ["NXS_NVCC", "NVCC"] {
        if let Some(value) = env(variable) {
            let path = PathBuf::from(&value);
            if path.is_file() {
                return Ok((path, None));
            }
            let named = (path.components().count() == 1).then(|| on_path(env, &path)).flatten();
            if let Some(found) = named {
                return Ok((found, None));
            }
            return Err(format!("{variable}={} is not a file. Unset it or point it at nvcc.", path.display()));
        }
    }
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"] {
        if let Some(value) = env(variable) {
            let path = Path::new(&value).join("bin").join(NVCC);
            if path.is_file() {
                return Ok((path, warn(&misled, &None)));
            }
            misled.push(format!("{variable}={}", Path::new(&value).display()));
            searched.push(path);
        }
    }
    let mut found = on_path(env, Path::new(NVCC));
    searched.push(PathBuf::from("$PATH"));
    if found.is_none() {
        let mut candidates = vec![PathBuf::from("/usr/local/cuda/bin"), PathBuf::from("/opt/cuda/bin")];
        if let Some(prefix) = env("CONDA_PREFIX") {
            candidates.push(Path::new(&prefix).join("bin"));
        }
        if let Some(venv) = env("VIRTUAL_ENV") {
            candidates.extend(pypi_folders(Path::new(&venv)));
        }
        for folder in candidates {
            let path = folder.join(NVCC);
            if path.is_file() {
                found = Some(path);
                break;
            }
            searched.push(path);
        }
    }
    match found {
        Some(path) => {
            let warning = warn(&misled, &Some(&path));
            Ok((path, warning))
        }
        None => {
            let mut message = String::from("the feature `cuda` needs nvcc, and none was found. Searched:\n");
            for path in &searched {
                let _ = writeln!(message, "  {}", path.display());
            }
            if !misled.is_empty() {
                let _ = writeln!(message, "({} does not hold bin/{NVCC}.)", misled.join(", "));
            }
            message.push_str(REMEDY);
            Err(message)
        }
    }
}

fn warn(misled: &[String], used: &Option<&PathBuf>) -> Option<String> {
    let used = used.map(|path| path.display().to_string()).unwrap_or_else(|| "the next variable".into());
    (!misled.is_empty()).then(|| format!("{} does not hold bin/{NVCC}; using {used}", misled.join(", ")))
}

fn on_path(env: Lookup, name: &Path) -> Option<PathBuf> {
    let path = env("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|candidate| candidate.is_file())
}

/// `<venv>/lib/python3.x/site-packages/nvidia/cu13/bin`: where NVIDIA's PyPI packages put nvcc.
fn pypi_folders(venv: &Path) -> Vec<PathBuf> {
    let list = |folder: &Path| -> Vec<PathBuf> {
        let mut entries: Vec<_> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        entries.sort();
        entries
    };
    let mut folders = Vec::new();
    for python in list(&venv.join("lib")) {
        for package in list(&python.join("site-packages/nvidia")).into_iter().rev() {
            folders.push(package.join("bin"));
        }
    }
    folders
}

fn find_cudart(root: &Path) -> Option<PathBuf> {
    let name = if cfg!(windows) { "cudart_static.lib" } else { "libcudart_static.a" };
    let mut folders: Vec<PathBuf> =
        ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib/x64"].map(|f| root.join(f)).into();
    // Debian splits the toolkit over /usr.
    folders.extend(["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"].map(PathBuf::from));
    folders.into_iter().find(|folder| folder.join(name).is_file())
}

fn version_of(nvcc: &Path) -> Result<(u32, u32), String> {
    let output =
        Command::new(nvcc).arg("--version").output().map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| format!("{} --version names no release:\n{text}", nvcc.display()))
}

/// "…, release 13.0, V13.0.88" -> (13, 0)
pub(crate) fn parse_version(text: &str) -> Option<(u32, u32)> {
    let release = text.split("release ").nth(1)?;
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

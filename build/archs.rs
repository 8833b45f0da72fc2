//! Which GPU architectures the kernels are compiled for.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::process::Command;

use crate::toolkit::Toolkit;

/// Every variable that the choice reads.
pub(crate) const VARIABLES: [&str; 2] = ["NXS_CUDA_ARCHS", "CUDA_COMPUTE_CAP"];

/// Machine code for every data-centre and consumer part since Ampere that differs, and PTX for what comes later.
/// Fixed, not probed: the machine that builds is rarely the one that runs.
const DEFAULT: &str = "80;86;89;90a;+ptx80";

const HELP: &str =
    "A list such as \"80;86;89;90a;+ptx80\" (machine code for each number, PTX for +ptx), or \"native\".";

/// The chosen architectures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Archs {
    /// "80", "90a": compiled to machine code.
    pub(crate) sass: BTreeSet<String>,
    /// "80": embedded as PTX, compiled by the driver of a later GPU.
    pub(crate) ptx: BTreeSet<String>,
}

impl Archs {
    /// `NXS_CUDA_ARCHS`, else `CUDA_COMPUTE_CAP`, else the default list; held against what this nvcc knows.
    pub(crate) fn choose(env: &dyn Fn(&str) -> Option<OsString>, toolkit: &Toolkit) -> Result<Self, String> {
        let asked = VARIABLES.iter().find_map(|name| env(name).map(|value| (*name, value)));
        let (source, text) = match asked {
            Some((name, value)) => (name, value.to_string_lossy().into_owned()),
            None => ("the default list", DEFAULT.to_string()),
        };
        let text = if text.trim() == "native" { native()? } else { text };
        let archs = Self::parse(&text).map_err(|e| format!("{source}: {e}\n{HELP}"))?;
        let known = known_to(toolkit);
        let unknown = archs.sass.iter().chain(&archs.ptx).find(|arch| !known.contains(*arch));
        if let (Some(unknown), false) = (unknown, known.is_empty()) {
            let known: Vec<_> = known.iter().map(String::as_str).collect();
            return Err(format!(
                "{source}: CUDA {}.{} does not know sm_{unknown}; it knows {}.\n{HELP}",
                toolkit.version.0,
                toolkit.version.1,
                known.join(", ")
            ));
        }
        Ok(archs)
    }

    /// Accepts `80`, `8.0`, `sm_80`, `90a`, `+ptx80`, separated by `;`, `,` or blanks.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut archs = Archs { sass: BTreeSet::new(), ptx: BTreeSet::new() };
        for item in text.split([';', ',', ' ']).filter(|item| !item.is_empty()) {
            let (ptx, name) = match item.strip_prefix("+ptx") {
                Some(rest) => (true, rest),
                None => (false, item.trim_start_matches("sm_").trim_start_matches("compute_")),
            };
            let name = name.replace('.', "");
            let digits = name.trim_end_matches(['a', 'f']);
            let number: u32 = digits.parse().map_err(|_| format!("\"{item}\" is not a compute capability"))?;
            if name.len() > digits.len() + 1 || number < 10 {
                return Err(format!("\"{item}\" is not a compute capability"));
            }
            if number < 80 {
                return Err(format!("\"{item}\": the kernels need compute capability 8.0 or newer"));
            }
            // wgmma exists for sm_90a alone, and sm_90a code runs wherever sm_90 code does.
            let name = if number == 90 && !ptx { "90a".to_string() } else { name };
            if ptx {
                archs.ptx.insert(name)
            } else {
                archs.sass.insert(name)
            };
        }
        if archs.sass.is_empty() && archs.ptx.is_empty() {
            return Err("the list is empty".into());
        }
        Ok(archs)
    }

    /// In full form: the `-arch` shorthand can add a pass for plain sm_90, which rejects wgmma.
    pub(crate) fn flags(&self) -> Vec<String> {
        let sass = self.sass.iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}"));
        let ptx = self.ptx.iter().map(|a| format!("-gencode=arch=compute_{a},code=compute_{a}"));
        sass.chain(ptx).collect()
    }
}

impl fmt::Display for Archs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let items: Vec<_> = self.sass.iter().cloned().chain(self.ptx.iter().map(|a| format!("+ptx{a}"))).collect();
        f.write_str(&items.join(";"))
    }
}

fn native() -> Result<String, String> {
    let failed = || "NXS_CUDA_ARCHS=native asks nvidia-smi, which did not answer. Name the architectures.".to_string();
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=compute_cap", "--format=csv,noheader"])
        .output()
        .map_err(|_| failed())?;
    let text = String::from_utf8_lossy(&output.stdout).replace('\n', ";");
    if output.status.success() && !text.trim().is_empty() { Ok(text) } else { Err(failed()) }
}

fn known_to(toolkit: &Toolkit) -> BTreeSet<String> {
    let output = Command::new(&toolkit.nvcc).arg("--list-gpu-code").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let mut known: BTreeSet<String> =
        text.lines().filter_map(|line| line.trim().strip_prefix("sm_")).map(str::to_string).collect();
    // The list leaves the architecture-specific variants out.
    let specific: Vec<_> = known.iter().filter(|arch| arch.as_str() >= "90" || arch.len() > 2).cloned().collect();
    known.extend(specific.into_iter().filter(|arch| !arch.ends_with(['a', 'f'])).map(|arch| arch + "a"));
    known
}

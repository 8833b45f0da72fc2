//! Candidates: heads mixed before sampling, one of several sequences selected, tokens that take back others.

mod backspace;
mod beam;
mod gated;
mod select;

pub use backspace::{Backspace, BackspaceArgs};
pub use beam::{BeamRank, BeamRankArgs};
pub use gated::{GatedSample, GatedSampleArgs, GatedSampleBuilder};
pub use select::{SelectCandidate, SelectCandidateArgs};

use crate::device::{Arch, DeviceInfo};
use crate::error::{Error, Result};

fn size(arg: &'static str, got: u64, min: u64, max: u64) -> Result<()> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
}

fn require_device(device: &DeviceInfo) -> Result<()> {
    if device.arch < (Arch { major: 8, minor: 0 }) {
        return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
    }
    Ok(())
}

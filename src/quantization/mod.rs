//! Residual quantization: codes to vectors.

mod multi_scale;
mod rvq_decode;
mod scalar;

pub use crate::layout::Access;
pub use multi_scale::{
    BIT_FLIP_DOMAIN, Cut, DecodeArgs, EncodeArgs, EncodeBitsArgs, FHat, FlipArgs, MultiScale, MultiScaleBuilder, Next,
    PhiTable, StepArgs, Token, TokenKind, Traffic as MultiScaleTraffic, Up, pack_phi, schedules,
};
pub use rvq_decode::{RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, Schedule, Traffic, Variant};
pub use scalar::{BitOrder, Bits, BitsArgs, BitsBuilder, Flips, Fsq, FsqArgs, FsqBound, FsqBuilder, Remap, RemapArgs};

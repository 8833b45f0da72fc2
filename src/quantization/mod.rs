//! Residual quantization: vectors to codes and codes to vectors.

mod codebook;
mod multi_scale;
mod rvq_decode;
mod rvq_encode;
mod scalar;

pub use crate::layout::Access;
pub use crate::plan::Traffic;
pub use codebook::{Codebook, CodebookArgs, CodebookBuilder, Filter, Metric};
pub use multi_scale::{
    BIT_FLIP_DOMAIN, Cut, DecodeArgs, EncodeArgs, EncodeBitsArgs, FHat, FlipArgs, MultiScale, MultiScaleBuilder, Next,
    PhiTable, StepArgs, Token, TokenKind, Up, pack_phi, schedules,
};
pub use rvq_decode::{RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, RvqDecodeTraffic, Schedule, Variant};
pub use rvq_encode::{
    EncodeKernel, EncodeSchedule, EncodeVariant, EncodeWork, Projections, RvqEncode, RvqEncodeArgs, RvqEncodeBuilder,
};
pub use scalar::{BitOrder, Bits, BitsArgs, BitsBuilder, Flips, Fsq, FsqArgs, FsqBound, FsqBuilder, Remap, RemapArgs};

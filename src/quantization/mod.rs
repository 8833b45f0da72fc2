//! Residual quantization: vectors to codes and codes to vectors.

mod codebook;
mod rvq_decode;
mod rvq_encode;

pub use crate::layout::Access;
pub use codebook::{Codebook, CodebookArgs, CodebookBuilder, Filter, Metric};
pub use rvq_decode::{RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, Schedule, Traffic, Variant};
pub use rvq_encode::{
    EncodeKernel, EncodeSchedule, EncodeVariant, EncodeWork, Projections, RvqEncode, RvqEncodeArgs, RvqEncodeBuilder,
};

//! Residual quantization: vectors to codes and codes to vectors.

mod codebook;
mod rvq_decode;

pub use crate::layout::Access;
pub use codebook::{Codebook, CodebookArgs, CodebookBuilder, Filter, Metric};
pub use rvq_decode::{RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, Schedule, Traffic, Variant};

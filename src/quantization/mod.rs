//! Residual quantization: codes to vectors.

mod rvq_decode;

pub use crate::layout::Access;
pub use rvq_decode::{RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, Schedule, Traffic, Variant};

//! Residual quantization: codes to vectors.

mod rvq_decode;

pub use rvq_decode::{Access, RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, Schedule, Traffic, Variant};

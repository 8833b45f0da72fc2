#![doc = include_str!("../README.md")]
#![warn(missing_debug_implementations, unreachable_pub)]
// Without a family, parts of the shared vocabulary have no user.
#![cfg_attr(
    not(all(feature = "attention", feature = "quantization", feature = "verification", feature = "compression")),
    allow(dead_code)
)]

#[cfg(feature = "attention")]
pub mod attention;
#[cfg(feature = "compression")]
pub mod compression;
pub mod device;
pub mod dtype;
#[cfg(feature = "emulate")]
pub mod emulator;
pub mod error;
pub mod layout;
#[cfg(any(feature = "attention", feature = "compression"))]
pub mod packed;
pub mod philox;
#[cfg(feature = "quantization")]
pub mod quantization;
pub mod stream;
#[cfg(feature = "verification")]
pub mod verification;
pub mod view;

mod engine;
mod ffi;
mod launch;
#[cfg(any(feature = "attention", feature = "quantization", feature = "verification", feature = "compression"))]
mod plan;

pub use device::{Device, DeviceInfo, driver_present};
pub use dtype::{DType, F8E4M3, bf16, f16};
pub use error::{Error, Result};
pub use layout::{Access, Layout};
pub use stream::{AsStream, Stream};
pub use view::{In, Out};

#[cfg(feature = "cudarc-0_19")]
pub use engine::cudarc_0_19;

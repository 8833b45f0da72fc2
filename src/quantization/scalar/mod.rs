//! Scalar quantizers, and what goes with them: elementwise, one pass each.

mod bits;
mod fsq;
mod remap;

pub use bits::{BitOrder, Bits, BitsArgs, BitsBuilder, Flips};
pub use fsq::{Fsq, FsqArgs, FsqBound, FsqBuilder};
pub use remap::{Remap, RemapArgs};

use crate::error::{Error, Result};

fn size(arg: &'static str, got: u64, min: u64, max: u64) -> Result<()> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
}

/// The kernels count blocks of at least 8 rows in 31 bits.
const MOST_ROWS: u64 = (1 << 31) - 1;

/// What a `Code` type can count: 2^63 for i64.
fn capacity<C: crate::dtype::Code>() -> u64 {
    1 << (8 * size_of::<C>()).min(63)
}

//! Counter-based random numbers, the same on host and device.
//!
//! Philox 4x32-10 (J. Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC'11), keyed by the request's seed and
//! counted by absolute position, domain and draw. So what a request draws does not depend on its place in a batch, on the
//! grid, or on who else is in the batch.

use crate::device::Device;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::stream::{AsStream, Stream};
use crate::view::Out;

/// The four words of one block.
///
/// `domain` keeps different uses of one position apart, `draw` counts within a domain.
pub fn block(seed: u64, position: u64, domain: u32, draw: u32) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut counter = [position as u32, (position >> 32) as u32, domain, draw];
    for _ in 0..10 {
        let product0 = 0xD251_1F53 * u64::from(counter[0]);
        let product1 = 0xCD9E_8D57 * u64::from(counter[2]);
        counter = [
            (product1 >> 32) as u32 ^ counter[1] ^ key[0],
            product1 as u32,
            (product0 >> 32) as u32 ^ counter[3] ^ key[1],
            product0 as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The upper 24 bits of a word as a float in `[0, 1)`. Every value is exact.
pub fn uniform(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// What a Philox fill can write: `u32` (raw words) or `f32` (uniforms in `[0, 1)`).
pub trait Random: Element {
    /// From a word.
    fn from_word(word: u32) -> Self;
}
impl Random for u32 {
    fn from_word(word: u32) -> Self {
        word
    }
}
impl Random for f32 {
    fn from_word(word: u32) -> Self {
        uniform(word)
    }
}

/// Fills a buffer with the blocks of consecutive positions.
///
/// `out` is `[positions, 4]`, contiguous, 16-byte aligned on a device: `out[i] = block(seed, first_position + i, domain,
/// draw)`. Deterministic, bitwise equal on every device.
///
/// ```
/// use nextscale::{Out, Stream, philox::PhiloxFill};
/// let mut uniforms = [0f32; 8];
/// PhiloxFill::new(42, 2).domain(7).run(&Stream::host(), Out::host(&mut uniforms))?;
/// assert!(uniforms.iter().all(|u| (0.0..1.0).contains(u)));
/// # Ok::<(), nextscale::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PhiloxFill {
    seed: u64,
    positions: u64,
    first_position: u64,
    domain: u32,
    draw: u32,
}

impl PhiloxFill {
    /// `positions` blocks of the sequence of `seed`, from position 0, domain 0 and draw 0.
    pub fn new(seed: u64, positions: u64) -> Self {
        PhiloxFill { seed, positions, first_position: 0, domain: 0, draw: 0 }
    }

    /// The position of the first block; positions wrap at 2^64.
    pub fn first_position(mut self, first_position: u64) -> Self {
        self.first_position = first_position;
        self
    }

    /// Which use of the position the numbers are for.
    pub fn domain(mut self, domain: u32) -> Self {
        self.domain = domain;
        self
    }

    /// Which draw within the domain.
    pub fn draw(mut self, draw: u32) -> Self {
        self.draw = draw;
        self
    }

    /// Writes `positions * 4` elements.
    ///
    /// # Errors
    /// A buffer that is too short, misaligned or elsewhere; more than 2^39 positions; what CUDA said.
    pub fn run<S: AsStream + ?Sized, T: Random>(&self, stream: &S, out: Out<'_, T>) -> Result<()> {
        const MOST: u64 = (1 << 39) - 1;
        if self.positions > MOST {
            return Err(Error::Size { arg: "positions", got: self.positions, min: 0, max: MOST });
        }
        let stream = stream.as_stream();
        Operands::of(&stream).output("out", &out, self.positions * 4)?.finish()?;
        match stream.device() {
            Device::Host => self.on_host(out),
            _ => self.on_cuda(&stream, out),
        }
    }

    fn on_host<T: Random>(&self, mut out: Out<'_, T>) -> Result<()> {
        let out = out.as_host().expect("operands are on the stream's device");
        for (i, four) in out.chunks_exact_mut(4).take(self.positions as usize).enumerate() {
            let words = block(self.seed, self.first_position.wrapping_add(i as u64), self.domain, self.draw);
            four.copy_from_slice(&words.map(T::from_word));
        }
        Ok(())
    }

    #[cfg(nxs_kernels)]
    fn on_cuda<T: Random>(&self, stream: &Stream<'_>, out: Out<'_, T>) -> Result<()> {
        let span = out.span();
        if self.positions > 0 && !span.address.is_multiple_of(16) {
            return Err(Error::Alignment { arg: "out", need: 16 });
        }
        let params = crate::ffi::nxs_philox_fill_params {
            out: span.address as *mut _,
            positions: self.positions as i64,
            seed: self.seed,
            first_position: self.first_position,
            domain: self.domain,
            draw: self.draw,
            out_dtype: T::DTYPE as i32,
        };
        crate::launch::launch("nxs_philox_fill", stream, |handle| {
            // SAFETY: `out` is checked to hold the positions on this stream's device.
            unsafe { crate::ffi::nxs_philox_fill(&params, handle) }
        })
    }

    #[cfg(not(nxs_kernels))]
    fn on_cuda<T: Random>(&self, _stream: &Stream<'_>, _out: Out<'_, T>) -> Result<()> {
        Err(Error::NotCompiled)
    }
}

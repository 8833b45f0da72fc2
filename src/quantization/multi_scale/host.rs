//! The formula on the host: the oracle of the tests. Resizing and phi in f64, the map in f32.

use core::ops::Range;

use super::phi::packed_len;
use super::plan::{MOST_PHI_CHANNELS, Next, Plan, Up};
use super::{Call, FHat, Token, TokenKind};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";

/// Up to four places on one axis, and their weights.
#[derive(Clone, Copy, Default)]
struct Taps {
    at: [usize; 4],
    weight: [f64; 4],
    count: usize,
}

impl Taps {
    fn new(up: Up, to: usize, from_size: usize, to_size: usize) -> Self {
        match up {
            Up::Bicubic => Self::bicubic(to, from_size, to_size),
            Up::Bilinear => Self::bilinear(to, from_size, to_size),
        }
    }

    fn bicubic(to: usize, from_size: usize, to_size: usize) -> Self {
        if from_size == to_size {
            return Taps { at: [to, 0, 0, 0], weight: [1.0, 0.0, 0.0, 0.0], count: 1 };
        }
        let source = (to as f64 + 0.5) * from_size as f64 / to_size as f64 - 0.5;
        let (first, t) = (source.floor(), source - source.floor());
        const A: f64 = -0.75;
        let near = |s: f64| ((A + 2.0) * s - (A + 3.0)) * s * s + 1.0;
        let far = |s: f64| ((A * s - 5.0 * A) * s + 8.0 * A) * s - 4.0 * A;
        let at = [-1.0, 0.0, 1.0, 2.0].map(|tap| (first + tap).clamp(0.0, (from_size - 1) as f64) as usize);
        Taps { at, weight: [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)], count: 4 }
    }

    fn bilinear(to: usize, from_size: usize, to_size: usize) -> Self {
        if from_size == to_size {
            return Taps { at: [to, 0, 0, 0], weight: [1.0, 0.0, 0.0, 0.0], count: 1 };
        }
        let source = ((to as f64 + 0.5) * from_size as f64 / to_size as f64 - 0.5).max(0.0);
        let first = (source.floor() as usize).min(from_size - 1);
        let t = source - first as f64;
        Taps { at: [first, (first + 1).min(from_size - 1), 0, 0], weight: [1.0 - t, t, 0.0, 0.0], count: 2 }
    }

    fn each(&self) -> impl Iterator<Item = (usize, f64)> + '_ {
        (0..self.count).map(|i| (self.at[i], self.weight[i]))
    }
}

/// Where pooling to `to_size` reads for `to`.
fn window(to: usize, from_size: usize, to_size: usize) -> Range<usize> {
    to * from_size / to_size..((to + 1) * from_size).div_ceil(to_size)
}

/// Refuses codes outside of the codebook, before anything is written.
pub(super) fn check_codes<T: Token>(
    plan: &Plan,
    tokens: &In<'_, T>,
    scales: Range<usize>,
    at: usize,
    stride: usize,
) -> Result<()> {
    if T::KIND != TokenKind::Codes {
        return Ok(());
    }
    let all = tokens.as_host().expect(HERE);
    let count: u64 = plan.scales[scales].iter().map(|scale| scale.tokens).sum();
    for b in 0..plan.batch as usize {
        for token in 0..count as usize {
            let at = b * stride + at + token;
            let code = all[at].code();
            if code < 0 || code as u64 >= plan.entries {
                return Err(Error::CodeOutOfRange { arg: "tokens", at: at as u64, code, entries: plan.entries });
            }
        }
    }
    Ok(())
}

/// The tokens of one scale of one image, as a map.
struct Grid<'t, T> {
    plan: &'t Plan,
    tokens: &'t [T],
    codebook: &'t [f32],
    height: usize,
    width: usize,
}

impl<T: Token> Grid<'_, T> {
    fn pixel(&self, c: usize, y: usize, x: usize) -> f64 {
        let (plan, patch) = (self.plan, self.plan.patch as usize);
        let token = y / patch * (self.width / patch) + x / patch;
        let element = c * patch * patch + y % patch * patch + x % patch;
        f64::from(match T::KIND {
            TokenKind::Codes => self.codebook[self.tokens[token].code() as usize * plan.channels as usize + c],
            TokenKind::Embeddings => self.tokens[token * plan.token_width() as usize + element].value(),
            TokenKind::Bits => {
                let bit = self.tokens[token * plan.token_width() as usize + element].value();
                if bit != 0.0 { plan.bit_scale() } else { -plan.bit_scale() }
            }
        })
    }

    /// Pixel `(y, x)` of the map resized to `size`.
    fn resized(&self, c: usize, (y, x): (usize, usize), (height, width): (usize, usize)) -> f64 {
        let up = self.plan.up;
        if (height, width) == (self.height, self.width) {
            return self.pixel(c, y, x);
        }
        let (rows, columns) = (Taps::new(up, y, self.height, height), Taps::new(up, x, self.width, width));
        let row = |y| columns.each().map(|(x, weight)| weight * self.pixel(c, y, x)).sum::<f64>();
        rows.each().map(|(y, weight)| weight * row(y)).sum()
    }
}

pub(super) fn run<T: Token, O: Float>(plan: &Plan, call: Call<'_, '_, '_, '_, T, O>) -> Result<()> {
    let Call { first, scales, tokens, tokens_at, tokens_stride, codebook, phi, f_hat, prefixes, next, .. } = call;
    if let Some(tokens) = tokens {
        check_codes(plan, tokens, first..first + scales, tokens_at, tokens_stride)?;
    }
    let tokens = tokens.map_or(&[][..], |tokens| tokens.as_host().expect(HERE));
    let codebook = codebook.map_or(&[][..], |codebook| codebook.as_host().expect(HERE));
    let phi = phi.map_or(&[][..], |phi| phi.as_host().expect(HERE));
    let (channels, height, width) = (plan.channels as usize, plan.height as usize, plan.width as usize);
    let image = channels * height * width;
    let independent = plan.next == Next::Tokens;
    let grid = |b: usize, s: usize| {
        let scale = plan.scales[s];
        let elements = if T::KIND == TokenKind::Codes { 1 } else { plan.token_width() as usize };
        let from = b * tokens_stride + tokens_at + (scale.first - plan.scales[first].first) as usize * elements;
        let tokens = &tokens[from..from + scale.tokens as usize * elements];
        Grid { plan, tokens, codebook, height: scale.height as usize, width: scale.width as usize }
    };

    let mut map: Option<&mut [f32]> = None;
    if let Some(f_hat) = f_hat {
        let (before, out, zero) = match f_hat {
            FHat::InPlace(out) => (None, out, false),
            FHat::FromZero(out) => (None, out, true),
            FHat::Between(before, out) => (Some(&*before), out, false),
        };
        let out = out.as_host().expect(HERE);
        let maps = plan.batch as usize * image;
        for s in first..first + scales {
            let to = if prefixes { (s - first) * maps } else { 0 };
            for b in 0..plan.batch as usize {
                let grid = grid(b, s);
                let mut patch = [[0f64; 9]; MOST_PHI_CHANNELS as usize];
                for y in 0..height {
                    for x in 0..width {
                        if plan.phi[s] >= 0 {
                            for (c, patch) in patch[..channels].iter_mut().enumerate() {
                                for (tap, value) in patch.iter_mut().enumerate() {
                                    let (y, x) = ((y + tap / 3).wrapping_sub(1), (x + tap % 3).wrapping_sub(1));
                                    let inside = y < height && x < width;
                                    *value = if inside { grid.resized(c, (y, x), (height, width)) } else { 0.0 };
                                }
                            }
                        }
                        for c in 0..channels {
                            let h = if plan.phi[s] >= 0 {
                                let rows = 9 * channels + 1;
                                let from = plan.phi[s] as usize * packed_len(channels) + c / 4 * rows * 4 + c % 4;
                                let weight = |row: usize| f64::from(phi[from + row * 4]);
                                let taps = patch[..channels].iter().flatten().enumerate();
                                taps.map(|(row, value)| weight(row) * value).sum::<f64>() + weight(rows - 1)
                            } else {
                                grid.resized(c, (y, x), (height, width))
                            };
                            let at = b * image + (c * height + y) * width + x;
                            let old = match before {
                                _ if independent => 0.0,
                                _ if s > first => out[if prefixes { to - maps } else { 0 } + at],
                                Some(before) => before.as_host().expect(HERE)[at],
                                None if zero => 0.0,
                                None => out[at],
                            };
                            out[to + at] = (f64::from(old) + h) as f32;
                        }
                    }
                }
            }
        }
        map = Some(out);
    }

    let Some((next, next_at, next_stride)) = next else { return Ok(()) };
    let next = next.as_host().expect(HERE);
    let to = plan.scales[first + scales];
    let size = (to.height as usize, to.width as usize);
    let (patch, token_width) = (plan.patch as usize, plan.token_width() as usize);
    for b in 0..plan.batch as usize {
        let grid = (scales > 0).then(|| grid(b, first + scales - 1));
        let map = map.as_deref().map(|map| &map[b * image..]);
        for y in 0..size.0 {
            for x in 0..size.1 {
                for c in 0..channels {
                    let value = match (independent, &grid) {
                        (true, Some(grid)) => grid.resized(c, (y, x), size),
                        _ => {
                            let pixel = |y, x| map.map_or(0.0, |map| f64::from(map[(c * height + y) * width + x]));
                            pooled(plan.next, (y, x), (height, width), size, pixel)
                        }
                    };
                    let token = y / patch * (size.1 / patch) + x / patch;
                    let element = c * patch * patch + y % patch * patch + x % patch;
                    let value = O::from_f32(value as f32);
                    for repeat in 0..call.repeat {
                        let entry = (repeat * plan.batch as usize + b) * next_stride;
                        next[next_at + entry + token * token_width + element] = value;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Pixel `to` of a map made smaller.
pub(super) fn pooled(
    next: Next,
    to: (usize, usize),
    from_size: (usize, usize),
    to_size: (usize, usize),
    pixel: impl Fn(usize, usize) -> f64,
) -> f64 {
    match next {
        Next::Bilinear => {
            let columns = Taps::bilinear(to.1, from_size.1, to_size.1);
            let row = |y| columns.each().map(|(x, weight)| weight * pixel(y, x)).sum::<f64>();
            Taps::bilinear(to.0, from_size.0, to_size.0).each().map(|(y, weight)| weight * row(y)).sum()
        }
        _ => {
            let (rows, columns) = (window(to.0, from_size.0, to_size.0), window(to.1, from_size.1, to_size.1));
            let count = rows.len() * columns.len();
            rows.map(|y| columns.clone().map(|x| pixel(y, x)).sum::<f64>()).sum::<f64>() / count as f64
        }
    }
}

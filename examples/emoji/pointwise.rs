//! What is left between dense layers and the library's ops; `pointwise.cu` has the same functions for CUDA.

use nextscale::dtype::Float;

use crate::device::{Buffer, Device};
use crate::failure::Result;

/// A place in a buffer of f32.
pub(crate) type Part<'a> = (&'a Buffer<f32>, usize);

/// `x[r] = table[index[r]] + positions[place[r]]`, or without a table `x[r] += positions[place[r]]`; rows of `width`.
pub(crate) fn embed(
    device: &Device,
    x: &mut Buffer<f32>,
    table: Option<&Buffer<f32>>,
    index: &Buffer<i32>,
    positions: &Buffer<f32>,
    place: &Buffer<i32>,
    [rows, width]: [usize; 2],
) -> Result<()> {
    #[cfg(feature = "cudarc-0_19")]
    if let Device::Cuda(cuda) = device {
        let table = table.map_or(0, |table| table.address(0));
        let addresses = [x.address(0), table, index.address(0), positions.address(0), place.address(0)];
        return cuda.launch("embed", rows * width, &addresses, &[rows, width], None);
    }
    let _ = device;
    for row in 0..rows {
        let x = &mut x.host_mut()[row * width..][..width];
        if let Some(table) = table {
            x.copy_from_slice(&table.host()[index.host()[row] as usize * width..][..width]);
        }
        let position = &positions.host()[place.host()[row] as usize * width..][..width];
        x.iter_mut().zip(position).for_each(|(x, position)| *x += position);
    }
    Ok(())
}

/// `x += gate * y`, then `h = layer_norm(x) * (1 + scale) + shift`, through SiLU if asked for.
pub(crate) struct Norm<'a> {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    /// Rows that share a gate, a scale and a shift.
    pub(crate) rows_a_group: usize,
    pub(crate) silu: bool,
    /// Nothing is added if there is none.
    pub(crate) y: Option<&'a Buffer<f32>>,
    /// 1 if there is none.
    pub(crate) gate: Option<Part<'a>>,
    pub(crate) scale: Part<'a>,
    pub(crate) shift: Part<'a>,
}

impl Norm<'_> {
    pub(crate) fn run<A: Float>(self, device: &Device, x: &mut Buffer<f32>, h: &mut Buffer<A>) -> Result<()> {
        let Norm { rows, width, rows_a_group, silu, y, gate, scale, shift } = self;
        #[cfg(feature = "cudarc-0_19")]
        if let Device::Cuda(cuda) = device {
            let place = |(buffer, at): Part<'_>| buffer.address(at);
            let (y, gate) = (y.map_or(0, |y| y.address(0)), gate.map_or(0, place));
            let addresses = [x.address(0), y, gate, place(scale), place(shift), h.address(0)];
            let sizes = [rows, width, rows_a_group, usize::from(silu)];
            return cuda.launch("norm", rows * 32, &addresses, &sizes, None);
        }
        let _ = device;
        for row in 0..rows {
            let of_group = |(buffer, at): Part<'_>, i: usize| buffer.host()[at + row / rows_a_group * width + i];
            let x = &mut x.host_mut()[row * width..][..width];
            if let Some(y) = y {
                for (i, (x, y)) in x.iter_mut().zip(&y.host()[row * width..]).enumerate() {
                    *x += gate.map_or(1.0, |gate| of_group(gate, i)) * y;
                }
            }
            let mean = x.iter().sum::<f32>() / width as f32;
            let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / width as f32;
            let inverse = 1.0 / (variance + 1e-6).sqrt();
            for (i, (x, h)) in x.iter().zip(&mut h.host_mut()[row * width..]).enumerate() {
                let value = (x - mean) * inverse * (1.0 + of_group(scale, i)) + of_group(shift, i);
                *h = A::from_f32(if silu { value / (1.0 + (-value).exp()) } else { value });
            }
        }
        Ok(())
    }
}

/// `h = gelu(x)`, by tanh.
pub(crate) fn gelu<A: Float>(device: &Device, count: usize, x: &Buffer<f32>, h: &mut Buffer<A>) -> Result<()> {
    #[cfg(feature = "cudarc-0_19")]
    if let Device::Cuda(cuda) = device {
        return cuda.launch("gelu", count, &[x.address(0), h.address(0)], &[count], None);
    }
    let _ = device;
    for (h, &v) in h.host_mut()[..count].iter_mut().zip(x.host()) {
        // tanh(u) by one exponential.
        let u = 0.797_884_6 * (v + 0.044_715 * v * v * v);
        *h = A::from_f32(v - v / ((2.0 * u).exp() + 1.0));
    }
    Ok(())
}

/// The 3 x 3 neighbourhood of each pixel of `h [images, side, side, channels]`, which first becomes `up` times as
/// large by repetition: `out [images, side * up, side * up, 9, channels]`, zero beyond the edge. A convolution is a
/// dense layer of it.
pub(crate) fn unfold<A: Float>(
    device: &Device,
    h: &Buffer<A>,
    out: &mut Buffer<A>,
    [images, side, channels, up]: [usize; 4],
) -> Result<()> {
    let to = side * up;
    #[cfg(feature = "cudarc-0_19")]
    if let Device::Cuda(cuda) = device {
        let threads = images * to * to * 9 * channels;
        return cuda.launch("unfold", threads, &[h.address(0), out.address(0)], &[images, side, channels, up], None);
    }
    let _ = device;
    let (h, out) = (h.host(), &mut out.host_mut()[..images * to * to * 9 * channels]);
    for (at, out) in out.chunks_exact_mut(channels).enumerate() {
        let (pixel, tap) = (at / 9, at % 9);
        let (y, x) = ((pixel / to % to + tap / 3).wrapping_sub(1), (pixel % to + tap % 3).wrapping_sub(1));
        if y < to && x < to {
            let from = (pixel / to / to * side + y / up) * side + x / up;
            out.copy_from_slice(&h[from * channels..][..channels]);
        } else {
            out.fill(A::from_f32(0.0));
        }
    }
    Ok(())
}

/// Maps `[images, channels, pixels]` to rows `[images, pixels, channels]`.
pub(crate) fn to_rows<A: Float>(
    device: &Device,
    map: &Buffer<f32>,
    out: &mut Buffer<A>,
    [images, channels, pixels]: [usize; 3],
) -> Result<()> {
    #[cfg(feature = "cudarc-0_19")]
    if let Device::Cuda(cuda) = device {
        let sizes = [images, channels, pixels];
        return cuda.launch("to_rows", images * channels * pixels, &[map.address(0), out.address(0)], &sizes, None);
    }
    let _ = device;
    for (at, out) in out.host_mut()[..images * channels * pixels].iter_mut().enumerate() {
        let (image, pixel, c) = (at / channels / pixels, at / channels % pixels, at % channels);
        *out = A::from_f32(map.host()[(image * channels + c) * pixels + pixel]);
    }
    Ok(())
}

/// Classifier-free guidance: `out = (1 + guidance) * first half of logits - guidance * second half`.
pub(crate) fn guide(
    device: &Device,
    count: usize,
    guidance: f32,
    logits: &Buffer<f32>,
    out: &mut Buffer<f32>,
    out_at: usize,
) -> Result<()> {
    #[cfg(feature = "cudarc-0_19")]
    if let Device::Cuda(cuda) = device {
        return cuda.launch("guide", count, &[logits.address(0), out.address(out_at)], &[count], Some(guidance));
    }
    let _ = device;
    let (said, unsaid) = logits.host()[..2 * count].split_at(count);
    for ((out, said), unsaid) in out.host_mut()[out_at..][..count].iter_mut().zip(said).zip(unsaid) {
        *out = (1.0 + guidance) * said - guidance * unsaid;
    }
    Ok(())
}

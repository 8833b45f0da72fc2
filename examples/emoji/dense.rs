//! Dense layers: the crate `gemm` on the host, cuBLAS on CUDA.

use std::borrow::Cow;

use nextscale::DType;
use nextscale::dtype::Float;

use crate::device::{Buffer, Device};
use crate::failure::Result;

/// A weight as PyTorch has it: `[outputs, inputs]`.
pub(crate) struct Matrix<A> {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    weight: Buffer<A>,
}

impl<A: Float> Matrix<A> {
    pub(crate) fn new(device: &Device, outputs: usize, inputs: usize, weight: &[f32]) -> Result<Self> {
        assert_eq!(weight.len(), outputs * inputs);
        let weight: Vec<A> = weight.iter().map(|&value| A::from_f32(value)).collect();
        Ok(Matrix { outputs, inputs, weight: device.upload(&weight)? })
    }

    /// `y[rows, outputs] = x[rows, inputs] weight^T`, summed in f32.
    pub(crate) fn apply(&self, device: &Device, rows: usize, x: &Buffer<A>, y: &mut Buffer<f32>) -> Result<()> {
        assert!(x.len() >= rows * self.inputs && y.len() >= rows * self.outputs);
        match device {
            #[cfg(feature = "cudarc-0_19")]
            Device::Cuda(cuda) => {
                cuda.dense([rows, self.inputs, self.outputs], x.address(0), self.weight.address(0), y.address(0))
            }
            _ => {
                multiply(
                    [rows, self.inputs, self.outputs],
                    &as_f32(x.host()),
                    &as_f32(self.weight.host()),
                    y.host_mut(),
                );
                Ok(())
            }
        }
    }
}

/// Borrowed if it is f32 already.
fn as_f32<A: Float>(values: &[A]) -> Cow<'_, [f32]> {
    match A::DTYPE {
        DType::F32 => Cow::Borrowed(bytemuck::cast_slice(values)),
        _ => Cow::Owned(values.iter().map(|value| value.to_f32()).collect()),
    }
}

/// `y = x weight^T`, on all cores.
pub(crate) fn multiply([rows, inputs, outputs]: [usize; 3], x: &[f32], weight: &[f32], y: &mut [f32]) {
    assert!(x.len() >= rows * inputs && weight.len() >= outputs * inputs && y.len() >= rows * outputs);
    // SAFETY: the slices hold the matrices that the sizes and strides (columns, rows) speak of; y is not among the
    // others.
    unsafe {
        gemm::gemm(
            rows,
            outputs,
            inputs,
            y.as_mut_ptr(),
            1,
            outputs as isize,
            false,
            x.as_ptr(),
            1,
            inputs as isize,
            weight.as_ptr(),
            inputs as isize,
            1,
            0f32,
            1f32,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

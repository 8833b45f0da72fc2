//! CUDA through cudarc: a stream, memory, cuBLAS, and the pointwise kernels of `pointwise.cu`, compiled when the
//! program starts.

use std::sync::Arc;

use nextscale::cudarc_0_19::cudarc;
use nextscale::{AsStream, Stream};

use cudarc::cublas::{CudaBlas, result::CublasError, result::gemm_ex, sys as blas};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, LaunchConfig, PushKernelArg,
    sys,
};
use cudarc::nvrtc::{CompileError, compile_ptx};

use crate::failure::{Failure, Result};

pub(crate) struct Cuda {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    kernels: Vec<(&'static str, CudaFunction)>,
}

const KERNELS: [&str; 6] = ["embed", "norm", "gelu", "unfold", "to_rows", "guide"];

/// Threads in a block of every kernel.
pub(crate) const THREADS: u32 = 256;

impl Cuda {
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        // cudarc panics where there is no driver.
        if !nextscale::driver_present() {
            return Err(Failure::failed("--device cuda: this machine has no CUDA driver"));
        }
        let context =
            CudaContext::new(ordinal).map_err(|e| Failure::failed(format!("--device cuda:{ordinal}: {e}")))?;
        // SAFETY: all work is on one stream, which orders it; graphs are captured without events.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        // SAFETY: the functions only ask whether a library can be loaded.
        let libraries =
            unsafe { [("cuBLAS", blas::is_culib_present()), ("NVRTC", cudarc::nvrtc::sys::is_culib_present())] };
        if let Some((name, _)) = libraries.into_iter().find(|(_, present)| !present) {
            return Err(Failure::failed(format!("--device cuda: {name} is not on the library path")));
        }
        let module = context.load_module(compile_ptx(include_str!("pointwise.cu"))?)?;
        let kernels = KERNELS.map(|name| Ok((name, module.load_function(&format!("emoji_{name}"))?)));
        let blas = CudaBlas::new(stream.clone())?;
        Ok(Cuda { stream, blas, kernels: kernels.into_iter().collect::<Result<_>>()? })
    }

    pub(crate) fn stream(&self) -> Stream<'_> {
        self.stream.as_stream()
    }

    pub(crate) fn wait(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }

    pub(crate) fn zeros(&self, bytes: usize) -> Result<Bytes> {
        Ok(Bytes { slice: self.stream.alloc_zeros::<u8>(bytes.max(256))? })
    }

    /// `y[rows, outputs] = x[rows, inputs] weight[outputs, inputs]^T`: f16 in, f32 sums and results.
    pub(crate) fn dense(&self, [rows, inputs, outputs]: [usize; 3], x: u64, weight: u64, y: u64) -> Result<()> {
        let (one, zero) = (1f32, 0f32);
        let [rows, inputs, outputs] = [rows, inputs, outputs].map(|size| size as i32);
        // cuBLAS is column-major: it computes y^T = weight x^T.
        // SAFETY: the buffers have these shapes, and outlive the work on the one stream; the scalars are read at once.
        unsafe {
            gemm_ex(
                *self.blas.handle(),
                blas::cublasOperation_t::CUBLAS_OP_T,
                blas::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                (&raw const one).cast(),
                weight as *const _,
                blas::cudaDataType::CUDA_R_16F,
                inputs,
                x as *const _,
                blas::cudaDataType::CUDA_R_16F,
                inputs,
                (&raw const zero).cast(),
                y as *mut _,
                blas::cudaDataType::CUDA_R_32F,
                outputs,
                blas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }?;
        Ok(())
    }

    /// Launches a kernel of `pointwise.cu` with so many threads: addresses, then sizes, then a float.
    pub(crate) fn launch(
        &self,
        name: &str,
        threads: usize,
        addresses: &[u64],
        sizes: &[usize],
        float: Option<f32>,
    ) -> Result<()> {
        let (_, kernel) = self.kernels.iter().find(|(known, _)| *known == name).expect("a kernel of pointwise.cu");
        let sizes: Vec<i32> = sizes.iter().map(|&size| size as i32).collect();
        let mut call = self.stream.launch_builder(kernel);
        addresses.iter().for_each(|address| _ = call.arg(address));
        sizes.iter().for_each(|size| _ = call.arg(size));
        if let Some(float) = &float {
            call.arg(float);
        }
        let blocks = (threads as u32).div_ceil(THREADS).max(1);
        let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are those of the kernel, in its order; the buffers have the sizes said.
        unsafe { call.launch(config) }?;
        Ok(())
    }

    /// What `launches` enqueues, as a graph.
    pub(crate) fn capture(&self, launches: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        self.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let launched = launches();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags);
        launched?;
        graph?.ok_or_else(|| Failure::failed("CUDA: nothing was captured"))
    }
}

/// Device memory, never empty.
pub(crate) struct Bytes {
    slice: CudaSlice<u8>,
}

impl Bytes {
    pub(crate) fn address(&self, at: usize) -> u64 {
        self.slice.device_ptr(self.slice.stream()).0 + at as u64
    }

    pub(crate) fn ordinal(&self) -> i32 {
        self.slice.stream().context().ordinal() as i32
    }

    pub(crate) fn write(&mut self, source: &[u8]) -> Result<()> {
        let stream = self.slice.stream().clone();
        if !source.is_empty() {
            stream.memcpy_htod(source, &mut self.slice.slice_mut(..source.len()))?;
        }
        Ok(())
    }

    pub(crate) fn read(&self, bytes: usize) -> Result<Vec<u8>> {
        let mut all = self.slice.stream().clone_dtoh(&self.slice)?;
        self.slice.stream().synchronize()?;
        all.truncate(bytes);
        Ok(all)
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Failure::Failed(format!("CUDA: {error}"))
    }
}

impl From<CublasError> for Failure {
    fn from(error: CublasError) -> Self {
        Failure::Failed(format!("cuBLAS: {error:?}"))
    }
}

impl From<CompileError> for Failure {
    fn from(error: CompileError) -> Self {
        Failure::Failed(format!("pointwise.cu: {error:?}"))
    }
}

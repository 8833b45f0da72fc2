//! Adapters to GPU engines. Each is a feature named by the engine's version, and depends on nothing but the core.

#[cfg(feature = "cudarc-0_19")]
pub mod cudarc_0_19;

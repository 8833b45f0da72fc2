//! The one error type.

use core::fmt;

use crate::device::{Arch, Device};

/// What every fallible function of the crate returns.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// Why a plan was refused, or why nothing was launched.
///
/// Each variant that concerns an argument names it as the op's documentation does. An error that a kernel meets while it
/// runs is not one of these: it surfaces at the caller's next synchronising call, as with every CUDA launch.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// There is no CUDA driver on this machine, or it is older than the toolkit this build used.
    DriverUnavailable {
        /// What was looked for.
        searched: &'static str,
    },
    /// The crate was built without the kernels: a CUDA stream needs the feature `cuda`.
    NotCompiled,
    /// The device has no kernel in this build.
    UnsupportedDevice {
        /// The device's architecture, if it could be asked.
        have: Option<Arch>,
        /// What the build holds.
        need: &'static str,
    },
    /// A combination that the op does not offer.
    Unsupported {
        /// The argument or setting.
        arg: &'static str,
        /// What is offered.
        what: &'static str,
    },
    /// A size is outside its limits.
    Size {
        /// The argument or setting.
        arg: &'static str,
        /// The value given.
        got: u64,
        /// The least value allowed.
        min: u64,
        /// The greatest value allowed.
        max: u64,
    },
    /// A buffer is shorter than its shape and strides need.
    Length {
        /// The argument.
        arg: &'static str,
        /// Elements needed.
        need: u64,
        /// Elements given.
        got: u64,
    },
    /// A stride is unusable: negative, not a multiple of what the access needs, or one that makes an output overlap itself.
    Stride {
        /// The argument.
        arg: &'static str,
        /// Which dimension, outermost first.
        dim: usize,
        /// The stride given, in elements.
        got: i64,
        /// The rule that it breaks.
        need: &'static str,
    },
    /// An address is not aligned.
    Alignment {
        /// The argument.
        arg: &'static str,
        /// Bytes it must be a multiple of.
        need: usize,
    },
    /// Two arguments share memory, and at least one of them is written.
    Overlap {
        /// The one that is written.
        written: &'static str,
        /// The other.
        other: &'static str,
    },
    /// An argument lives on another device than the stream.
    DeviceMismatch {
        /// The argument.
        arg: &'static str,
        /// The stream's device.
        stream: Device,
        /// The argument's device.
        got: Device,
    },
    /// A view was ordered on another stream than the one it is used on.
    StreamMismatch {
        /// The argument.
        arg: &'static str,
    },
    /// The workspace is too small.
    Workspace {
        /// Bytes needed: the plan's `workspace_bytes`.
        need: u64,
        /// Bytes given.
        got: u64,
    },
    /// The host path met a code outside its codebook. (A kernel clamps it and sets a flag.)
    CodeOutOfRange {
        /// The argument.
        arg: &'static str,
        /// Position in the buffer, in elements.
        at: u64,
        /// The code.
        code: i64,
        /// Number of entries in the codebook.
        entries: u64,
    },
    /// A row that is not there: a position outside its table, or a place outside a cache. (A kernel that learns it from
    /// device memory clamps it or leaves it out, and sets a flag.)
    RowOutOfRange {
        /// The argument.
        arg: &'static str,
        /// Position in the buffer, in elements; 0 for a number.
        at: u64,
        /// The row.
        row: i64,
        /// How many there are.
        rows: u64,
    },
    /// The host path met a NaN or an infinity where there must be none. (A kernel takes it as 0 and sets a flag.)
    NotFinite {
        /// The argument.
        arg: &'static str,
        /// Position in the buffer, in elements.
        at: u64,
    },
    /// A dtype that is known only when the program runs does not suit.
    DType {
        /// The argument.
        arg: &'static str,
        /// What is offered.
        what: &'static str,
    },
    /// CUDA or the launcher refused; nothing was launched.
    Launch {
        /// The launcher.
        op: &'static str,
        /// `nxs_status`: negative for the library's own codes, else a `cudaError_t`.
        code: i32,
        /// The status by name.
        name: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::DriverUnavailable { searched } => write!(f, "no usable CUDA driver (searched {searched})"),
            Error::NotCompiled => f.write_str("nextscale was built without the feature `cuda`"),
            Error::UnsupportedDevice { have: Some(have), need } => {
                write!(f, "no kernel for {have} in this build; it holds {need}")
            }
            Error::UnsupportedDevice { have: None, need } => {
                write!(f, "no kernel for this device in this build; it holds {need}")
            }
            Error::Unsupported { arg, what } => write!(f, "{arg}: unsupported; {what}"),
            Error::Size { arg, got, min, max } => write!(f, "{arg}: {got} is outside {min}..={max}"),
            Error::Length { arg, need, got } => write!(f, "{arg}: {got} elements, {need} needed"),
            Error::Stride { arg, dim, got, need } => write!(f, "{arg}: stride {got} of dimension {dim}: {need}"),
            Error::Alignment { arg, need } => write!(f, "{arg}: not aligned to {need} bytes"),
            Error::Overlap { written, other } => write!(f, "{written} is written and overlaps {other}"),
            Error::DeviceMismatch { arg, stream, got } => write!(f, "{arg}: on {got}, but the stream is on {stream}"),
            Error::StreamMismatch { arg } => write!(f, "{arg}: this view was made for another stream"),
            Error::Workspace { need, got } => write!(f, "workspace: {got} bytes, {need} needed"),
            Error::CodeOutOfRange { arg, at, code, entries } => {
                write!(f, "{arg}: code {code} at element {at}, but the codebook has {entries} entries")
            }
            Error::RowOutOfRange { arg, at, row, rows } => {
                write!(f, "{arg}: row {row} by element {at}, but there are {rows} rows")
            }
            Error::NotFinite { arg, at } => write!(f, "{arg}: element {at} is NaN or infinite"),
            Error::DType { arg, what } => write!(f, "{arg}: wrong dtype; {what}"),
            Error::Launch { op, code, name } => write!(f, "{op}: {name} ({code})"),
        }
    }
}

impl std::error::Error for Error {}

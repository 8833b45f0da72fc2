//! An emoji generator on nextscale, on the host or a GPU by the same code.
//!
//! ```text
//! cargo run --release --example emoji -- --out emoji.png
//! cargo run --release --features cuda,cudarc-0_19 --example emoji -- --device cuda --category animals --count 64
//! ```
//!
//! Read it in this order: `device` (memory and a stream), `dense` and `pointwise` (what is not the library's),
//! `transformer` (attention by `Prepare` and `ScaleAttention`), `tokenizer` (`MultiScale`, and a decoder to pixels),
//! `var` (a scale at a time), `ar` (a token at a time, or drafted and verified), `options` and `program`.
//! `python-ref/emoji` trains the models.

mod ar;
mod compress;
#[cfg(feature = "cudarc-0_19")]
mod cuda;
mod dense;
mod device;
mod failure;
mod options;
mod pointwise;
mod program;
mod sampling;
mod sheet;
mod tokenizer;
mod transformer;
mod var;
mod weights;

use std::process::ExitCode;

fn main() -> ExitCode {
    match program::run(std::env::args_os().skip(1)) {
        Ok(said) => {
            print!("{said}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("emoji: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

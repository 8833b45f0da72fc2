//! Runs any op of nextscale from a file: `op --list`, `op <op> --help`.
//!
//! ```text
//! cargo run --example op -- rvq_decode --device host --in x.safetensors --out y.safetensors --set null_code=-1
//! ```
//!
//! It is how other languages check the library, and how a bug report becomes a test. Exit code 2: the request makes no
//! sense (a wrong setting, tensor or dtype); 1: the op, the device or the output file failed; both with one line that
//! says why.
//!
//! `op --requests` takes many in one process, which opens a device once: a line of standard input for each, its arguments
//! separated by tabs, and answers each with a line of standard output: the exit code, a tab, and why.

mod attention_merge;
mod attention_prepare;
mod candidates;
mod compact;
mod compress_event;
mod confidence_rank;
mod draft_sample;
mod drift;
mod importance;
mod multi_scale;
mod pack;
mod philox_fill;
mod pooled_verify;
mod redundancy;
mod request;
mod row_stats;
mod runner;
mod rvq_decode;
mod rvq_encode;
mod scalar_quantize;
mod scale_attention;
mod select;
mod tensors;
mod tree_build;
mod tree_verify;
mod typical_verify;
mod verify;
mod visual_verify;

use std::ffi::OsString;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use lexopt::prelude::*;

use crate::request::{Failure, Op, Settings};
use crate::runner::{DEVICES, Runner};
use crate::tensors::Tensors;

/// Every op. A new one is a file beside this and a line here.
static OPS: &[&Op] = &[
    &rvq_decode::OP,
    &rvq_encode::OP,
    &scale_attention::OP,
    &attention_merge::OP,
    &attention_prepare::OP,
    &multi_scale::OP,
    &multi_scale::ENCODE,
    &scalar_quantize::BITS,
    &scalar_quantize::FSQ,
    &scalar_quantize::REMAP,
    &verify::OP,
    &visual_verify::OP,
    &pooled_verify::OP,
    &typical_verify::OP,
    &confidence_rank::OP,
    &candidates::GATED,
    &candidates::SELECT,
    &candidates::BEAMS,
    &candidates::BACKSPACE,
    &tree_verify::OP,
    &tree_build::OP,
    &draft_sample::OP,
    &row_stats::OP,
    &drift::OP,
    &select::OP,
    &compact::OP,
    &compress_event::OP,
    &importance::OP,
    &redundancy::NORMS,
    &redundancy::OP,
    &pack::PACK,
    &pack::UNPACK,
    &pack::ROTATE,
    &philox_fill::OP,
];

/// The device that was opened last, and what it was called.
type Opened = Option<(String, Runner)>;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let answered = if arguments.iter().any(|argument| argument == "--requests") {
        answer_all()
    } else {
        answer(arguments, &mut None)
    };
    match answered {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("op: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

fn answer_all() -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::Failed(error.to_string());
    let mut opened = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(failed)?;
        let answered = answer(line.split('\t').map(OsString::from), &mut opened);
        let (code, why) = match answered {
            Ok(()) => (0, String::new()),
            Err(failure) => (failure.exit_code(), format!("op: {failure}").replace(['\n', '\t'], " ")),
        };
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{code}\t{why}").and_then(|()| stdout.flush()).map_err(failed)?;
    }
    Ok(())
}

fn answer(arguments: impl IntoIterator<Item = OsString>, opened: &mut Opened) -> Result<(), Failure> {
    let mut op: Option<&Op> = None;
    let (mut help, mut list, mut counters) = (false, false, false);
    let mut device = "host".to_owned();
    let (mut input, mut output) = (None::<PathBuf>, None::<PathBuf>);
    let mut settings = Vec::new();
    let mut repeat = 1u64;

    let mut parser = lexopt::Parser::from_args(arguments);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => help = true,
            Long("list") => list = true,
            Long("counters") => counters = true,
            Long("device") => device = parser.value()?.string()?,
            Long("in") => input = Some(parser.value()?.into()),
            Long("out") => output = Some(parser.value()?.into()),
            Long("set") => {
                // Several pairs may follow one --set; the op's name, which has no '=', may too.
                settings.push(parser.value()?.string()?);
            }
            Long("repeat") => repeat = parser.value()?.parse()?,
            Value(value) => {
                let value = value.string()?;
                if value.contains('=') && !settings.is_empty() {
                    settings.push(value);
                } else if op.is_none() {
                    op = Some(*OPS.iter().find(|op| op.name == value).ok_or_else(|| {
                        Failure::request(format!("no op is called {value:?}; `op --list` names them"))
                    })?);
                } else {
                    return Err(Failure::request(format!("unexpected argument {value:?}")));
                }
            }
            _ => return Err(argument.unexpected().into()),
        }
    }

    if list {
        for op in OPS {
            println!("{:<20}{}", op.name, op.about);
        }
        return Ok(());
    }
    let Some(op) = op else {
        let usage = usage("<op>");
        if help {
            println!("{usage}");
            return Ok(());
        }
        return Err(Failure::request(format!("which op? {usage}")));
    };
    if help {
        println!("{}\n\n{}", usage(op.name), op.help());
        return Ok(());
    }

    if repeat == 0 {
        return Err(Failure::request("--repeat must be at least 1"));
    }
    let settings = Settings::parse(op, &settings)?;
    let inputs = match input {
        Some(path) => Tensors::load(&path)?,
        None => Tensors::default(),
    };
    inputs.refuse_others(op)?;
    let output = output.ok_or_else(|| Failure::request("--out is missing"))?;
    if counters || opened.as_ref().is_none_or(|(name, _)| *name != device) {
        *opened = Some((device.clone(), Runner::open(&device, counters)?));
    }
    let Some((_, runner)) = opened else { unreachable!("just opened") };

    let first = (op.run)(runner, &inputs, &settings)?;
    if counters {
        println!("{}", runner.counters());
    }
    for round in 2..=repeat {
        let again = (op.run)(runner, &inputs, &settings)?;
        if let Some(name) = first.first_difference(&again) {
            return Err(Failure::Failed(format!("{name}: run {round} gave other bits than run 1")));
        }
    }
    first.save(&output)
}

fn usage(op: &str) -> String {
    format!(
        "usage: op {op} [--device {DEVICES}] [--in x.safetensors] --out y.safetensors \
         [--set key=value ...] [--repeat n: fails unless all runs give the same bits] \
         [--counters: what one run did, on the emulator only]; or op --requests: many, from standard input"
    )
}

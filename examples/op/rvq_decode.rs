use nextscale::dtype::{Code, Float};
use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "rvq_decode",
    about: "Residual vector quantization: out[b, r, :] = sum over levels l of codebooks[l, codes[b, l, r], :].",
    inputs: &[
        TensorHelp {
            name: "codes",
            dtypes: "u16, u32, i64",
            shape: "[batch, levels, rows] or [levels, rows]; with rows_first [batch, rows, levels] or [rows, levels]",
            about: "0 <= code < entries, or null_code",
        },
        TensorHelp {
            name: "codebooks",
            dtypes: "f32, f16, bf16",
            shape: "[levels, entries, dim], or [entries, dim] shared by all levels",
            about: "summed in f32 from +0, levels ascending",
        },
    ],
    settings: &[
        SettingHelp { name: "out_dtype", values: "f32 | f16 | bf16", about: "default: that of codebooks" },
        SettingHelp { name: "null_code", values: "integer", about: "a code that adds nothing; default: there is none" },
        SettingHelp { name: "rows_first", values: "true | false", about: "the layout of codes; default false" },
        SettingHelp {
            name: "access",
            values: "auto | narrow | wide",
            about: "how a kernel reaches memory; wide is refused where dim does not allow it; default auto",
        },
    ],
    outputs: &[
        TensorHelp {
            name: "out",
            dtypes: "f32, f16, bf16",
            shape: "[batch, rows, dim], or [rows, dim] if codes have no batch",
            about: "rounded once, to nearest even",
        },
        TensorHelp {
            name: "flags",
            dtypes: "u32",
            shape: "[1]",
            about: "not on the host: bit 0 says that a code was out of range and was clamped",
        },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let (codes, codebooks) = (inputs.require("codes")?, inputs.require("codebooks")?);
    let out_dtype = settings.get("out_dtype")?.unwrap_or(codebooks.dtype);
    with_type!("codes", codes.dtype, C in [u16, u32, i64], {
        with_type!("codebooks", codebooks.dtype, E in [f32, f16, bf16], {
            with_type!("out_dtype", out_dtype, O in [f32, f16, bf16], {
                decode::<C, E, O>(runner, codes, codebooks, settings)
            })
        })
    })
}

fn decode<C: Code, E: Float, O: Float>(
    runner: &Runner,
    codes: &Tensor,
    codebooks: &Tensor,
    settings: &Settings,
) -> Result<Tensors, Failure> {
    let rows_first = settings.get("rows_first")?.unwrap_or(false);
    let (batch, [first, second]) = match codes.shape[..] {
        [batch, first, second] => (Some(batch), [first, second]),
        [first, second] => (None, [first, second]),
        _ => return Err(Failure::request(format!("codes: shape {:?} has not 2 or 3 dimensions", codes.shape))),
    };
    let (levels, rows) = if rows_first { (second, first) } else { (first, second) };
    let (shared, entries, dim) = match codebooks.shape[..] {
        [of_books, entries, dim] if of_books == levels => (false, entries, dim),
        [of_books, _, _] => {
            let layout = if rows_first { "[.., rows, levels]" } else { "[.., levels, rows]" };
            return Err(Failure::request(format!(
                "codebooks have {of_books} levels, but codes {layout} have {levels}"
            )));
        }
        [entries, dim] => (true, entries, dim),
        _ => return Err(Failure::request(format!("codebooks: shape {:?} has not 2 or 3 dimensions", codebooks.shape))),
    };

    let mut plan = RvqDecode::<C, E, O>::builder(levels, entries, dim)
        .batch(batch.unwrap_or(1))
        .rows(rows)
        .access(settings.get("access")?.unwrap_or_default());
    if rows_first {
        plan = plan.codes_rows_first();
    }
    if shared {
        plan = plan.shared_codebook();
    }
    if let Some(code) = settings.get("null_code")? {
        plan = plan.null_code(code);
    }
    let plan = plan.build(&runner.info()?)?;

    let shape: Vec<usize> = batch.into_iter().chain([rows, dim]).collect();
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    let elements = elements.ok_or_else(|| Failure::request(format!("an output of shape {shape:?} is too large")))?;
    let codes = runner.upload(&codes.elements::<C>())?;
    let codebooks = runner.upload(&codebooks.elements::<E>())?;
    let mut out = runner.output::<O>(elements)?;
    let mut flags = runner.upload(&[0u32])?;
    runner.run(|stream| {
        plan.run(
            stream,
            RvqDecodeArgs {
                codes: codes.as_in(),
                codebooks: codebooks.as_in(),
                out: out.as_out(),
                flags: Some(flags.as_out()),
            },
        )
    })?;

    let outputs = Tensors::default().with("out", Tensor::new(&shape, &out.download()?));
    // The host refuses what a kernel would flag.
    Ok(if runner.is_host() { outputs } else { outputs.with("flags", Tensor::new(&[1], &flags.download()?)) })
}

use nextscale::dtype::Float;
use nextscale::verification::{RowStats, RowStatsArgs};
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "row_stats",
    about: "Greatest logit and sum of exponentials of each chunk of 1024 columns.",
    inputs: &[
        TensorHelp { name: "logits", dtypes: "f32, f16, bf16", shape: "[rows, vocab]", about: "vocab up to 2^24" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[rows]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp {
            name: "allow",
            dtypes: "u32",
            shape: "[rows, ceil(vocab / 32)]",
            about: "bit v % 32 of word v / 32: whether column v counts; default: all do",
        },
    ],
    settings: &[],
    outputs: &[TensorHelp {
        name: "partials",
        dtypes: "f32",
        shape: "[rows, ceil(vocab / 1024), 2]",
        about: "max, sum of 2^(s logit - rint(s max)) with s = log2(e) / temperature; the sum's sign: a NaN",
    }],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, _settings: &Settings) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?;
    with_type!("logits", logits.dtype, P in [f32, f16, bf16], stats::<P>(runner, inputs))
}

fn stats<P: Float>(runner: &Runner, inputs: &Tensors) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?;
    let [rows, vocab] = logits.shape_of("logits")?;
    let plan = RowStats::<P>::builder(rows, vocab).build(&runner.info()?)?;
    let shape = [rows, vocab.div_ceil(1024), 2];
    let logits = runner.upload(&logits.elements::<P>())?;
    let temperature = match inputs.get("temperature") {
        Some(tensor) => Some(runner.upload(&tensor.expect::<f32>("temperature", &[rows])?)?),
        None => None,
    };
    let allow = match inputs.get("allow") {
        Some(tensor) => Some(runner.upload(&tensor.expect::<u32>("allow", &[rows, vocab.div_ceil(32)])?)?),
        None => None,
    };
    let mut partials = runner.output::<f32>(shape.iter().product())?;
    runner.run(|stream| {
        plan.run(
            stream,
            RowStatsArgs {
                logits: logits.as_in(),
                temperature: temperature.as_ref().map(|buffer| buffer.as_in()),
                allow: allow.as_ref().map(|buffer| buffer.as_in()),
                partials: partials.as_out(),
            },
        )
    })?;
    Ok(Tensors::default().with("partials", Tensor::new(&shape, &partials.download()?)))
}

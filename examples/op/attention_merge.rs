use nextscale::attention::{Merge, MergeArgs};
use nextscale::dtype::Float;
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "attention_merge",
    about: "Partial attention outputs, merged by their log-sum-exps.",
    inputs: &[
        TensorHelp {
            name: "parts",
            dtypes: "f32, f16, bf16",
            shape: "[parts, batch, rows, heads, dim]",
            about: "1 to 256 parts, dim from 1 to 1024",
        },
        TensorHelp {
            name: "lse",
            dtypes: "f32",
            shape: "[parts, batch, heads, rows]",
            about: "natural logarithm; -inf: the part adds nothing",
        },
        TensorHelp {
            name: "old_out",
            dtypes: "f32, f16, bf16",
            shape: "[batch, rows, heads, dim], of out's dtype",
            about: "with old_lse: the part before part 0; default: there is none",
        },
        TensorHelp { name: "old_lse", dtypes: "f32", shape: "[batch, heads, rows]", about: "the lse of old_out" },
    ],
    settings: &[
        SettingHelp { name: "out_dtype", values: "f32 | f16 | bf16", about: "default: that of parts" },
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
            shape: "[batch, rows, heads, dim]",
            about: "rounded once, to nearest even",
        },
        TensorHelp { name: "out_lse", dtypes: "f32", shape: "[batch, heads, rows]", about: "of all parts" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let parts = inputs.require("parts")?;
    let out_dtype = settings.get("out_dtype")?.unwrap_or(parts.dtype);
    with_type!("parts", parts.dtype, P in [f32, f16, bf16], {
        with_type!("out_dtype", out_dtype, O in [f32, f16, bf16], merge::<P, O>(runner, inputs, settings))
    })
}

fn merge<P: Float, O: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let parts = inputs.require("parts")?;
    let [of_parts, batch, rows, heads, dim] = parts.shape_of("parts")?;
    let lse = inputs.require("lse")?.expect::<f32>("lse", &[of_parts, batch, heads, rows])?;
    let (out_shape, lse_shape) = ([batch, rows, heads, dim], [batch, heads, rows]);
    let mut plan = Merge::<P, O>::builder(of_parts, heads, dim)
        .batch(batch)
        .rows(rows)
        .access(settings.get("access")?.unwrap_or_default());
    let (mut out, mut out_lse) = match (inputs.get("old_out"), inputs.get("old_lse")) {
        (None, None) => (runner.output::<O>(out_shape.iter().product())?, runner.output(lse_shape.iter().product())?),
        (Some(old), Some(old_lse)) => {
            plan = plan.accumulate();
            (
                runner.upload(&old.expect::<O>("old_out", &out_shape)?)?,
                runner.upload(&old_lse.expect::<f32>("old_lse", &lse_shape)?)?,
            )
        }
        _ => return Err(Failure::request("old_out and old_lse go together")),
    };
    let plan = plan.build(&runner.info()?)?;
    let (parts, lse) = (runner.upload(&parts.elements::<P>())?, runner.upload(&lse)?);
    runner.run(|stream| {
        plan.run(
            stream,
            MergeArgs { parts: parts.as_in(), lse: lse.as_in(), out: out.as_out(), out_lse: Some(out_lse.as_out()) },
        )
    })?;
    Ok(Tensors::default()
        .with("out", Tensor::new(&out_shape, &out.download()?))
        .with("out_lse", Tensor::new(&lse_shape, &out_lse.download()?)))
}

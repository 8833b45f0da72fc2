use nextscale::dtype::{Element, Float};
use nextscale::verification::{DraftSample, DraftSampleArgs, Siblings};
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "draft_sample",
    about: "Drafts of each row, and what a verifier has to know of the row.",
    inputs: &[
        TensorHelp { name: "logits", dtypes: "f32, f16, bf16", shape: "[rows, vocab]", about: "vocab up to 2^24" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[rows]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp { name: "top_k", dtypes: "i32", shape: "[rows]", about: "0 and default: off" },
        TensorHelp { name: "top_p", dtypes: "f32", shape: "[rows]", about: "1 and default: off" },
        TensorHelp { name: "min_p", dtypes: "f32", shape: "[rows]", about: "0 and default: off" },
        TensorHelp {
            name: "draft_to_target",
            dtypes: "i32",
            shape: "[vocab]",
            about: "the token of a column; default: the column",
        },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[rows]", about: "default: 0" },
        TensorHelp {
            name: "positions",
            dtypes: "i64",
            shape: "[rows]",
            about: "of the step's first draft; default: 0",
        },
        TensorHelp {
            name: "rows_in_step",
            dtypes: "i32",
            shape: "[rows]",
            about: "in place of the setting; positions are then the drafts' own",
        },
        TensorHelp {
            name: "uniforms",
            dtypes: "f32",
            shape: "[rows, drafts, 4]",
            about: "in place of seeds; three are used",
        },
    ],
    settings: &[
        SettingHelp { name: "row_in_step", values: "0 to 1023", about: "which draft of its step; default 0" },
        SettingHelp { name: "drafts", values: "1 to 32", about: "of a row; default 1" },
        SettingHelp { name: "distinct", values: "true, false", about: "whether they are; default true" },
        SettingHelp { name: "fallback", values: "a token", about: "the first where none can be drawn; default 0" },
    ],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[rows, drafts]", about: "of the target; -1: none left" },
        TensorHelp { name: "stats", dtypes: "f32", shape: "[rows, 4]", about: "max, sum, least logit kept, scale" },
        TensorHelp {
            name: "log_probs",
            dtypes: "f32",
            shape: "[rows, drafts]",
            about: "natural logarithm of the row's probability; NaN: none drawn",
        },
        TensorHelp { name: "status", dtypes: "u32", shape: "[rows]", about: "bits; 0: nothing to say" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?;
    with_type!("logits", logits.dtype, Q in [f32, f16, bf16], sample::<Q>(runner, inputs, settings))
}

/// The tensor on the device, if it is there.
pub(crate) fn optional<T: Element>(
    runner: &Runner,
    inputs: &Tensors,
    name: &str,
    shape: &[usize],
) -> Result<Option<Buffer<T>>, Failure> {
    match inputs.get(name) {
        Some(tensor) => Ok(Some(runner.upload(&tensor.expect::<T>(name, shape)?)?)),
        None => Ok(None),
    }
}

fn sample<Q: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?;
    let [rows, vocab] = logits.shape_of("logits")?;
    let drafts: usize = settings.get("drafts")?.unwrap_or(1);
    let distinct: bool = settings.get("distinct")?.unwrap_or(true);
    let plan = DraftSample::<Q>::builder(rows, vocab)
        .drafts(u32::try_from(drafts).unwrap_or(u32::MAX))
        .siblings(if distinct { Siblings::WithoutReplacement } else { Siblings::WithReplacement })
        .row_in_step(settings.get("row_in_step")?.unwrap_or(0))
        .fallback_token(settings.get::<i64>("fallback")?.unwrap_or(0) as i32)
        .build(&runner.info()?)?;
    let logits = runner.upload(&logits.elements::<Q>())?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[rows])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[rows])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[rows])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[rows])?;
    let map = optional::<i32>(runner, inputs, "draft_to_target", &[vocab])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[rows])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[rows])?;
    let rows_in_step = optional::<i32>(runner, inputs, "rows_in_step", &[rows])?;
    let uniforms = optional::<f32>(runner, inputs, "uniforms", &[rows, drafts, 4])?;
    let (mut tokens, mut stats) = (runner.output::<i32>(rows * drafts)?, runner.output::<f32>(rows * 4)?);
    let (mut log_probs, mut status) = (runner.output::<f32>(rows * drafts)?, runner.output::<u32>(rows)?);
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    runner.run(|stream| {
        plan.run(
            stream,
            DraftSampleArgs {
                logits: logits.as_in(),
                temperature: temperature.as_ref().map(Buffer::as_in),
                top_k: top_k.as_ref().map(Buffer::as_in),
                top_p: top_p.as_ref().map(Buffer::as_in),
                min_p: min_p.as_ref().map(Buffer::as_in),
                draft_to_target: map.as_ref().map(Buffer::as_in),
                seeds: seeds.as_ref().map(Buffer::as_in),
                positions: positions.as_ref().map(Buffer::as_in),
                rows_in_step: rows_in_step.as_ref().map(Buffer::as_in),
                uniforms: uniforms.as_ref().map(Buffer::as_in),
                tokens: tokens.as_out(),
                stats: Some(stats.as_out()),
                log_probs: Some(log_probs.as_out()),
                status: status.as_out(),
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("tokens", Tensor::new(&[rows, drafts], &tokens.download()?))
        .with("stats", Tensor::new(&[rows, 4], &stats.download()?))
        .with("log_probs", Tensor::new(&[rows, drafts], &log_probs.download()?))
        .with("status", Tensor::new(&[rows], &status.download()?)))
}

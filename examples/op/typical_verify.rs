use nextscale::dtype::Float;
use nextscale::verification::{TypicalOut, TypicalVerifier, TypicalVerifierArgs};
use nextscale::{bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "typical_verify",
    about: "Typical acceptance of chains and candidate paths (Medusa).",
    inputs: &[
        TensorHelp {
            name: "target",
            dtypes: "f32, f16, bf16",
            shape: "[target_rows, vocab]",
            about: "raw logits of what follows each node; vocab up to 2^24",
        },
        TensorHelp { name: "drafts", dtypes: "i32", shape: "[batch, nodes]", about: "node 0's is not looked at" },
        TensorHelp {
            name: "paths",
            dtypes: "i32",
            shape: "[paths, depth]",
            about: "nodes from 0 on, then -1; default: one path of all nodes",
        },
        TensorHelp { name: "row_index", dtypes: "i32", shape: "[batch, nodes]", about: "default: b * nodes + n" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[batch]", about: "default: 0" },
        TensorHelp {
            name: "positions",
            dtypes: "i64",
            shape: "[batch]",
            about: "of the token after node 0; default: 0",
        },
        TensorHelp { name: "uniforms", dtypes: "f32", shape: "[batch, 3]", about: "in place of seeds" },
    ],
    settings: &[
        SettingHelp { name: "epsilon", values: "0 and above", about: "greatest threshold; default 0.3" },
        SettingHelp { name: "alpha", values: "0 and above", about: "threshold without entropy; default 0.09" },
        SettingHelp { name: "fallback", values: "a token", about: "where none can be drawn; default 0" },
    ],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[batch, depth]", about: "emitted, then -1" },
        TensorHelp { name: "nodes", dtypes: "i32", shape: "[batch, depth]", about: "0 and those accepted, then -1" },
        TensorHelp { name: "emitted", dtypes: "i32", shape: "[batch]", about: "how many" },
        TensorHelp { name: "accepted", dtypes: "i32", shape: "[batch]", about: "how many drafts" },
        TensorHelp { name: "path", dtypes: "i32", shape: "[batch]", about: "which" },
        TensorHelp { name: "last_row", dtypes: "i32", shape: "[batch]", about: "whose hidden state goes on" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let target = inputs.require("target")?.dtype;
    with_type!("target", target, T in [f32, f16, bf16], verify::<T>(runner, inputs, settings))
}

fn verify<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let target = inputs.require("target")?;
    let [target_rows, vocab] = target.shape_of("target")?;
    let drafts = inputs.require("drafts")?;
    let [batch, nodes] = drafts.shape_of("drafts")?;
    let mut plan = TypicalVerifier::<T>::builder(batch, nodes, vocab)
        .target_rows(target_rows)
        .epsilon(settings.get("epsilon")?.unwrap_or(0.3))
        .alpha(settings.get("alpha")?.unwrap_or(0.09))
        .fallback_token(settings.get::<i64>("fallback")?.unwrap_or(0) as i32);
    let (mut depth, mut paths) = (nodes, None);
    if let Some(tensor) = inputs.get("paths") {
        let [count, longest] = tensor.shape_of("paths")?;
        plan = plan.paths(count, longest);
        depth = longest;
        paths = Some(runner.upload(&tensor.expect::<i32>("paths", &[count, longest])?)?);
    }
    let plan = plan.build(&runner.info()?)?;
    let target = runner.upload(&target.elements::<T>())?;
    let drafts = runner.upload(&drafts.expect::<i32>("drafts", &[batch, nodes])?)?;
    let row_index = optional::<i32>(runner, inputs, "row_index", &[batch, nodes])?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[batch])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
    let uniforms = optional::<f32>(runner, inputs, "uniforms", &[batch, 3])?;
    let (mut tokens, mut kept) = (runner.output::<i32>(batch * depth)?, runner.output::<i32>(batch * depth)?);
    let (mut emitted, mut accepted) = (runner.output(batch)?, runner.output(batch)?);
    let (mut path, mut last_row) = (runner.output::<i32>(batch)?, runner.output::<i32>(batch)?);
    let mut status = runner.output::<u32>(batch)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    runner.run(|stream| {
        plan.run(
            stream,
            TypicalVerifierArgs {
                target: target.as_in(),
                drafts: drafts.as_in(),
                paths: paths.as_ref().map(Buffer::as_in),
                row_index: row_index.as_ref().map(Buffer::as_in),
                temperature: temperature.as_ref().map(Buffer::as_in),
                seeds: seeds.as_ref().map(Buffer::as_in),
                positions: positions.as_ref().map(Buffer::as_in),
                uniforms: uniforms.as_ref().map(Buffer::as_in),
                out: TypicalOut {
                    tokens: tokens.as_out(),
                    emitted: emitted.as_out(),
                    accepted: accepted.as_out(),
                    nodes: Some(kept.as_out()),
                    path: Some(path.as_out()),
                    last_row: Some(last_row.as_out()),
                    status: status.as_out(),
                },
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("tokens", Tensor::new(&[batch, depth], &tokens.download()?))
        .with("nodes", Tensor::new(&[batch, depth], &kept.download()?))
        .with("emitted", Tensor::new(&[batch], &emitted.download()?))
        .with("accepted", Tensor::new(&[batch], &accepted.download()?))
        .with("path", Tensor::new(&[batch], &path.download()?))
        .with("last_row", Tensor::new(&[batch], &last_row.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?)))
}

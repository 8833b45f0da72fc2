use nextscale::dtype::Float;
use nextscale::verification::{
    Backspace, BackspaceArgs, BeamRank, BeamRankArgs, GatedSample, GatedSampleArgs, SelectCandidate,
    SelectCandidateArgs,
};
use nextscale::{bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static GATED: Op = Op {
    name: "gated_sample",
    about: "A token of each row of two heads, mixed by a gate.",
    inputs: &[
        TensorHelp { name: "first", dtypes: "f32, f16, bf16", shape: "[rows, vocab]", about: "vocab up to 2^24" },
        TensorHelp { name: "second", dtypes: "as first", shape: "[rows, vocab]", about: "raw logits" },
        TensorHelp { name: "gate", dtypes: "f32", shape: "[rows]", about: "1: the first alone" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[rows]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp { name: "top_k", dtypes: "i32", shape: "[rows]", about: "0 and default: off" },
        TensorHelp { name: "top_p", dtypes: "f32", shape: "[rows]", about: "1 and default: off" },
        TensorHelp { name: "min_p", dtypes: "f32", shape: "[rows]", about: "0 and default: off" },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[rows]", about: "default: 0" },
        TensorHelp { name: "positions", dtypes: "i64", shape: "[rows]", about: "default: 0" },
        TensorHelp { name: "uniforms", dtypes: "f32", shape: "[rows, 3]", about: "in place of seeds" },
    ],
    settings: &[SettingHelp { name: "row_in_step", values: "0 to 1023", about: "default 0" }],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[rows]", about: "one a row" },
        TensorHelp { name: "stats", dtypes: "f32", shape: "[rows, 4]", about: "max, sum, least logit kept, scale" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[rows]", about: "bits; 0: nothing to say" },
    ],
    run: |runner, inputs, settings| {
        let dtype = inputs.require("first")?.dtype;
        with_type!("first", dtype, T in [f32, f16, bf16], gated::<T>(runner, inputs, settings))
    },
};

fn gated<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let first = inputs.require("first")?;
    let [rows, vocab] = first.shape_of("first")?;
    let plan = GatedSample::<T>::builder(rows, vocab)
        .row_in_step(settings.get("row_in_step")?.unwrap_or(0))
        .build(&runner.info()?)?;
    let first = runner.upload(&first.elements::<T>())?;
    let second = runner.upload(&inputs.require("second")?.expect::<T>("second", &[rows, vocab])?)?;
    let gate = runner.upload(&inputs.require("gate")?.expect::<f32>("gate", &[rows])?)?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[rows])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[rows])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[rows])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[rows])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[rows])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[rows])?;
    let uniforms = optional::<f32>(runner, inputs, "uniforms", &[rows, 3])?;
    let (mut tokens, mut stats) = (runner.output::<i32>(rows)?, runner.output::<f32>(rows * 4)?);
    let mut status = runner.output::<u32>(rows)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        plan.run(
            stream,
            GatedSampleArgs {
                first: first.as_in(),
                second: second.as_in(),
                gate: gate.as_in(),
                temperature: temperature.as_ref().map(Buffer::as_in),
                top_k: top_k.as_ref().map(Buffer::as_in),
                top_p: top_p.as_ref().map(Buffer::as_in),
                min_p: min_p.as_ref().map(Buffer::as_in),
                seeds: seeds.as_ref().map(Buffer::as_in),
                positions: positions.as_ref().map(Buffer::as_in),
                uniforms: uniforms.as_ref().map(Buffer::as_in),
                tokens: tokens.as_out(),
                stats: Some(stats.as_out()),
                status: status.as_out(),
                workspace: workspace.as_out(),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("tokens", Tensor::new(&[rows], &tokens.download()?))
        .with("stats", Tensor::new(&[rows, 4], &stats.download()?))
        .with("status", Tensor::new(&[rows], &status.download()?)))
}

pub(crate) static SELECT: Op = Op {
    name: "select_candidate",
    about: "One of several sequences: importance resampling, or the best of n.",
    inputs: &[
        TensorHelp { name: "scores", dtypes: "f32", shape: "[batch, candidates]", about: "up to 1024 candidates" },
        TensorHelp { name: "sequences", dtypes: "i32", shape: "[batch, candidates, length]", about: "default: none" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "default: 1; below 1e-5: the best" },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[batch]", about: "default: 0" },
        TensorHelp { name: "positions", dtypes: "i64", shape: "[batch]", about: "default: 0" },
        TensorHelp { name: "uniforms", dtypes: "f32", shape: "[batch, 3]", about: "in place of seeds" },
    ],
    settings: &[],
    outputs: &[
        TensorHelp { name: "parents", dtypes: "i32", shape: "[batch]", about: "which" },
        TensorHelp { name: "selected", dtypes: "i32", shape: "[batch, length]", about: "with sequences" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run: |runner, inputs, _| {
        let scores = inputs.require("scores")?;
        let [batch, candidates] = scores.shape_of("scores")?;
        let length = match inputs.get("sequences") {
            Some(tensor) => tensor.shape_of::<3>("sequences")?[2],
            None => 0,
        };
        let plan = SelectCandidate::new(batch, candidates, length, &runner.info()?)?;
        let scores = runner.upload(&scores.expect::<f32>("scores", &[batch, candidates])?)?;
        let sequences = optional::<i32>(runner, inputs, "sequences", &[batch, candidates, length])?;
        let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
        let seeds = optional::<i64>(runner, inputs, "seeds", &[batch])?;
        let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
        let uniforms = optional::<f32>(runner, inputs, "uniforms", &[batch, 3])?;
        let (mut parents, mut selected) = (runner.output::<i32>(batch)?, runner.output::<i32>(batch * length)?);
        let mut status = runner.output::<u32>(batch)?;
        runner.run(|stream| {
            plan.run(
                stream,
                SelectCandidateArgs {
                    scores: scores.as_in(),
                    sequences: sequences.as_ref().map(Buffer::as_in),
                    temperature: temperature.as_ref().map(Buffer::as_in),
                    seeds: seeds.as_ref().map(Buffer::as_in),
                    positions: positions.as_ref().map(Buffer::as_in),
                    uniforms: uniforms.as_ref().map(Buffer::as_in),
                    parents: parents.as_out(),
                    selected: sequences.is_some().then(|| selected.as_out()),
                    status: status.as_out(),
                },
            )
        })?;
        let mut out = Tensors::default()
            .with("parents", Tensor::new(&[batch], &parents.download()?))
            .with("status", Tensor::new(&[batch], &status.download()?));
        if sequences.is_some() {
            out = out.with("selected", Tensor::new(&[batch, length], &selected.download()?));
        }
        Ok(out)
    },
};

pub(crate) static BEAMS: Op = Op {
    name: "beam_rank",
    about: "The best continuations of beams, and their parents.",
    inputs: &[
        TensorHelp {
            name: "logits",
            dtypes: "f32, f16, bf16",
            shape: "[batch, beams, vocab]",
            about: "up to 32 beams",
        },
        TensorHelp { name: "scores", dtypes: "f32", shape: "[batch, beams]", about: "sums of ln p so far" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "default: 1" },
    ],
    settings: &[SettingHelp { name: "width", values: "1 to 32", about: "how many are kept; default: the beams" }],
    outputs: &[
        TensorHelp { name: "parents", dtypes: "i32", shape: "[batch, width]", about: "beams; -1: no more" },
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[batch, width]", about: "-1: no more" },
        TensorHelp { name: "best", dtypes: "f32", shape: "[batch, width]", about: "scores, greatest first; -inf" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run: |runner, inputs, settings| {
        let dtype = inputs.require("logits")?.dtype;
        with_type!("logits", dtype, T in [f32, f16, bf16], beams::<T>(runner, inputs, settings))
    },
};

fn beams<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?;
    let [batch, beams, vocab] = logits.shape_of("logits")?;
    let width = settings.get::<usize>("width")?.unwrap_or(beams);
    let plan = BeamRank::<T>::new(batch, beams, width, vocab, None, &runner.info()?)?;
    let logits = runner.upload(&logits.elements::<T>())?;
    let scores = runner.upload(&inputs.require("scores")?.expect::<f32>("scores", &[batch, beams])?)?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let (mut parents, mut tokens) = (runner.output::<i32>(batch * width)?, runner.output::<i32>(batch * width)?);
    let (mut best, mut status) = (runner.output::<f32>(batch * width)?, runner.output::<u32>(batch)?);
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    runner.run(|stream| {
        plan.run(
            stream,
            BeamRankArgs {
                logits: logits.as_in(),
                scores: scores.as_in(),
                temperature: temperature.as_ref().map(Buffer::as_in),
                parents: parents.as_out(),
                tokens: tokens.as_out(),
                best: best.as_out(),
                status: status.as_out(),
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("parents", Tensor::new(&[batch, width], &parents.download()?))
        .with("tokens", Tensor::new(&[batch, width], &tokens.download()?))
        .with("best", Tensor::new(&[batch, width], &best.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?)))
}

pub(crate) static BACKSPACE: Op = Op {
    name: "backspace",
    about: "Emitted tokens appended to sequences, of which one takes the last one away.",
    inputs: &[
        TensorHelp { name: "emitted", dtypes: "i32", shape: "[batch, most]", about: "up to the first below 0" },
        TensorHelp { name: "least", dtypes: "i32", shape: "[batch]", about: "never taken away; default: 0" },
        TensorHelp { name: "sequences", dtypes: "i32", shape: "[batch, capacity]", about: "as they are" },
        TensorHelp { name: "lengths", dtypes: "i32", shape: "[batch]", about: "of them" },
    ],
    settings: &[SettingHelp { name: "token", values: "0 and above", about: "the backspace; must be given" }],
    outputs: &[
        TensorHelp { name: "sequences", dtypes: "i32", shape: "[batch, capacity]", about: "as they became" },
        TensorHelp { name: "lengths", dtypes: "i32", shape: "[batch]", about: "of them" },
        TensorHelp { name: "kept", dtypes: "i32", shape: "[batch]", about: "the least length on the way" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run: |runner, inputs, settings| {
        let emitted = inputs.require("emitted")?;
        let [batch, most] = emitted.shape_of("emitted")?;
        let before = inputs.require("sequences")?;
        let [_, capacity] = before.shape_of("sequences")?;
        let plan = Backspace::new(batch, most, capacity, settings.require("token")?, &runner.info()?)?;
        let emitted = runner.upload(&emitted.expect::<i32>("emitted", &[batch, most])?)?;
        let least = optional::<i32>(runner, inputs, "least", &[batch])?;
        let before = before.expect::<i32>("sequences", &[batch, capacity])?;
        let of = inputs.require("lengths")?.expect::<i32>("lengths", &[batch])?;
        let (mut sequences, mut lengths) = (runner.upload(&before)?, runner.upload(&of)?);
        let (mut kept, mut status) = (runner.output::<i32>(batch)?, runner.output::<u32>(batch)?);
        runner.run(|stream| {
            plan.run(
                stream,
                BackspaceArgs {
                    emitted: emitted.as_in(),
                    least: least.as_ref().map(Buffer::as_in),
                    sequences: sequences.as_out(),
                    lengths: lengths.as_out(),
                    kept: kept.as_out(),
                    status: status.as_out(),
                },
            )
        })?;
        Ok(Tensors::default()
            .with("sequences", Tensor::new(&[batch, capacity], &sequences.download()?))
            .with("lengths", Tensor::new(&[batch], &lengths.download()?))
            .with("kept", Tensor::new(&[batch], &kept.download()?))
            .with("status", Tensor::new(&[batch], &status.download()?)))
    },
};

use nextscale::dtype::Float;
use nextscale::verification::{Drafts, Rule, Verifier, VerifierArgs, VerifierOptions, VerifierOut};
use nextscale::{bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "verify",
    about: "Verification of chains of drafts: which are accepted, and the token that follows.",
    inputs: &[
        TensorHelp {
            name: "target",
            dtypes: "f32, f16, bf16",
            shape: "[target_rows, vocab]",
            about: "raw logits; vocab up to 2^24",
        },
        TensorHelp {
            name: "cu_rows",
            dtypes: "i32",
            shape: "[batch + 1]",
            about: "where the rows of a request begin; one more than it has drafts",
        },
        TensorHelp {
            name: "drafts",
            dtypes: "i32",
            shape: "[batch, max_drafts + 1]",
            about: "as [rows]: at row r, the draft that it scores; -1: none from here on",
        },
        TensorHelp {
            name: "row_index",
            dtypes: "i32",
            shape: "[batch, max_drafts + 1]",
            about: "as [rows]; default: r",
        },
        TensorHelp {
            name: "draft",
            dtypes: "f32, f16, bf16",
            shape: "[draft_rows, draft_vocab]",
            about: "raw logits; default: drafts are not random",
        },
        TensorHelp {
            name: "draft_row",
            dtypes: "i32",
            shape: "[batch, max_drafts + 1]",
            about: "as [rows]; default: b * max_drafts + i",
        },
        TensorHelp { name: "draft_stats", dtypes: "f32", shape: "[draft_rows, 4]", about: "of draft_sample" },
        TensorHelp { name: "target_to_draft", dtypes: "i32", shape: "[vocab]", about: "default: the token itself" },
        TensorHelp {
            name: "target_stats",
            dtypes: "f32",
            shape: "[target_rows, ceil(vocab / 1024), 2]",
            about: "of row_stats; default: rows are swept",
        },
        TensorHelp {
            name: "allow",
            dtypes: "u32",
            shape: "[batch, max_drafts + 1, ceil(vocab / 32)]",
            about: "as [rows, ..]; default: all",
        },
        TensorHelp { name: "rules", dtypes: "i32", shape: "[batch]", about: "0 greedy, 1 match, 2 reject, 3 block" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp { name: "draft_temperature", dtypes: "f32", shape: "[batch]", about: "default: temperature" },
        TensorHelp { name: "top_k", dtypes: "i32", shape: "[batch]", about: "0 and default: off" },
        TensorHelp { name: "top_p", dtypes: "f32", shape: "[batch]", about: "1 and default: off" },
        TensorHelp { name: "min_p", dtypes: "f32", shape: "[batch]", about: "0 and default: off" },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[batch]", about: "default: 0" },
        TensorHelp {
            name: "positions",
            dtypes: "i64",
            shape: "[batch]",
            about: "of the token after row 0; default: 0",
        },
        TensorHelp {
            name: "uniforms",
            dtypes: "f32",
            shape: "[batch, max_drafts + 1, 4]",
            about: "in place of seeds: the accept test, three for a token",
        },
    ],
    settings: &[
        SettingHelp { name: "rule", values: "greedy | match | reject | block", about: "default reject" },
        SettingHelp { name: "trials", values: "0 to 4096", about: "of thinning; default by the vocabulary" },
        SettingHelp { name: "fallback", values: "a token", about: "where none can be drawn; default 0" },
    ],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[batch, max_drafts + 1]", about: "emitted, then -1" },
        TensorHelp { name: "emitted", dtypes: "i32", shape: "[batch]", about: "how many" },
        TensorHelp { name: "accepted", dtypes: "i32", shape: "[batch]", about: "how many drafts" },
        TensorHelp { name: "last_row", dtypes: "i32", shape: "[batch]", about: "whose hidden state goes on; -1: none" },
        TensorHelp { name: "log_probs", dtypes: "f32", shape: "[batch, max_drafts + 1]", about: "of the target; NaN" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let target = inputs.require("target")?.dtype;
    let draft = inputs.get("draft").map_or(target, |draft| draft.dtype);
    with_type!("target", target, P in [f32, f16, bf16], {
        with_type!("draft", draft, Q in [f32, f16, bf16], verify::<P, Q>(runner, inputs, settings))
    })
}

fn verify<P: Float, Q: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let target = inputs.require("target")?;
    let [target_rows, vocab] = target.shape_of("target")?;
    let [batch, of_request] = inputs.require("drafts")?.shape_of("drafts")?;
    if of_request == 0 {
        return Err(Failure::request("drafts: [batch, max_drafts + 1]"));
    }
    let all = [batch, of_request];
    let rules = optional::<i32>(runner, inputs, "rules", &[batch])?;
    let mut plan = Verifier::<P, Q>::builder(batch, of_request - 1, vocab)
        .target_rows(target_rows)
        .rule(settings.get("rule")?.unwrap_or(Rule::Reject))
        .fallback_token(settings.get::<i64>("fallback")?.unwrap_or(0) as i32);
    if rules.is_some() {
        plan = plan.rules_per_request();
    }
    if let Some(trials) = settings.get("trials")? {
        plan = plan.trials(trials);
    }
    let (mut draft, mut draft_stats) = (None, None);
    if let Some(tensor) = inputs.get("draft") {
        let [rows, columns] = tensor.shape_of("draft")?;
        draft_stats = optional::<f32>(runner, inputs, "draft_stats", &[rows, 4])?;
        let kind = if draft_stats.is_some() { Drafts::LogitsAndStats } else { Drafts::Logits };
        plan = plan.draft_rows(rows).draft_vocab(columns).drafts(kind);
        draft = Some(runner.upload(&tensor.elements::<Q>())?);
    }
    let plan = plan.build(&runner.info()?)?;
    let target = runner.upload(&target.elements::<P>())?;
    let cu_rows = runner.upload(&inputs.require("cu_rows")?.expect::<i32>("cu_rows", &[batch + 1])?)?;
    let drafts = runner.upload(&inputs.require("drafts")?.expect::<i32>("drafts", &all)?)?;
    let row_index = optional::<i32>(runner, inputs, "row_index", &all)?;
    let draft_row = optional::<i32>(runner, inputs, "draft_row", &all)?;
    let map = optional::<i32>(runner, inputs, "target_to_draft", &[vocab])?;
    let target_stats = optional::<f32>(runner, inputs, "target_stats", &[target_rows, vocab.div_ceil(1024), 2])?;
    let allow = optional::<u32>(runner, inputs, "allow", &[batch, of_request, vocab.div_ceil(32)])?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let draft_temperature = optional::<f32>(runner, inputs, "draft_temperature", &[batch])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[batch])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[batch])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[batch])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[batch])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
    let uniforms = optional::<f32>(runner, inputs, "uniforms", &[batch, of_request, 4])?;
    let (mut tokens, mut log_probs) = (runner.output::<i32>(batch * of_request)?, runner.output(batch * of_request)?);
    let (mut emitted, mut accepted) = (runner.output(batch)?, runner.output(batch)?);
    let (mut last_row, mut status) = (runner.output::<i32>(batch)?, runner.output::<u32>(batch)?);
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    runner.run(|stream| {
        plan.run(
            stream,
            VerifierArgs {
                target: target.as_in(),
                cu_rows: cu_rows.as_in(),
                drafts: drafts.as_in(),
                options: VerifierOptions {
                    row_index: row_index.as_ref().map(Buffer::as_in),
                    draft: draft.as_ref().map(Buffer::as_in),
                    draft_row: draft_row.as_ref().map(Buffer::as_in),
                    draft_stats: draft_stats.as_ref().map(Buffer::as_in),
                    target_to_draft: map.as_ref().map(Buffer::as_in),
                    target_stats: target_stats.as_ref().map(Buffer::as_in),
                    allow: allow.as_ref().map(Buffer::as_in),
                    rules: rules.as_ref().map(Buffer::as_in),
                    temperature: temperature.as_ref().map(Buffer::as_in),
                    draft_temperature: draft_temperature.as_ref().map(Buffer::as_in),
                    top_k: top_k.as_ref().map(Buffer::as_in),
                    top_p: top_p.as_ref().map(Buffer::as_in),
                    min_p: min_p.as_ref().map(Buffer::as_in),
                    seeds: seeds.as_ref().map(Buffer::as_in),
                    positions: positions.as_ref().map(Buffer::as_in),
                    uniforms: uniforms.as_ref().map(Buffer::as_in),
                },
                out: VerifierOut {
                    tokens: tokens.as_out(),
                    emitted: emitted.as_out(),
                    accepted: accepted.as_out(),
                    status: status.as_out(),
                    last_row: Some(last_row.as_out()),
                    log_probs: Some(log_probs.as_out()),
                },
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("tokens", Tensor::new(&all, &tokens.download()?))
        .with("emitted", Tensor::new(&[batch], &emitted.download()?))
        .with("accepted", Tensor::new(&[batch], &accepted.download()?))
        .with("last_row", Tensor::new(&[batch], &last_row.download()?))
        .with("log_probs", Tensor::new::<f32>(&all, &log_probs.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?)))
}

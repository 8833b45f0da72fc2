use nextscale::dtype::Float;
use nextscale::verification::{
    Drafts, Embeddings, Grouped, Lantern, Neighbours, Redraft, VisualOptions, VisualOut, VisualRule, VisualVerifier,
    VisualVerifierArgs,
};
use nextscale::{DType, bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, Setting, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

const OF_STEP: &str = "[batch, max_drafts + 1]";

pub(crate) static OP: Op = Op {
    name: "visual_verify",
    about: "Verification of chains of image tokens: LANTERN, grouped, speculative Jacobi.",
    inputs: &[
        TensorHelp {
            name: "target",
            dtypes: "f32, f16, bf16",
            shape: "[target_rows, vocab]",
            about: "raw logits; vocab up to 2^18",
        },
        TensorHelp {
            name: "target_free",
            dtypes: "as target",
            shape: "[target_rows, vocab]",
            about: "those without the condition; default: no guidance",
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
            shape: OF_STEP,
            about: "as [rows]: at row r, the draft that it scores; -1: none from here on",
        },
        TensorHelp { name: "row_index", dtypes: "i32", shape: OF_STEP, about: "as [rows]; default: r" },
        TensorHelp {
            name: "draft",
            dtypes: "as target",
            shape: "[draft_rows, vocab]",
            about: "raw logits; default: drafts are not random",
        },
        TensorHelp {
            name: "draft_free",
            dtypes: "as target",
            shape: "[draft_rows, vocab]",
            about: "those without the condition; with target_free and draft",
        },
        TensorHelp {
            name: "draft_row",
            dtypes: "i32",
            shape: OF_STEP,
            about: "as [rows]; default: b * max_drafts + i",
        },
        TensorHelp { name: "draft_stats", dtypes: "f32", shape: "[draft_rows, 4]", about: "of draft_sample" },
        TensorHelp {
            name: "allow",
            dtypes: "u32",
            shape: "[batch, max_drafts + 1, ceil(vocab / 32)]",
            about: "as [rows, ..]; default: all",
        },
        TensorHelp {
            name: "syntax",
            dtypes: "u32",
            shape: "[ceil(vocab / 32)]",
            about: "drafts that are accepted whatever their probability; default: none",
        },
        TensorHelp {
            name: "neighbours",
            dtypes: "u16, i32",
            shape: "[codes, max(accumulated, zeroed)]",
            about: "with rule=lantern: the nearest codes, nearest first",
        },
        TensorHelp {
            name: "embeddings",
            dtypes: "f32, f16, bf16",
            shape: "[codes, dim]",
            about: "with rule=grouped: a vector of each code; default: none",
        },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp { name: "draft_temperature", dtypes: "f32", shape: "[batch]", about: "default: temperature" },
        TensorHelp { name: "guidance", dtypes: "f32", shape: "[batch]", about: "with target_free; default: 1" },
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
        SettingHelp { name: "rule", values: "lantern | grouped | jacobi", about: "must be given" },
        SettingHelp { name: "redraft", values: "none | independent | maximal | gumbel", about: "default none" },
        SettingHelp { name: "accumulated", values: "0 to 65535", about: "neighbours that may count; default 1000" },
        SettingHelp { name: "zeroed", values: "0 to 65535", about: "by a rejection; default 1001" },
        SettingHelp { name: "bound", values: "0 and above", about: "up to 1 delta, above it lambda + 1; default 0.1" },
        SettingHelp { name: "below", values: "0 to 15", about: "of a group; default 7" },
        SettingHelp { name: "above", values: "0 to 15", about: "of a group; default 6" },
        SettingHelp { name: "probability_gap", values: "0 and above", about: "of a group; default 0.15" },
        SettingHelp { name: "distance", values: "0 and above", about: "of a group, squared; default 0.5" },
        SettingHelp { name: "first_code", values: "a token", about: "default 0" },
        SettingHelp { name: "codes", values: "1 and above", about: "how many tokens are codes; default: all" },
        SettingHelp { name: "fallback", values: "a token", about: "where none can be drawn; default 0" },
    ],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: OF_STEP, about: "emitted, then -1" },
        TensorHelp { name: "emitted", dtypes: "i32", shape: "[batch]", about: "how many" },
        TensorHelp { name: "accepted", dtypes: "i32", shape: "[batch]", about: "how many drafts" },
        TensorHelp { name: "last_row", dtypes: "i32", shape: "[batch]", about: "whose hidden state goes on; -1: none" },
        TensorHelp { name: "redrafts", dtypes: "i32", shape: OF_STEP, about: "with redraft; behind the step's end" },
        TensorHelp {
            name: "redraft_stats",
            dtypes: "f32",
            shape: "[batch, max_drafts + 1, 4]",
            about: "with redraft; beside redrafts, else NaN",
        },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run,
};

impl Setting for Redraft {
    const WHAT: &'static str = "none, independent, maximal or gumbel";
    fn parse(value: &str) -> Option<Self> {
        match value {
            "none" => Some(Redraft::None),
            "independent" => Some(Redraft::Independent),
            "maximal" => Some(Redraft::Maximal),
            "gumbel" => Some(Redraft::Gumbel),
            _ => None,
        }
    }
}

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let target = inputs.require("target")?.dtype;
    with_type!("target", target, T in [f32, f16, bf16], verify::<T>(runner, inputs, settings))
}

fn verify<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let target = inputs.require("target")?;
    let [target_rows, vocab] = target.shape_of("target")?;
    let [batch, of_request] = inputs.require("drafts")?.shape_of("drafts")?;
    if of_request == 0 {
        return Err(Failure::request("drafts: [batch, max_drafts + 1]"));
    }
    let all = [batch, of_request];
    let first = settings.get::<usize>("first_code")?.unwrap_or(0);
    let codes = settings.get::<usize>("codes")?.unwrap_or(vocab.saturating_sub(first));
    let embeddings = inputs.get("embeddings");
    let dim = match embeddings {
        Some(tensor) => tensor.shape_of::<2>("embeddings")?[1],
        None => 0,
    };
    let rule = match settings.require::<String>("rule")?.as_str() {
        "lantern" => VisualRule::Lantern(Lantern {
            accumulated: settings.get("accumulated")?.unwrap_or(1000),
            zeroed: settings.get("zeroed")?.unwrap_or(1001),
            bound: settings.get("bound")?.unwrap_or(0.1),
        }),
        "grouped" => VisualRule::Grouped(Grouped {
            below: settings.get("below")?.unwrap_or(7),
            above: settings.get("above")?.unwrap_or(6),
            probability_gap: settings.get("probability_gap")?.unwrap_or(0.15),
            distance: settings.get("distance")?.unwrap_or(0.5),
            dim,
        }),
        "jacobi" => VisualRule::Jacobi,
        other => return Err(Failure::request(format!("rule={other}: not lantern, grouped or jacobi"))),
    };
    let redraft = settings.get("redraft")?.unwrap_or(Redraft::None);
    let mut plan = VisualVerifier::<T>::builder(batch, of_request - 1, vocab, rule)
        .target_rows(target_rows)
        .codes(first, codes)
        .redraft(redraft)
        .fallback_token(settings.get::<i64>("fallback")?.unwrap_or(0) as i32);
    let target_free = optional::<T>(runner, inputs, "target_free", &[target_rows, vocab])?;
    if target_free.is_some() {
        plan = plan.guided();
    }
    let (mut draft, mut draft_free, mut draft_stats) = (None, None, None);
    if let Some(tensor) = inputs.get("draft") {
        let [rows, _] = tensor.shape_of("draft")?;
        draft_stats = optional::<f32>(runner, inputs, "draft_stats", &[rows, 4])?;
        let kind = if draft_stats.is_some() { Drafts::LogitsAndStats } else { Drafts::Logits };
        plan = plan.draft_rows(rows).drafts(kind);
        draft = Some(runner.upload(&tensor.expect::<T>("draft", &[rows, vocab])?)?);
        draft_free = optional::<T>(runner, inputs, "draft_free", &[rows, vocab])?;
    }
    let plan = plan.build(&runner.info()?)?;
    let target = runner.upload(&target.elements::<T>())?;
    let cu_rows = runner.upload(&inputs.require("cu_rows")?.expect::<i32>("cu_rows", &[batch + 1])?)?;
    let drafts = runner.upload(&inputs.require("drafts")?.expect::<i32>("drafts", &all)?)?;
    let row_index = optional::<i32>(runner, inputs, "row_index", &all)?;
    let draft_row = optional::<i32>(runner, inputs, "draft_row", &all)?;
    let words = vocab.div_ceil(32);
    let allow = optional::<u32>(runner, inputs, "allow", &[batch, of_request, words])?;
    let syntax = optional::<u32>(runner, inputs, "syntax", &[words])?;
    let (mut small_ids, mut ids) = (None, None);
    if let (VisualRule::Lantern(Lantern { accumulated, zeroed, .. }), Some(tensor)) = (rule, inputs.get("neighbours")) {
        let shape = [codes, accumulated.max(zeroed)];
        match tensor.dtype {
            DType::U16 => small_ids = Some(runner.upload(&tensor.expect::<u16>("neighbours", &shape)?)?),
            _ => ids = Some(runner.upload(&tensor.expect::<i32>("neighbours", &shape)?)?),
        }
    }
    let (mut f32s, mut f16s, mut bf16s) = (None, None, None);
    if let Some(tensor) = embeddings {
        let shape = [codes, dim];
        match tensor.dtype {
            DType::F16 => f16s = Some(runner.upload(&tensor.expect::<f16>("embeddings", &shape)?)?),
            DType::BF16 => bf16s = Some(runner.upload(&tensor.expect::<bf16>("embeddings", &shape)?)?),
            _ => f32s = Some(runner.upload(&tensor.expect::<f32>("embeddings", &shape)?)?),
        }
    }
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let draft_temperature = optional::<f32>(runner, inputs, "draft_temperature", &[batch])?;
    let guidance = optional::<f32>(runner, inputs, "guidance", &[batch])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[batch])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[batch])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[batch])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[batch])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
    let uniforms = optional::<f32>(runner, inputs, "uniforms", &[batch, of_request, 4])?;
    let mut tokens = runner.output::<i32>(batch * of_request)?;
    let (mut redrafts, mut stats) =
        (runner.output::<i32>(batch * of_request)?, runner.output::<f32>(batch * of_request * 4)?);
    let (mut emitted, mut accepted) = (runner.output(batch)?, runner.output(batch)?);
    let (mut last_row, mut status) = (runner.output::<i32>(batch)?, runner.output::<u32>(batch)?);
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    let redrafting = redraft != Redraft::None;
    runner.run(|stream| {
        plan.run(
            stream,
            VisualVerifierArgs {
                target: target.as_in(),
                cu_rows: cu_rows.as_in(),
                drafts: drafts.as_in(),
                options: VisualOptions {
                    target_free: target_free.as_ref().map(Buffer::as_in),
                    row_index: row_index.as_ref().map(Buffer::as_in),
                    draft: draft.as_ref().map(Buffer::as_in),
                    draft_free: draft_free.as_ref().map(Buffer::as_in),
                    draft_row: draft_row.as_ref().map(Buffer::as_in),
                    draft_stats: draft_stats.as_ref().map(Buffer::as_in),
                    allow: allow.as_ref().map(Buffer::as_in),
                    syntax: syntax.as_ref().map(Buffer::as_in),
                    neighbours: (small_ids.as_ref().map(|ids| Neighbours::U16(ids.as_in())))
                        .or(ids.as_ref().map(|ids| Neighbours::I32(ids.as_in()))),
                    embeddings: (f32s.as_ref().map(|rows| Embeddings::F32(rows.as_in())))
                        .or(f16s.as_ref().map(|rows| Embeddings::F16(rows.as_in())))
                        .or(bf16s.as_ref().map(|rows| Embeddings::BF16(rows.as_in()))),
                    temperature: temperature.as_ref().map(Buffer::as_in),
                    draft_temperature: draft_temperature.as_ref().map(Buffer::as_in),
                    guidance: guidance.as_ref().map(Buffer::as_in),
                    top_k: top_k.as_ref().map(Buffer::as_in),
                    top_p: top_p.as_ref().map(Buffer::as_in),
                    min_p: min_p.as_ref().map(Buffer::as_in),
                    seeds: seeds.as_ref().map(Buffer::as_in),
                    positions: positions.as_ref().map(Buffer::as_in),
                    uniforms: uniforms.as_ref().map(Buffer::as_in),
                },
                out: VisualOut {
                    tokens: tokens.as_out(),
                    emitted: emitted.as_out(),
                    accepted: accepted.as_out(),
                    status: status.as_out(),
                    last_row: Some(last_row.as_out()),
                    redrafts: redrafting.then(|| redrafts.as_out()),
                    redraft_stats: redrafting.then(|| stats.as_out()),
                },
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    let mut out = Tensors::default()
        .with("tokens", Tensor::new(&all, &tokens.download()?))
        .with("emitted", Tensor::new(&[batch], &emitted.download()?))
        .with("accepted", Tensor::new(&[batch], &accepted.download()?))
        .with("last_row", Tensor::new(&[batch], &last_row.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?));
    if redrafting {
        out = out
            .with("redrafts", Tensor::new(&all, &redrafts.download()?))
            .with("redraft_stats", Tensor::new(&[batch, of_request, 4], &stats.download()?));
    }
    Ok(out)
}

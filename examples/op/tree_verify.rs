use nextscale::dtype::Float;
use nextscale::verification::{
    Drafts, Rule, Siblings, TreeLinks, TreeVerifier, TreeVerifierArgs, TreeVerifierOptions, TreeVerifierOut,
};
use nextscale::{bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "tree_verify",
    about: "Verification of trees of drafts: the path that is accepted, and the token that follows.",
    inputs: &[
        TensorHelp {
            name: "target",
            dtypes: "f32, f16, bf16",
            shape: "[target_rows, vocab]",
            about: "raw logits; vocab up to 2^24",
        },
        TensorHelp {
            name: "drafts",
            dtypes: "i32",
            shape: "[batch, max_nodes]",
            about: "each node's token; outside the vocabulary: no draft",
        },
        TensorHelp {
            name: "parents",
            dtypes: "i32",
            shape: "[batch, max_nodes]",
            about: "of each node; -1: the root, or no node",
        },
        TensorHelp {
            name: "first_child",
            dtypes: "i32",
            shape: "[batch, max_nodes]",
            about: "with next_sibling in place of parents; -1: none",
        },
        TensorHelp { name: "next_sibling", dtypes: "i32", shape: "[batch, max_nodes]", about: "-1: none" },
        TensorHelp {
            name: "cu_rows",
            dtypes: "i32",
            shape: "[batch + 1]",
            about: "where the nodes of a request begin, all arrays [batch, max_nodes] then being ragged; default: at b * max_nodes",
        },
        TensorHelp { name: "row_index", dtypes: "i32", shape: "[batch, max_nodes]", about: "default: the node's own" },
        TensorHelp {
            name: "draft",
            dtypes: "f32, f16, bf16",
            shape: "[draft_rows, draft_vocab]",
            about: "raw logits; default: drafts are not random",
        },
        TensorHelp {
            name: "draft_row",
            dtypes: "i32",
            shape: "[batch, max_nodes]",
            about: "what a node's children were drawn from; default: the node's own",
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
            shape: "[batch, max_nodes, ceil(vocab / 32)]",
            about: "default: all",
        },
        TensorHelp { name: "rules", dtypes: "i32", shape: "[batch]", about: "0 greedy, 1 match, 2 reject" },
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
            about: "of the token after the root; default: 0",
        },
        TensorHelp {
            name: "uniforms",
            dtypes: "f32",
            shape: "[batch, max_nodes, 4]",
            about: "in place of seeds: a node's accept test, three for a token after it",
        },
        TensorHelp {
            name: "kv_start",
            dtypes: "i32",
            shape: "[batch]",
            about: "the root's row of the cache; default: 0",
        },
        TensorHelp {
            name: "kv_slots",
            dtypes: "i32",
            shape: "[batch, max_nodes]",
            about: "each node's row of the cache",
        },
    ],
    settings: &[
        SettingHelp {
            name: "max_depth",
            values: "0 to 64",
            about: "drafts on a path; default 64, at most max_nodes - 1",
        },
        SettingHelp { name: "rule", values: "greedy | match | reject", about: "default reject" },
        SettingHelp { name: "distinct", values: "0 | 1", about: "siblings were drawn without replacement; default 0" },
        SettingHelp { name: "fallback", values: "a token", about: "where none can be drawn; default 0" },
        SettingHelp { name: "cluster", values: "1 | 2 | 4 | 8 | 16", about: "blocks that share a request" },
    ],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[batch, max_depth + 1]", about: "emitted, then -1" },
        TensorHelp { name: "emitted", dtypes: "i32", shape: "[batch]", about: "how many" },
        TensorHelp { name: "accepted", dtypes: "i32", shape: "[batch]", about: "how many drafts" },
        TensorHelp { name: "last_row", dtypes: "i32", shape: "[batch]", about: "whose hidden state goes on; -1: none" },
        TensorHelp { name: "path", dtypes: "i32", shape: "[batch, max_depth + 1]", about: "root and nodes, then -1" },
        TensorHelp { name: "kv_source", dtypes: "i32", shape: "[batch, max_depth + 1]", about: "rows of the cache" },
        TensorHelp { name: "kv_destination", dtypes: "i32", shape: "[batch, max_depth + 1]", about: "where to" },
        TensorHelp { name: "log_probs", dtypes: "f32", shape: "[batch, max_depth + 1]", about: "of the target; NaN" },
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
    let [batch, nodes] = inputs.require("drafts")?.shape_of("drafts")?;
    let all = [batch, nodes];
    let rules = optional::<i32>(runner, inputs, "rules", &[batch])?;
    let max_depth: usize = settings.get("max_depth")?.unwrap_or(64.min(nodes.saturating_sub(1)));
    let mut plan = TreeVerifier::<P, Q>::builder(batch, nodes, max_depth, vocab)
        .target_rows(target_rows)
        .rule(settings.get("rule")?.unwrap_or(Rule::Reject))
        .siblings(match settings.get::<i64>("distinct")? {
            Some(1) => Siblings::WithoutReplacement,
            _ => Siblings::WithReplacement,
        })
        .fallback_token(settings.get::<i64>("fallback")?.unwrap_or(0) as i32);
    if rules.is_some() {
        plan = plan.rules_per_request();
    }
    if let Some(cluster) = settings.get("cluster")? {
        plan = plan.cluster(cluster);
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
    let drafts = runner.upload(&inputs.require("drafts")?.expect::<i32>("drafts", &all)?)?;
    let parents = optional::<i32>(runner, inputs, "parents", &all)?;
    let first_child = optional::<i32>(runner, inputs, "first_child", &all)?;
    let next_sibling = optional::<i32>(runner, inputs, "next_sibling", &all)?;
    let links = || match (&parents, &first_child, &next_sibling) {
        (Some(parents), None, None) => Ok(TreeLinks::Parents(parents.as_in())),
        (None, Some(first), Some(next)) => {
            Ok(TreeLinks::Children { first_child: first.as_in(), next_sibling: next.as_in() })
        }
        _ => Err(Failure::request("parents, or first_child and next_sibling")),
    };
    links()?;
    let cu_rows = optional::<i32>(runner, inputs, "cu_rows", &[batch + 1])?;
    let row_index = optional::<i32>(runner, inputs, "row_index", &all)?;
    let draft_row = optional::<i32>(runner, inputs, "draft_row", &all)?;
    let map = optional::<i32>(runner, inputs, "target_to_draft", &[vocab])?;
    let target_stats = optional::<f32>(runner, inputs, "target_stats", &[target_rows, vocab.div_ceil(1024), 2])?;
    let allow = optional::<u32>(runner, inputs, "allow", &[batch, nodes, vocab.div_ceil(32)])?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let draft_temperature = optional::<f32>(runner, inputs, "draft_temperature", &[batch])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[batch])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[batch])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[batch])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[batch])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
    let uniforms = optional::<f32>(runner, inputs, "uniforms", &[batch, nodes, 4])?;
    let kv_start = optional::<i32>(runner, inputs, "kv_start", &[batch])?;
    let kv_slots = optional::<i32>(runner, inputs, "kv_slots", &all)?;
    let written = batch * (max_depth + 1);
    let (mut tokens, mut log_probs) = (runner.output::<i32>(written)?, runner.output(written)?);
    let (mut emitted, mut accepted) = (runner.output(batch)?, runner.output(batch)?);
    let (mut last_row, mut status) = (runner.output::<i32>(batch)?, runner.output::<u32>(batch)?);
    let mut path = runner.output::<i32>(written)?;
    let (mut source, mut destination) = (runner.output::<i32>(written)?, runner.output::<i32>(written)?);
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        plan.run(
            stream,
            TreeVerifierArgs {
                target: target.as_in(),
                tree: links().expect("they were there"),
                drafts: drafts.as_in(),
                options: TreeVerifierOptions {
                    cu_rows: cu_rows.as_ref().map(Buffer::as_in),
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
                    kv_start: kv_start.as_ref().map(Buffer::as_in),
                    kv_slots: kv_slots.as_ref().map(Buffer::as_in),
                },
                out: TreeVerifierOut {
                    tokens: tokens.as_out(),
                    emitted: emitted.as_out(),
                    accepted: accepted.as_out(),
                    status: status.as_out(),
                    last_row: Some(last_row.as_out()),
                    path: Some(path.as_out()),
                    kv_source: Some(source.as_out()),
                    kv_destination: Some(destination.as_out()),
                    log_probs: Some(log_probs.as_out()),
                },
                workspace: workspace.as_out(),
            },
        )
    })?;
    let of_path = [batch, max_depth + 1];
    Ok(Tensors::default()
        .with("tokens", Tensor::new(&of_path, &tokens.download()?))
        .with("emitted", Tensor::new(&[batch], &emitted.download()?))
        .with("accepted", Tensor::new(&[batch], &accepted.download()?))
        .with("last_row", Tensor::new(&[batch], &last_row.download()?))
        .with("path", Tensor::new(&of_path, &path.download()?))
        .with("kv_source", Tensor::new(&of_path, &source.download()?))
        .with("kv_destination", Tensor::new(&of_path, &destination.download()?))
        .with("log_probs", Tensor::new::<f32>(&of_path, &log_probs.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?)))
}

use nextscale::verification::{TreeBuilder, TreeBuilderArgs, TreeBuilderOut};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors};

pub(crate) static OP: Op = Op {
    name: "tree_build",
    about: "Links, positions, masks and paths of trees of drafts, and the choice of nodes by scores (EAGLE-2).",
    inputs: &[
        TensorHelp {
            name: "parents",
            dtypes: "i32",
            shape: "[batch, candidates]",
            about: "by number in the tree; -1: the root, or no node",
        },
        TensorHelp {
            name: "cu_rows",
            dtypes: "i32",
            shape: "[batch + 1]",
            about: "where the candidates of a request begin; default: at b * candidates",
        },
        TensorHelp { name: "drafts", dtypes: "i32", shape: "[batch, candidates]", about: "tokens" },
        TensorHelp {
            name: "scores",
            dtypes: "f32",
            shape: "[batch, candidates]",
            about: "log-probabilities; default: all candidates are nodes",
        },
        TensorHelp { name: "positions", dtypes: "i64", shape: "[batch]", about: "of the roots; default: 0" },
    ],
    settings: &[
        SettingHelp { name: "nodes", values: "1 to 1024", about: "of a tree; default: candidates" },
        SettingHelp { name: "leaves", values: "1 to nodes", about: "rows of paths; default: nodes" },
        SettingHelp { name: "max_depth", values: "0 to 64", about: "default 64" },
        SettingHelp { name: "sums", values: "0 | 1", about: "scores are sums over the path; default 0" },
    ],
    outputs: &[
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
        TensorHelp { name: "counts", dtypes: "i32", shape: "[batch]", about: "nodes" },
        TensorHelp { name: "selected", dtypes: "i32", shape: "[batch, nodes]", about: "the candidate; -1: no node" },
        TensorHelp { name: "parents", dtypes: "i32", shape: "[batch, nodes]", about: "" },
        TensorHelp { name: "drafts", dtypes: "i32", shape: "[batch, nodes]", about: "if they were given" },
        TensorHelp { name: "first_child", dtypes: "i32", shape: "[batch, nodes]", about: "" },
        TensorHelp { name: "next_sibling", dtypes: "i32", shape: "[batch, nodes]", about: "" },
        TensorHelp { name: "depths", dtypes: "i32", shape: "[batch, nodes]", about: "" },
        TensorHelp { name: "node_positions", dtypes: "i64", shape: "[batch, nodes]", about: "" },
        TensorHelp {
            name: "mask",
            dtypes: "u32",
            shape: "[batch, nodes, ceil(nodes / 32)]",
            about: "bit j % 32 of word j / 32: whether node j is seen",
        },
        TensorHelp { name: "paths", dtypes: "i32", shape: "[batch, leaves, max_depth + 1]", about: "to each leaf" },
        TensorHelp { name: "leaf_counts", dtypes: "i32", shape: "[batch]", about: "" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let parents = inputs.require("parents")?;
    let [batch, candidates] = parents.shape_of("parents")?;
    let all = [batch, candidates];
    let chooses = inputs.get("scores").is_some();
    let nodes: usize = settings.get("nodes")?.unwrap_or(candidates);
    if !chooses && nodes != candidates {
        return Err(Failure::request("nodes: without scores all candidates are nodes"));
    }
    let leaves: usize = settings.get("leaves")?.unwrap_or(nodes);
    let max_depth: usize = settings.get("max_depth")?.unwrap_or(64);
    let mut plan = TreeBuilder::builder(batch, nodes).leaves(leaves).max_depth(max_depth);
    if chooses {
        plan = plan.candidates(candidates);
    }
    if settings.get::<i64>("sums")? == Some(1) {
        plan = plan.scores_are_sums();
    }
    let plan = plan.build(&runner.info()?)?;
    let parents = runner.upload(&parents.expect::<i32>("parents", &all)?)?;
    let cu_rows = optional::<i32>(runner, inputs, "cu_rows", &[batch + 1])?;
    let drafts = optional::<i32>(runner, inputs, "drafts", &all)?;
    let scores = optional::<f32>(runner, inputs, "scores", &all)?;
    let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
    let of_nodes = || runner.output::<i32>(batch * nodes);
    let (mut selected, mut to_parents, mut to_drafts) = (of_nodes()?, of_nodes()?, of_nodes()?);
    let (mut first_child, mut next_sibling, mut depths) = (of_nodes()?, of_nodes()?, of_nodes()?);
    let (mut counts, mut leaf_counts) = (runner.output::<i32>(batch)?, runner.output::<i32>(batch)?);
    let mut node_positions = runner.output::<i64>(batch * nodes)?;
    let words = nodes.div_ceil(32);
    let mut mask = runner.output::<u32>(batch * nodes * words)?;
    let mut paths = runner.output::<i32>(batch * leaves * (max_depth + 1))?;
    let mut status = runner.output::<u32>(batch)?;
    runner.run(|stream| {
        plan.run(
            stream,
            TreeBuilderArgs {
                parents: parents.as_in(),
                cu_rows: cu_rows.as_ref().map(Buffer::as_in),
                drafts: drafts.as_ref().map(Buffer::as_in),
                scores: scores.as_ref().map(Buffer::as_in),
                positions: positions.as_ref().map(Buffer::as_in),
                out: TreeBuilderOut {
                    status: status.as_out(),
                    counts: Some(counts.as_out()),
                    selected: Some(selected.as_out()),
                    parents: Some(to_parents.as_out()),
                    drafts: drafts.is_some().then(|| to_drafts.as_out()),
                    first_child: Some(first_child.as_out()),
                    next_sibling: Some(next_sibling.as_out()),
                    depths: Some(depths.as_out()),
                    node_positions: Some(node_positions.as_out()),
                    mask: Some(mask.as_out()),
                    paths: Some(paths.as_out()),
                    leaf_counts: Some(leaf_counts.as_out()),
                },
            },
        )
    })?;
    let of = [batch, nodes];
    let made = Tensors::default()
        .with("status", Tensor::new(&[batch], &status.download()?))
        .with("counts", Tensor::new(&[batch], &counts.download()?))
        .with("selected", Tensor::new(&of, &selected.download()?))
        .with("parents", Tensor::new(&of, &to_parents.download()?))
        .with("first_child", Tensor::new(&of, &first_child.download()?))
        .with("next_sibling", Tensor::new(&of, &next_sibling.download()?))
        .with("depths", Tensor::new(&of, &depths.download()?))
        .with("node_positions", Tensor::new(&of, &node_positions.download()?))
        .with("mask", Tensor::new(&[batch, nodes, words], &mask.download()?))
        .with("paths", Tensor::new(&[batch, leaves, max_depth + 1], &paths.download()?))
        .with("leaf_counts", Tensor::new(&[batch], &leaf_counts.download()?));
    Ok(if drafts.is_some() { made.with("drafts", Tensor::new(&of, &to_drafts.download()?)) } else { made })
}

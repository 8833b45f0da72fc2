use nextscale::compression::{Aggregation, Importance, ImportanceArgs, ImportanceVariant, Pool, Reduction};
use nextscale::dtype::Float;
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, Setting, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "importance",
    about: "Importance of cached keys: column sums of softmax(scale * Q K^T), pooled.",
    inputs: &[
        TensorHelp {
            name: "q",
            dtypes: "bf16, f16, f32",
            shape: "[sets, q_rows, heads * groups, dim]",
            about: "the queries of a KV head next to each other; dim 64, 96 or 128; f32 on the host only",
        },
        TensorHelp { name: "k", dtypes: "as q", shape: "[sets, tokens, heads, dim]", about: "" },
        TensorHelp { name: "rows", dtypes: "i32", shape: "[queries]", about: "rows of q; default: all of them" },
        TensorHelp {
            name: "masked",
            dtypes: "i32",
            shape: "[masked]",
            about: "columns that are -inf before the pooling; default: none",
        },
        TensorHelp { name: "lengths", dtypes: "i32", shape: "[sets, heads]", about: "keys there are; default: tokens" },
        TensorHelp {
            name: "lse",
            dtypes: "f32",
            shape: "[sets, heads * groups, queries]",
            about: "of each row, natural logarithm; default: it is computed",
        },
        TensorHelp {
            name: "old_scores",
            dtypes: "f32",
            shape: "[sets, heads, tokens]",
            about: "are added to; default: there are none",
        },
    ],
    settings: &[
        SettingHelp {
            name: "aggregation",
            values: "max_logit | mean_prob | max_prob | logit",
            about: "over the query heads of a KV head; default max_logit",
        },
        SettingHelp { name: "reduction", values: "mean | sum", about: "over queries; default mean" },
        SettingHelp {
            name: "causal",
            values: "true | false",
            about: "the queries are those of the last keys; default false",
        },
        SettingHelp { name: "excluded", values: "size", about: "trailing keys that are not looked at; default 0" },
        SettingHelp {
            name: "unscored",
            values: "size",
            about: "trailing keys that are seen but not scored; default 0",
        },
        SettingHelp { name: "pool", values: "none | max | average", about: "default none" },
        SettingHelp { name: "pool_width", values: "size", about: "odd, up to 63; default 7" },
        SettingHelp { name: "scale", values: "number", about: "of the logits; default 1 / sqrt(dim)" },
        SettingHelp { name: "variant", values: "auto | portable | hopper", about: "which kernels; default auto" },
    ],
    outputs: &[TensorHelp {
        name: "scores",
        dtypes: "f32",
        shape: "[sets, heads, tokens]",
        about: "0 where not scored",
    }],
    run,
};

impl Setting for Aggregation {
    const WHAT: &'static str = "max_logit, mean_prob, max_prob or logit";
    fn parse(text: &str) -> Option<Self> {
        match text {
            "max_logit" => Some(Aggregation::MaxLogit),
            "mean_prob" => Some(Aggregation::MeanProb),
            "max_prob" => Some(Aggregation::MaxProb),
            "logit" => Some(Aggregation::Logit),
            _ => None,
        }
    }
}

impl Setting for Reduction {
    const WHAT: &'static str = "mean or sum";
    fn parse(text: &str) -> Option<Self> {
        match text {
            "mean" => Some(Reduction::Mean),
            "sum" => Some(Reduction::Sum),
            _ => None,
        }
    }
}

impl Setting for ImportanceVariant {
    const WHAT: &'static str = "auto, portable or hopper";
    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(ImportanceVariant::Auto),
            "portable" => Some(ImportanceVariant::Portable),
            "hopper" => Some(ImportanceVariant::Hopper),
            _ => None,
        }
    }
}

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    with_type!("q", inputs.require("q")?.dtype, T in [bf16, f16, f32], score::<T>(runner, inputs, settings))
}

fn score<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let [_, tokens, heads, dim] = inputs.require("k")?.shape_of("k")?;
    let q = inputs.require("q")?;
    let [sets, q_rows, q_heads, _] = q.shape_of("q")?;
    if heads == 0 || q_heads % heads != 0 {
        return Err(Failure::request(format!("q has {q_heads} heads, k {heads}")));
    }
    let q = runner.upload(&q.expect::<T>("q", &[sets, q_rows, q_heads, dim])?)?;
    let k = runner.upload(&inputs.require("k")?.expect::<T>("k", &[sets, tokens, heads, dim])?)?;
    let optional = |name: &str| match inputs.get(name) {
        Some(list) => {
            let [len] = list.shape_of(name)?;
            Ok::<_, Failure>(Some((len, runner.upload(&list.expect::<i32>(name, &[len])?)?)))
        }
        None => Ok(None),
    };
    let (rows, masked) = (optional("rows")?, optional("masked")?);
    let queries = rows.as_ref().map_or(q_rows, |(len, _)| *len);
    let lengths = match inputs.get("lengths") {
        Some(lengths) => Some(runner.upload(&lengths.expect::<i32>("lengths", &[sets, heads])?)?),
        None => None,
    };
    let lse = match inputs.get("lse") {
        Some(lse) => Some(runner.upload(&lse.expect::<f32>("lse", &[sets, q_heads, queries])?)?),
        None => None,
    };

    let width = settings.get("pool_width")?.unwrap_or(7);
    let pool = match settings.get::<String>("pool")?.as_deref() {
        None | Some("none") => Pool::None,
        Some("max") => Pool::Max(width),
        Some("average") => Pool::Average(width),
        Some(other) => return Err(Failure::request(format!("pool={other}: not none, max or average"))),
    };
    let mut plan = Importance::<T>::builder(heads, q_heads / heads, dim)
        .sets(sets)
        .tokens(tokens)
        .queries(queries)
        .aggregation(settings.get("aggregation")?.unwrap_or_default())
        .reduction(settings.get("reduction")?.unwrap_or_default())
        .excluded(settings.get("excluded")?.unwrap_or(0))
        .unscored(settings.get("unscored")?.unwrap_or(0))
        .variant(settings.get("variant")?.unwrap_or_default())
        .pool(pool);
    if settings.get("causal")?.unwrap_or(false) {
        plan = plan.causal();
    }
    if let Some(scale) = settings.get("scale")? {
        plan = plan.scale(scale);
    }
    if rows.is_some() {
        plan = plan.listed_queries(q_rows);
    }
    if let Some((len, _)) = &masked {
        plan = plan.masked(*len);
    }
    if lse.is_some() {
        plan = plan.given_lse();
    }
    let shape = [sets, heads, tokens];
    let mut scores = match inputs.get("old_scores") {
        Some(old) => {
            plan = plan.accumulate();
            runner.upload(&old.expect::<f32>("old_scores", &shape)?)?
        }
        None => runner.output::<f32>(shape.iter().product())?,
    };
    let plan = plan.build(&runner.info()?)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        plan.run(
            stream,
            ImportanceArgs {
                pages: None,
                q: q.as_in(),
                k: k.as_in(),
                scores: scores.as_out(),
                rows: rows.as_ref().map(|(_, rows)| rows.as_in()),
                masked: masked.as_ref().map(|(_, masked)| masked.as_in()),
                lengths: lengths.as_ref().map(|lengths| lengths.as_in()),
                lse: lse.as_ref().map(|lse| lse.as_in()),
                workspace: Some(workspace.as_out()),
            },
        )
    })?;
    Ok(Tensors::default().with("scores", Tensor::new(&shape, &scores.download()?)))
}

use nextscale::compression::{Form, KeyNorms, KeyNormsArgs, Redundancy, RedundancyArgs, Retain, Similar};
use nextscale::dtype::Float;
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

const K: TensorHelp = TensorHelp {
    name: "k",
    dtypes: "bf16, f16, f32",
    shape: "[sets, tokens, heads, dim]",
    about: "dim 64, 96 or 128; f32 on the host only",
};
const LENGTHS: TensorHelp =
    TensorHelp { name: "lengths", dtypes: "i32", shape: "[sets, heads]", about: "keys there are; default: tokens" };

pub(crate) static NORMS: Op = Op {
    name: "key_norms",
    about: "Inverse norms of keys, 1 / (|k| + eps), and the sum of the unit keys.",
    inputs: &[
        K,
        LENGTHS,
        TensorHelp {
            name: "old_unit_sum",
            dtypes: "f32",
            shape: "[sets, heads, dim]",
            about: "of the keys before, is added to; default: there are none",
        },
    ],
    settings: &[SettingHelp { name: "eps", values: "number", about: "added to the norms; default 1e-8" }],
    outputs: &[
        TensorHelp {
            name: "inverse_norms",
            dtypes: "f32",
            shape: "[sets, heads, tokens]",
            about: "0 beyond the length",
        },
        TensorHelp { name: "unit_sum", dtypes: "f32", shape: "[sets, heads, dim]", about: "" },
    ],
    run: |runner, inputs, settings| with_type!("k", inputs.require("k")?.dtype, T in [bf16, f16, f32], norms::<T>(runner, inputs, settings)),
};

pub(crate) static OP: Op = Op {
    name: "redundancy",
    about: "Redundancy of cached keys: how alike each is to the others of its set and head.",
    inputs: &[
        K,
        LENGTHS,
        TensorHelp {
            name: "inverse_norms",
            dtypes: "f32",
            shape: "[sets, heads, tokens]",
            about: "what key_norms gives",
        },
        TensorHelp { name: "unit_sum", dtypes: "f32", shape: "[sets, heads, dim]", about: "what key_norms gives" },
    ],
    settings: &[
        SettingHelp {
            name: "form",
            values: "cosine | softmax | similar",
            about: "cosine to the mean of the unit keys; FlowCache's softmax; R-KV's; default softmax",
        },
        SettingHelp { name: "threshold", values: "number", about: "of similar: of neighbours' cosines; default 0.5" },
        SettingHelp {
            name: "retain",
            values: "last | first | zero | first_percent",
            about: "of similar: the neighbour left out; default last",
        },
        SettingHelp { name: "ratio", values: "number", about: "of first_percent; default 0.1" },
        SettingHelp {
            name: "lonely_leave_first",
            values: "true | false",
            about: "of similar: keys without a neighbour leave out key 0; default true",
        },
    ],
    outputs: &[TensorHelp {
        name: "scores",
        dtypes: "f32",
        shape: "[sets, heads, tokens]",
        about: "0 beyond the length",
    }],
    run: |runner, inputs, settings| with_type!("k", inputs.require("k")?.dtype, T in [bf16, f16, f32], score::<T>(runner, inputs, settings)),
};

fn norms<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let k = inputs.require("k")?;
    let [sets, tokens, heads, dim] = k.shape_of("k")?;
    let lengths = lengths(runner, inputs, [sets, heads])?;
    let mut plan = KeyNorms::<T>::builder(heads, dim).sets(sets).tokens(tokens);
    if let Some(eps) = settings.get("eps")? {
        plan = plan.eps(eps);
    }
    let mut unit_sum = match inputs.get("old_unit_sum") {
        Some(old) => {
            plan = plan.accumulate();
            runner.upload(&old.expect::<f32>("old_unit_sum", &[sets, heads, dim])?)?
        }
        None => runner.output::<f32>(sets * heads * dim)?,
    };
    let plan = plan.build(&runner.info()?)?;
    let k = runner.upload(&k.elements::<T>())?;
    let mut inverse_norms = runner.output::<f32>(sets * heads * tokens)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        plan.run(
            stream,
            KeyNormsArgs {
                pages: None,
                k: k.as_in(),
                inverse_norms: inverse_norms.as_out(),
                unit_sum: unit_sum.as_out(),
                lengths: lengths.as_ref().map(|lengths| lengths.as_in()),
                workspace: Some(workspace.as_out()),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("inverse_norms", Tensor::new(&[sets, heads, tokens], &inverse_norms.download()?))
        .with("unit_sum", Tensor::new(&[sets, heads, dim], &unit_sum.download()?)))
}

fn score<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let k = inputs.require("k")?;
    let [sets, tokens, heads, dim] = k.shape_of("k")?;
    let lengths = lengths(runner, inputs, [sets, heads])?;
    let form = match settings.get::<String>("form")?.as_deref() {
        None | Some("softmax") => Form::Softmax,
        Some("cosine") => Form::Cosine,
        Some("similar") => Form::Similar(Similar {
            threshold: settings.get("threshold")?.unwrap_or(0.5),
            retain: match settings.get::<String>("retain")?.as_deref() {
                None | Some("last") => Retain::Last,
                Some("first") => Retain::First,
                Some("zero") => Retain::Zero,
                Some("first_percent") => Retain::FirstPercent(settings.get("ratio")?.unwrap_or(0.1)),
                Some(other) => {
                    return Err(Failure::request(format!("retain={other}: not last, first, zero or first_percent")));
                }
            },
            lonely_leave_first: settings.get("lonely_leave_first")?.unwrap_or(true),
        }),
        Some(other) => return Err(Failure::request(format!("form={other}: not cosine, softmax or similar"))),
    };
    let plan = Redundancy::<T>::builder(heads, dim).sets(sets).tokens(tokens).form(form).build(&runner.info()?)?;
    let k = runner.upload(&k.elements::<T>())?;
    let given = |name: &str, shape: &[usize]| runner.upload(&inputs.require(name)?.expect::<f32>(name, shape)?);
    let inverse_norms = given("inverse_norms", &[sets, heads, tokens])?;
    let unit_sum = given("unit_sum", &[sets, heads, dim])?;
    let mut scores = runner.output::<f32>(sets * heads * tokens)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        plan.run(
            stream,
            RedundancyArgs {
                pages: None,
                k: k.as_in(),
                inverse_norms: inverse_norms.as_in(),
                unit_sum: unit_sum.as_in(),
                scores: scores.as_out(),
                lengths: lengths.as_ref().map(|lengths| lengths.as_in()),
                workspace: Some(workspace.as_out()),
            },
        )
    })?;
    Ok(Tensors::default().with("scores", Tensor::new(&[sets, heads, tokens], &scores.download()?)))
}

fn lengths(
    runner: &Runner,
    inputs: &Tensors,
    shape: [usize; 2],
) -> Result<Option<crate::runner::Buffer<i32>>, Failure> {
    match inputs.get("lengths") {
        Some(lengths) => Ok(Some(runner.upload(&lengths.expect::<i32>("lengths", &shape)?)?)),
        None => Ok(None),
    }
}

use nextscale::compression::{PositionWeight, Scope, Select, SelectArgs, Tie};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors};

pub(crate) static OP: Op = Op {
    name: "select",
    about: "Which tokens of a cache are kept, by importance and redundancy, within budgets.",
    inputs: &[
        TensorHelp { name: "importance", dtypes: "f32", shape: "[sets, heads, tokens]", about: "this, or redundancy" },
        TensorHelp { name: "redundancy", dtypes: "f32", shape: "[sets, heads, tokens]", about: "or both" },
        TensorHelp { name: "weights", dtypes: "f32", shape: "[items]", about: "default: by the setting, or none" },
        TensorHelp { name: "lengths", dtypes: "i32", shape: "[lists]", about: "default: the setting" },
        TensorHelp { name: "budgets", dtypes: "i32", shape: "[lists]", about: "default: the setting" },
    ],
    settings: &[
        SettingHelp { name: "budget", values: "tokens", about: "default 0" },
        SettingHelp { name: "length", values: "tokens", about: "default: all" },
        SettingHelp { name: "capacity", values: "tokens", about: "default: what the budget needs" },
        SettingHelp { name: "scope", values: "head | set | shared | ada", about: "who shares a list; default head" },
        SettingHelp { name: "floor", values: "0 to 1", about: "with ada; default 0.2" },
        SettingHelp { name: "sink", values: "tokens", about: "default 0" },
        SettingHelp { name: "recent", values: "tokens", about: "default 0" },
        SettingHelp { name: "active", values: "tokens", about: "default 0" },
        SettingHelp { name: "block", values: "tokens", about: "default 1" },
        SettingHelp { name: "lambda", values: "a number", about: "default 0.07" },
        SettingHelp { name: "relative", values: "true | false", about: "less the least score; default false" },
        SettingHelp {
            name: "weighting",
            values: "none | exponential | polynomial | upper_convex | gaussian",
            about: "of the plan's items, with power 3; default none",
        },
        SettingHelp { name: "demoted", values: "items", about: "the first, by a million; default 0" },
        SettingHelp { name: "tie", values: "oldest | newest", about: "default oldest" },
        SettingHelp { name: "shared_bytes", values: "bytes", about: "default: what the device has" },
    ],
    outputs: &[
        TensorHelp { name: "indices", dtypes: "i32", shape: "[lists, capacity]", about: "ascending, then -1" },
        TensorHelp { name: "counts", dtypes: "i32", shape: "[lists]", about: "" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[lists]", about: "1: a NaN, 2: clamped" },
    ],
    run,
};

fn one_of<T: Copy>(settings: &Settings, key: &str, choices: &[(&str, T)]) -> Result<T, Failure> {
    let Some(word) = settings.get::<String>(key)? else { return Ok(choices[0].1) };
    let found = choices.iter().find(|(name, _)| *name == word);
    let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
    found.map(|found| found.1).ok_or_else(|| Failure::request(format!("{key}={word}: not one of {}", names.join(", "))))
}

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let given = inputs.get("importance").or(inputs.get("redundancy"));
    let given = given.ok_or_else(|| Failure::request("importance or redundancy is missing"))?;
    let shape @ [sets, heads, tokens] = given.shape_of("importance")?;
    let floor = settings.get("floor")?.unwrap_or(0.2);
    let scopes =
        [("head", Scope::PerHead), ("set", Scope::PerSet), ("shared", Scope::Shared), ("ada", Scope::Ada { floor })];
    let mut plan = Select::builder(sets, heads, tokens)
        .scope(one_of(settings, "scope", &scopes)?)
        .budget(settings.get("budget")?.unwrap_or(0))
        .length(settings.get("length")?.unwrap_or(tokens))
        .sink(settings.get("sink")?.unwrap_or(0))
        .recent(settings.get("recent")?.unwrap_or(0))
        .active(settings.get("active")?.unwrap_or(0))
        .block(settings.get("block")?.unwrap_or(1))
        .lambda(settings.get("lambda")?.unwrap_or(0.07))
        .relative(settings.get("relative")?.unwrap_or(false))
        .demote(settings.get("demoted")?.unwrap_or(0), 1e6)
        .tie(one_of(settings, "tie", &[("oldest", Tie::Oldest), ("newest", Tie::Newest)])?);
    if let Some(capacity) = settings.get("capacity")? {
        plan = plan.capacity(capacity);
    }
    if let Some(bytes) = settings.get("shared_bytes")? {
        plan = plan.shared_bytes(bytes);
    }
    let plan = plan.build(&runner.info()?)?;
    let (lists, capacity) = (plan.lists(), plan.capacity());
    let weighting = [
        ("none", PositionWeight::None),
        ("exponential", PositionWeight::Exponential),
        ("polynomial", PositionWeight::Polynomial(3)),
        ("upper_convex", PositionWeight::UpperConvexPolynomial(3)),
        ("gaussian", PositionWeight::Gaussian),
    ];
    let weights = match (inputs.get("weights"), one_of(settings, "weighting", &weighting)?) {
        (Some(tensor), _) => Some(tensor.expect::<f32>("weights", &[plan.items()])?),
        (None, PositionWeight::None) => None,
        (None, weighting) => Some(weighting.table(plan.items())),
    };
    let weights = weights.map(|weights| runner.upload(&weights)).transpose()?;
    let scores = |name| inputs.get(name).map(|tensor| runner.upload(&tensor.expect::<f32>(name, &shape)?)).transpose();
    let (importance, redundancy) = (scores("importance")?, scores("redundancy")?);
    let numbers =
        |name| inputs.get(name).map(|tensor| runner.upload(&tensor.expect::<i32>(name, &[lists])?)).transpose();
    let (lengths, budgets) = (numbers("lengths")?, numbers("budgets")?);
    let mut indices = runner.output::<i32>(lists * capacity)?;
    let mut counts = runner.output::<i32>(lists)?;
    let mut status = runner.output::<u32>(lists)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        plan.run(
            stream,
            SelectArgs {
                importance: importance.as_ref().map(|buffer| buffer.as_in()),
                redundancy: redundancy.as_ref().map(|buffer| buffer.as_in()),
                weights: weights.as_ref().map(|buffer| buffer.as_in()),
                lengths: lengths.as_ref().map(|buffer| buffer.as_in()),
                budgets: budgets.as_ref().map(|buffer| buffer.as_in()),
                indices: indices.as_out(),
                counts: counts.as_out(),
                status: Some(status.as_out()),
                workspace: Some(workspace.as_out()),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("indices", Tensor::new(&[lists, capacity], &indices.download()?))
        .with("counts", Tensor::new(&[lists], &counts.download()?))
        .with("status", Tensor::new(&[lists], &status.download()?)))
}

use nextscale::compression::{Drift, DriftArgs};
use nextscale::dtype::Float;
use nextscale::{Access, bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "drift",
    about: "Whether the features of each chunk changed enough to be computed anew: one step.",
    inputs: &[
        TensorHelp { name: "features", dtypes: "f32, f16, bf16", shape: "[chunks, elements]", about: "of this step" },
        TensorHelp { name: "previous", dtypes: "that of features", shape: "[chunks, elements]", about: "before it" },
        TensorHelp { name: "accumulated", dtypes: "f32", shape: "[chunks]", about: "default: 0" },
        TensorHelp { name: "steps", dtypes: "i32", shape: "[chunks]", about: "steps before this one; default: 1" },
        TensorHelp {
            name: "force",
            dtypes: "i32",
            shape: "[chunks]",
            about: "0: test, 1: compute, 2: leave alone; default: 0",
        },
        TensorHelp { name: "polynomial", dtypes: "f32", shape: "[terms]", about: "up to 8, highest power first" },
    ],
    settings: &[
        SettingHelp { name: "threshold", values: "a number", about: "default 0.01" },
        SettingHelp { name: "eps", values: "a number", about: "default 1e-8" },
        SettingHelp { name: "warmup", values: "steps", about: "default 0" },
        SettingHelp { name: "compute_before", values: "step", about: "default 1" },
        SettingHelp { name: "compute_from", values: "step", about: "default: none" },
        SettingHelp { name: "reset_forced", values: "true | false", about: "default false" },
        SettingHelp { name: "keep", values: "true | false", about: "writes features to previous; default false" },
        SettingHelp { name: "access", values: "auto | narrow | wide", about: "default auto" },
    ],
    outputs: &[
        TensorHelp {
            name: "decision",
            dtypes: "i32",
            shape: "[chunks]",
            about: "1: compute, 0: reuse; -1: left alone",
        },
        TensorHelp { name: "change", dtypes: "f32", shape: "[chunks]", about: "NaN: not tested" },
        TensorHelp { name: "accumulated", dtypes: "f32", shape: "[chunks]", about: "after this step" },
        TensorHelp { name: "steps", dtypes: "i32", shape: "[chunks]", about: "with this step" },
        TensorHelp { name: "previous", dtypes: "that of features", shape: "[chunks, elements]", about: "" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let features = inputs.require("features")?;
    with_type!("features", features.dtype, P in [f32, f16, bf16], drift::<P>(runner, inputs, settings))
}

fn drift<P: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let features = inputs.require("features")?;
    let shape @ [chunks, elements] = features.shape_of("features")?;
    let polynomial: Vec<f64> = match inputs.get("polynomial") {
        Some(tensor) => {
            let [terms] = tensor.shape_of("polynomial")?;
            tensor.expect::<f32>("polynomial", &[terms])?.into_iter().map(f64::from).collect()
        }
        None => Vec::new(),
    };
    let mut plan = Drift::<P>::builder(chunks, elements)
        .threshold(settings.get("threshold")?.unwrap_or(0.01))
        .eps(settings.get::<f32>("eps")?.unwrap_or(1e-8).into())
        .polynomial(&polynomial)
        .warmup(settings.get("warmup")?.unwrap_or(0))
        .compute_before(settings.get("compute_before")?.unwrap_or(1))
        .reset_forced(settings.get("reset_forced")?.unwrap_or(false))
        .keep(settings.get("keep")?.unwrap_or(false))
        .access(settings.get::<Access>("access")?.unwrap_or_default());
    if let Some(step) = settings.get("compute_from")? {
        plan = plan.compute_from(step);
    }
    let plan = plan.build(&runner.info()?)?;
    let of_chunks = |name, default: f32| match inputs.get(name) {
        Some(tensor) => tensor.expect::<f32>(name, &[chunks]),
        None => Ok(vec![default; chunks]),
    };
    let counts = |name, default: i32| match inputs.get(name) {
        Some(tensor) => tensor.expect::<i32>(name, &[chunks]),
        None => Ok(vec![default; chunks]),
    };
    let features = runner.upload(&features.elements::<P>())?;
    let mut previous = runner.upload(&inputs.require("previous")?.expect::<P>("previous", &shape)?)?;
    let mut accumulated = runner.upload(&of_chunks("accumulated", 0.0)?)?;
    let mut steps = runner.upload(&counts("steps", 1)?)?;
    let force = runner.upload(&counts("force", 0)?)?;
    let mut decision = runner.output::<i32>(chunks)?;
    let mut change = runner.output::<f32>(chunks)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; chunks])?;
    runner.run(|stream| {
        plan.run(
            stream,
            DriftArgs {
                features: features.as_in(),
                previous: previous.as_out(),
                accumulated: accumulated.as_out(),
                steps: steps.as_out(),
                force: Some(force.as_in()),
                decision: decision.as_out(),
                change: Some(change.as_out()),
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    Ok(Tensors::default()
        .with("decision", Tensor::new(&[chunks], &decision.download()?))
        .with("change", Tensor::new(&[chunks], &change.download()?))
        .with("accumulated", Tensor::new(&[chunks], &accumulated.download()?))
        .with("steps", Tensor::new(&[chunks], &steps.download()?))
        .with("previous", Tensor::new(&shape, &previous.download()?)))
}

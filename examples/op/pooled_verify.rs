use nextscale::dtype::Float;
use nextscale::verification::{Neighbours, PooledOptions, PooledOut, PooledVerifier, PooledVerifierArgs};
use nextscale::{DType, bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

const IMAGE: &str = "[batch, height, width]";

pub(crate) static OP: Op = Op {
    name: "pooled_verify",
    about: "Acceptance of images by the probability of their tokens' neighbourhoods (MuLo-SD).",
    inputs: &[
        TensorHelp {
            name: "target",
            dtypes: "f32, f16, bf16",
            shape: "[batch * height * width, vocab]",
            about: "raw logits; vocab up to 2^18",
        },
        TensorHelp { name: "target_free", dtypes: "as target", shape: "as target", about: "default: no guidance" },
        TensorHelp { name: "drafts", dtypes: "i32", shape: IMAGE, about: "what is no token is rejected" },
        TensorHelp {
            name: "neighbours",
            dtypes: "u16, i32",
            shape: "[codes, neighbours]",
            about: "the nearest codes; default: none",
        },
        TensorHelp { name: "guidance", dtypes: "f32", shape: "[batch]", about: "with target_free; default: 1" },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "default: 1; below 1e-5: greedy" },
        TensorHelp { name: "top_k", dtypes: "i32", shape: "[batch]", about: "0 and default: off" },
        TensorHelp { name: "top_p", dtypes: "f32", shape: "[batch]", about: "1 and default: off" },
        TensorHelp { name: "min_p", dtypes: "f32", shape: "[batch]", about: "0 and default: off" },
        TensorHelp { name: "threshold", dtypes: "f32", shape: "[batch]", about: "default: the setting" },
    ],
    settings: &[
        SettingHelp { name: "radius", values: "0 to 255", about: "of what is drawn again; default 0" },
        SettingHelp { name: "threshold", values: "a number", about: "least probability accepted; default 0.5" },
        SettingHelp { name: "first_code", values: "a token", about: "default 0" },
        SettingHelp { name: "codes", values: "1 and above", about: "how many tokens are codes; default: all" },
    ],
    outputs: &[
        TensorHelp { name: "resample", dtypes: "u8", shape: IMAGE, about: "0 accepted, 1 rejected, 2 near one" },
        TensorHelp { name: "positions", dtypes: "i32", shape: "[batch, height * width]", about: "ascending, then -1" },
        TensorHelp { name: "islands", dtypes: "i32", shape: IMAGE, about: "number of the island; -1" },
        TensorHelp { name: "counts", dtypes: "i32", shape: "[batch, 2]", about: "positions, islands" },
        TensorHelp { name: "pooled", dtypes: "f32", shape: IMAGE, about: "what was compared" },
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
    let [rows, vocab] = target.shape_of("target")?;
    let image = inputs.require("drafts")?;
    let [batch, height, width] = image.shape_of("drafts")?;
    let first = settings.get::<usize>("first_code")?.unwrap_or(0);
    let codes = settings.get::<usize>("codes")?.unwrap_or(vocab.saturating_sub(first));
    let near = match inputs.get("neighbours") {
        Some(tensor) => tensor.shape_of::<2>("neighbours")?[1],
        None => 0,
    };
    let mut plan = PooledVerifier::<T>::builder(batch, [height, width], vocab)
        .codes(first, codes)
        .neighbours(near)
        .radius(settings.get("radius")?.unwrap_or(0))
        .threshold(settings.get("threshold")?.unwrap_or(0.5));
    let target_free = optional::<T>(runner, inputs, "target_free", &[rows, vocab])?;
    if target_free.is_some() {
        plan = plan.guided();
    }
    let plan = plan.build(&runner.info()?)?;
    let target = runner.upload(&target.expect::<T>("target", &[batch * height * width, vocab])?)?;
    let drafts = runner.upload(&image.elements::<i32>())?;
    let (mut small_ids, mut ids) = (None, None);
    if let Some(tensor) = inputs.get("neighbours").filter(|_| near > 0) {
        match tensor.dtype {
            DType::U16 => small_ids = Some(runner.upload(&tensor.expect::<u16>("neighbours", &[codes, near])?)?),
            _ => ids = Some(runner.upload(&tensor.expect::<i32>("neighbours", &[codes, near])?)?),
        }
    }
    let guidance = optional::<f32>(runner, inputs, "guidance", &[batch])?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[batch])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[batch])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[batch])?;
    let threshold = optional::<f32>(runner, inputs, "threshold", &[batch])?;
    let mut resample = runner.output::<u8>(rows)?;
    let (mut positions, mut islands) = (runner.output::<i32>(rows)?, runner.output::<i32>(rows)?);
    let (mut counts, mut pooled) = (runner.output::<i32>(batch * 2)?, runner.output::<f32>(rows)?);
    let mut status = runner.output::<u32>(batch)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    runner.run(|stream| {
        plan.run(
            stream,
            PooledVerifierArgs {
                target: target.as_in(),
                drafts: drafts.as_in(),
                options: PooledOptions {
                    target_free: target_free.as_ref().map(Buffer::as_in),
                    neighbours: (small_ids.as_ref().map(|ids| Neighbours::U16(ids.as_in())))
                        .or(ids.as_ref().map(|ids| Neighbours::I32(ids.as_in()))),
                    guidance: guidance.as_ref().map(Buffer::as_in),
                    temperature: temperature.as_ref().map(Buffer::as_in),
                    top_k: top_k.as_ref().map(Buffer::as_in),
                    top_p: top_p.as_ref().map(Buffer::as_in),
                    min_p: min_p.as_ref().map(Buffer::as_in),
                    threshold: threshold.as_ref().map(Buffer::as_in),
                },
                out: PooledOut {
                    resample: resample.as_out(),
                    positions: Some(positions.as_out()),
                    islands: Some(islands.as_out()),
                    counts: counts.as_out(),
                    pooled: Some(pooled.as_out()),
                    status: status.as_out(),
                },
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    let image = [batch, height, width];
    Ok(Tensors::default()
        .with("resample", Tensor::new(&image, &resample.download()?))
        .with("positions", Tensor::new(&[batch, height * width], &positions.download()?))
        .with("islands", Tensor::new(&image, &islands.download()?))
        .with("counts", Tensor::new(&[batch, 2], &counts.download()?))
        .with("pooled", Tensor::new(&image, &pooled.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?)))
}

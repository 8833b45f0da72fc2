use nextscale::DType;
use nextscale::philox::{PhiloxFill, Random};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "philox_fill",
    about: "Philox 4x32-10 blocks of consecutive positions.",
    inputs: &[],
    settings: &[
        SettingHelp { name: "positions", values: "integer", about: "number of blocks; required" },
        SettingHelp { name: "seed", values: "integer", about: "the key; default 0" },
        SettingHelp { name: "first_position", values: "integer", about: "wraps at 2^64; default 0" },
        SettingHelp { name: "domain", values: "integer", about: "which use of the position; default 0" },
        SettingHelp { name: "draw", values: "integer", about: "which draw within the domain; default 0" },
        SettingHelp { name: "dtype", values: "u32 | f32", about: "raw words, or uniforms in [0, 1); default u32" },
    ],
    outputs: &[TensorHelp {
        name: "out",
        dtypes: "u32, f32",
        shape: "[positions, 4]",
        about: "out[i] = philox(seed, first_position + i, domain, draw)",
    }],
    run,
};

fn run(runner: &Runner, _inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let dtype = settings.get("dtype")?.unwrap_or(DType::U32);
    with_type!("dtype", dtype, T in [u32, f32], fill::<T>(runner, settings))
}

fn fill<T: Random>(runner: &Runner, settings: &Settings) -> Result<Tensors, Failure> {
    let positions: u64 = settings.require("positions")?;
    let fill = PhiloxFill::new(settings.get("seed")?.unwrap_or(0), positions)
        .first_position(settings.get("first_position")?.unwrap_or(0))
        .domain(settings.get("domain")?.unwrap_or(0))
        .draw(settings.get("draw")?.unwrap_or(0));
    let elements = usize::try_from(positions).ok().and_then(|positions| positions.checked_mul(4));
    let elements = elements.ok_or_else(|| Failure::request(format!("positions={positions}: too many")))?;
    let mut out = runner.output::<T>(elements)?;
    runner.run(|stream| fill.run(stream, out.as_out()))?;
    Ok(Tensors::default().with("out", Tensor::new(&[elements / 4, 4], &out.download()?)))
}

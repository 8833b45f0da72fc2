// A plan for f32 codebooks does not take others.
use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
use nextscale::{DeviceInfo, In, Out, Stream, f16};

fn main() {
    let plan = RvqDecode::<u32, f32, f32>::builder(1, 1, 1).build(&DeviceInfo::A100).unwrap();
    let (codes, codebooks, mut out) = ([0u32], [f16::ZERO], [0f32]);
    let args = RvqDecodeArgs {
        codes: In::host(&codes),
        codebooks: In::host(&codebooks),
        out: Out::host(&mut out),
        flags: None,
    };
    plan.run(&Stream::host(), args).unwrap();
}

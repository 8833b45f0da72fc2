// A buffer that is written needs a mutable borrow: an input view will not do.
use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
use nextscale::{DeviceInfo, In, Stream};

fn main() {
    let plan = RvqDecode::<u32, f32, f32>::builder(1, 1, 1).build(&DeviceInfo::A100).unwrap();
    let (codes, codebooks, out) = ([0u32], [0f32], [0f32]);
    let args = RvqDecodeArgs { codes: In::host(&codes), codebooks: In::host(&codebooks), out: In::host(&out), flags: None };
    plan.run(&Stream::host(), args).unwrap();
}

// The output's borrow is exclusive for as long as the arguments live.
use nextscale::quantization::RvqDecodeArgs;
use nextscale::{In, Out};

fn main() {
    let (codes, mut values) = ([0u32], [0f32; 2]);
    let args = RvqDecodeArgs {
        codes: In::host(&codes),
        codebooks: In::host(&values),
        out: Out::host(&mut values),
        flags: None,
    };
    drop(args);
}

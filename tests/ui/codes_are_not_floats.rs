// Codes are integers.
use nextscale::DeviceInfo;
use nextscale::quantization::RvqDecode;

fn main() {
    let _ = RvqDecode::<f32, f32, f32>::builder(1, 1, 1).build(&DeviceInfo::A100);
}

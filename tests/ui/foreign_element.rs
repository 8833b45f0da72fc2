// Only types that the kernels know can be elements.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mine(u8);

impl nextscale::dtype::Element for Mine {
    const DTYPE: nextscale::DType = nextscale::DType::U8;
}

fn main() {}

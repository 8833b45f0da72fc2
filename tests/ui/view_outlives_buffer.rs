// A view borrows its buffer.
use nextscale::In;

fn main() {
    let view = {
        let codes = vec![0u32; 4];
        In::host(&codes)
    };
    assert_eq!(view.len(), 4);
}

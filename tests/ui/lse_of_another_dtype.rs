// The log-sum-exp is f32, whatever the dtype of the attention.
use nextscale::attention::{ScaleAttention, ScaleAttentionArgs, Segment, Visibility};
use nextscale::{DeviceInfo, In, Out, Stream, bf16};

fn main() {
    let table = Visibility::table(&[Segment::tokens(1)], |_, _| true).unwrap();
    let plan = ScaleAttention::<bf16>::builder(&table).head_dim(8).build(&DeviceInfo::A100).unwrap();
    let (q, mut out, mut lse) = ([bf16::ONE; 8], [bf16::ZERO; 8], [bf16::ZERO]);
    let args = ScaleAttentionArgs {
        q: In::host(&q),
        k: In::host(&q),
        v: In::host(&q),
        out: Out::host(&mut out),
        lse: Some(Out::host(&mut lse)),
        schedule: In::host(plan.schedule().words()),
        lengths: None,
        row_index: None,
        kv_offset: None,
        workspace: None,
    };
    plan.run(&Stream::host(), args).unwrap();
}

//! Scale attention on every device, against an oracle written here from the formula.

#![cfg(feature = "attention")]

mod support;

use nextscale::attention::{Rule, ScaleAttention, ScaleAttentionArgs, Segment, Variant, Visibility};
use nextscale::{DeviceInfo, bf16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

#[test]
fn smoke() {
    let segments: Vec<Segment> = [1, 2, 3, 4, 5, 6, 8, 10].iter().map(|&n| Segment::grid(n, n)).collect();
    let vis = Visibility::new(&segments, &segments, |q, k| if k <= q { Rule::Full } else { Rule::Hidden }).unwrap();
    let l = vis.query_count() as usize;
    let (b, h, d) = (1, 2, 64);
    let mut rng = StdRng::seed_from_u64(1);
    let mut draw = |n: usize| -> Vec<bf16> { (0..n).map(|_| bf16::from_f32(rng.random_range(-2.0..2.0f32))).collect() };
    let (q, mut k, v) = (draw(b * l * h * d), draw(b * l * h * d), draw(b * l * h * d));
    // Keys are taken from the last to the first: logits that grow on the way.
    for (i, k) in k.iter_mut().enumerate() {
        let row = i / (h * d);
        *k = bf16::from_f32(k.to_f32() * if row < 20 { 30.0 } else if row < 40 { 8.0 } else { 1.0 });
    }
    let run = |device: &TestDevice, groups: u32, splits: u32| {
        let plan = ScaleAttention::<bf16>::builder(&vis)
            .batch(b)
            .heads(h, h)
            .head_dim(d)
            .variant(Variant::Hopper)
            .tiles_an_item(groups)
            .splits(splits)
            .build(&{ let mut info = DeviceInfo::H200; info.sm_count = 1; info })
            .unwrap();
        eprintln!("{:?}", plan.schedule());
        let (q, k, v) = (Buffer::of(device, &q, 0), Buffer::of(device, &k, 0), Buffer::of(device, &v, 0));
        let words = Buffer::of(device, plan.schedule().words(), 0);
        let mut out = Buffer::<bf16>::poisoned(device, b * l * h * d, 0);
        let mut lse = Buffer::<f32>::poisoned(device, b * l * h, 0);
        let mut ws = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        plan.run(
            &device.stream(),
            ScaleAttentionArgs {
                q: q.input(),
                k: k.input(),
                v: v.input(),
                out: out.output(),
                lse: Some(lse.output()),
                schedule: words.input(),
                lengths: None,
                row_index: None,
                kv_offset: None,
                workspace: Some(ws.output()),
            },
        )
        .unwrap();
        (out.read(), lse.read())
    };
    let (o, e) = run(&TestDevice::Host, 2, 1);
    for device in TestDevice::kernels() {
        for groups in 1..=3 {
            let start = std::time::Instant::now();
            let (o2, e2) = run(&device, groups, 1);
            let worst = o.iter().zip(&o2).map(|(a, b)| (a.to_f32() - b.to_f32()).abs()).fold(0f32, f32::max);
            let worst_e = e.iter().zip(&e2).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            eprintln!("groups {groups} worst {worst} {worst_e} {:?}", start.elapsed());
            assert!(o.iter().zip(&o2).all(|(a, b)| (a.to_f32() - b.to_f32()).abs() < 0.02));
            assert!(worst_e < 2e-4);
        }
    }
}

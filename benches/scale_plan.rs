//! How long planning takes: from a model's scales to the words that kernels read. On the host alone.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use nextscale::attention::{Past, Rule, ScaleAttention, Visibility};
use nextscale::{DeviceInfo, bf16};

const VAR_256: [u32; 10] = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16];
const VAR_512: [u32; 10] = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32];
const VAR_1024: [u32; 14] = [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64];
const INFINITY_1M: [u32; 13] = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64];

fn plans(criterion: &mut Criterion) {
    let squares = |sides: &[u32]| Visibility::scale_causal(&sides.iter().map(|&n| (n, n)).collect::<Vec<_>>()).unwrap();
    let sides = INFINITY_1M.map(|n| (n, n));
    let cases = [
        ("VAR 256", squares(&VAR_256)),
        ("VAR 512", squares(&VAR_512)),
        ("VAR 1024", squares(&VAR_1024)),
        ("Infinity 1M", squares(&INFINITY_1M)),
        ("Infinity 1M, last step", squares(&INFINITY_1M).step(12)),
        ("Infinity 1M, text before it", squares(&INFINITY_1M).with_prefix(512, Rule::Full).unwrap()),
        ("Infinity 1M, local", Visibility::scale_local(&sides, 9, 5, 4, 4).unwrap()),
        ("64 x 64, two-way", Visibility::two_way(1, 64, 64).unwrap()),
        ("16 384 tokens, causal", Visibility::token_causal(16_384).unwrap()),
        ("200 frames of VAR 256", Visibility::frame_causal(200, &VAR_256.map(|n| (n, n)), Past::LastScale).unwrap()),
    ];
    let mut group = criterion.benchmark_group("scale_plan");
    for (name, visibility) in &cases {
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| {
                let plan = ScaleAttention::<bf16>::builder(black_box(visibility)).batch(2).heads(16, 16).head_dim(128);
                plan.build(&DeviceInfo::H200).unwrap()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, plans);
criterion_main!(benches);

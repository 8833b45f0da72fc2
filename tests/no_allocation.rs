//! A run allocates nothing on the heap: engines call it per layer and per step.

#![cfg(any(feature = "attention", feature = "quantization", feature = "verification", feature = "compression"))]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use nextscale::DeviceInfo;
use support::{Buffer, TestDevice};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(address, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
}

/// Of the second run: the first one loads code and looks for the driver.
fn assert_allocates_nothing(device: &TestDevice, mut run: impl FnMut()) {
    run();
    assert_eq!(allocations(run), 0, "{device:?}");
}

#[cfg(feature = "quantization")]
#[test]
fn rvq_decode_allocates_nothing() {
    use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
    for device in TestDevice::all() {
        let plan = RvqDecode::<u32, f32, f32>::builder(2, 4, 8).rows(3).build(&DeviceInfo::A100).unwrap();
        let codes = Buffer::of(&device, &[1u32; 6], 0);
        let codebooks = Buffer::of(&device, &[1f32; 64], 0);
        let mut out = Buffer::<f32>::poisoned(&device, 24, 0);
        assert_allocates_nothing(&device, || {
            let args =
                RvqDecodeArgs { codes: codes.input(), codebooks: codebooks.input(), out: out.output(), flags: None };
            plan.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "quantization")]
#[test]
fn rvq_encode_allocates_nothing() {
    use nextscale::quantization::{Codebook, CodebookArgs, EncodeVariant, RvqEncode, RvqEncodeArgs};
    for device in TestDevice::all() {
        let book = Codebook::builder(2, 20, 8).build(&DeviceInfo::H200).unwrap();
        let rows = Buffer::of(&device, &[1f32; 320], 0);
        let mut prepared = Buffer::<u8>::poisoned(&device, book.bytes() as usize, 0);
        let args = CodebookArgs { rows: rows.input(), usage: None, prepared: prepared.output(), flags: None };
        book.prepare(&device.stream(), args).unwrap();
        let mut codes = Buffer::<u32>::poisoned(&device, 6, 0);
        for variant in [EncodeVariant::Portable, EncodeVariant::Hopper, EncodeVariant::Stream] {
            let plan = RvqEncode::<f32, u32>::builder(&book).rows(3).variant(variant);
            let plan = plan.build(&DeviceInfo::H200).unwrap();
            assert_allocates_nothing(&device, || {
                let args = RvqEncodeArgs::new(rows.input_of(24), prepared.input(), codes.output());
                plan.run(&device.stream(), args).unwrap();
            });
        }
    }
}

/// Tables are lowered when the plan is made; a run with every operand walks them in place.
#[cfg(feature = "attention")]
#[test]
fn scale_attention_allocates_nothing() {
    use nextscale::attention::{Rule, ScaleAttention, ScaleAttentionArgs, Segment, Visibility};
    use nextscale::bf16;
    for device in TestDevice::all() {
        let scales = [Segment::grid(2, 2).with_length(0), Segment::grid(3, 3).with_length(1)];
        let table = Visibility::new(&scales, &scales, |q, k| [Rule::Causal, Rule::Full][usize::from(q > k)]).unwrap();
        let builder = ScaleAttention::<bf16>::builder(&table).batch(2).heads(2, 1).gathered_rows(20).packed_keys(30);
        let plan = builder.build(&DeviceInfo::of(&device.stream()).unwrap()).unwrap();
        let q = Buffer::of(&device, &[bf16::ONE; 2 * 20 * 2 * 64], 0);
        let kv = Buffer::of(&device, &[bf16::ONE; 30 * 64], 0);
        let mut out = Buffer::<bf16>::poisoned(&device, 2 * 13 * 2 * 64, 0);
        let mut lse = Buffer::<f32>::poisoned(&device, 2 * 2 * 13, 0);
        let schedule = Buffer::of(&device, plan.schedule().words(), 0);
        let lengths = Buffer::of(&device, &[3i32; 4], 0);
        let row_index = Buffer::of(&device, &[7i32; 26], 0);
        let kv_offset = Buffer::of(&device, &[0i32, 13], 0);
        assert_allocates_nothing(&device, || {
            let args = ScaleAttentionArgs {
                q: q.input(),
                k: kv.input(),
                v: kv.input(),
                out: out.output(),
                lse: Some(lse.output()),
                schedule: schedule.input(),
                lengths: Some(lengths.input()),
                row_index: Some(row_index.input()),
                kv_offset: Some(kv_offset.input()),
                workspace: None,
            };
            plan.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "attention")]
#[test]
fn merge_and_prepare_allocate_nothing() {
    use nextscale::attention::{Merge, MergeArgs, Norm, Prepare, PrepareArgs, Rope};
    for device in TestDevice::all() {
        let merge = Merge::<f32, f32>::builder(2, 2, 8).rows(3).build(&DeviceInfo::A100).unwrap();
        let prepare = Prepare::<f32, f32, f32>::builder(8).rows(3).q(2).k(2, 3).v(2, 3);
        let prepare = prepare.norm(Norm::L2 { eps: 1e-12 }).rope(Rope::half(3)).build(&DeviceInfo::A100).unwrap();
        let ones = Buffer::of(&device, &[1f32; 96], 0);
        let mut outs = [0, 1, 2].map(|_| Buffer::<f32>::poisoned(&device, 48, 0));
        assert_allocates_nothing(&device, || {
            let [q_out, k_cache, v_cache] = &mut outs;
            let args = MergeArgs { parts: ones.input(), lse: ones.input(), out: q_out.output(), out_lse: None };
            merge.run(&device.stream(), args).unwrap();
            let args = PrepareArgs {
                q: Some(ones.input()),
                k: Some(ones.input()),
                v: Some(ones.input()),
                q_out: Some(q_out.output()),
                k_cache: Some(k_cache.output()),
                v_cache: Some(v_cache.output()),
                cos: Some(ones.input()),
                sin: Some(ones.input()),
                ..PrepareArgs::default()
            };
            prepare.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "quantization")]
#[test]
fn multi_scale_and_scalar_quantizers_allocate_nothing() {
    use nextscale::quantization::{
        Bits, BitsArgs, EncodeArgs, FHat, Fsq, FsqArgs, MultiScale, PhiTable, StepArgs, pack_phi,
    };
    for device in TestDevice::all() {
        let plan = MultiScale::<u16, f32>::builder(4, (3, 3), &[(1, 1), (3, 3)]).entries(5).phi(PhiTable::shared(2));
        let plan = plan.build(&DeviceInfo::of(&device.stream()).unwrap()).unwrap();
        let tokens = Buffer::of(&device, &[1u16, 2, 3, 4, 0, 1, 2, 3, 4, 0], 0);
        let codebook = Buffer::of(&device, &[0.5f32; 20], 0);
        let phi = Buffer::of(&device, &pack_phi(4, &[0.1; 144], &[0.1; 4], 0.5).unwrap(), 0);
        let f = Buffer::of(&device, &[0.25f32; 36], 0);
        let mut map = Buffer::<f32>::poisoned(&device, 36, 0);
        let mut next = Buffer::<f32>::poisoned(&device, 36, 0);
        let mut codes = Buffer::<u16>::poisoned(&device, 10, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.encode_workspace_bytes() as usize, 0);
        assert_allocates_nothing(&device, || {
            let args = StepArgs {
                scale: 0,
                tokens: tokens.input(),
                codebook: Some(codebook.input()),
                phi: Some(phi.input()),
                f_hat: Some(FHat::FromZero(map.output())),
                next: Some(next.output()),
                flags: None,
            };
            plan.step(&device.stream(), args).unwrap();
            let args = EncodeArgs {
                f: f.input(),
                codebook: codebook.input(),
                search: None,
                phi: Some(phi.input()),
                codes: codes.output(),
                f_hat: map.output(),
                workspace: Some(workspace.output()),
            };
            plan.encode(&device.stream(), args).unwrap();
        });
        let bits = Bits::<f32, f32, u16>::builder(4, 9).build(&DeviceInfo::A100).unwrap();
        let fsq = Fsq::<f32, f32, u16>::builder(12, &[3, 4, 5]).build(&DeviceInfo::A100).unwrap();
        let mut labels = Buffer::<u8>::poisoned(&device, 36, 0);
        assert_allocates_nothing(&device, || {
            let (codes, labels) = (Some(codes.output()), Some(labels.output()));
            bits.run(
                &device.stream(),
                BitsArgs { input: f.input(), labels, values: Some(next.output()), codes, seeds: None },
            )
            .unwrap();
            let args =
                FsqArgs { z: Some(f.input()), values: Some(map.output()), indices: None, given: None, flags: None };
            fsq.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "verification")]
#[test]
fn verification_allocates_nothing() {
    use nextscale::verification::{
        Accepted, DraftSample, DraftSampleArgs, Drafts, Emitted, RowStats, RowStatsArgs, Verifier, VerifierArgs,
        VerifierOptions, VerifierOut,
    };
    for device in TestDevice::all() {
        let info = &DeviceInfo::A100;
        let verifier = Verifier::<f32, f32>::builder(2, 1, 3000).drafts(Drafts::Logits).rules_per_request();
        let verifier = verifier.trials(2).build(info).unwrap();
        let sampler = DraftSample::<f32>::builder(2, 3000).build(info).unwrap();
        let stats = RowStats::<f32>::builder(4, 3000).build(info).unwrap();
        let logits = Buffer::of(&device, &[0.5f32; 4 * 3000], 0);
        let (cu_rows, drafts) = (Buffer::of(&device, &[0, 2, 4], 0), Buffer::of(&device, &[1, -1, 2, -1], 0));
        let (rules, top_k) = (Buffer::of(&device, &[2, 3], 0), Buffer::of(&device, &[9, 0], 0));
        let seeds = Buffer::of(&device, &[1i64, 2], 0);
        let [mut tokens, mut drawn] = [4, 2].map(|len| Buffer::<i32>::poisoned(&device, len, 0));
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 2, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let [mut log_probs, mut of_draft, mut partials] =
            [4, 8, 24].map(|len| Buffer::<f32>::poisoned(&device, len, 0));
        let mut workspace = Buffer::<u8>::poisoned(&device, verifier.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &vec![0u32; verifier.counter_words()], 0);
        assert_allocates_nothing(&device, || {
            let args = VerifierArgs {
                target: logits.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VerifierOptions {
                    draft: Some(logits.input()),
                    rules: Some(rules.input()),
                    top_k: Some(top_k.input()),
                    seeds: Some(seeds.input()),
                    ..VerifierOptions::default()
                },
                out: VerifierOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: None,
                    log_probs: Some(log_probs.output()),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            };
            verifier.run(&device.stream(), args).unwrap();
            let args = DraftSampleArgs {
                logits: logits.input(),
                temperature: None,
                top_k: Some(top_k.input()),
                top_p: None,
                min_p: None,
                draft_to_target: None,
                seeds: Some(seeds.input()),
                positions: None,
                rows_in_step: None,
                uniforms: None,
                tokens: drawn.output(),
                stats: Some(of_draft.output()),
                log_probs: None,
                status: status.output(),
                workspace: workspace.output(),
                counters: counters.output(),
            };
            sampler.run(&device.stream(), args).unwrap();
            let args =
                RowStatsArgs { logits: logits.input(), temperature: None, allow: None, partials: partials.output() };
            stats.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "compression")]
#[test]
fn drift_select_and_compact_allocate_nothing() {
    use nextscale::compression::{Compact, CompactArgs, Drift, DriftArgs, Scope, Select, SelectArgs};
    for device in TestDevice::all() {
        let drift = Drift::<f32>::builder(1, 64).build(&DeviceInfo::A100).unwrap();
        let features = Buffer::of(&device, &[1f32; 64], 0);
        let mut previous = Buffer::of(&device, &[1f32; 64], 0);
        let mut accumulated = Buffer::of(&device, &[0f32], 0);
        let (mut steps, mut decision) = (Buffer::of(&device, &[0i32], 0), Buffer::of(&device, &[0i32], 0));
        let mut workspace = Buffer::<u8>::poisoned(&device, 4096, 0);
        let mut counters = Buffer::of(&device, &[0u32], 0);
        assert_allocates_nothing(&device, || {
            let args = DriftArgs {
                features: features.input(),
                previous: previous.output(),
                accumulated: accumulated.output(),
                steps: steps.output(),
                force: None,
                decision: decision.output(),
                change: None,
                workspace: workspace.output(),
                counters: counters.output(),
            };
            drift.run(&device.stream(), args).unwrap();
        });
        let scores = Buffer::of(&device, &(0..64).map(|i| (i * 7 % 64) as f32).collect::<Vec<_>>(), 0);
        let mut indices = Buffer::<i32>::poisoned(&device, 64, 0);
        let mut counts = Buffer::<i32>::poisoned(&device, 2, 0);
        for (scope, block) in [(Scope::PerHead, 1), (Scope::Shared, 4), (Scope::Ada { floor: 0.2 }, 1)] {
            let select =
                Select::builder(1, 2, 32).budget(8).scope(scope).block(block).build(&DeviceInfo::A100).unwrap();
            assert_allocates_nothing(&device, || {
                let args = SelectArgs {
                    importance: Some(scores.input()),
                    redundancy: None,
                    weights: None,
                    lengths: None,
                    budgets: None,
                    indices: indices.output(),
                    counts: counts.output(),
                    status: None,
                    workspace: Some(workspace.output()),
                };
                select.run(&device.stream(), args).unwrap();
            });
        }
        let compact = Compact::<f32, f32>::builder(1, 1, 8, 4).k(8).build(&DeviceInfo::A100).unwrap();
        let rows = Buffer::of(&device, &[0, 2, 4, 6], 0);
        let mut out = Buffer::<f32>::poisoned(&device, 32, 0);
        assert_allocates_nothing(&device, || {
            let args =
                CompactArgs { k: Some(features.input()), k_out: Some(out.output()), ..CompactArgs::of(rows.input()) };
            compact.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "verification")]
#[test]
fn verification_of_trees_allocates_nothing() {
    use nextscale::verification::{
        Accepted, Drafts, Emitted, TreeBuilder, TreeBuilderArgs, TreeBuilderOut, TreeLinks, TreeVerifier,
        TreeVerifierArgs, TreeVerifierOptions, TreeVerifierOut,
    };
    for device in TestDevice::all() {
        let info = &DeviceInfo::A100;
        let verifier = TreeVerifier::<f32, f32>::builder(1, 4, 2, 3000).drafts(Drafts::Logits).build(info).unwrap();
        let builder = TreeBuilder::builder(1, 3).candidates(4).max_depth(2).build(info).unwrap();
        let logits = Buffer::of(&device, &[0.5f32; 4 * 3000], 0);
        let (parents, drafts) = (Buffer::of(&device, &[-1, 0, 0, 1], 0), Buffer::of(&device, &[-1, 5, 6, 7], 0));
        let (top_k, seeds) = (Buffer::of(&device, &[9], 0), Buffer::of(&device, &[1i64], 0));
        let scores = Buffer::of(&device, &[0f32, -1.0, -2.0, -0.5], 0);
        let [mut tokens, mut path, mut selected] = [0; 3].map(|_| Buffer::<i32>::poisoned(&device, 3, 0));
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 1, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 1, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 1, 0);
        let mut log_probs = Buffer::<f32>::poisoned(&device, 3, 0);
        let mut paths = Buffer::<i32>::poisoned(&device, 9, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, verifier.workspace_bytes() as usize, 0);
        assert_allocates_nothing(&device, || {
            let args = TreeVerifierArgs {
                target: logits.input(),
                tree: TreeLinks::Parents(parents.input()),
                drafts: drafts.input(),
                options: TreeVerifierOptions {
                    draft: Some(logits.input()),
                    top_k: Some(top_k.input()),
                    seeds: Some(seeds.input()),
                    ..TreeVerifierOptions::default()
                },
                out: TreeVerifierOut {
                    path: Some(path.output()),
                    log_probs: Some(log_probs.output()),
                    ..TreeVerifierOut::new(tokens.output(), emitted.output(), accepted.output(), status.output())
                },
                workspace: workspace.output(),
            };
            verifier.run(&device.stream(), args).unwrap();
            let args = TreeBuilderArgs {
                parents: parents.input(),
                cu_rows: None,
                drafts: None,
                scores: Some(scores.input()),
                positions: None,
                out: TreeBuilderOut {
                    selected: Some(selected.output()),
                    paths: Some(paths.output()),
                    ..TreeBuilderOut::new(status.output())
                },
            };
            builder.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "verification")]
#[test]
fn visual_verification_allocates_nothing() {
    use nextscale::verification::{
        Accepted, ConfidenceOut, ConfidenceRank, ConfidenceRankArgs, Drafts, Emitted, Grouped, Lantern, Neighbours,
        PooledOptions, PooledOut, PooledVerifier, PooledVerifierArgs, Redraft, TypicalOut, TypicalVerifier,
        TypicalVerifierArgs, VisualOptions, VisualOut, VisualRule, VisualVerifier, VisualVerifierArgs,
    };
    for device in TestDevice::all() {
        let info = &DeviceInfo::A100;
        let logits = Buffer::of(&device, &[0.5f32; 4 * 3000], 0);
        let (cu_rows, drafts) = (Buffer::of(&device, &[0, 2, 4], 0), Buffer::of(&device, &[1, -1, 2, -1], 0));
        let near = Buffer::of(&device, &[7u16; 3000 * 3], 0);
        let (seeds, counts) = (Buffer::of(&device, &[1i64, 2], 0), Buffer::of(&device, &[1, -1], 0));
        let [mut tokens, mut redrafts] = [4, 4].map(|len| Buffer::<i32>::poisoned(&device, len, 0));
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 2, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut resample = Buffer::<u8>::poisoned(&device, 4, 0);
        let mut counted = Buffer::<i32>::poisoned(&device, 4, 0);
        let lantern = VisualRule::Lantern(Lantern { accumulated: 3, zeroed: 3, bound: 0.1 });
        let rules = [lantern, VisualRule::Grouped(Grouped::default()), VisualRule::Jacobi];
        let visual = rules.map(|rule| {
            let builder = VisualVerifier::<f32>::builder(2, 1, 3000, rule).drafts(Drafts::Logits);
            builder.redraft(Redraft::Gumbel).build(info).unwrap()
        });
        let pooled = PooledVerifier::<f32>::builder(2, [1, 2], 3000).radius(1).build(info).unwrap();
        let typical = TypicalVerifier::<f32>::builder(2, 2, 3000).build(info).unwrap();
        let rank = ConfidenceRank::<f32>::builder(2, 2, 3000).build(info).unwrap();
        let sizes = [visual[0].workspace_bytes(), pooled.workspace_bytes(), typical.workspace_bytes()];
        let most = sizes.into_iter().fold(rank.workspace_bytes(), u64::max);
        let mut workspace = Buffer::<u8>::poisoned(&device, most as usize, 0);
        let mut counters = Buffer::of(&device, &[0u32; 4], 0);
        assert_allocates_nothing(&device, || {
            for (plan, rule) in visual.iter().zip(rules) {
                let args = VisualVerifierArgs {
                    target: logits.input(),
                    cu_rows: cu_rows.input(),
                    drafts: drafts.input(),
                    options: VisualOptions {
                        draft: Some(logits.input()),
                        neighbours: matches!(rule, VisualRule::Lantern(_)).then(|| Neighbours::U16(near.input())),
                        seeds: Some(seeds.input()),
                        ..VisualOptions::default()
                    },
                    out: VisualOut {
                        tokens: tokens.output(),
                        emitted: emitted.output(),
                        accepted: accepted.output(),
                        status: status.output(),
                        last_row: None,
                        redrafts: Some(redrafts.output()),
                        redraft_stats: None,
                    },
                    workspace: workspace.output(),
                    counters: counters.output(),
                };
                plan.run(&device.stream(), args).unwrap();
            }
            let args = PooledVerifierArgs {
                target: logits.input(),
                drafts: drafts.input(),
                options: PooledOptions::default(),
                out: PooledOut {
                    resample: resample.output(),
                    positions: Some(tokens.output()),
                    islands: Some(redrafts.output()),
                    counts: counted.output(),
                    pooled: None,
                    status: status.output(),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            };
            pooled.run(&device.stream(), args).unwrap();
            let args = TypicalVerifierArgs {
                target: logits.input(),
                drafts: drafts.input(),
                paths: None,
                row_index: None,
                temperature: None,
                seeds: Some(seeds.input()),
                positions: None,
                uniforms: None,
                out: TypicalOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    nodes: Some(redrafts.output()),
                    path: None,
                    last_row: None,
                    status: status.output(),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            };
            typical.run(&device.stream(), args).unwrap();
            let args = ConfidenceRankArgs {
                logits: logits.input(),
                masked: None,
                temperature: None,
                top_k: None,
                top_p: None,
                min_p: None,
                threshold: None,
                counts: counts.input(),
                noise: None,
                seeds: Some(seeds.input()),
                positions: None,
                out: ConfidenceOut {
                    tokens: tokens.output(),
                    candidates: Some(redrafts.output()),
                    confidence: None,
                    committed: counted.output(),
                    status: status.output(),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            };
            rank.run(&device.stream(), args).unwrap();
        });
    }
}

#[cfg(feature = "compression")]
#[test]
fn pack_unpack_and_rotate_allocate_nothing() {
    use nextscale::compression::{Format, Pack, PackArgs, Rotate, RotateArgs, Rotation, UnpackArgs};
    for device in TestDevice::all() {
        let input = Buffer::of(&device, &[1f32; 32 * 64], 0);
        let mut out = Buffer::<f32>::poisoned(&device, 32 * 64, 0);
        for format in [Format::Fp8, Format::INT4, Format::kivi_key(2, 32), Format::turbo_key(3)] {
            let mut builder = Pack::<f32, f32>::builder(format, 32, 1, 64);
            if format.rows() == 1 {
                builder = builder.rotation(Rotation::seeded(1));
            }
            let plan = builder.build(&DeviceInfo::A100).unwrap();
            let mut codes = Buffer::<u8>::poisoned(&device, plan.codes_len() as usize, 0);
            let mut numbers = Buffer::<f32>::poisoned(&device, plan.numbers_len() as usize, 0);
            assert_allocates_nothing(&device, || {
                let args = PackArgs {
                    input: input.input(),
                    codes: codes.output(),
                    numbers: Some(numbers.output()),
                    scales: None,
                    kept: None,
                    counts: None,
                    flags: None,
                };
                plan.pack(&device.stream(), args).unwrap();
            });
            assert_allocates_nothing(&device, || {
                let args = UnpackArgs {
                    codes: codes.input(),
                    numbers: Some(numbers.input()),
                    scales: None,
                    counts: None,
                    out: out.output(),
                    flags: None,
                };
                plan.unpack(&device.stream(), args).unwrap();
            });
        }
        let plan = Rotate::<f32>::builder(Rotation::HADAMARD, 32, 1, 64).build(&DeviceInfo::A100).unwrap();
        assert_allocates_nothing(&device, || {
            plan.run(&device.stream(), RotateArgs { input: input.input(), out: out.output() }).unwrap();
        });
    }
}

#[cfg(feature = "compression")]
#[test]
fn events_allocate_nothing() {
    use nextscale::compression::{CacheSpec, ChunkCache, EventArgs, Policy, PositionWeight};
    use nextscale::{DType, bf16};
    let spec = CacheSpec {
        branches: 1,
        layers: 3,
        heads: 2,
        k_dim: 64,
        v_dim: 64,
        dtype: DType::BF16,
        packed: None,
        page_rows: 8,
        spare_pages: 0,
        extras: 0,
        most_rows: 64,
        bytes: 1 << 20,
    };
    let flow = Policy::FlowCache { budget: 16, lambda: 0.07, weight: PositionWeight::Exponential };
    for device in TestDevice::all() {
        for policy in [flow, Policy::AdaKv { budget: 8, window: 4, floor: 0.2 }] {
            let mut cache = ChunkCache::new(spec).unwrap();
            (0..3).for_each(|layer| {
                cache.append(0, layer, 0, 40, 0).unwrap();
                cache.seal(0, layer, 0).unwrap();
            });
            let moves: Vec<_> =
                (0..3).map(|layer| cache.compress(0, layer, policy.rows(2)).unwrap().unwrap()).collect();
            let mut builder = cache.event::<bf16>(policy, &moves).unwrap().workspace(0);
            let queries = policy.queries().unwrap_or(5);
            if policy.queries().is_none() {
                builder = builder.queries(queries);
            }
            let event = builder.build(&DeviceInfo::A100).unwrap();
            assert_eq!(event.groups(), 3);
            let places = cache.layout().pages * 8 * 2;
            let q = Buffer::of(&device, &vec![bf16::ONE; 3 * queries * 2 * 64], 0);
            let mut k = Buffer::of(&device, &vec![bf16::ONE; places * 64], 0);
            let mut v = Buffer::of(&device, &vec![bf16::ONE; places * 64], 0);
            let mut lengths = Buffer::<i32>::poisoned(&device, 6, 0);
            let pages: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
            let pages = Buffer::of(&device, &pages, 0);
            let weights = event.weights().map(|weights| Buffer::of(&device, weights, 0));
            let mut workspace = Buffer::<u8>::poisoned(&device, event.workspace_bytes() as usize, 0);
            let stream = device.stream();
            assert_allocates_nothing(&device, || {
                let mut args =
                    EventArgs::of(k.output(), v.output(), lengths.output(), pages.input(), workspace.output());
                args.q = Some(q.input());
                args.weights = weights.as_ref().map(|weights| weights.input());
                event.run(&stream, args).unwrap();
            });
        }
    }
}

//! What is refused, before anything is written: plans, buffers, indices.

use nextscale::attention::{ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, Segment, Variant, Visibility};
use nextscale::{Device, DeviceInfo, Error, In, Out, Stream, bf16, f16};

use crate::case::{Case, Loaded, Memory, Problem, attend};
use crate::support::{Buffer, TestDevice};
use crate::{FULL, mixed, places};

#[test]
fn bad_plans_are_refused() {
    type Builder<T> = ScaleAttentionBuilder<T>;
    let scales = [Segment::grid(2, 2), Segment::grid(3, 3)];
    let table = Visibility::table(&scales, |q, k| k <= q).unwrap();
    let builder = || ScaleAttention::<bf16>::builder(&table).batch(2).heads(4, 2);
    let build = |b: Builder<bf16>| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |b: Builder<bf16>, name: &str| {
        let built = build(b);
        assert!(matches!(built, Err(Error::Size { arg, .. }) if arg == name), "{name}: {built:?}");
    };
    let unsupported = |b: Builder<bf16>, name: &str| {
        let built = build(b);
        assert!(matches!(built, Err(Error::Unsupported { arg, .. }) if arg == name), "{name}: {built:?}");
    };
    let stride = |b: Builder<bf16>, name: &str, at: usize| {
        let built = build(b);
        assert!(matches!(built, Err(Error::Stride { arg, dim, .. }) if arg == name && dim == at), "{name}: {built:?}");
    };

    size(builder().head_dim(0), "head_dim");
    size(builder().head_dim(136), "head_dim");
    unsupported(builder().head_dim(44), "head_dim");
    size(builder().heads(0, 0), "heads");
    size(builder().heads(usize::MAX, 1), "heads");
    size(builder().heads(4, 0), "kv_heads");
    size(builder().heads(2, 4), "kv_heads");
    unsupported(builder().heads(4, 3), "kv_heads");
    size(builder().batch(1 << 31), "batch");
    size(builder().batch(usize::MAX), "batch");
    size(builder().batch(1 << 29), "batch * heads * rows");
    size(builder().kv_rows(12), "kv_rows");
    size(builder().kv_rows(1 << 31), "kv_rows");
    size(builder().gathered_rows(0), "q_rows");
    size(builder().gathered_rows(1 << 31), "q_rows");
    unsupported(builder().packed_keys(50), "packed_keys");
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        unsupported(builder().softmax_scale(scale), "softmax_scale");
    }
    for bound in [0.0, -1.0, 40.1, f32::NAN, f32::INFINITY] {
        unsupported(builder().logit_bound(bound), "logit_bound");
    }
    let half = ScaleAttention::<f16>::builder(&table).logit_bound(5.0).build(&DeviceInfo::H200);
    assert!(matches!(half, Err(Error::Unsupported { arg: "logit_bound", .. })));

    // Contiguous: q and out [2, 13, 4, 64], k and v [2, 13, 2, 64].
    let (q, kv) = ([13 * 256, 256, 64], [13 * 128, 128, 64]);
    assert_eq!(build(builder().q_strides(q).kv_strides(kv, kv).out_strides(q)), Ok(()));
    for (dim, bad) in [(0, -8), (1, 4), (2, 1 << 38), (1, i64::MAX), (2, i64::MIN)] {
        let with = |strides: [i64; 3]| {
            let mut bad_strides = strides;
            bad_strides[dim] = bad;
            bad_strides
        };
        stride(builder().q_strides(with(q)), "q", dim);
        stride(builder().kv_strides(with(kv), kv), "k", dim);
        stride(builder().kv_strides(kv, with(kv)), "v", dim);
        stride(builder().out_strides(with(q)), "out", dim);
    }
    stride(builder().out_strides([13 * 256, 256, 56]), "out", 2);
    stride(builder().out_strides([13 * 256, 248, 64]), "out", 1);
    stride(builder().out_strides([0, 256, 64]), "out", 0);
    stride(builder().lse_strides([52, 0, 1]), "lse", 1);
    stride(builder().lse_strides([51, 13, 1]), "lse", 0);
    stride(builder().lse_strides([52, 13, -1]), "lse", 2);
    // One row or head for all would be a tensor of fewer.
    stride(builder().q_strides([13 * 256, 0, 64]), "q", 1);
    stride(builder().q_strides([13 * 256, 256, 0]), "q", 2);
    stride(builder().kv_strides([13 * 128, 0, 64], kv), "k", 1);
    stride(builder().kv_strides(kv, [13 * 128, 128, 0]), "v", 2);
    assert_eq!(build(builder().q_strides([0, 256, 64]).kv_strides([0, 128, 64], [0, 128, 64])), Ok(()));
    let huge = [(1 << 38) - 8; 3];
    let many = || builder().heads(1, 1).batch((1 << 26) - 1);
    size(many().q_strides(huge), "q");
    size(many().kv_strides(huge, kv), "k");
    size(many().kv_strides(kv, huge), "v");
    size(many().out_strides([huge[0], 256, 64]), "out");

    let with_length = |index| {
        let keys = scales.map(|segment| segment.with_length(index));
        ScaleAttention::<bf16>::builder(&Visibility::new(&scales, &keys, FULL).unwrap())
    };
    assert_eq!(build(with_length(3).packed_keys(0)), Ok(()));
    // Heads first: between heads of no rows there is nothing.
    let heads_first = [0, 64, 0];
    assert_eq!(build(with_length(3).heads(2, 2).packed_keys(0).kv_strides(heads_first, heads_first)), Ok(()));
    stride(with_length(1).lengths_strides([1, 1, -1]), "lengths", 2);
    size(with_length(1).lengths_strides([i64::MAX, 1, i64::MAX]).heads(3, 3), "lengths");
    size(with_length(1 << 16), "lengths");
    size(with_length(u32::MAX), "lengths");

    size(builder().tiles_an_item(0), "tiles_an_item");
    size(builder().tiles_an_item(4), "tiles_an_item");
    size(builder().head_dim(72).tiles_an_item(5), "tiles_an_item");
    unsupported(builder().head_dim(72).tiles_an_item(3), "tiles_an_item");
    size(builder().variant(Variant::Portable).tiles_an_item(2), "tiles_an_item");
    size(builder().splits(0), "splits");
    size(builder().splits(33), "splits");

    let long = Visibility::table(&[Segment::tokens(1 << 30)], |_, _| true).unwrap();
    size(ScaleAttention::builder(&long).heads(4, 1).head_dim(8).pack_heads(true), "rows");

    let on = |mut device: DeviceInfo, major, minor, variant| {
        (device.arch.major, device.arch.minor) = (major, minor);
        builder().variant(variant).build(&device).map(|plan| plan.variant())
    };
    for (major, minor) in [(7, 5), (5, 0)] {
        let old = on(DeviceInfo::A100, major, minor, Variant::Auto);
        assert!(matches!(old, Err(Error::UnsupportedDevice { have: Some(_), .. })));
    }
    for (major, minor) in [(8, 0), (8, 9), (10, 0), (12, 0)] {
        let other = on(DeviceInfo::H200, major, minor, Variant::Hopper);
        assert!(matches!(other, Err(Error::UnsupportedDevice { have: Some(_), .. })));
        assert_eq!(on(DeviceInfo::H200, major, minor, Variant::Auto), Ok(Variant::Portable));
    }
    // Of 13 tokens in all, the portable one is faster.
    assert_eq!(on(DeviceInfo::H200, 9, 0, Variant::Auto), Ok(Variant::Portable));
    for (tokens, variant) in [(64, Variant::Portable), (65, Variant::Hopper)] {
        let table = Visibility::table(&[Segment::tokens(tokens)], |_, _| true).unwrap();
        let plan = ScaleAttention::<bf16>::builder(&table).build(&DeviceInfo::H200).unwrap();
        assert_eq!(plan.variant(), variant);
    }
}

/// As large as is allowed: counted without overflow.
#[test]
fn numbers_of_huge_plans_do_not_overflow() {
    let keys = [Segment::tokens((1 << 31) - 1)];
    let table = Visibility::new(&[Segment::tokens(1 << 16)], &keys, FULL).unwrap();
    let builder = ScaleAttention::<bf16>::builder(&table).heads(1 << 14, 1).head_dim(128).splits(32);
    let plan = builder.build(&DeviceInfo::H200).unwrap();
    assert!(plan.useful_flops() > 1 << 62);
    assert!(plan.workspace_bytes() > 1 << 43);
}

/// Every operand is needed: gathered rows of packed keys with lengths, in two splits.
fn all_operands() -> Case {
    let lengths = (0..6).map(|i| Some(i / 2)).collect();
    Case { gathers: true, packed_keys: true, memory: Memory::Plain, splits: Some(2), seed: 4, lengths, ..mixed() }
}

#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    for (device, variant) in places() {
        let case = Case { variant, groups: Some(1), ..all_operands() };
        let problem = case.problem::<bf16>();
        let plan = problem.plan(&case);
        let workspace = plan.workspace_bytes();
        let mut loaded = Loaded::new(&device, &case, &problem, &plan);
        let (words, rows) = (plan.schedule().words().len(), case.rows());
        for (name, need) in [
            ("q", problem.q.len),
            ("k", problem.k.len),
            ("v", problem.v.len),
            ("out", problem.out.len),
            ("lse", problem.lse.len),
            ("schedule", words),
            ("lengths", problem.lengths.len()),
            ("row_index", 2 * rows),
            ("kv_offset", 2),
        ] {
            if name == "schedule" && device.is_host() {
                continue; // which leaves it alone
            }
            let need = need as u64;
            let ran = plan.run(&device.stream(), loaded.args_short_of(name));
            assert_eq!(ran, Err(Error::Length { arg: name, need, got: need - 1 }));
            let mut args = loaded.args();
            match name {
                "lengths" => args.lengths = None,
                "row_index" => args.row_index = None,
                "kv_offset" => args.kv_offset = None,
                _ => continue,
            }
            assert_eq!(plan.run(&device.stream(), args), Err(Error::Length { arg: name, need, got: 0 }));
        }
        if !device.is_host() {
            let ran = plan.run(&device.stream(), loaded.args_short_of("workspace"));
            assert_eq!(ran, Err(Error::Workspace { need: workspace, got: workspace - 1 }));
            let mut args = loaded.args();
            args.workspace = None;
            assert_eq!(plan.run(&device.stream(), args), Err(Error::Workspace { need: workspace, got: 0 }));
        }
        loaded.assert_untouched();
    }
}

/// The least alignment of each operand on devices that run kernels; the host asks for its elements' alone.
#[test]
fn kernels_ask_for_aligned_buffers() {
    for (device, variant) in places().into_iter().filter(|(device, _)| !device.is_host()) {
        let case = Case { variant, groups: Some(1), ..all_operands() };
        let problem = case.problem::<bf16>();
        let plan = problem.plan(&case);
        let mut loaded = Loaded::new(&device, &case, &problem, &plan);
        let shifted = problem.buffers.iter().map(|data| Buffer::of(&device, data, 4)).collect::<Vec<_>>();
        let mut out = Buffer::<bf16>::poisoned(&device, problem.out.len, 1);
        let words = Buffer::of(&device, plan.schedule().words(), 2);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 16);
        for (name, need) in [("q", 16), ("k", 16), ("v", 16), ("out", 16), ("schedule", 16), ("workspace", 256)] {
            let mut args = loaded.args();
            match name {
                "q" => args.q = shifted[0].input(),
                "k" => args.k = shifted[1].input(),
                "v" => args.v = shifted[2].input(),
                "out" => args.out = out.output(),
                "schedule" => args.schedule = words.input(),
                _ => args.workspace = Some(workspace.output()),
            }
            assert_eq!(plan.run(&device.stream(), args), Err(Error::Alignment { arg: name, need }));
        }
        loaded.assert_untouched();
        assert!(out.read().iter().all(|x| x.to_bits() == u16::MAX));

        // Kernels know no f32.
        let problem = case.problem::<f32>();
        let plan = problem.plan(&case);
        let mut loaded = Loaded::new(&device, &case, &problem, &plan);
        assert!(matches!(plan.run(&device.stream(), loaded.args()), Err(Error::DType { arg: "q", .. })));
        loaded.assert_untouched();
    }
}

/// Operands of which nothing is needed may be anywhere.
#[test]
fn what_is_not_needed_is_not_looked_at() {
    for (device, variant) in places() {
        let case = Case { variant, groups: Some(1), ..Case::cross(&[[1, 1, 3]], &[], FULL) };
        let problem = case.problem::<bf16>();
        let plan = problem.plan(&case);
        let mut loaded = Loaded::new(&device, &case, &problem, &plan);
        let (empty, none) = (Buffer::<bf16>::of(&device, &[], 1), Buffer::<i32>::of(&device, &[], 1));
        let mut workspace = Buffer::<u8>::poisoned(&device, 5, 1);
        let mut args = loaded.args();
        (args.k, args.v, args.workspace) = (empty.input(), empty.input(), Some(workspace.output()));
        (args.lengths, args.row_index, args.kv_offset) = (Some(none.input()), None, Some(none.input()));
        plan.run(&device.stream(), args).unwrap();
        assert!(loaded.read().out.iter().all(|x| x.to_f32() == 0.0));
        assert_eq!(workspace.read(), [u8::MAX; 5]);
    }
}

/// Misaligned, overlapping, foreign buffers: addresses that are compared, never reached.
#[test]
fn bad_addresses_are_refused_before_the_driver_is_asked() {
    const NAMES: [&str; 10] =
        ["q", "k", "v", "out", "lse", "schedule", "lengths", "row_index", "kv_offset", "workspace"];
    let case = all_operands();
    let problem = case.problem::<bf16>();
    let plan = problem.plan(&case);
    let (words, rows) = (plan.schedule().words().len(), case.rows());
    // Elements and their bytes, the buffers a MiB apart.
    let sizes = [
        problem.q.len,
        problem.k.len,
        problem.v.len,
        problem.out.len,
        problem.lse.len,
        words,
        problem.lengths.len(),
        2 * rows,
        2,
    ];
    let bytes = [2, 2, 2, 2, 4, 4, 4, 4, 4, 1];
    let sizes: Vec<usize> = sizes.into_iter().chain([plan.workspace_bytes() as usize]).collect();
    let apart: [u64; 10] = std::array::from_fn(|i| (i as u64 + 1) << 20);
    // SAFETY: every call below is refused before it reaches the driver.
    let run = |at: [u64; 10], foreign: Option<usize>| unsafe {
        let ordinal = |i| i32::from(foreign == Some(i));
        plan.run(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            ScaleAttentionArgs {
                q: In::from_raw(at[0], sizes[0], ordinal(0)),
                k: In::from_raw(at[1], sizes[1], ordinal(1)),
                v: In::from_raw(at[2], sizes[2], ordinal(2)),
                out: Out::from_raw(at[3], sizes[3], ordinal(3)),
                lse: Some(Out::from_raw(at[4], sizes[4], ordinal(4))),
                schedule: In::from_raw(at[5], sizes[5], ordinal(5)),
                lengths: Some(In::from_raw(at[6], sizes[6], ordinal(6))),
                row_index: Some(In::from_raw(at[7], sizes[7], ordinal(7))),
                kv_offset: Some(In::from_raw(at[8], sizes[8], ordinal(8))),
                workspace: Some(Out::from_raw(at[9], sizes[9], ordinal(9))),
            },
        )
    };
    for i in 0..10 {
        let refused = run(apart, Some(i));
        let got = Device::Cuda(1);
        assert_eq!(refused, Err(Error::DeviceMismatch { arg: NAMES[i], stream: Device::Cuda(0), got }));
        let mut at = apart;
        at[i] += 1;
        let need = if i == 9 { 256 } else { bytes[i] };
        if need > 1 {
            assert_eq!(run(at, None), Err(Error::Alignment { arg: NAMES[i], need }));
        }
        for written in [3, 4, 9] {
            // The written one begins where the other ends.
            let mut at = apart;
            at[written] = apart[i] + ((sizes[i] - 1) * bytes[i]) as u64 / 256 * 256;
            let pair = if i == written { continue } else { (NAMES[written], NAMES[i]) };
            let pair = if [3, 4, 9].contains(&i) && i < written { (pair.1, pair.0) } else { pair };
            assert_eq!(run(at, None), Err(Error::Overlap { written: pair.0, other: pair.1 }));
        }
    }
    let (mut out, mut lse) = (vec![bf16::ZERO; sizes[3]], vec![0f32; sizes[4]]);
    let mut loaded = Loaded::new(&TestDevice::Host, &case, &problem, &plan);
    let mut args = loaded.args();
    (args.out, args.lse) = (Out::host(&mut out), Some(Out::host(&mut lse)));
    // SAFETY: as above.
    let mixed = unsafe { plan.run(&Stream::from_raw(std::ptr::null_mut(), 0), args) };
    assert!(matches!(mixed, Err(Error::DeviceMismatch { arg: "q", got: Device::Host, .. })), "{mixed:?}");
}

/// On the host an index or a length that is out of range is an error before anything is written; kernels clamp, and
/// whatever an offset says, nothing is written but the output.
#[test]
fn indices_out_of_range() {
    let gathers = Case { gathers: true, ..mixed() };
    let packed = Case { packed_keys: true, batch: 2, ..Case::cross(&[[1, 2, 3]], &[[1, 1, 20], [1, 1, 9]], FULL) };
    let packed = Case { lengths: vec![Some(0), Some(1)], ..packed };
    let host = |case: &Case, problem: &Problem<bf16>| {
        let plan = problem.plan(case);
        let mut loaded = Loaded::new(&TestDevice::Host, case, problem, &plan);
        let ran = plan.run(&Stream::host(), loaded.args());
        loaded.assert_untouched();
        match ran {
            Err(Error::CodeOutOfRange { arg, at, code, entries }) => (arg, at, code, entries),
            other => panic!("{other:?}"),
        }
    };
    let problem = gathers.problem::<bf16>();
    for wild in [-1, problem.q_rows as i32, i32::MIN, i32::MAX] {
        let mut problem = problem.clone();
        problem.row_index[5] = wild;
        assert_eq!(host(&gathers, &problem), ("row_index", 5, wild.into(), problem.q_rows as u64));
    }
    for (place, wild) in [(0, -1), (1, 22), (2, i32::MIN), (3, i32::MAX)] {
        let mut problem = gathers.problem::<bf16>();
        let [_, of_batch, of_head] = problem.lengths_strides;
        let at = place / 2 * of_batch + place % 2 * of_head;
        problem.lengths[at] = wild;
        assert_eq!(host(&gathers, &problem), ("lengths", at as u64, wild.into(), 21));
    }
    let mut problem = packed.problem::<bf16>();
    problem.lengths.fill(3);
    let rows = problem.kv_rows as i32;
    for wild in [-1, rows - 22, i32::MIN, i32::MAX] {
        problem.kv_offset = vec![0, wild];
        assert_eq!(host(&packed, &problem), ("kv_offset", 1, wild.into(), rows as u64));
    }

    for (device, variant) in places().into_iter().filter(|(device, _)| !device.is_host()) {
        let case = gathers.on(variant);
        let mut wild = case.problem::<bf16>();
        for q in &mut wild.buffers[0] {
            *q = bf16::from_f32(if q.is_nan() { 0.5 } else { q.to_f32() });
        }
        wild.row_index[..4].copy_from_slice(&[-1, i32::MIN, i32::MAX, wild.q_rows as i32]);
        let mut clamped = wild.clone();
        clamped.row_index[..4].copy_from_slice(&[0, 0, wild.q_rows as i32 - 1, wild.q_rows as i32 - 1]);
        let [_, of_batch, of_head] = wild.lengths_strides;
        for (place, wild_length, length) in [(0, -1, 0), (1, i32::MIN, 0), (2, 0, 0), (3, -7, 0)] {
            let at = place / 2 * of_batch + place % 2 * of_head;
            (wild.lengths[at], clamped.lengths[at]) = (wild_length, length);
        }
        let (actual, right) = (attend(&device, &case, &wild), attend(&device, &case, &clamped));
        assert_eq!(actual.bits(), right.bits());
        // Lengths beyond the segment.
        for q in wild.buffers.iter_mut().flatten().filter(|x| x.is_nan()) {
            *q = bf16::from_f32(0.25);
        }
        for length in [22, i32::MAX] {
            let problem = |length| Problem { lengths: vec![length; wild.lengths.len()], ..wild.clone() };
            let (actual, right) = (attend(&device, &case, &problem(length)), attend(&device, &case, &problem(21)));
            assert_eq!(actual.bits(), right.bits());
        }
        let case = packed.on(variant);
        for wild in [-1, -200, i32::MIN, 1, 1000, i32::MAX - 300, i32::MAX] {
            let mut problem = case.problem::<bf16>();
            problem.kv_offset[1] = wild;
            let plan = problem.plan(&case);
            let mut loaded = Loaded::new(&device, &case, &problem, &plan);
            let ran = plan.run(&device.stream(), loaded.args());
            ran.unwrap();
            loaded.read();
        }
    }
}

//! Scale attention on every device, against an oracle written here from the formula.

#![cfg(feature = "attention")]

#[path = "scale_attention/case.rs"]
mod case;
#[cfg(feature = "cudarc-0_19")]
#[path = "scale_attention/cuda.rs"]
mod cuda;
#[path = "scale_attention/oracle.rs"]
mod oracle;
#[path = "scale_attention/refusals.rs"]
mod refusals;
mod support;

use case::{Case, Data, Grid, Limits, Loaded, Memory, Problem, Ran, attend, case};
use nextscale::attention::{Rule, ScaleAttention, ScaleAttentionArgs, Variant};
use nextscale::dtype::Float;
use nextscale::{DeviceInfo, In, Out, bf16, f16};
use oracle::{Expected, Path};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

/// Every device with every kernel that it has. On the host the variant is only a matter of the schedule.
fn places() -> Vec<(TestDevice, Variant)> {
    let mut places = vec![(TestDevice::Host, Variant::Hopper)];
    for device in TestDevice::kernels() {
        let hopper = DeviceInfo::of(&device.stream()).unwrap().arch == DeviceInfo::H200.arch;
        places.extend(hopper.then(|| (device.clone(), Variant::Hopper)));
        places.push((device, Variant::Portable));
    }
    places
}

impl Case {
    /// With no more groups than the kernel has.
    fn on(&self, variant: Variant) -> Case {
        let possible = |groups| match (variant, groups) {
            (Variant::Portable, _) => 1,
            (_, 3) if self.dim > 64 => 2,
            (_, 4) if self.dim <= 64 => 3,
            _ => groups,
        };
        Case { variant, groups: self.groups.map(possible), ..self.clone() }
    }
}

fn path(device: &TestDevice) -> Path {
    if device.is_host() { Path::Host } else { Path::Kernel }
}

fn check<T: Float>(device: &TestDevice, case: &Case) -> Result<(), String> {
    let problem = case.problem::<T>();
    let ran = attend(device, case, &problem);
    Expected::of(case, &problem).check(case, &problem, &ran, path(device))
}

/// bf16, f16; on the host also f32.
fn check_dtype(device: &TestDevice, case: &Case, dtype: usize) -> Result<(), String> {
    match dtype {
        0 => check::<bf16>(device, case),
        1 => check::<f16>(device, case),
        _ => check::<f32>(device, case),
    }
}

fn check_all(device: &TestDevice, case: &Case) {
    for dtype in 0..2 {
        check_dtype(device, case, dtype)
            .unwrap_or_else(|what| panic!("{what}: dtype {dtype} of {case:?} on {device:?}"));
    }
}

fn runner(cases: u32) -> proptest::test_runner::TestRunner {
    proptest::test_runner::TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    })
}

const FULL: fn(usize, usize) -> Rule = |_, _| Rule::Full;

/// A little of everything: a text with a length, scales, grouped heads, gaps.
fn mixed() -> Case {
    let mut case = Case {
        batch: 2,
        heads: 4,
        kv_heads: 2,
        memory: Memory::AnyOrder,
        spare: 9,
        groups: Some(2),
        ..Case::table(&[[1, 1, 21], [1, 1, 1], [1, 2, 2], [1, 4, 4], [1, 7, 7], [1, 9, 9]], |q, k| match (q, k) {
            (0, 0) => Rule::Causal,
            (5, 4) => Rule::Window { frames: 0, rows: 1, columns: 2 },
            (q, k) if k <= q => Rule::Full,
            _ => Rule::Hidden,
        })
    };
    case.lengths[0] = Some(0);
    case
}

#[test]
fn random_cases_agree_with_the_formula() {
    for (device, variant) in places() {
        let dtypes = if device.is_host() { 3 } else { 2 };
        let cases = (case(Limits::of(&device)), 0..dtypes as usize);
        let run = runner(support::cases())
            .run(&cases, |(case, dtype)| check_dtype(&device, &case.on(variant), dtype).map_err(TestCaseError::fail));
        run.unwrap_or_else(|failure| panic!("{failure} on {device:?}, {variant:?}"));
    }
}

/// Tables of published models.
fn models() -> Vec<Case> {
    let full_if = |sees: bool| if sees { Rule::Full } else { Rule::Hidden };
    let scales: Vec<Grid> = [1, 2, 3, 4, 5, 6, 8, 10].map(|n| [1, n, n]).to_vec();
    // VAR, Infinity; HMAR, M-VAR.
    let block_causal = Case::table(&scales, |q, k| full_if(k <= q));
    let block_diagonal = Case::table(&scales, |q, k| full_if(k == q));
    // ACDiT: clean blocks 0 to 3, then noisy ones; a noisy block sees the clean ones before it, and itself.
    let noisy = Case::table(&[[1, 1, 40]; 8], |q, k| full_if(if q < 4 { k <= q } else { k < q - 4 || k == q }));
    // VAREdit: source scales, then target scales; a target sees sources up to its own scale.
    let pairs: Vec<Grid> = [1, 3, 5, 7, 1, 3, 5, 7].map(|n| [1, n, n]).to_vec();
    let edit = Case::table(&pairs, |q, k| full_if(if q < 4 { k <= q } else { k <= q - 4 || (4..=q).contains(&k) }));
    // InfinityStar: two clips of three scales, a text; the second clip sees the first one's last scale; the last
    // segment is padding, which sees nothing and is not seen.
    let clips: Vec<Grid> =
        vec![[1, 1, 1], [2, 3, 3], [3, 5, 5], [1, 1, 1], [2, 3, 3], [3, 5, 5], [1, 1, 31], [1, 1, 13]];
    let video = Case::table(&clips, |q, k| {
        full_if(match q {
            0..=2 => k == q || k == 6,
            3..=5 => k == q || k == 6 || k == 2,
            6 => k == 6,
            _ => false,
        })
    });
    // Prompts of different length, one after the other, that all rows of an entry see.
    let mut cross = Case::cross(&[[1, 8, 9]], &[[1, 1, 77]], FULL);
    cross.lengths = vec![Some(0)];
    let cross = Case { packed_keys: true, batch: 3, shared_lengths: true, ..cross };
    vec![block_causal, block_diagonal, noisy, edit, video, cross]
}

#[test]
fn tables_of_models() {
    for (device, variant) in places() {
        for (i, case) in models().into_iter().enumerate() {
            let groups = Some(1 + (i as u32 + 1) % 4);
            check_all(&device, &Case { heads: 2, kv_heads: 1 + i % 2, groups, ..case }.on(variant));
        }
    }
}

/// Rows and keys at the edges of tiles and chunks.
#[test]
fn edges_of_tiles_and_chunks() {
    const SIZES: [u32; 7] = [1, 63, 64, 65, 127, 128, 129];
    for (device, variant) in places() {
        for (i, rows) in SIZES.into_iter().enumerate() {
            for (j, keys) in SIZES.into_iter().enumerate() {
                let dim = [64, 128, 96, 40][(i + j) % 4];
                let case =
                    Case::cross(
                        &[[1, 1, rows]],
                        &[[1, 1, keys]],
                        |_, _| if i == j { Rule::Causal } else { Rule::Full },
                    );
                let case = Case { dim, spare: [0, 200][j % 2], groups: Some(1 + (i * 7 + j) as u32 % 4), ..case };
                let case = Case { memory: if i % 2 == 0 { Memory::OneBuffer } else { Memory::Plain }, ..case };
                check_dtype(&device, &case.on(variant), (i + j) % 2).unwrap();
            }
        }
    }
}

/// More chunks than a kernel holds at once, in the splits and groups of the plan's choice and in others.
#[test]
fn many_keys() {
    for (device, variant) in places() {
        for (i, data) in [Data::Plain, Data::Sharp, Data::Ramp(0.03)].into_iter().enumerate() {
            let case = Case::cross(&[[1, 1, 5], [1, 9, 9]], &[[1, 1, 700], [1, 1, 450]], |q, k| {
                if q == 0 && k == 1 { Rule::Hidden } else { Rule::Full }
            });
            let case = Case { lengths: vec![Some(0), None], seed: 2, dim: [64, 128, 96][i], data, spare: 30, ..case };
            for (groups, splits) in
                [(None, None), (Some(1), Some(1)), (Some(2), Some(3)), (Some(4), Some(2)), (Some(1), Some(32))]
            {
                check_dtype(&device, &Case { groups, splits, ..case.clone() }.on(variant), i % 2).unwrap();
            }
        }
    }
}

/// Nothing to see, nothing to do, and the least that there is.
#[test]
fn empty_and_tiny_problems() {
    let with_lengths = |case: Case| Case { lengths: vec![Some(0); case.keys.len()], ..case };
    let hidden = |_, _| Rule::Hidden;
    let base = Case { heads: 2, kv_heads: 1, spare: 3, ..Case::var(&[1, 2, 3]) };
    let cases = [
        Case::var(&[1]),
        Case { batch: 0, ..base.clone() },
        // No rows, no keys, neither; keys that are nobody's.
        Case::cross(&[], &[[1, 2, 2]], FULL),
        Case::cross(&[[1, 2, 2]], &[], FULL),
        Case { spare: 70, ..Case::cross(&[[1, 2, 2]], &[], FULL) },
        Case::cross(&[], &[], FULL),
        Case::cross(&[[1, 0, 5], [0, 3, 3]], &[[1, 1, 0]], FULL),
        Case::cross(&[[1, 9, 9], [1, 1, 0], [1, 1, 3]], &[[1, 1, 0], [1, 1, 5], [1, 1, 0]], FULL),
        Case { spare: 5, groups: Some(2), ..Case::table(&[[1, 9, 9], [1, 5, 5]], hidden) },
        with_lengths(Case { packed_keys: true, batch: 2, ..Case::cross(&[[1, 2, 2]], &[[1, 1, 4]], hidden) }),
        // Memory of no rows, heads first.
        with_lengths(Case {
            packed_keys: true,
            heads: 2,
            kv_heads: 2,
            memory: Memory::AnyOrder,
            ..Case::cross(&[[1, 2, 2]], &[[1, 1, 4]], FULL)
        }),
        // A prefix of no tokens before the scales.
        Case::table(&[[1, 1, 0], [1, 1, 1], [1, 2, 2]], |q, k| if k <= q { Rule::Full } else { Rule::Hidden }),
        // Some rows of a tile see nothing, and one tile of two.
        Case {
            groups: Some(2),
            ..Case::table(&[[1, 3, 3], [1, 10, 10], [1, 2, 2]], |q, k| [Rule::Hidden, Rule::Full][q * k % 2])
        },
    ];
    for (device, variant) in places() {
        for case in &cases {
            check_all(&device, &Case { batch: case.batch.min(2), ..case.clone() }.on(variant));
        }
        // A segment that sees only what a length of 0 leaves, beside one that sees more.
        let case = Case::cross(&[[1, 1, 70], [1, 2, 2]], &[[1, 1, 30], [1, 3, 3]], |q, k| {
            [Rule::Full, Rule::Hidden][q.min(k)]
        });
        for groups in [1, 2, 3, 4].map(Some) {
            let case = Case { lengths: vec![None, Some(0)], heads: 2, kv_heads: 2, groups, ..case.clone() }.on(variant);
            let mut problem = case.problem::<bf16>();
            problem.lengths.fill(0);
            let ran = attend(&device, &case, &problem);
            Expected::of(&case, &problem).check(&case, &problem, &ran, path(&device)).unwrap();
            let all_zero = Case { lengths: vec![Some(0); 2], ..case.clone() };
            let ran = attend(&device, &all_zero, &problem);
            assert!(ran.out.iter().all(|x| x.to_f32() == 0.0) && ran.lse.iter().all(|&x| x == f32::NEG_INFINITY));
        }
    }
}

#[test]
fn extreme_logits() {
    for (device, variant) in places() {
        for data in [Data::Sharp, Data::Equal(16.0), Data::Equal(0.0), Data::Ramp(0.05), Data::Ramp(1.0)] {
            for groups in [1, 2, 4].map(Some) {
                let case = Case { data, scale: Some(1.0), groups, ..Case::var(&[1, 3, 7, 9, 11]) };
                check_all(&device, &case.on(variant));
            }
        }
        // Bounds at their limit: all logits at either end of it.
        for sign in [1.0f32, -1.0] {
            let case = Case { scale: Some(40.0), data: Data::Equal(0.125), ..Case::var(&[1, 3, 9]) }.on(variant);
            let mut problem = case.problem::<bf16>();
            for k in &mut problem.buffers[1] {
                *k = bf16::from_f32(k.to_f32() * sign);
            }
            problem.bound = Some(40.0);
            let ran = attend(&device, &case, &problem);
            Expected::of(&case, &problem).check(&case, &problem, &ran, path(&device)).unwrap();
        }
    }
}

/// A logit of -inf is as good as not seen; one of +inf or NaN makes the rows that see it NaN, and no other.
#[test]
fn infinite_and_undefined_logits() {
    fn run<T: Float>(device: &TestDevice, case: &Case, value: f32, key: usize) {
        let mut problem = case.problem::<T>();
        for x in &mut problem.buffers[0] {
            *x = T::from_f32(x.to_f32().abs());
        }
        let at = problem.k_at(case, 0, key, 0);
        problem.buffers[1][at..at + case.dim].fill(T::from_f32(value));
        let ran = attend(device, case, &problem);
        let keys = case.key_count();
        if value == f32::NEG_INFINITY {
            let sees = |_, _, row: usize, k: usize| problem.sees[row * keys + k] && k != key;
            let expected = Expected::with(case, &problem, f64::from(problem.scale), sees);
            return expected.check(case, &problem, &ran, path(device)).unwrap();
        }
        let sane = {
            let mut problem = problem.clone();
            problem.buffers[1][at..at + case.dim].fill(T::from_f32(0.5));
            problem
        };
        let mut with_sane = ran.clone();
        let right = attend(device, case, &sane);
        for row in 0..case.rows() {
            let (at, lse) = (problem.out.at(0, row, 0), problem.lse.at(0, 0, row));
            if problem.sees[row * keys + key] {
                let row = &mut with_sane.out[at..at + case.dim];
                assert!(
                    row.iter().all(|x| x.to_f32().is_nan()) && ran.lse[lse].is_nan(),
                    "{value}, {row:?}, {}",
                    ran.lse[lse]
                );
                row.copy_from_slice(&right.out[at..at + case.dim]);
                with_sane.lse[lse] = right.lse[lse];
            }
        }
        Expected::of(case, &sane).check(case, &sane, &with_sane, path(device)).unwrap();
    }
    for (device, variant) in places() {
        // The key of the first scale is seen by all, that of the last by its own scale.
        for (key, groups, splits) in
            [(0, Some(1), None), (14, Some(2), Some(2)), (60, Some(3), None), (120, None, Some(3))]
        {
            for value in [f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
                let case = Case { groups, splits, ..Case::var(&[1, 3, 7, 9]) }.on(variant);
                run::<bf16>(&device, &case, value, key);
                run::<f16>(&device, &case, value, key);
                if value != f32::INFINITY {
                    run::<bf16>(&device, &Case { bounded: true, ..case }, value, key);
                }
            }
        }
        run::<bf16>(&device, &Case::var(&[1]).on(variant), f32::NEG_INFINITY, 0);
    }
}

/// What a row does not see, finite as it is, leaves the row's bits alone.
#[test]
fn values_of_others_do_not_show() {
    fn run<T: Float>(device: &TestDevice, case: &Case) -> Result<(), TestCaseError> {
        let problem = case.problem::<T>();
        let before = attend(device, case, &problem);
        let mut rng = StdRng::seed_from_u64(case.seed);
        let (rows, keys) = (case.rows(), case.key_count());
        let live = |b, g, key| problem.exists(case, b, g, key) && (0..rows).any(|row| problem.sees[row * keys + key]);
        for _ in 0..2 {
            // Some keys of one head of one entry.
            let (b, g) = (rng.random_range(0..case.batch), rng.random_range(0..case.kv_heads));
            let first = rng.random_range(0..keys.max(1));
            let range = first..keys.min(first + [1, 30, keys][rng.random_range(0..3)]);
            let changed: Vec<usize> = range.filter(|&key| live(b, g, key)).collect();
            let mut other = problem.clone();
            for &key in &changed {
                let values: Vec<f32> = (0..case.dim).map(|_| rng.random_range(-30.0..30.0f32)).collect();
                let (k, v) = (problem.k_at(case, b, key, g), problem.v_at(case, b, key, g));
                case::put(&mut other.buffers[problem.k.buffer][k..], &values);
                case::put(&mut other.buffers[problem.v.buffer][v..], &values);
            }
            let after = attend(device, case, &other);
            for entry in 0..case.batch {
                for row in 0..rows {
                    for h in 0..case.heads {
                        let affected = entry == b && h / (case.heads / case.kv_heads) == g;
                        if affected && changed.iter().any(|&key| problem.sees[row * keys + key]) {
                            continue;
                        }
                        let bits = |ran| problem.row_bits(case, ran, [entry, row, h]);
                        prop_assert!(bits(&before) == bits(&after), "entry {}, row {}, head {}", entry, row, h);
                    }
                }
            }
        }
        Ok(())
    }
    for (device, variant) in places() {
        let run = runner(support::cases() / 4).run(&(case(Limits::of(&device)), any::<bool>()), |(case, half)| {
            let case = Case { bounded: false, shared_keys: false, ..case.on(variant) };
            if half { run::<f16>(&device, &case) } else { run::<bf16>(&device, &case) }
        });
        run.unwrap_or_else(|failure| panic!("{failure} on {device:?}, {variant:?}"));
    }
}

/// An entry's result does not depend on repetition, on what else is in the batch, or on where it stands there.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for (device, variant) in places() {
        let packed = {
            let case = Case::cross(&[[1, 7, 11]], &[[1, 1, 90], [1, 1, 60]], FULL);
            Case { lengths: vec![Some(0), Some(1)], packed_keys: true, memory: Memory::AnyOrder, ..case }
        };
        for case in [mixed(), packed, Case { memory: Memory::OneBuffer, gathers: true, ..mixed() }] {
            for (groups, splits) in [(1, 2), (2, 1), (4, 1)].map(|(groups, splits)| (Some(groups), Some(splits))) {
                let case = Case { batch: 5, heads: 2, kv_heads: 1, groups, splits, ..case.clone() }.on(variant);
                let problem = case.problem::<bf16>();
                let all = attend(&device, &case, &problem);
                assert_eq!(attend(&device, &case, &problem).bits(), all.bits());
                for b in [0, 2, 4] {
                    let (alone, entry) = problem.entry(&case, b);
                    let ran = attend(&device, &alone, &entry);
                    for row in 0..case.rows() {
                        for h in 0..case.heads {
                            let in_batch = problem.row_bits(&case, &all, [b, row, h]);
                            assert_eq!(
                                entry.row_bits(&alone, &ran, [0, row, h]),
                                in_batch,
                                "entry {b}, row {row}, head {h}"
                            );
                        }
                    }
                }
                if case.packed_keys || case.memory == Memory::OneBuffer {
                    continue;
                }
                // The others full of NaN.
                let mut others = problem.clone();
                for place in [problem.q, problem.k, problem.v] {
                    let kept: Vec<bf16> = problem.buffers[place.buffer].clone();
                    others.buffers[place.buffer].fill(case::poison());
                    let heads = if place.buffer == 0 { case.heads } else { case.kv_heads };
                    for row in 0..if place.buffer == 0 { problem.q_rows } else { problem.kv_rows } {
                        for h in 0..heads {
                            let at = place.at(2, row, h);
                            others.buffers[place.buffer][at..at + case.dim].copy_from_slice(&kept[at..at + case.dim]);
                        }
                    }
                }
                let ran = attend(&device, &case, &others);
                for (row, h) in (0..case.rows()).flat_map(|row| (0..case.heads).map(move |h| (row, h))) {
                    assert_eq!(problem.row_bits(&case, &ran, [2, row, h]), problem.row_bits(&case, &all, [2, row, h]));
                }
            }
        }
    }
}

/// The number of blocks, and the order in which they take the work, change nothing.
#[test]
fn the_same_on_any_device_that_is_cut_alike() {
    for (device, variant) in places() {
        for (groups, splits) in [(1, 1), (2, 3), (4, 1)].map(|(groups, splits)| (Some(groups), Some(splits))) {
            let case = Case { batch: 3, heads: 2, groups, splits, ..mixed() }.on(variant);
            let problem = case.problem::<f16>();
            let all = attend(&device, &case, &problem);
            // Half of L2 holds K and V of that many of the six heads.
            for (sm_count, kv_heads_at_once) in [(1, 100), (2, 1), (7, 4), (132, 5), (10_000, 0)] {
                let mut other = case.clone();
                let l2_bytes = 2 * kv_heads_at_once * 4 * case.key_count() * case.dim;
                (other.device.sm_count, other.device.l2_bytes) = (sm_count, l2_bytes as i64);
                let ran = attend(&device, &other, &problem);
                assert_eq!(ran.bits(), all.bits());
            }
        }
    }
}

/// A schedule that is not the plan's is noticed by every item: nothing is written.
#[test]
fn a_schedule_of_another_plan_is_noticed() {
    for (device, variant) in places().into_iter().filter(|(device, _)| !device.is_host()) {
        for splits in [1, 2].map(Some) {
            let case = Case { splits, ..mixed() }.on(variant);
            let problem = case.problem::<bf16>();
            let plan = problem.plan(&case);
            let need = plan.schedule().words().len();
            let others = [
                Case { groups: Some(1), pack_heads: Some(true), ..mixed() }.on(variant),
                Case { splits, ..models().swap_remove(4) }.on(variant),
                Case { rules: Case::table(&mixed().keys, FULL).rules, splits, ..mixed() }.on(variant),
            ];
            let words = others.iter().map(|other| other.problem::<bf16>().plan(other).schedule().words().to_vec());
            for mut words in words.chain([vec![0; need], vec![u32::MAX; need], vec![1; need]]) {
                words.resize(words.len().max(need), 0);
                assert_ne!(words[..need], *plan.schedule().words());
                let mut loaded = Loaded::new(&device, &case, &problem, &plan);
                loaded.schedule = Buffer::of(&device, &words, 0);
                let ran = plan.run(&device.stream(), loaded.args());
                ran.unwrap();
                loaded.assert_untouched();
            }
        }
    }
}

/// The comparison must be able to fail.
#[test]
fn a_broken_attention_is_caught() {
    fn run<T: Float>() {
        let case = Case { groups: Some(2), ..Case::var(&[1, 2, 3, 5, 7, 9, 11]) };
        let problem = case.problem::<T>();
        let (rows, keys) = (case.rows(), case.key_count());
        let scale = f64::from(problem.scale);
        let sees = |row: usize, key: usize| problem.sees[row * keys + key];
        let ran = attend(&TestDevice::Host, &case, &problem);
        let verdict = |expected: &Expected, ran: &Ran<T>| expected.check(&case, &problem, ran, Path::Kernel);
        let without_lse = |expected: &Expected, ran: &Ran<T>| {
            let case = Case { lse: false, ..case.clone() };
            expected.check(&case, &problem, ran, Path::Kernel)
        };
        let right = Expected::of(&case, &problem);
        verdict(&right, &ran).unwrap();

        // Of the last scale's 121 rows, one sees one key more or less, of 290; the scale is 1 % off.
        let row = rows - 50;
        let other = |key: usize, scale| {
            Expected::with(&case, &problem, scale, move |_, _, r, k| sees(r, k) != (r == row && k == key))
        };
        let err = |result: Result<(), String>| assert!(result.is_err());
        err(verdict(&other(keys - 1, scale), &ran));
        err(verdict(&other(100, scale), &ran));
        err(verdict(&other(keys, scale * 1.01), &ran));
        // All of them: even the values alone tell.
        let all = |range: std::ops::Range<usize>| {
            Expected::with(&case, &problem, scale, move |_, _, r, k| {
                sees(r, k) && !(r + 121 >= rows && range.contains(&k))
            })
        };
        err(without_lse(&all(100..101), &ran));
        err(without_lse(&all(keys - 1..keys), &ran));
        err(without_lse(&other(keys, scale * 1.1), &ran));

        // Sums that are not rescaled when the maximum grows, from one chunk of 128 to the next.
        let mut wrong = ran.clone();
        for row in 0..rows {
            let logits: Vec<f32> = (0..keys)
                .filter(|&key| sees(row, key))
                .map(|key| {
                    let (q, k) = (problem.q_of(&case, 0, row, 0), problem.k_of(&case, 0, key, 0));
                    q.iter().zip(k).map(|(q, k)| q.to_f32() * k.to_f32()).sum::<f32>() * problem.scale
                })
                .collect();
            let (mut most, mut sum, mut sums) = (f32::NEG_INFINITY, 0f32, vec![0f32; case.dim]);
            for (number, chunk) in logits.chunks(128).enumerate() {
                most = chunk.iter().fold(most, |most, &logit| most.max(logit));
                for (i, logit) in chunk.iter().enumerate() {
                    let weight = (logit - most).exp();
                    sum += weight;
                    let v = problem.v_of(&case, 0, number * 128 + i, 0);
                    sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight * v.to_f32());
                }
            }
            let values: Vec<f32> = sums.iter().map(|x| x / sum).collect();
            case::put(&mut wrong.out[problem.out.at(0, row, 0)..], &values);
            wrong.lse[problem.lse.at(0, 0, row)] = most + sum.ln();
        }
        err(verdict(&right, &wrong));
        err(without_lse(&right, &wrong));

        // Two rows exchanged, a value that is no number, a gap that is written.
        let mut swapped = ran.clone();
        swapped.out.rotate_right(case.dim);
        err(without_lse(&right, &swapped));
        let mut broken = ran.clone();
        broken.out[77] = T::from_f32(f32::NAN);
        err(verdict(&right, &broken));
        let mut broken = ran.clone();
        broken.lse[77] += 3e-4;
        err(verdict(&right, &broken));
        let gaps = Case { memory: Memory::AnyOrder, seed: 3, ..case.clone() };
        let problem = gaps.problem::<T>();
        let mut ran = attend(&TestDevice::Host, &gaps, &problem);
        let expected = Expected::of(&gaps, &problem);
        expected.check(&gaps, &problem, &ran, Path::Host).unwrap();
        let gap = ran.out.iter().position(|x| x.to_f32().is_nan()).expect("a gap");
        ran.out[gap] = T::from_f32(0.0);
        err(expected.check(&gaps, &problem, &ran, Path::Host));
    }
    run::<bf16>();
    run::<f16>();
    run::<f32>();
}

/// More than 2^31 elements from one batch entry, row or head to the next but one. Pages that nobody touches take no
/// memory.
#[test]
fn offsets_are_64_bit() {
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 8 GiB");
        return;
    }
    let case = Case { batch: 2, heads: 3, kv_heads: 3, ..Case::cross(&[[1, 1, 3]], &[[1, 1, 3]], FULL) };
    let near = case.problem::<bf16>();
    for (device, variant) in places() {
        let case = case.on(variant);
        let right = attend(&device, &case, &near);
        for (large, far) in [(0, (1usize << 31) + 64), (1, 1 << 30), (2, 1 << 30)] {
            // Rows of q, k and v side by side, one dimension far apart.
            let mut strides = [1 << 14, 1 << 10, 256];
            strides[large] = far;
            let place = |first| case::Place { buffer: 0, first, len: case::reach([2, 3, 3], strides, 64), strides };
            let (q, k, v) = (place(0), place(64), place(128));
            let mut data: Vec<bf16> = bytemuck::allocation::cast_vec(vec![0u16; v.first + v.len]);
            for (from, to) in [(near.q, q), (near.k, k), (near.v, v)] {
                for (b, row, h) in (0..18).map(|i| (i / 9, i / 3 % 3, i % 3)) {
                    let from = &near.buffers[from.buffer][from.at(b, row, h)..][..64];
                    data[to.at(b, row, h)..][..64].copy_from_slice(from);
                }
            }
            let problem = Problem { buffers: Vec::new(), q, k, v, out: place(0), ..near.clone() };
            let plan = problem.plan(&Case { memory: Memory::OneBuffer, lse: false, ..case.clone() });
            let words = Buffer::of(&device, plan.schedule().words(), 0);
            let inputs = Inputs::new(&device, data);
            let [q, k, v] = [q, k, v].map(|place| inputs.view(place.first, place.len));
            let mut out = Inputs::new(&device, bytemuck::allocation::cast_vec(vec![0u16; problem.out.len]));
            let ran = plan.run(
                &device.stream(),
                ScaleAttentionArgs {
                    q,
                    k,
                    v,
                    out: out.view_mut(),
                    lse: None,
                    schedule: words.input(),
                    lengths: None,
                    row_index: None,
                    kv_offset: None,
                    workspace: None,
                },
            );
            ran.unwrap();
            let ran = out.read();
            for (b, row, h) in (0..18).map(|i| (i / 9, i / 3 % 3, i % 3)) {
                let (at, near_at) = (problem.out.at(b, row, h), near.out.at(b, row, h));
                assert_eq!(ran[at..at + 64], right.out[near_at..near_at + 64]);
            }
        }
    }
}

/// A large buffer: on the host and the emulator without a copy.
enum Inputs {
    Here(TestDevice, Vec<bf16>),
    There(Buffer<bf16>),
}

impl Inputs {
    fn new(device: &TestDevice, data: Vec<bf16>) -> Self {
        let here = device.is_host() || device.is_emulated();
        if here { Inputs::Here(device.clone(), data) } else { Inputs::There(Buffer::of(device, &data, 0)) }
    }

    fn view(&self, first: usize, len: usize) -> In<'_, bf16> {
        match self {
            #[cfg(feature = "emulate")]
            Inputs::Here(device, data) if device.is_emulated() => In::emulated(&data[first..first + len]),
            Inputs::Here(_, data) => In::host(&data[first..first + len]),
            Inputs::There(buffer) => buffer.input_from(first, len),
        }
    }

    fn view_mut(&mut self) -> Out<'_, bf16> {
        match self {
            Inputs::Here(_device, data) => {
                #[cfg(feature = "emulate")]
                if _device.is_emulated() {
                    return Out::emulated(data);
                }
                Out::host(data)
            }
            Inputs::There(buffer) => buffer.output(),
        }
    }

    fn read(self) -> Vec<bf16> {
        match self {
            Inputs::Here(_, data) => data,
            Inputs::There(buffer) => buffer.read(),
        }
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<ScaleAttention<bf16>>();
    let plan = |case: &Case| case.problem::<bf16>().plan(case);
    let case = mixed();
    assert_eq!(plan(&case), plan(&case));
    for other in [
        Case { batch: 3, ..case.clone() },
        Case { scale: Some(1.0), ..case.clone() },
        Case { groups: Some(1), ..case.clone() },
        Case { splits: Some(2), ..case.clone() },
        Case { rules: Case::table(&case.keys, FULL).rules, ..case.clone() },
    ] {
        assert_ne!(plan(&case), plan(&other));
    }
    let pairs = case.sees().iter().filter(|sees| **sees).count() as u64;
    assert_eq!(plan(&case).useful_flops(), pairs * 2 * 4 * 4 * 64);
    assert_eq!(plan(&case).workspace_bytes(), 0);
    // Of two splits, sums of 64 and a log-sum-exp for each row.
    let split = plan(&Case { splits: Some(2), ..case.clone() });
    assert_eq!(split.workspace_bytes(), 2 * 2 * 4 * case.rows() as u64 * 65 * 4);
}

//! What only a GPU has: streams, graphs, an engine's slices.

use std::sync::Arc;

use nextscale::attention::{ScaleAttentionArgs, Variant};
use nextscale::cudarc_0_19::{AsIn, AsOut};
use nextscale::{DeviceInfo, Error, bf16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::case::{Case, Loaded, Problem, Ran, attend};
use crate::mixed;
use crate::oracle::{Expected, Path};
use crate::support::{self, TestDevice};

type CudaStream = nextscale::cudarc_0_19::cudarc::driver::CudaStream;

fn gpus() -> Option<[Arc<CudaStream>; 2]> {
    let stream = || match TestDevice::cuda()? {
        TestDevice::Cuda(stream) => Some(stream),
        _ => None,
    };
    Some([stream()?, stream()?])
}

/// The kernel of choice.
fn of(stream: &Arc<CudaStream>, case: Case) -> Case {
    Case { device: DeviceInfo::of(stream).unwrap(), groups: Some(1), ..case }.on(Variant::Auto)
}

/// Every key finite, so that lengths may change.
fn without_nan(mut problem: Problem<bf16>) -> Problem<bf16> {
    let mut rng = StdRng::seed_from_u64(11);
    for x in problem.buffers.iter_mut().flatten().filter(|x| x.is_nan()) {
        *x = bf16::from_f32(rng.random_range(-2.0..2.0f32));
    }
    problem
}

#[test]
fn slices_and_views_run_on_their_own_stream_only() {
    let Some([stream, other]) = gpus() else { return };
    let case = of(&stream, Case::var(&[1, 3, 9]));
    let problem = case.problem::<bf16>();
    let plan = problem.plan(&case);
    let [q, k, v] = [0, 1, 2].map(|i| {
        let shifted: Vec<bf16> = [vec![bf16::NAN; 8], problem.buffers[i].clone()].concat();
        stream.clone_htod(&shifted).unwrap()
    });
    let schedule = stream.clone_htod(plan.schedule().words()).unwrap();
    let mut out = stream.alloc_zeros::<bf16>(problem.out.len + 16).unwrap();
    let mut lse = stream.alloc_zeros::<f32>(problem.lse.len).unwrap();
    let mut run = |on: &Arc<CudaStream>| {
        plan.run(
            on,
            ScaleAttentionArgs {
                q: q.slice(8..).as_in(on),
                k: k.slice(8..).as_in(&stream),
                v: v.slice(8..).as_in(on),
                out: out.slice_mut(8..8 + problem.out.len).as_out(on),
                lse: Some(lse.as_out(on)),
                schedule: schedule.as_in(on),
                lengths: None,
                row_index: None,
                kv_offset: None,
                workspace: None,
            },
        )
    };
    assert_eq!(run(&other), Err(Error::StreamMismatch { arg: "k" }));
    run(&stream).unwrap();
    let all = stream.clone_dtoh(&out).unwrap();
    assert!(all[..8].iter().chain(&all[8 + problem.out.len..]).all(|x| x.to_bits() == 0));
    let ran = Ran { out: all[8..8 + problem.out.len].to_vec(), lse: stream.clone_dtoh(&lse).unwrap() };
    Expected::of(&case, &problem).check(&case, &problem, &ran, Path::Kernel).unwrap();
}

/// A captured graph replays with the lengths of the moment.
#[test]
fn graphs_replay() {
    let Some([stream, _]) = gpus() else { return };
    let device = TestDevice::Cuda(stream.clone());
    for splits in [1, 2].map(Some) {
        let case = of(&stream, Case { splits, ..mixed() });
        let mut problem = without_nan(case.problem());
        let plan = problem.plan(&case);
        let mut loaded = Loaded::new(&device, &case, &problem, &plan);
        let ran = plan.run(&stream, loaded.args()); // loads the code
        ran.unwrap();
        let mut lengths = stream.clone_htod(&problem.lengths).unwrap();
        let graph = support::capture(&stream, || {
            let mut args = loaded.args();
            args.lengths = Some(lengths.as_in(&stream));
            plan.run(&stream, args).unwrap();
        });
        for replay in [0, 21, 1, 20, 7] {
            let next: Vec<i32> = (0..problem.lengths.len() as i32).map(|i| (replay + i) % 22).collect();
            stream.memcpy_htod(&next, &mut lengths).unwrap();
            graph.launch().unwrap();
            problem.lengths = next;
            let ran = loaded.read();
            Expected::of(&case, &problem).check(&case, &problem, &ran, Path::Kernel).unwrap();
            let eager = attend(&device, &case, &problem);
            assert_eq!(ran.bits(), eager.bits());
        }
    }
}

/// Two streams at once give what one after the other gives.
#[test]
fn streams_do_not_disturb_each_other() {
    let Some([first, second]) = gpus() else { return };
    let case = of(&first, Case { heads: 8, kv_heads: 8, ..Case::var(&[1, 2, 3, 4, 5, 6, 8, 10, 13, 16]) });
    let problem = case.problem::<bf16>();
    let plan = problem.plan(&case);
    let devices = [TestDevice::Cuda(first), TestDevice::Cuda(second)];
    let mut loaded: Vec<_> = (0..8).map(|i| Loaded::new(&devices[i % 2], &case, &problem, &plan)).collect();
    devices.iter().for_each(TestDevice::sync);
    for (i, loaded) in loaded.iter_mut().enumerate() {
        plan.run(&devices[i % 2].stream(), loaded.args()).unwrap();
    }
    let expected = loaded[0].read();
    Expected::of(&case, &problem).check(&case, &problem, &expected, Path::Kernel).unwrap();
    assert!(loaded.iter().all(|loaded| loaded.read().bits() == expected.bits()));
}

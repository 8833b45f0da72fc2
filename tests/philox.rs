//! Philox against the published known answers and across devices.

mod support;

use nextscale::philox::{self, PhiloxFill};
use nextscale::{Error, Out, Stream};
use support::{Buffer, TestDevice};

/// From Random123's kat_vectors (philox4x32, 10 rounds): counter, key, words.
const KNOWN: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
    ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
    ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
    (
        [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
        [0xa4093822, 0x299f31d0],
        [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
    ),
];

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[test]
fn known_answers() {
    for (counter, key, words) in KNOWN {
        let (seed, position) = (join(key[0], key[1]), join(counter[0], counter[1]));
        assert_eq!(philox::block(seed, position, counter[2], counter[3]), words);
        for device in TestDevice::all() {
            let mut out = Buffer::<u32>::poisoned(&device, 4, 0);
            PhiloxFill::new(seed, 1)
                .first_position(position)
                .domain(counter[2])
                .draw(counter[3])
                .run(&device.stream(), out.output())
                .unwrap();
            assert_eq!(out.read(), words, "{device:?}");
        }
    }
}

#[test]
fn every_device_draws_the_same() {
    for device in TestDevice::kernels() {
        for positions in [0u64, 1, 255, 256, 257, 5000] {
            // Across the wrap of the low counter word, and of the whole position.
            for first in [0, u64::from(u32::MAX) - 100, u64::MAX - 100] {
                let fill = PhiloxFill::new(0x0123_4567_89ab_cdef, positions).first_position(first).domain(3).draw(9);
                let len = positions as usize * 4;
                let (mut host, mut uniform_host) = (vec![0u32; len], vec![0f32; len]);
                fill.run(&Stream::host(), Out::host(&mut host)).unwrap();
                fill.run(&Stream::host(), Out::host(&mut uniform_host)).unwrap();
                let mut out = Buffer::<u32>::poisoned(&device, len, 0);
                let mut uniform = Buffer::<f32>::poisoned(&device, len, 0);
                fill.run(&device.stream(), out.output()).unwrap();
                fill.run(&device.stream(), uniform.output()).unwrap();
                assert_eq!(out.read(), host);
                assert_eq!(uniform.read(), uniform_host);
            }
        }
    }
}

#[test]
fn uniforms_fill_the_unit_interval() {
    assert_eq!(philox::uniform(0), 0.0);
    assert_eq!(philox::uniform(u32::MAX), 1.0 - f32::EPSILON / 2.0);
    let mut out = vec![0f32; 40_000];
    PhiloxFill::new(7, 10_000).run(&Stream::host(), Out::host(&mut out)).unwrap();
    let mean = out.iter().map(|&u| f64::from(u)).sum::<f64>() / out.len() as f64;
    // Five standard errors.
    assert!((mean - 0.5).abs() < 5.0 * (1.0 / 12f64).sqrt() / (out.len() as f64).sqrt(), "{mean}");
}

#[test]
fn bad_input_is_refused() {
    let mut short = [0u32; 7];
    let fill = PhiloxFill::new(1, 2);
    assert_eq!(fill.run(&Stream::host(), Out::host(&mut short)), Err(Error::Length { arg: "out", need: 8, got: 7 }));
    let huge = PhiloxFill::new(1, 1 << 40).run(&Stream::host(), Out::host(&mut short));
    assert!(matches!(huge, Err(Error::Size { arg: "positions", .. })));
    for device in TestDevice::kernels() {
        let mut shifted = Buffer::<u32>::poisoned(&device, 8, 1);
        assert_eq!(fill.run(&device.stream(), shifted.output()), Err(Error::Alignment { arg: "out", need: 16 }));
    }
}

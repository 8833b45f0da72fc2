//! The harness itself: that what should fail does.

mod support;

use support::{Buffer, POISON_BYTE, TestDevice, Tolerance};

#[test]
fn buffers_round_trip_at_any_shift() {
    for device in TestDevice::all() {
        for shift in 0..5 {
            let elements: Vec<u16> = (0..300).collect();
            assert_eq!(Buffer::of(&device, &elements, shift).read(), elements);
            assert_eq!(Buffer::<u8>::poisoned(&device, 77, shift).read(), [POISON_BYTE; 77]);
        }
    }
}

#[test]
#[should_panic(expected = "canary written at byte 8")]
fn a_write_past_the_end_is_noticed() {
    let mut buffer = Buffer::<f32>::poisoned(&TestDevice::Host, 2, 0);
    buffer.scribble(8, 0);
    buffer.read();
}

#[test]
#[should_panic(expected = "canary written at byte -1")]
fn a_write_before_the_start_is_noticed() {
    let mut buffer = Buffer::<f32>::poisoned(&TestDevice::Host, 2, 1);
    buffer.scribble(-1, 0);
    buffer.read();
}

#[test]
fn tolerances_refuse() {
    let tolerance = Tolerance::rounded_to(8);
    let reference = [1.0, -2.0, 0.0];
    assert_eq!(tolerance.check(&[1.0, -2.0, 0.0], &reference), Ok(()));
    assert_eq!(tolerance.check(&[1.003, -2.0, 0.0], &reference), Ok(()));
    assert!(tolerance.check(&[1.01, -2.0, 0.0], &reference).is_err());
    assert!(tolerance.check(&[f64::NAN, -2.0, 0.0], &reference).is_err());
    assert!(tolerance.check(&[1.0, -2.0, f64::INFINITY], &reference).is_err());
    assert!(tolerance.check(&[1.0, -2.0], &reference).is_err());
    // Each element within its bound, all of them off by nearly as much: the norm notices a bias.
    let strict = Tolerance { atol: 0.0, rtol: 0.01, rel_l2: 0.001 };
    assert!(strict.check(&[1.009, 1.009], &[1.0, 1.0]).is_err());
}

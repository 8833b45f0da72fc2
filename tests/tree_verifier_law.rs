//! What a lossless rule emits from trees over several steps has the law of the target: chi-square of whole sequences, with
//! drafts of the library's own drafter; and wrong rules fail the same test.

#![cfg(feature = "verification")]

mod support;
mod trees;
mod verification;

use nextscale::verification::{Drafts, Rule, Siblings};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::TestDevice;
use trees::{Flaw, How, run};
use verification::Chain;

/// Logits of a target, and of a drafter that is like it but for noise.
fn similar(vocab: usize, noise: f32, seed: u64) -> Chain {
    let mut rng = StdRng::seed_from_u64(seed);
    let target: Vec<f32> = (0..vocab * vocab).map(|_| rng.random_range(-2.0..2.0f32)).collect();
    let draft = target.iter().map(|x| x + rng.random_range(-noise..=noise)).collect();
    Chain { vocab, target, draft }
}

/// A drafter that ranks the tokens the other way round: most siblings fail.
fn reversed(vocab: usize, seed: u64) -> Chain {
    let Chain { target, .. } = similar(vocab, 0.0, seed);
    let draft = target.iter().map(|x| -0.7 * x).collect();
    Chain { vocab, target, draft }
}

/// How many standard deviations chi-square lies above its mean.
fn excess(chain: &Chain, how: &How, requests: usize, first: u32) -> f64 {
    let (counts, _) = run(chain, &TestDevice::Host, how, requests, first);
    let (chi, freedom) = chain.chi_square(&counts, first, how.temperature);
    (chi - freedom) / (2.0 * freedom).sqrt()
}

/// Three first drafts, then two, then one.
const BUSHY: [i32; 9] = [-1, 0, 0, 0, 1, 1, 3, 4, 6];
/// Four siblings.
const WIDE: [i32; 5] = [-1, 0, 0, 0, 0];
const CHAIN: [i32; 4] = [-1, 0, 1, 2];

const SIBLINGS: [Siblings; 2] = [Siblings::WithReplacement, Siblings::WithoutReplacement];

#[test]
fn lossless_rules_have_the_law_of_the_target() {
    for (name, chain) in [("similar", similar(5, 1.0, 1)), ("reversed", reversed(5, 2))] {
        for tree in [&BUSHY[..], &WIDE, &CHAIN] {
            for rule in [Rule::Match, Rule::Reject] {
                for kind in [Drafts::Deterministic, Drafts::Logits, Drafts::LogitsAndStats] {
                    for siblings in SIBLINGS {
                        // Where nothing depends on how siblings were drawn, once is enough.
                        let plain = rule == Rule::Match || kind == Drafts::Deterministic;
                        if plain && (siblings == SIBLINGS[1] || kind == Drafts::LogitsAndStats) {
                            continue;
                        }
                        let how = How::plain(tree, rule, kind, siblings);
                        let excess = excess(&chain, &how, 30_000, 3);
                        assert!(excess < 4.0, "{name} {tree:?} {rule:?} {kind:?} {siblings:?}: {excess}");
                    }
                }
            }
        }
    }
}

/// At other temperatures, and where siblings use up nearly all of a small vocabulary.
#[test]
fn temperatures_and_exhausted_vocabularies_have_the_law_too() {
    let chain = similar(4, 2.5, 3);
    for temperature in [0.6, 1.7] {
        for siblings in SIBLINGS {
            let mut how = How::plain(&WIDE, Rule::Reject, Drafts::Logits, siblings);
            how.temperature = temperature;
            let excess = excess(&chain, &how, 60_000, 3);
            assert!(excess < 4.0, "{siblings:?} at {temperature}: {excess}");
        }
    }
}

/// Children that the library's drafter draws in one go have the law that the verifier takes them to have; distinct ones
/// have not that of independent ones.
#[test]
fn children_drawn_at_once_have_the_law_of_the_target() {
    for (name, chain) in [("similar", similar(5, 2.5, 11)), ("reversed", reversed(5, 2))] {
        for tree in [&BUSHY[..], &WIDE] {
            for kind in [Drafts::Logits, Drafts::LogitsAndStats] {
                for siblings in SIBLINGS {
                    let at_once = Some(siblings);
                    let how = How { at_once, ..How::plain(tree, Rule::Reject, kind, siblings) };
                    let excess = excess(&chain, &how, 30_000, 3);
                    assert!(excess < 4.0, "{name} {tree:?} {kind:?} {siblings:?}: {excess}");
                }
            }
        }
    }
    // The other way round they would have: independent draws of which repetitions are passed over are distinct ones.
    let how = How::plain(&WIDE, Rule::Reject, Drafts::Logits, Siblings::WithReplacement);
    let how = How { at_once: Some(Siblings::WithoutReplacement), flaw: Some(Flaw::None), ..how };
    let excess = excess(&similar(5, 2.5, 11), &how, 30_000, 3);
    assert!(excess > 10.0, "distinct ones taken for independent ones: {excess}");
}

#[test]
fn wrong_rules_do_not() {
    let reversed = reversed(5, 2);
    let different = similar(5, 2.5, 11);
    for siblings in SIBLINGS {
        let plain = How::plain(&WIDE, Rule::Reject, Drafts::Logits, siblings);
        // The oracle without a flaw passes, or nothing below would mean anything.
        for chain in [&reversed, &different] {
            let how = How { flaw: Some(Flaw::None), ..plain.clone() };
            let excess = excess(chain, &how, 30_000, 3);
            assert!(excess < 4.0, "{siblings:?}: {excess}");
        }
        for (flaw, chain) in [
            (Flaw::OriginalRatio, &reversed),
            (Flaw::OriginalRatio, &different),
            (Flaw::NotNormalised, &reversed),
            (Flaw::NoResidual, &reversed),
            (Flaw::Inverted, &different),
        ] {
            let excess = excess(chain, &How { flaw: Some(flaw), ..plain.clone() }, 30_000, 3);
            assert!(excess > 10.0, "{flaw:?} {siblings:?}: {excess}");
        }
        // After many siblings little is left to draw from: one is enough to see it.
        let how = How { shares_noise: true, ..How::plain(&[-1, 0, 1], Rule::Reject, Drafts::Logits, siblings) };
        let excess = excess(&reversed, &how, 30_000, 3);
        assert!(excess > 10.0, "shared noise, {siblings:?}: {excess}");
    }
    let plain = How::plain(&WIDE, Rule::Reject, Drafts::Logits, Siblings::WithoutReplacement);
    let excess = excess(&different, &How { flaw: Some(Flaw::ForgetsReplacement), ..plain }, 30_000, 3);
    assert!(excess > 10.0, "forgets replacement: {excess}");
}

/// More siblings, more accepted; distinct ones more than independent ones; never fewer than target-only sampling.
#[test]
fn more_siblings_accept_more() {
    let chain = similar(5, 1.5, 7);
    let accepted = |tree: &[i32], rule, siblings| {
        let how = How::plain(tree, rule, Drafts::Logits, siblings);
        run(&chain, &TestDevice::Host, &how, 20_000, 3).1
    };
    let [independent, distinct] = SIBLINGS;
    let one = accepted(&[-1, 0], Rule::Reject, independent);
    let four = accepted(&WIDE, Rule::Reject, independent);
    let of_distinct = accepted(&WIDE, Rule::Reject, distinct);
    let by_match = accepted(&WIDE, Rule::Match, independent);
    assert!(one < four && four < of_distinct, "{one} {four} {of_distinct}");
    assert!(by_match < four, "{by_match} {four}");
}

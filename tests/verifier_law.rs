//! What a lossless rule emits over several steps has the law of the target: chi-square of whole sequences, with drafts of
//! the library's own drafter; and wrong rules fail the same test.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::verification::{Drafts, Rule};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::TestDevice;
use verification::{Chain, Draws, Flaw, How, draft_draws, draws};

/// Logits of a target, and of a drafter that is like it but for noise.
fn similar(vocab: usize, noise: f32, seed: u64) -> Chain {
    let mut rng = StdRng::seed_from_u64(seed);
    let target: Vec<f32> = (0..vocab * vocab).map(|_| rng.random_range(-2.0..2.0f32)).collect();
    let draft = target.iter().map(|x| x + rng.random_range(-noise..=noise)).collect();
    Chain { vocab, target, draft }
}

/// A drafter that ranks the tokens the other way round: rejections are the rule, and all goes through the residual.
fn reversed(vocab: usize, seed: u64) -> Chain {
    let Chain { target, .. } = similar(vocab, 0.0, seed);
    let draft = target.iter().map(|x| -0.7 * x).collect();
    Chain { vocab, target, draft }
}

/// How many standard deviations chi-square lies above its mean.
fn excess(chain: &Chain, device: &TestDevice, how: How, requests: usize, first: u32) -> f64 {
    let (counts, _) = chain.run(device, how, requests, first);
    let (chi, freedom) = chain.chi_square(&counts, first, how.temperature);
    (chi - freedom) / (2.0 * freedom).sqrt()
}

const KINDS: [Drafts; 3] = [Drafts::Deterministic, Drafts::Logits, Drafts::LogitsAndStats];

#[test]
fn lossless_rules_have_the_law_of_the_target() {
    let device = TestDevice::Host;
    for (name, chain) in [("similar", similar(5, 1.0, 1)), ("reversed", reversed(5, 2))] {
        for rule in [Rule::Match, Rule::Reject, Rule::Block] {
            for kind in KINDS {
                for trials in [0, 3] {
                    if trials > 0 && (rule != Rule::Reject || kind == Drafts::Deterministic) {
                        continue;
                    }
                    let how = How { trials: Some(trials), ..How::plain(rule, kind) };
                    let excess = excess(&chain, &device, how, 60_000, 4);
                    assert!(excess < 4.0, "{name} {rule:?} {kind:?} {trials} trials: {excess}");
                }
            }
        }
    }
}

/// At other temperatures, and with as many drafts as tokens looked at.
#[test]
fn temperatures_and_longer_chains_have_the_law_too() {
    let chain = similar(4, 1.5, 3);
    for (temperature, drafts) in [(0.6, 5), (1.7, 1), (1.0, 6)] {
        for rule in [Rule::Match, Rule::Reject, Rule::Block] {
            let how = How { temperature, drafts, ..How::plain(rule, Drafts::LogitsAndStats) };
            let excess = excess(&chain, &TestDevice::Host, how, 60_000, 5);
            assert!(excess < 4.0, "{rule:?} at {temperature} with {drafts} drafts: {excess}");
        }
    }
}

/// Draws for the residual that are those of the drafter.
fn shared_with_the_drafter(seed: u64, position: u64, i: usize) -> Draws {
    let position = position - i as u64;
    Draws { residual: draft_draws(seed, position, i), ..draws(seed, position, i) }
}

/// Draws for the accept test that are those of the drafter.
fn accepts_by_the_draft(seed: u64, position: u64, i: usize) -> Draws {
    let position = position - i as u64;
    Draws { accept: draft_draws(seed, position, i)[2], ..draws(seed, position, i) }
}

#[test]
fn wrong_rules_do_not() {
    let device = TestDevice::Host;
    let (similar, reversed) = (similar(5, 1.0, 1), reversed(5, 2));
    let how = How::plain(Rule::Reject, Drafts::Logits);
    // The oracle without a flaw passes, or nothing below would mean anything.
    for rule in [Rule::Reject, Rule::Block] {
        let how = How { rule, flaw: Some(Flaw::None), ..how };
        let excess = excess(&similar, &device, how, 30_000, 3);
        assert!(excess < 4.0, "{rule:?}: {excess}");
    }
    for flaw in [Flaw::NoResidual, Flaw::TakesDraftsForDeterministic, Flaw::Inverted] {
        let excess = excess(&reversed, &device, How { flaw: Some(flaw), ..how }, 30_000, 3);
        assert!(excess > 10.0, "{flaw:?}: {excess}");
    }
    let different = self::similar(5, 2.5, 11);
    for (flaw, chain) in [(Flaw::BreaksAtFirstFailure, &similar), (Flaw::PlainResidual, &different)] {
        let how = How { rule: Rule::Block, flaw: Some(flaw), ..how };
        let excess = excess(chain, &device, how, 30_000, 3);
        assert!(excess > 10.0, "{flaw:?}: {excess}");
    }
    for instead in [shared_with_the_drafter, accepts_by_the_draft] as [fn(u64, u64, usize) -> Draws; 2] {
        let excess = excess(&reversed, &device, How { instead: Some(instead), ..how }, 30_000, 3);
        assert!(excess > 10.0, "{excess}");
    }
    // Whereas draws of one's own in place of the op's do no harm.
    let mine = |seed: u64, position: u64, i: usize| draws(seed ^ 1 << 60, position - i as u64, i);
    let excess = excess(&reversed, &device, How { instead: Some(mine), ..how }, 30_000, 3);
    assert!(excess < 4.0, "{excess}");
}

/// The acceptance that theory says: 1 - TV for rejection, more for blocks, p(d) for a deterministic draft.
#[test]
fn blocks_accept_more() {
    let chain = similar(5, 1.5, 7);
    let accepted = |rule| chain.run(&TestDevice::Host, How::plain(rule, Drafts::Logits), 20_000, 4).1;
    let (by_match, reject, block) = (accepted(Rule::Match), accepted(Rule::Reject), accepted(Rule::Block));
    assert!(by_match < reject && reject < block, "{by_match} {reject} {block}");
}

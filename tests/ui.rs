//! Misuse of the typed API that must not compile.

/// Compares the compiler's words, which change from one Rust to the next, and builds the dependencies once more: for CI.
#[test]
fn misuse_does_not_compile() {
    if std::env::var_os("NXS_UI_TESTS").is_none() {
        eprintln!("SKIPPED: NXS_UI_TESTS is not set");
        return;
    }
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}

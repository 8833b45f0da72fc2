//! The header is C99 and C++17, its structs are laid out as `src/ffi.rs` says, and the numbers in Rust are those in C.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nextscale::DType;

const HEADER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/include");
const FFI: &str = include_str!("../src/ffi.rs");

/// The host compiler for a language, without cargo's build-script environment.
fn compiler(cpp: bool) -> Command {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    cc::Build::new()
        .cpp(cpp)
        .target(&triple)
        .host(&triple)
        .opt_level(0)
        .cargo_metadata(false)
        .get_compiler()
        .to_command()
}

fn build_and_run(name: &str, source: &str) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (file, program): (PathBuf, PathBuf) = (folder.join(format!("{name}.c")), folder.join(name));
    fs::write(&file, source).unwrap();
    let mut command = compiler(false);
    command.args(["-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-I", HEADER, "-o"]);
    let built = command.arg(&program).arg(&file).status().unwrap();
    assert!(built.success());
    String::from_utf8(Command::new(program).output().unwrap().stdout).unwrap()
}

#[test]
fn compiles_as_c99_and_as_cpp17() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join("include.c");
    fs::write(&file, "#include \"nextscale.h\"\n").unwrap();
    for (cpp, standard, language) in [(false, "-std=c99", "c"), (true, "-std=c++17", "c++")] {
        let mut command = compiler(cpp);
        command.args([standard, "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", language]);
        assert!(command.args(["-I", HEADER]).arg(&file).status().unwrap().success(), "{standard}");
    }
}

/// bindgen wrote the layout that libclang computed into `ffi.rs` as assertions; here the C compiler states its own.
#[test]
fn structs_are_laid_out_alike() {
    let mut source = String::from("#include \"nextscale.h\"\n#include <stdio.h>\nint main(void) {\n");
    let mut expected = String::new();
    // ["Size of S"][size_of::<S>() - 24usize]; ["Offset of field: S::f"][offset_of!(S, f) - 8usize];
    let flat = FFI.split_whitespace().collect::<Vec<_>>().join(" ");
    for assertion in flat.split("[\"").skip(1) {
        let (what, rest) = assertion.split_once("\"]").unwrap();
        let number = rest.split("usize]").next().unwrap().rsplit("- ").next().unwrap();
        let expression = if let Some(name) = what.strip_prefix("Size of ") {
            format!("sizeof({name})")
        } else if let Some(field) = what.strip_prefix("Offset of field: ") {
            format!("offsetof({})", field.replace("::", ", "))
        } else {
            continue;
        };
        writeln!(source, "  printf(\"%s %zu\\n\", \"{expression}\", {expression});").unwrap();
        writeln!(expected, "{expression} {number}").unwrap();
    }
    source.push_str("  return 0;\n}\n");
    assert!(expected.contains("sizeof(nxs_rvq_decode_params)"), "{expected}");
    assert_eq!(build_and_run("layout", &source), expected);
}

#[test]
fn dtypes_have_the_numbers_of_the_header() {
    let dtypes = [
        ("NXS_F32", DType::F32),
        ("NXS_F16", DType::F16),
        ("NXS_BF16", DType::BF16),
        ("NXS_F8_E4M3", DType::F8E4M3),
        ("NXS_I8", DType::I8),
        ("NXS_U8", DType::U8),
        ("NXS_U16", DType::U16),
        ("NXS_I32", DType::I32),
        ("NXS_U32", DType::U32),
        ("NXS_I64", DType::I64),
    ];
    let mut source = String::from("#include \"nextscale.h\"\n#include <stdio.h>\nint main(void) {\n");
    let mut expected = String::new();
    for (name, dtype) in dtypes {
        writeln!(source, "  printf(\"%d \", {name});").unwrap();
        write!(expected, "{} ", dtype as i32).unwrap();
    }
    source.push_str("  return 0;\n}\n");
    assert_eq!(build_and_run("dtypes", &source), expected);
}

#[cfg(feature = "verification")]
#[test]
fn rules_and_status_bits_have_the_numbers_of_the_header() {
    use nextscale::verification::{Confidence, Redraft, Rule, status};
    let numbers = [
        ("NXS_RULE_GREEDY", Rule::Greedy as u32),
        ("NXS_RULE_MATCH", Rule::Match as u32),
        ("NXS_RULE_REJECT", Rule::Reject as u32),
        ("NXS_RULE_BLOCK", Rule::Block as u32),
        ("NXS_REDRAFT_NONE", Redraft::None as u32),
        ("NXS_REDRAFT_INDEPENDENT", Redraft::Independent as u32),
        ("NXS_REDRAFT_MAXIMAL", Redraft::Maximal as u32),
        ("NXS_REDRAFT_GUMBEL", Redraft::Gumbel as u32),
        ("NXS_CONFIDENCE_PROBABILITY", Confidence::Probability as u32),
        ("NXS_CONFIDENCE_LOG_PROBABILITY", Confidence::LogProbability as u32),
        ("NXS_CONFIDENCE_MARGIN", Confidence::Margin as u32),
        ("NXS_CONFIDENCE_ENTROPY", Confidence::Entropy as u32),
        ("NXS_STATUS_TARGET_NAN", status::TARGET_NAN),
        ("NXS_STATUS_DRAFT_BAD", status::DRAFT_BAD),
        ("NXS_STATUS_TARGET_EMPTY", status::TARGET_EMPTY),
        ("NXS_STATUS_TARGET_BEYOND", status::TARGET_BEYOND),
        ("NXS_STATUS_DRAFT_IMPOSSIBLE", status::DRAFT_IMPOSSIBLE),
        ("NXS_STATUS_ROW_OUT_OF_RANGE", status::ROW_OUT_OF_RANGE),
        ("NXS_STATUS_DRAFTS_IGNORED", status::DRAFTS_IGNORED),
        ("NXS_STATUS_SEQUENCE_FULL", status::SEQUENCE_FULL),
        ("NXS_STATUS_TREE_BAD", status::TREE_BAD),
    ];
    let mut source = String::from("#include \"nextscale.h\"\n#include <stdio.h>\nint main(void) {\n");
    let mut expected = String::new();
    for (name, number) in numbers {
        writeln!(source, "  printf(\"{name} %u\\n\", (unsigned){name});").unwrap();
        writeln!(expected, "{name} {number}").unwrap();
    }
    source.push_str("  return 0;\n}\n");
    assert_eq!(build_and_run("rules", &source), expected);
}

/// `nextscale::emulator::Counters` is written by hand.
#[cfg(feature = "emulate")]
#[test]
fn counters_are_laid_out_alike() {
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/emulator/include/nextscale_emulator.h");
    let mut source = format!("#include \"{header}\"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n");
    let mut expected = String::new();
    let offsets = nextscale::emulator::Counters::default().named().map(|(name, _)| name).zip((0..).step_by(8));
    for (name, offset) in offsets {
        writeln!(source, "  printf(\"{name} %zu\\n\", offsetof(nxs_emulator_counts, {name}));").unwrap();
        writeln!(expected, "{name} {offset}").unwrap();
    }
    source.push_str("  printf(\"%zu\", sizeof(nxs_emulator_counts));\n  return 0;\n}\n");
    write!(expected, "{}", size_of::<nextscale::emulator::Counters>()).unwrap();
    assert_eq!(build_and_run("counters", &source), expected);
}

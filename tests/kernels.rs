//! Gates on what the compiler made of the kernels, with no GPU: registers, spills and stack against
//! `kernels/budget.toml`, and the instructions meant in the machine code of every architecture.

#![cfg(all(feature = "cuda", feature = "quantization"))]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Budgets {
    budget: Vec<Budget>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    kernel: String,
    registers: u32,
    spills: u32,
    stack: u32,
    #[serde(default)]
    sass: BTreeMap<String, Vec<String>>,
}

/// One entry function on one architecture, as ptxas reports it.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    kernel: String,
    arch: String,
    registers: u32,
    spills: u32,
    stack: u32,
}

fn budgets() -> Vec<Budget> {
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/budget.toml")).unwrap();
    toml::from_str::<Budgets>(&text).unwrap().budget
}

fn parse(report: &str) -> Vec<Usage> {
    let number = |line: &str, after: &str, before: &str| -> Option<u32> {
        let end = line.find(before)?;
        let start = line[..end].rfind(after).map_or(0, |at| at + after.len());
        line[start..end].trim().parse().ok()
    };
    let mut usages: Vec<Usage> = Vec::new();
    // After a kernel's own properties follow those of the functions that it calls, which are called rarely.
    let mut function = "";
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut parts = rest.split('\'');
            let kernel = parts.next().unwrap().to_string();
            let arch = parts.nth(1).unwrap().to_string();
            usages.push(Usage { kernel, arch, ..Usage::default() });
        } else if let Some(name) = line.split("Function properties for ").nth(1) {
            function = name;
        } else if let Some(usage) = usages.last_mut() {
            if line.contains("bytes stack frame") && function == usage.kernel {
                usage.stack = number(line, " ", " bytes stack frame").unwrap();
                usage.spills = number(line, ", ", " bytes spill stores").unwrap()
                    + number(line, ", ", " bytes spill loads").unwrap();
            } else if line.contains("Used ") {
                usage.registers = number(line, "Used ", " registers").unwrap();
            }
        }
    }
    usages
}

/// Every way in which a kernel exceeds its budget or has none.
fn excesses(usages: &[Usage], budgets: &[Budget]) -> Vec<String> {
    let mut excesses = Vec::new();
    for usage in usages {
        match budgets.iter().find(|budget| usage.kernel.contains(&budget.kernel)) {
            None => excesses.push(format!("{}: no entry in kernels/budget.toml", usage.kernel)),
            Some(budget) => {
                let over = usage.registers > budget.registers
                    || usage.spills > budget.spills
                    || usage.stack > budget.stack
                    || usage.registers == 0;
                if over {
                    excesses.push(format!("over budget: {usage:?}"));
                }
            }
        }
    }
    excesses
}

#[test]
fn kernels_stay_within_their_budget() {
    let report = fs::read_to_string(env!("NXS_PTXAS_REPORT")).unwrap();
    let usages = parse(&report);
    assert!(!usages.is_empty(), "the report names no kernel");
    let excesses = excesses(&usages, &budgets());
    assert!(excesses.is_empty(), "{}", excesses.join("\n"));
    // A budget for a kernel that is gone would hide a renamed one.
    for budget in budgets() {
        assert!(usages.iter().any(|usage| usage.kernel.contains(&budget.kernel)), "no kernel {}", budget.kernel);
    }
}

#[test]
fn an_excess_is_noticed() {
    let report = "\
ptxas info    : Compiling entry function '_Zphilox_fill_kernelv' for 'sm_90a'
ptxas info    : Function properties for _Zphilox_fill_kernelv
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 368 bytes cmem[0]
ptxas info    : Function properties for _Zcalled
    0 bytes stack frame, 100 bytes spill stores, 100 bytes spill loads
ptxas info    : Compiling entry function '_Zunknownv' for 'sm_80'
ptxas info    : Used 10 registers
";
    let usages = parse(report);
    let expected =
        Usage { kernel: "_Zphilox_fill_kernelv".into(), arch: "sm_90a".into(), registers: 40, spills: 12, stack: 16 };
    assert_eq!(usages[0], expected);
    assert_eq!(excesses(&usages, &budgets()).len(), 2);
}

#[test]
fn machine_code_has_the_instructions_meant() {
    let cuobjdump = Path::new(env!("NXS_CUDA_ROOT")).join("bin/cuobjdump");
    let Ok(output) = Command::new(&cuobjdump).arg("-sass").arg(env!("NXS_KERNEL_LIBRARY")).output() else {
        assert!(std::env::var_os("NXS_REQUIRE_SASS").is_none(), "no {}", cuobjdump.display());
        eprintln!("SKIPPED: no {}", cuobjdump.display());
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    // (architecture, budget) -> the opcodes of all its instances
    let budgets = budgets();
    let mut opcodes: BTreeMap<(String, usize), BTreeSet<String>> = BTreeMap::new();
    let (mut arch, mut current) = (String::new(), None);
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("code for sm_") {
            arch = rest.to_string();
        } else if let Some(name) = line.strip_prefix("Function : ") {
            current = budgets.iter().position(|budget| name.contains(&budget.kernel));
        } else if let (Some(budget), true) = (current, line.starts_with("/*") && !line.starts_with("/* ")) {
            let instruction = line.split("*/").nth(1).unwrap_or("").trim();
            let opcode = instruction.split_whitespace().find(|word| !word.starts_with('@')).unwrap_or("");
            opcodes.entry((arch.clone(), budget)).or_default().insert(opcode.trim_end_matches(';').to_string());
        }
    }
    let archs: BTreeSet<&String> = opcodes.keys().map(|(arch, _)| arch).collect();
    assert!(!archs.is_empty(), "cuobjdump shows no machine code: {}", String::from_utf8_lossy(&output.stderr));
    for (i, budget) in budgets.iter().enumerate() {
        for arch in &archs {
            let wanted = ["all", arch.as_str()].into_iter().filter_map(|key| budget.sass.get(key)).flatten();
            for opcode in wanted {
                let present = opcodes.get(&(arch.to_string(), i)).is_some_and(|all| all.contains(opcode));
                assert!(
                    present,
                    "{} for sm_{arch} has no {opcode}: {:?}",
                    budget.kernel,
                    opcodes.get(&(arch.to_string(), i))
                );
            }
        }
    }
}

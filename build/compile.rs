//! Compiles what changed and archives all of it.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::SystemTime;

use crate::archs::Archs;
use crate::toolkit::Toolkit;

/// The files of a folder with an extension, sorted.
pub(crate) fn sources_in(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut sources: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    sources.retain(|path| path.extension().is_some_and(|found| found == extension));
    sources.sort();
    Ok(sources)
}

/// One source and what its compilation leaves in `OUT_DIR`.
struct Unit {
    source: PathBuf,
    object: PathBuf,
    /// Make rules of everything the object depends on, written by the compiler.
    depfile: PathBuf,
    /// What the compiler said, ptxas above all; its presence and first line (the command) mark the object as finished.
    report: PathBuf,
}

impl Unit {
    fn new(manifest: &Path, source: &Path, out: &Path) -> Self {
        let relative = source.strip_prefix(manifest).unwrap_or(source).with_extension("");
        let relative = relative.strip_prefix("kernels").unwrap_or(&relative);
        let name = relative.to_string_lossy().replace(['/', '\\'], "-");
        let file = |extension: &str| out.join(format!("{name}.{extension}"));
        Unit { source: source.to_path_buf(), object: file("o"), depfile: file("d"), report: file("said") }
    }

    /// The object was made by this very command, and nothing it read has changed since.
    fn is_fresh(&self, command: &str) -> bool {
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        let finished: Option<SystemTime> = modified(&self.object);
        let (Some(finished), Ok(report), Ok(rules)) =
            (finished, fs::read_to_string(&self.report), fs::read_to_string(&self.depfile))
        else {
            return false;
        };
        report.lines().next() == Some(command)
            && dependencies(&rules).iter().all(|path| modified(path).is_some_and(|time| time <= finished))
    }
}

/// The prerequisites in a make rule.
pub(crate) fn dependencies(rules: &str) -> Vec<PathBuf> {
    let prerequisites = rules.split_once(" : ").or_else(|| rules.split_once(": ")).map_or("", |(_, rest)| rest);
    let joined = prerequisites.replace("\\\n", " ").replace("\\\r\n", " ");
    // A blank inside a path is escaped; nothing else is.
    joined.replace("\\ ", "\0").split_whitespace().map(|path| PathBuf::from(path.replace('\0', " "))).collect()
}

/// Names the folder that finished objects are kept in, for builds of other profiles, features and checkouts.
pub(crate) const CACHE: &str = "NXS_KERNEL_CACHE";

/// What a compilation reads of ours: the source and, through its includes, the headers under `roots`. Headers of the
/// toolkit and of the host compiler are known by their versions.
fn contents(source: &Path, roots: &[PathBuf]) -> BTreeMap<PathBuf, String> {
    let (mut read, mut open) = (BTreeMap::new(), vec![source.to_path_buf()]);
    while let Some(path) = open.pop() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for line in text.lines() {
            let name = line.trim_start().strip_prefix("#include \"").and_then(|rest| rest.split('"').next());
            let Some(name) = name else { continue };
            let beside = path.parent().map(Path::to_path_buf);
            let found = beside.iter().chain(roots).map(|folder| folder.join(name)).find(|path| path.is_file());
            open.extend(found.filter(|found| !read.contains_key(found)));
        }
        read.insert(path, text);
    }
    read
}

/// Where the cache has or would have what comes of these contents: by the compiler, its flags, and all that it reads of
/// ours, wherever the checkout lies.
fn cached(cache: &Path, compiler: &Compiler, manifest: &Path, contents: &BTreeMap<PathBuf, String>) -> PathBuf {
    let within = |path: &Path| path.strip_prefix(manifest).unwrap_or(path).to_path_buf();
    let mut hash = DefaultHasher::new();
    compiler.version.hash(&mut hash);
    for word in &compiler.command[1..] {
        within(Path::new(word)).hash(&mut hash);
    }
    for (path, text) in contents {
        (within(path), text).hash(&mut hash);
    }
    cache.join(format!("{:016x}", hash.finish()))
}

/// A make rule of what was read, as the compiler would write it.
fn rules(contents: &BTreeMap<PathBuf, String>) -> String {
    let paths = contents.keys().map(|path| path.to_string_lossy().replace(' ', "\\ "));
    format!("object : {}\n", paths.collect::<Vec<_>>().join(" \\\n "))
}

/// What compiles the sources: nvcc, or a C++ compiler for the emulator.
pub(crate) struct Compiler {
    /// The command line but for the source and its outputs.
    pub(crate) command: Vec<OsString>,
    pub(crate) version: String,
    /// Where our own headers are looked for, in this order.
    pub(crate) roots: Vec<PathBuf>,
}

/// Compiles every source that is not fresh, as many at a time as cargo allows, and archives the objects as
/// `lib<library>.a`. Returns what the compiler said of them, collected.
pub(crate) fn compile(
    compiler: &Compiler,
    manifest: &Path,
    sources: &[PathBuf],
    out: &Path,
    library: &str,
) -> Result<PathBuf, String> {
    let units: Vec<Unit> = sources.iter().map(|source| Unit::new(manifest, source, out)).collect();
    let stamp = format!("# {} {:?}", compiler.version, compiler.command);
    let stale: Vec<&Unit> = units.iter().filter(|unit| !unit.is_fresh(&stamp)).collect();

    let cache = std::env::var_os(CACHE).filter(|name| !name.is_empty()).map(PathBuf::from);
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..jobs.min(stale.len()) {
            scope.spawn(|| {
                while let Some(unit) = stale.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let built = match &cache {
                        Some(cache) => compile_cached(compiler, manifest, unit, &stamp, cache),
                        None => compile_unit(&compiler.command, unit, &stamp),
                    };
                    if let Err(e) = built {
                        errors.lock().expect("no thread panics").push(e);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().expect("no thread panics");
    if !errors.is_empty() {
        return Err(errors.join("\n\n"));
    }

    let mut archive = cc::Build::new();
    archive.cargo_metadata(false).cargo_warnings(false).objects(units.iter().map(|unit| &unit.object));
    archive.try_compile(library).map_err(|e| format!("archiving failed: {e}"))?;

    let mut report = String::new();
    for unit in &units {
        report += &fs::read_to_string(&unit.report).map_err(|e| format!("{}: {e}", unit.report.display()))?;
    }
    let path = out.join("report.txt");
    fs::write(&path, report).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// nvcc, for these architectures.
pub(crate) fn nvcc(toolkit: &Toolkit, archs: &Archs, kernels: &Path) -> Result<Compiler, String> {
    // The host compiler of the target, as every other native dependency finds it.
    let host = cc::Build::new().cpp(true).cargo_metadata(false).try_get_compiler();
    let host = host.map_err(|e| format!("nvcc needs a C++ compiler: {e}"))?;
    let mut command: Vec<OsString> = vec![toolkit.nvcc.clone().into()];
    let mut flag = |flag: &str| command.push(flag.into());
    flag("-std=c++17");
    flag("-O3"); // in every profile: unoptimised device code is of no use to anyone
    // Line tables double the size of an object: with cargo's own debug information or not at all.
    if std::env::var("DEBUG").is_ok_and(|level| !matches!(level.as_str(), "false" | "0" | "none")) {
        flag("-lineinfo");
    }
    flag("-Xptxas=-v");
    flag("-Xfatbin=-compress-all"); // a fifth of the size
    if host.is_like_msvc() {
        flag("-Xcompiler=/O2");
    } else {
        // Launchers use no exceptions and no guarded statics, so that nothing of libstdc++ is linked.
        flag("-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-Wall,-Wextra");
    }
    for arch in archs.flags() {
        flag(&arch);
    }
    let roots = vec![kernels.to_path_buf(), kernels.join("include")];
    for folder in &roots {
        command.extend(["-I".into(), folder.into()]);
    }
    command.extend(["-ccbin".into(), host.path().into()]);
    Ok(Compiler { command, version: format!("{:?}", toolkit.version), roots })
}

/// Takes a unit from the cache, or compiles it and leaves it there. A cache that cannot be used is no error.
fn compile_cached(compiler: &Compiler, manifest: &Path, unit: &Unit, stamp: &str, cache: &Path) -> Result<(), String> {
    let contents = contents(&unit.source, &compiler.roots);
    let entry = cached(cache, compiler, manifest, &contents);
    // An interrupted build must not look finished.
    let _ = fs::remove_file(&unit.report);
    if let Ok(said) = fs::read_to_string(entry.join("said"))
        && fs::copy(entry.join("o"), &unit.object).is_ok()
        && fs::write(&unit.depfile, rules(&contents)).is_ok()
    {
        return report(unit, stamp, &said);
    }
    compile_unit(&compiler.command, unit, stamp)?;
    // Renamed when whole, as another build may look.
    let draft = entry.with_extension(std::process::id().to_string());
    let said = fs::read_to_string(&unit.report).unwrap_or_default();
    let said = said.split_once('\n').map_or("", |(_, said)| said);
    if fs::create_dir_all(&draft).is_ok()
        && fs::copy(&unit.object, draft.join("o")).is_ok()
        && fs::write(draft.join("said"), said).is_ok()
    {
        let _ = fs::rename(&draft, entry);
    }
    let _ = fs::remove_dir_all(&draft);
    Ok(())
}

fn report(unit: &Unit, stamp: &str, said: &str) -> Result<(), String> {
    fs::write(&unit.report, format!("{stamp}\n{said}")).map_err(|e| format!("{}: {e}", unit.report.display()))
}

fn compile_unit(compiler: &[OsString], unit: &Unit, stamp: &str) -> Result<(), String> {
    let mut command = Command::new(&compiler[0]);
    command.args(&compiler[1..]);
    // An interrupted build must not look finished.
    let _ = fs::remove_file(&unit.report);
    command.arg("-c").arg(&unit.source).arg("-o").arg(&unit.object).arg("-MD").arg("-MF").arg(&unit.depfile);
    let output = command.output().map_err(|e| format!("cannot run {:?}: {e}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let printed = String::from_utf8_lossy(&output.stdout);
        return Err(format!("compilation failed of {}:\n{printed}{said}", unit.source.display()));
    }
    report(unit, stamp, &said)
}

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
    /// Make rules of everything the object depends on, written by nvcc.
    depfile: PathBuf,
    /// What ptxas said; its presence and first line (the command) mark the object as finished.
    report: PathBuf,
}

impl Unit {
    fn new(kernels: &Path, source: &Path, out: &Path) -> Self {
        let relative = source.strip_prefix(kernels).unwrap_or(source).with_extension("");
        let name = relative.to_string_lossy().replace(['/', '\\'], "-");
        let file = |extension: &str| out.join(format!("{name}.{extension}"));
        Unit { source: source.to_path_buf(), object: file("o"), depfile: file("d"), report: file("ptxas") }
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

/// Names the folder that finished objects are kept in, for builds of other profiles and features.
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

/// Where the cache has or would have this unit: by the command without nvcc's place, and all that it reads of ours.
fn cached(cache: &Path, toolkit: &Toolkit, compiler: &[OsString], unit: &Unit, kernels: &Path) -> PathBuf {
    let mut hash = DefaultHasher::new();
    (toolkit.version, &compiler[1..]).hash(&mut hash);
    for (path, text) in contents(&unit.source, &[kernels.to_path_buf(), kernels.join("include")]) {
        (path, text).hash(&mut hash);
    }
    cache.join(format!("{:016x}", hash.finish()))
}

/// Copies a finished unit to or from the cache; whether that worked.
fn copy(from: [&Path; 2], to: [&Path; 2]) -> bool {
    from.iter().zip(to).all(|(from, to)| fs::copy(from, to).is_ok())
}

/// Compiles every source that is not fresh, as many at a time as cargo allows, and archives the objects as
/// `libnextscale_kernels.a`. Returns the collected ptxas report.
pub(crate) fn compile(
    toolkit: &Toolkit,
    archs: &Archs,
    kernels: &Path,
    sources: &[PathBuf],
    out: &Path,
) -> Result<PathBuf, String> {
    let compiler = compiler(toolkit, archs, kernels)?;
    let units: Vec<Unit> = sources.iter().map(|source| Unit::new(kernels, source, out)).collect();
    let stamp = format!("# {:?} {compiler:?}", toolkit.version);
    let stale: Vec<&Unit> = units.iter().filter(|unit| !unit.is_fresh(&stamp)).collect();

    let cache = std::env::var_os(CACHE).filter(|name| !name.is_empty()).map(PathBuf::from);
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..jobs.min(stale.len()) {
            scope.spawn(|| {
                while let Some(unit) = stale.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let entry = cache.as_ref().map(|cache| cached(cache, toolkit, &compiler, unit, kernels));
                    if let Err(e) = compile_unit(&compiler, unit, &stamp, entry.as_deref()) {
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
    archive.try_compile("nextscale_kernels").map_err(|e| format!("archiving failed: {e}"))?;

    let mut report = String::new();
    for unit in &units {
        report += &fs::read_to_string(&unit.report).map_err(|e| format!("{}: {e}", unit.report.display()))?;
    }
    let path = out.join("ptxas-report.txt");
    fs::write(&path, report).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path)
}

/// The command line but for the source and its outputs.
fn compiler(toolkit: &Toolkit, archs: &Archs, kernels: &Path) -> Result<Vec<OsString>, String> {
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
    for folder in [kernels.to_path_buf(), kernels.join("include")] {
        command.extend(["-I".into(), folder.into()]);
    }
    command.extend(["-ccbin".into(), host.path().into()]);
    Ok(command)
}

fn compile_unit(compiler: &[OsString], unit: &Unit, stamp: &str, entry: Option<&Path>) -> Result<(), String> {
    // An interrupted build must not look finished.
    let _ = fs::remove_file(&unit.report);
    let report = |said: &str| {
        let written = fs::write(&unit.report, format!("{stamp}\n{said}"));
        written.map_err(|e| format!("{}: {e}", unit.report.display()))
    };
    let built = [unit.object.as_path(), unit.depfile.as_path()];
    if let Some(entry) = entry {
        let said = fs::read_to_string(entry.join("said"));
        if let (Ok(said), true) = (said, copy([&entry.join("o"), &entry.join("d")], built)) {
            return report(&said);
        }
    }
    let mut command = Command::new(&compiler[0]);
    command.args(&compiler[1..]);
    command.arg("-c").arg(&unit.source).arg("-o").arg(&unit.object).arg("-MD").arg("-MF").arg(&unit.depfile);
    let output = command.output().map_err(|e| format!("cannot run {:?}: {e}", command.get_program()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let printed = String::from_utf8_lossy(&output.stdout);
        return Err(format!("nvcc failed on {}:\n{printed}{said}", unit.source.display()));
    }
    if let Some(entry) = entry {
        // Renamed when whole, as another build may look. A cache that cannot be written is no error.
        let draft = entry.with_extension(std::process::id().to_string());
        let _ = fs::create_dir_all(&draft);
        if copy(built, [&draft.join("o"), &draft.join("d")]) && fs::write(draft.join("said"), said.as_bytes()).is_ok() {
            let _ = fs::rename(&draft, entry);
        }
        let _ = fs::remove_dir_all(&draft);
    }
    report(&said)
}

#!/usr/bin/env bash
# On a machine with a GPU: run.sh [test] [conform] [sanitize] [compare] [bench] ...   (all if none is named)
# Results and logs go to $OUT, ./out if unset. Ends with one line a step; exits with 1 if any failed.
#   test      every test executable, on the host and on the GPU (a skip is a failure), and the C example
#   conform   the emulator's conformance programs; their checksums are compared with emulated ones by hand
#   sanitize  compute-sanitizer's four tools over the tests, small shapes
#   compare   the op executable against PyTorch
#   bench     measured ceilings, our benches, the peers; writes RESULTS.md
#   emoji     only if named: the emoji program on the GPU with the weights in $WEIGHTS, beside PyTorch
# CASES: random cases of each op to compare (default 81). COMPARE, PEERS: flags for compare.py, such as --only OP, and
# for bench_peers.py, such as --quick. SANITIZE: the tests to sanitize, TOOLS: with what. BENCHES: the benches to run;
# MORE_PEERS: files of earlier peers for the report.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-$PWD/out}
mkdir -p "$OUT"
cd "$here"
export NXS_REQUIRE_GPU=1
# The emoji engine loads cuBLAS and NVRTC: those that torch has brought along, if there are.
libraries=$(python3 -c 'import glob, importlib.util as u; s = u.find_spec("nvidia")
print(":".join(p for root in s.submodule_search_locations for p in glob.glob(root + "/*/lib")) if s else "")' 2> /dev/null)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
summary=()
failed=0

# step NAME COMMAND...: runs it with its output in $OUT/NAME.log, and the end of that on the screen.
step() {
  local name=$1 start=$SECONDS verdict=passed
  shift
  if ! "$@" > "$OUT/$name.log" 2>&1; then
    verdict=FAILED
    failed=1
    tail -n 40 "$OUT/$name.log"
  fi
  local last
  last=$(grep -aE '^test result|passed|ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$name.log" | tail -n 1 | cut -c1-90)
  summary+=("$(printf '%-34s %-7s %4d s  %s' "$name" $verdict $((SECONDS - start)) "$last")")
}

run_test() {
  for executable in tests/*; do
    step "test-$(basename "$executable")" "$executable" --test-threads=4
  done
  step test-c_example ./c_example
}

run_conform() {
  for program in conform/*; do
    step "conform-$(basename "$program")" timeout 60 "$program"
  done
}

run_sanitize() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer) || return 1
  # Kernels are what is under test, and nothing else is worth the time: one thread, few cases, tests that launch.
  local launching="agree edges widths_of bitwise graphs streams wide many_keys tables_of empty another_plan infinite values_of indices \
      trials harm ties lists ada_keeps twice_is_once bad_indices those_of_the_formula published_rules are_split every_form duplicates depend_on every_policy pages_and_windows"
  local known="rvq_decode rvq_encode multi_scale scalar_quantize philox scale_attention attention_merge attention_prepare draft_sample verifier visual_verifier pooled_verifier typical_verifier confidence_rank candidates tree_verifier tree_builder drift select compact compress_event importance redundancy pack packed_attention" test words tool
  for test in ${SANITIZE:-$known}; do
    words=$launching
    [ "$test" = philox ] && words=
    for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
      # shellcheck disable=SC2086
      NXS_SMALL=1 NXS_CASES=6 step "sanitize-$tool-$test" sanitized "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "tests/$test" --test-threads=1 $words
    done
  done
}

# A command that runs tests; none at all is a failure.
sanitized() {
  "$@" | tee "$OUT/sanitized.txt"
  [ "${PIPESTATUS[0]}" = 0 ] && ! grep -q '^running 0 tests' "$OUT/sanitized.txt"
}

run_compare() {
  step compare python3 python-ref/compare.py --op ./op --device cuda --cases ${CASES:-81} --seed $RANDOM ${COMPARE:-}
}

machine() {
  python3 - <<'PY'
import json, subprocess, datetime
query = "name,driver_version,memory.total"
name, driver, memory = subprocess.check_output(
    ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], text=True).splitlines()[0].split(", ")
built = dict(line.split(" ", 1) for line in open("built-from.txt") if " " in line)
toolkit = next((line.split("release ")[1].split(",")[0] for line in open("built-from.txt") if "release " in line), "?")
print(json.dumps({"date": datetime.date.today().isoformat(), "gpu": name, "driver": driver, "memory": memory,
                  "toolkit": f"CUDA {toolkit}", "commit": built.get("commit", "?").strip()}))
PY
}

run_bench() {
  machine > "$OUT/machine.json"
  step bench-ceilings bash -c './ceilings > "$OUT/ceilings.json"'
  for executable in benches/*; do
    [ -x "$executable" ] || continue
    [[ " ${BENCHES:-$(basename "$executable")} " = *" $(basename "$executable") "* ]] || continue
    CRITERION_HOME="$OUT/criterion" step "bench-$(basename "$executable")" "$executable" --bench
  done
  step bench-peers python3 python-ref/bench_peers.py --shapes benches/shapes.json --out "$OUT/peers.json" ${PEERS:-}
  step bench-results bash -c './results --criterion "$OUT/criterion" --peers "$OUT/peers.json" ${MORE_PEERS:-} \
    --ceilings "$OUT/ceilings.json" --machine "$OUT/machine.json" --shapes benches/shapes.json > "$OUT/RESULTS.md"'
  tar -czf "$OUT/criterion.tgz" -C "$OUT" criterion && rm -rf "$OUT/criterion"
}

run_emoji() {
  local emoji=(./emoji --weights "${WEIGHTS:?the folder of the weights}" --device cuda --quiet)
  NXS_EMOJI_WEIGHTS=$(realpath "$WEIGHTS") step emoji-test tests/emoji
  for sampler in var ar speculative; do
    for count in 1 16; do
      step "emoji-$sampler-$count" "${emoji[@]}" --sampler $sampler --count $count --repeat 50 --seed 7 \
        --out "$OUT/emoji-$sampler-$count.png"
    done
  done
  step emoji-sheet "${emoji[@]}" --count 64 --out "$OUT/emoji-sheet.png"
  step emoji-peer python3 python-ref/emoji/peer.py
}

export OUT
for mode in "${@:-test conform sanitize compare bench}"; do
  for one in $mode; do
    case $one in
      test | conform | sanitize | compare | bench | emoji) "run_$one" || { summary+=("$one could not start"); failed=1; } ;;
      *) echo "unknown: $one (test, conform, sanitize, compare, bench, emoji)" >&2; exit 2 ;;
    esac
  done
done
printf '\n'
printf '%s\n' "${summary[@]}"
exit $failed

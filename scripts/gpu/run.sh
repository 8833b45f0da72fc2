#!/usr/bin/env bash
# On a machine with a GPU: run.sh [test] [conform] [sanitize] [compare] [bench] [peers] ...   (all if none is named)
# Ends with one line a step, and exits with 1 if any failed. $OUT, ./out if unset, gets RESULTS.md, results.json (all that
# was measured, for `results --merge`) and logs.tar.xz. docs/measuring.md says which calls to make, and what they take.
#   test      every test executable, on the host and on the GPU (a skip is a failure), and the C example
#   conform   the emulator's conformance programs; their checksums are compared with emulated ones by hand
#   sanitize  compute-sanitizer's four tools over the tests, small shapes
#   compare   the op executable against PyTorch
#   bench     measured ceilings, and our benches
#   peers     what others offer, on the same shapes
#   train     only if named: trains the emoji models on $DATA for $TRAIN_SECONDS (470); the weights, with what is written of
#             them, are parts of a file that `cat weights.tar.xz.* | tar -xJ` unpacks
#   emoji     only if named: the emoji program on the GPU with the weights in $WEIGHTS, beside PyTorch
# What times nothing runs JOBS at a time (the cores, 16 at most); what times has the GPU for itself.
# LIMIT: seconds after which no step begins, and those that run are stopped (default 540: a step that hangs takes no more).
# TEST_SECONDS, SANITIZE_SECONDS, BENCH_SECONDS: the most that one of these may take.
# TESTS, BENCHES, SANITIZE: which; TOOLS: with what to sanitize. CASES: random cases of each op to compare (default 81).
# COMPARE, PEERS: flags for compare.py, such as --only OP, and for bench_peers.py, such as --quick. MORE: results.json of
# earlier runs, which the report takes what was not measured again from.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-$PWD/out}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
MORE=$(for file in ${MORE:-}; do realpath "$file"; done)
cd "$here"
export OUT LC_ALL=C NXS_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
LIMIT=${LIMIT:-540}
cores=$(nproc)
JOBS=${JOBS:-$((cores < 16 ? cores : 16))}
# Where logs and summaries grow; packed at the end.
logs=$(mktemp -d)
# The emoji engine loads cuBLAS and NVRTC: those that torch has brought along, if there are.
libraries=$(python3 -c 'import glob, importlib.util as u; s = u.find_spec("nvidia")
print(":".join(p for root in s.submodule_search_locations for p in glob.glob(root + "/*/lib")) if s else "")' 2> /dev/null)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

# Seconds that are left, less those that packing takes.
left() { echo $((LIMIT - SECONDS - 5)); }

# step NAME MOST COMMAND...: runs it for MOST seconds at most, and no longer than there is time, with its output in NAME.log;
# says when it is done, and how a failure ended. Its line of the summary goes to a file: steps may run beside each other.
step() {
  local name=$1 most=$2 start=$SECONDS verdict=passed code=0 rest last
  shift 2
  rest=$(left)
  if [ "$rest" -lt 2 ]; then
    verdict=LEFT-OUT code=1
    : > "$logs/$name.log"
  else
    timeout --kill-after=5 $((most < rest ? most : rest)) "$@" > "$logs/$name.log" 2>&1 < /dev/null || code=$?
    [ $code = 0 ] || verdict=FAILED
    [ $code != 124 ] && [ $code != 137 ] || verdict=TIMED-OUT
  fi
  last=$(grep -aE '^test result|passed|results,|ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$name.log" | tail -n 1 | cut -c1-90)
  printf '%-34s %-9s %4d s  %s\n' "$name" $verdict $((SECONDS - start)) "$last" > "$logs/$name.line"
  echo "[$SECONDS s] $(cat "$logs/$name.line")"
  if [ $code != 0 ]; then
    touch "$logs/failed"
    grep -aE 'FAILED|panicked|rror' "$logs/$name.log" | head -n 12
    tail -n 12 "$logs/$name.log"
  fi
  return $code
}

# together NUMBER: waits until fewer than so many of this shell's steps run.
together() { while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do wait -n; done; }

chosen() { # WHICH NAME: whether it is among them; all are if none is named
  [ -z "$1" ] || [[ " $1 " = *" $2 "* ]]
}

run_test() {
  local executable name
  # Large ones first.
  for executable in $(ls -S tests/*); do
    name=$(basename "$executable")
    chosen "${TESTS:-}" "$name" || continue
    together $(((JOBS + 1) / 2))
    step "test-$name" "${TEST_SECONDS:-150}" "$executable" --test-threads=2 &
  done
  wait
  step test-c_example 30 ./c_example
}

run_conform() {
  for program in conform/*; do
    together "$JOBS"
    step "conform-$(basename "$program")" 60 "$program" &
  done
  wait
}

run_sanitize() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer) || return 1
  # Kernels are what is under test, and nothing else is worth the time: one thread, few cases, tests that launch.
  local launching="agree edges widths_of bitwise graphs streams wide many_keys tables_of empty another_plan infinite values_of indices \
      trials harm ties lists ada_keeps twice_is_once bad_indices those_of_the_formula published_rules are_split every_form duplicates depend_on every_policy pages_and_windows"
  local known="rvq_decode rvq_encode multi_scale scalar_quantize philox scale_attention attention_merge attention_prepare draft_sample verifier visual_verifier pooled_verifier typical_verifier confidence_rank candidates tree_verifier tree_builder drift select compact compress_event importance redundancy pack packed_attention" test words tool
  for tool in ${TOOLS:-memcheck racecheck initcheck synccheck}; do
    for test in ${SANITIZE:-$known}; do
      words=$launching
      [ "$test" = philox ] && words=
      together $(((JOBS + 1) / 2))
      # shellcheck disable=SC2086
      NXS_SMALL=1 NXS_CASES=${NXS_CASES:-6} step "sanitize-$tool-$test" "${SANITIZE_SECONDS:-200}" ./run.sh --sanitized "$sanitizer" \
        --tool "$tool" --error-exitcode 1 "tests/$test" --test-threads=1 $words &
    done
  done
  wait
}

# A command that runs tests; none at all is a failure.
sanitized() {
  local output
  output=$(mktemp)
  "$@" | tee "$output"
  [ "${PIPESTATUS[0]}" = 0 ] && ! grep -q '^running 0 tests' "$output"
}

run_compare() {
  # shellcheck disable=SC2086
  step compare 400 python3 python-ref/compare.py --op ./op --device cuda --cases "${CASES:-81}" --seed "$RANDOM" \
    --jobs "$JOBS" --time-budget $(($(left) < 390 ? $(left) - 10 : 380)) ${COMPARE:-}
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

# What the report is made of.
measured=$logs/measured
ceilings() {
  [ -s "$measured/ceilings.json" ] && return
  mkdir -p "$measured"
  machine > "$measured/machine.json"
  step bench-ceilings 60 bash -c './ceilings > "$1"' - "$measured/ceilings.json"
}

run_bench() {
  local executable name
  ceilings
  for executable in benches/*; do
    name=$(basename "$executable")
    [ -x "$executable" ] && chosen "${BENCHES:-}" "$name" || continue
    CRITERION_HOME="$measured/criterion" step "bench-$name" "${BENCH_SECONDS:-240}" "$executable" --bench
  done
}

run_peers() {
  local rest
  ceilings
  rest=$(left)
  # shellcheck disable=SC2086
  step peers "$LIMIT" python3 python-ref/bench_peers.py --shapes benches/shapes.json --out "$measured/peers.json" \
    --jobs "$(((JOBS * 3 + 3) / 4))" --time-budget $((rest > 40 ? rest - 20 : 20)) ${PEERS:-}
}

# The results as one file, and a report of them and of earlier ones.
report() {
  [ -s "$measured/ceilings.json" ] || return 0
  local earlier=()
  # shellcheck disable=SC2206
  earlier=($MORE)
  python3 ./results --pack "$measured" > "$OUT/results.json" &&
    python3 ./results --merge "$OUT/results.json" "${earlier[@]}" --shapes benches/shapes.json > "$OUT/RESULTS.md" \
      2> "$logs/results.log" || { echo "no report:"; cat "$logs/results.log"; touch "$logs/failed"; }
}

run_train() {
  local data
  data=$(realpath "${DATA:?what python-ref/emoji/data.py made}")
  step train "$LIMIT" python3 python-ref/emoji/train.py --data "$data" --out "$logs/weights" --seconds "${TRAIN_SECONDS:-470}"
  grep -a '^\[' "$logs/train.log" | grep -av ' step '
  # The second snapshot shares two models with the first.
  tar -C "$logs" --exclude best/tokenizer.safetensors --exclude best/draft.safetensors -cf - weights | xz -1 -T0 |
    split -b 15M - "$OUT/weights.tar.xz."
  rm -rf "$logs/weights"
}

run_emoji() {
  local emoji=(./emoji --weights "${WEIGHTS:?the folder of the weights}" --device cuda --quiet)
  NXS_EMOJI_WEIGHTS=$(realpath "$WEIGHTS") step emoji-test 120 tests/emoji
  for sampler in var ar speculative; do
    for count in 1 16; do
      step "emoji-$sampler-$count" 60 "${emoji[@]}" --sampler $sampler --count $count --repeat 50 --seed 7 \
        --out "$logs/emoji-$sampler-$count.png"
    done
  done
  step emoji-sheet 60 "${emoji[@]}" --count 64 --out "$OUT/emoji-sheet.png"
  step emoji-peer 240 python3 python-ref/emoji/peer.py
  # What was measured is in the programs' own words.
  cat "$logs"/emoji-*.log > "$OUT/emoji.txt"
}

if [ "${1:-}" = --sanitized ]; then
  shift
  sanitized "$@"
  exit
fi

for mode in "${@:-test conform sanitize compare bench peers}"; do
  for one in $mode; do
    case $one in
      test | conform | sanitize | compare | bench | peers | train | emoji)
        "run_$one" || [ -e "$logs/failed" ] || { echo "$one could not start"; touch "$logs/failed"; } ;;
      *) echo "unknown: $one (test, conform, sanitize, compare, bench, peers, train, emoji)" >&2; exit 2 ;;
    esac
  done
done
report
tar -cJf "$OUT/logs.tar.xz" -C "$logs" .
printf '\n'
# What failed stands last, where a short look finds it.
cat "$logs"/*.line > "$logs/lines" 2> /dev/null
grep ' passed ' "$logs/lines"
grep -v ' passed ' "$logs/lines"
echo "$SECONDS s, $(grep -c ' passed ' "$logs/lines") steps passed, $(grep -vc ' passed ' "$logs/lines") did not"
[ ! -e "$logs/failed" ]

#!/bin/sh
# Builds the kernels, the emulator and its tests under AddressSanitizer and UndefinedBehaviorSanitizer, and runs them.
# The last line says how many checks passed and failed. CXX picks the compiler (g++), JOBS the compilations at a time (1).
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$root/target/emulator
mkdir -p "$out"
cd "$root"

cxx=${CXX:-g++}
# maybe-uninitialized: gcc is mistaken where code is instrumented.
flags="-std=c++20 -O1 -g1 -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -Wno-maybe-uninitialized -Werror -fsanitize=address,undefined -fno-sanitize-recover=undefined \
 -fno-omit-frame-pointer -ffp-contract=off -Iemulator/include -Ikernels -Ikernels/include"
# A register that a kernel reads before it writes it has this pattern.
kernel_flags="-ftrivial-auto-var-init=pattern"

object_of() { echo "$out/$(echo "$1" | tr / -).o"; }

# Into $out, unless the object is newer than everything it was made from.
compile() {
  object=$(object_of "$1")
  if [ -f "$object.d" ] && [ -f "$object" ] && [ "$0" -ot "$object" ]; then
    fresh=1
    for dependency in $(sed 's/^[^:]*://; s/\\$//' "$object.d"); do
      [ -f "$dependency" ] && [ "$dependency" -ot "$object" ] || { fresh=0; break; }
    done
    [ $fresh = 1 ] && return
  fi
  echo "compile $1"
  case $1 in
    emulator/src/*) extra=-O2 ;;
    *) extra="$kernel_flags -Iemulator/tests" ;;
  esac
  # shellcheck disable=SC2086
  $cxx $flags $extra -MMD -MF "$object.d" -x c++ -c "$1" -o "$object" || { rm -f "$object"; exit 1; }
}

# Called by itself, below: one source of many.
if [ "${1:-}" = --compile ]; then
  compile "$2"
  exit
fi

# A failure does not keep the others from being compiled, so that one run tells them all.
printf '%s\n' emulator/src/*.cpp kernels/*/*.cu emulator/tests/*.cpp | xargs -P "${JOBS:-1}" -n 1 sh "$0" --compile
rm -f "$out/libnextscale_emulated.a"
for source in emulator/src/*.cpp kernels/*/*.cu; do
  object_of "$source"
done | xargs ar rcs "$out/libnextscale_emulated.a"

passed=0 failed=0
for source in emulator/tests/*.cpp; do
  name=$(basename "$source" .cpp)
  # shellcheck disable=SC2086
  $cxx $flags "$(object_of "$source")" "$out/libnextscale_emulated.a" -o "$out/$name"
  # In order and as late as can be; then in two random orders. The planted bugs choose for themselves.
  for settings in "0 late" "1 random" "2 early"; do
    [ "$name" = bugs ] && [ "$settings" != "0 late" ] && continue
    echo "== $name, seed and landing $settings"
    status=0
    NXS_EMULATOR_SEED=${settings% *} NXS_EMULATOR_LANDING=${settings#* } "$out/$name" > "$out/$name.log" 2>&1 || status=$?
    cat "$out/$name.log"
    last=$(tail -n 1 "$out/$name.log")
    case $last in
      *" passed, "*" failed") passed=$((passed + ${last%% *})) && last=${last#*, } && failed=$((failed + ${last%% *})) ;;
      *) failed=$((failed + 1)) && echo "$name ended with status $status" ;;
    esac
  done
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]

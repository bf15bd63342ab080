#!/usr/bin/env bash
# All that needs a GPU, on one, within ten minutes: the gpu tests, every kernel against others, a step of an 8B model.
#
#   benchmarks/gpu.sh                        writes benchmarks/results/<date>_<gpu>.json, and the log beside it
#   WHEELS=dir benchmarks/gpu.sh             installs the wheels of that folder first, without a network
#   PARTS="tests step" benchmarks/gpu.sh     only these of: tests kernels step
#   OUT=dir PYTHON=python3.12                where results go; the interpreter
#   TESTS_SECONDS KERNELS_SECONDS STEP_SECONDS   what each part may take; what it does not reach, it names
#
# The results are written after each part, so that a machine that is taken away leaves what was measured.
# The script ends with 64 where there is no GPU, with 1 if a test fails or a part breaks off, else with 0.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 70
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
parts=${PARTS:-tests kernels step}
export TRITON_INTERPRET=0 PYTHONPATH="$root:$root/kernels:$root/launch${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if ! device=$("$python" -c 'import sys, torch
if not torch.cuda.is_available(): sys.exit(1)
print(torch.cuda.get_device_name())'); then
  echo "gpu.sh: no CUDA device that $python can use" >&2
  exit 64
fi
gpu=$(sed -E 's/^nvidia //; s/[^a-z0-9]+/_/g; s/^_+|_+$//g' <<<"${device,,}")
if [ -n "${WHEELS:-}" ]; then
  # one by one, so that one that does not fit keeps no other away
  for wheel in "$WHEELS"/*.whl; do
    "$python" -m pip install --quiet --no-index --no-deps --disable-pip-version-check "$wheel" ||
      echo "gpu.sh: not installed: $wheel" >&2
  done
fi
mkdir -p "$out"
name="$out/$(date +%F)_$gpu"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0
: >"$name.log"
wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac; }

report() {
  "$python" - "$scratch" "$name.json" "$device" "$parts" <<'PYTHON'
import json
import sys
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path

scratch, target, device, parts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4].split()
result = {"date": date.today().isoformat(), "device": device, "parts": parts}


def code_of(part):
    path = scratch / f"{part}.code"
    return int(path.read_text()) if path.exists() else None


if "tests" in parts:
    code = code_of("tests")
    done = {None: "not begun", 0: "all passed", 1: "some failed", 124: "not done in time"}.get(code, "broke off")
    written = (scratch / "tests.xml").exists()
    tests = {"exit": code, "what": done if written or code in (None, 124) else "broke off; see the log"}
    if written:
        root = ET.parse(scratch / "tests.xml").getroot()
        suite = root if root.tag == "testsuite" else root[0]
        tests |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
        tests["failed"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
    result["tests"] = tests
for part in ("kernels", "step"):
    if part in parts:
        path, code = scratch / f"{part}.json", code_of(part)
        without = "not begun" if code is None else "broke off; see the log"
        result[part] = json.loads(path.read_text()) if path.exists() else without
target.write_text(json.dumps(result, indent=2) + "\n")
print(f"wrote {target}")
PYTHON
}

# finished PART CODE
finished() {
  echo "$2" >"$scratch/$1.code"
  [ "$2" -eq 0 ] || failed=1
  report || failed=1
}

if wanted tests; then
  # a configuration that names options of an absent plugin is an error of its own
  options=()
  "$python" -c 'import pytest_timeout' 2>/dev/null || options=(-c /dev/null --rootdir "$root" --import-mode=importlib)
  # most of the time goes into compilers; each process would start one for every core
  export TORCHINDUCTOR_COMPILE_THREADS=2
  "$python" -c 'import xdist' 2>/dev/null && options+=(-n 6)
  # Interrupted, pytest still says what failed. Attention comes last: each of its tests compiles whole graphs.
  timeout -s INT -k 20 "${TESTS_SECONDS:-170}" "$python" -m pytest "${options[@]}" -m gpu -p no:cacheprovider -q \
    --continue-on-collection-errors --junitxml "$scratch/tests.xml" \
    tests/gpu/test_[!a]*.py tests/gpu/test_ad*.py tests/gpu/test_at*.py 2>&1 | tee -a "$name.log"
  finished tests "${PIPESTATUS[0]}"
  unset TORCHINDUCTOR_COMPILE_THREADS
fi
if wanted kernels; then
  seconds=${KERNELS_SECONDS:-160}
  timeout -k 10 $((seconds + 40)) "$python" benchmarks/kernels.py --seconds "$seconds" \
    --out "$scratch/kernels.json" 2>&1 >/dev/null | tee -a "$name.log"
  finished kernels "${PIPESTATUS[0]}"
fi
if wanted step; then
  seconds=${STEP_SECONDS:-190}
  timeout -k 10 $((seconds + 40)) "$python" benchmarks/gpu_step.py --seconds "$seconds" \
    --out "$scratch/step.json" 2>&1 >/dev/null | tee -a "$name.log"
  finished step "${PIPESTATUS[0]}"
fi
exit $failed

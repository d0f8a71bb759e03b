#!/bin/bash
# What one accelerator proves and how fast it is: bash tests/gpu/run.sh [PART...]
# Parts: tests and the names of benchmarks (model, step, mhc, attention); all of them by default.
# Whole logs go to $OUT, what matters to stdout. A part that fails does not stop the others.
set -u
cd "$(dirname "$0")/../.." || exit 2
logs=${OUT:-$(mktemp -d)}
python=${PYTHON:-python3}
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
parts=${*:-tests model step mhc attention}
failed=0

bounded() { # seconds, log, command...
    local seconds=$1 log=$logs/$2
    shift 2
    local started=$SECONDS
    # Interrupted, pytest still tells what it found.
    timeout -s INT -k 30 "$seconds" "$@" >"$log" 2>&1
    local code=$?
    [ $code = 0 ] || failed=1
    echo "== ${log##*/}: exit code $code, $((SECONDS - started)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -1
$python -c "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__, torch.accelerator.current_accelerator())"

for part in $parts; do
    if [ "$part" = tests ]; then
        # By importance: a limit cuts the last ones off. Warnings are those of another torch, too.
        bounded 240 tests.log $python -m pytest -m gpu -W default --tb=short --timeout 120 -v -rfE \
            -p no:cacheprovider --durations=8 \
            tests/gpu/test_backend.py tests/gpu/test_training.py tests/gpu/test_command.py \
            tests/gpu/test_kernels.py tests/gpu/test_compiled.py
        grep -E '^(E  |FAILED|ERROR|tests/.*(Error|FAILED|ERROR))|fp64: |fp32: |bf16: |compiled: |mneme train|s (call|setup) |passed|failed' \
            "$logs/tests.log" | cut -c1-300 | tail -110
    else
        limit=90
        [ "$part" = step ] && limit=150
        if [ "$part" = step ] && [ ! -d corpus ]; then
            bounded 100 corpus.log $python -m launch.cli data build quickstart
        fi
        bounded $limit "bench-$part.log" $python -m launch.cli bench "$part"
        tail -n 60 "$logs/bench-$part.log" | cut -c1-200
    fi
done
exit $failed

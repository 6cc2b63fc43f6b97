#!/usr/bin/env bash
# Sets up on first use, then trains, tests, or makes and judges records. `./run.sh help` says how.
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")  # not where we are: relative paths are the caller's
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # threads that wait leave the cores to others

usage='./run.sh [--option value ...]   train; the options are those of train_gpt.py (--help lists them)
./run.sh reference [--option value ...]   train the baseline, records/reference
./run.sh optimization [NAME] [--option value ...]   fewest steps; records/optimization/README.md
./run.sh test [pytest args]     lint and tests, on a CPU; with a GPU also the tests that need one
./run.sh record NAME [--runs N] [-- --option value ...]   train N times, write records/<date>_<NAME>/
                                (--track medium or optimization; --logs FILE ... for runs that there are)
./run.sh reproduce FOLDER [--runs N] [--fineweb]          run a record again, beside its figures
./run.sh compare A B [--runs N [--fineweb] | --logs]       two scripts or records, interleaved
./run.sh ablate FILE [NAME ...] [-- --option value ...]   train variants one after the other in one process
./run.sh history                records/README.md and a picture for each track from all records
./run.sh check SCRIPT           does it predict from earlier tokens only, and score honestly?
./run.sh eval CHECKPOINT        HellaSwag accuracy of saved weights
./run.sh generate CHECKPOINT TEXT [--tokens N]            the text continued with saved weights
./run.sh bench                  kernels beside their peaks and plain PyTorch, one GPU
./run.sh profile                where the time of a few steps of each stage goes; --help on each says more

On first use it makes .venv and installs requirements.txt (PYTHON=python3 uses that interpreter as it is).
GPUs: the largest of 8, 4, 2, 1 that the machine has; NPROC overrides. Data: FineWeb, fetched if missing.
Without a GPU it trains the small preset on the built-in sample, for about two minutes.
Several nodes: on each one NNODES=2 NODE_RANK=0 MASTER_ADDR=host [MASTER_PORT=29500] ./run.sh'

fail() {  # with one line; exit code 2: what was asked for is wrong
  echo "run.sh: $1" >&2
  exit "${2:-2}"
}

attend() {  # run a command that ends when this script is told to
  local code=0 signal
  "$@" &
  for signal in 1 2 15; do  # SIGHUP, SIGINT, SIGTERM
    trap "kill $! 2>/dev/null; wait $! || :; fail interrupted $((128 + signal))" "$signal"
  done
  wait $! || code=$?
  trap - 1 2 15
  return $code
}

set_up() {  # sets $python; installs again when requirements.txt has changed
  local venv=$root/.venv base=python3
  python=${PYTHON:-$venv/bin/python}
  [ -z "${PYTHON:-}" ] && [ ! -x "$python" ] || base=$python
  command -v "$base" >/dev/null || fail "PYTHON=$base: no such program: name one, or unset PYTHON" 1
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or later is needed, $base is $("$base" --version 2>&1 | tail -1): name a later one as PYTHON, or make .venv by it, as python3.12 -m venv --clear '$venv'" 1
  [ -n "${PYTHON:-}" ] || cmp -s "$root/requirements.txt" "$venv/requirements.txt" && return
  echo "installing requirements.txt in .venv (once, a minute or two)"
  attend "$base" -m venv "$venv"
  attend "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
  cp "$root/requirements.txt" "$venv/requirements.txt"
}

number() {  # a variable of the environment, or its default, if it is within a range
  local value=${!1:-$2}
  [[ $value =~ ^(0|[1-9][0-9]{0,4})$ ]] && [ "$value" -ge "$3" ] && [ "$value" -le "$4" ] ||
    fail "$1=$value: give a whole number from $3 to $4"
  echo "$value"
}

# How many GPUs to use, and how many threads torch would take. Options that the script cannot read
# end it here, before data are fetched.
count='
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    import torch
except ImportError as error:
    sys.exit(f"run.sh: {error}: install requirements.txt for {sys.executable}, or unset PYTHON")
gpus = torch.cuda.device_count()
print(max(n for n in (0, 1, 2, 4, 8) if n <= gpus), torch.get_num_threads(), flush=True)
_, script, *options = sys.argv
helps = {"--help", "-h"} & {*options}  # which the script itself gives
if options and not helps and "\ndef parse_args(" in open(script, encoding="utf-8").read():
    import importlib.util, os
    sys.argv[0], sys.path[0], sys.dont_write_bytecode = script, os.path.dirname(script), True
    spec = importlib.util.spec_from_file_location("script", script)
    sys.modules["script"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.parse_args(options)'

# torchrun, but silent about processes that have said themselves why they ended
torchrun='
import os, signal, sys
def interrupted(number, frame):  # until there are processes, which are told to end then
    print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(128 + number)
signals = signal.SIGHUP, signal.SIGINT, signal.SIGTERM
signals = [s for s in signals if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP
for number in signals:
    signal.signal(number, interrupted)
import logging
from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing import api, errors
logging.disable(logging.ERROR)
names = ",".join(s.name for s in signals)
sys.argv[1:1] = ["--signals-to-handle", names, "--shutdown-timeout", "5"]
try:
    run.main()
except errors.ChildFailedError as error:
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    if code not in (1, 2, 129, 130, 143):
        code = f"run.sh: process {rank} ended with {failure.signal_name() if code < 0 else code}"
    sys.exit(code)
except api.SignalException as error:
    sys.exit(128 + error.sigval)
except DistError as error:
    first = str(error).splitlines()[0]
    print(f"run.sh: the nodes cannot meet ({first}): MASTER_ADDR is the address of node 0 and",
          "MASTER_PORT a free port there, the same on every node", file=sys.stderr)
    sys.exit(1)'

launch() {  # a script, on the GPUs there are, with the data it needs
  local script=$root/$1 nproc nnodes node port nodes=(--standalone) found gpus threads preset= shards
  shift
  nproc=$(number NPROC 1 1 9999)
  nnodes=$(number NNODES 1 1 9999)
  if [ "$nnodes" -gt 1 ]; then
    node=$(number NODE_RANK "" 0 $((nnodes - 1)))
    port=$(number MASTER_PORT 29500 1 65535)
    [ -n "${MASTER_ADDR:-}" ] || fail "MASTER_ADDR is missing: give the address of node 0"
    nodes=(--nnodes "$nnodes" --node-rank "$node" --master-addr "$MASTER_ADDR" --master-port "$port")
  fi
  set_up
  found=$("$python" -c "$count" "$script" "$@")
  read -r gpus threads <<<"$found"
  [ -n "${NPROC:-}" ] || nproc=$((gpus > 0 ? gpus : 1))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > nproc ? threads / nproc : 1))}
  if [ "$gpus" -eq 0 ]; then  # large buffers would else be mapped anew in every step
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647}
  fi

  if [[ ! " $* " =~ " "(--train_files|--val_file|--volumes|--help|-h)[=\ ] ]]; then  # needs our data
    [[ ! " $* " =~ .*" --preset"[=\ ]([^ ]*) ]] || preset=${BASH_REMATCH[1]}
    if [ -z "$preset" ] && [ "$gpus" -eq 0 ]; then
      preset=tiny
      echo "no GPU: training the small preset on the built-in sample, on the CPU"
    fi
    if [ "$preset" = tiny ]; then
      shards=$root/data/sample/sample
      [ -f "${shards}_train_000001.bin" ] || attend "$python" "$root/data/sample.py"
    else
      shards=$root/data/fineweb10B/fineweb
      attend "$python" "$root/data/cached_fineweb.py"  # passes over what is whole
    fi
    [ "$PWD" -ef "$root" ] || set -- "$@" --val_file "${shards}_val_000000.bin" \
      --train_files "${shards}_train_*.bin"
  fi
  [ "$nproc" -gt 1 ] || [ "$nnodes" -gt 1 ] || exec "$python" "$script" "$@"
  exec "$python" -c "$torchrun" "${nodes[@]}" --nproc-per-node "$nproc" "$script" "$@"
}

case ${1:-} in
  help | -h) echo "$usage" ;;
  test) set_up; shift; cd "$root"; "$python" -m ruff check . && "$python" -m ruff format --check . && exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests "$@" ;;
  record | reproduce | compare | history) set_up; exec "$python" "$root"/tools/report.py "$@" ;;
  ablate) set_up; shift; exec "$python" "$root"/tools/ablate.py "$@" ;;
  check) set_up; shift; exec "$python" "$root"/tools/check.py "$@" ;;
  eval) set_up; shift; exec "$python" "$root"/tools/hellaswag.py "$@" ;;
  generate) set_up; shift; exec "$python" "$root"/tools/generate.py "$@" ;;
  bench) set_up; shift; exec "$python" "$root"/tools/bench.py "$@" ;;
  reference) shift; launch records/reference/train_gpt.py "$@" ;;
  profile) shift; launch tools/profiler.py "$@" ;;
  optimization)  # the baseline, or an optimizer by its name or file, made into a whole script
    shift
    folder=records/optimization script=$folder/train_gpt_simple.py
    if [[ -n ${1:-} && $1 != -* ]]; then
      set_up
      script=$("$python" "$root/$folder/submission.py" "$1") || exit
      script=${script#"$root"/}
      shift
    fi
    launch "$script" "$@" ;;
  "" | --*) launch train_gpt.py "$@" ;;
  *) fail "'$1' is not understood; ./run.sh help lists the commands" ;;
esac

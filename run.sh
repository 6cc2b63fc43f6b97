#!/usr/bin/env bash
# Sets up on first use, then trains, tests, or makes and judges records. `./run.sh help` says how.
set -euo pipefail
cd "$(dirname "$0")"

usage='./run.sh [--option value ...]   train; the options are those of train_gpt.py (--help lists them)
./run.sh test [pytest args]     lint and tests, on a CPU; with a GPU also the tests that need one
./run.sh record NAME [--runs N] [-- --option value ...]   train N times, write records/<date>_<NAME>/
./run.sh reproduce FOLDER [--runs N]                      run a record again, beside its figures
./run.sh compare A B [--runs N | --logs]                  two scripts or records, in turn
./run.sh ablate FILE [NAME ...] [-- --option value ...]   train variants one after the other in one process
./run.sh history                records/README.md and history.png from all records
./run.sh check SCRIPT           does it predict from earlier tokens only, and score honestly?
./run.sh eval CHECKPOINT        HellaSwag accuracy of saved weights
./run.sh generate CHECKPOINT TEXT [--tokens N]            the text continued with saved weights
./run.sh bench                  every kernel beside ceilings and plain PyTorch, one GPU
./run.sh profile                where the time of a few steps of each stage goes; --help on each says more

On first use it makes .venv and installs requirements.txt (PYTHON=python3 uses that interpreter as it is).
GPUs: the largest of 8, 4, 2, 1 that the machine has; NPROC overrides. Data: FineWeb, fetched if missing.
Without a GPU it trains the small preset on the built-in sample, in about two minutes.
Several nodes: on each one NNODES=2 NODE_RANK=0 MASTER_ADDR=host [MASTER_PORT=29500] ./run.sh'

set_up() {  # sets $python; installs again when requirements.txt has changed
  python=${PYTHON:-$PWD/.venv/bin/python}
  [ -n "${PYTHON:-}" ] || cmp -s requirements.txt .venv/requirements.txt && return
  echo "installing requirements.txt in .venv (once, a minute or two)"
  python3 -m venv .venv
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.txt
}

# torchrun, but silent about processes that have said themselves why they ended (exit codes 1, 2, 130)
torchrun='
import logging, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing import api, errors
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    run.main()
except errors.ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code in (1, 2, 130) else str(error))
except api.SignalException:
    sys.exit(130)'

launch() {  # a script, on the GPUs there are, with the data it needs
  local script=$1 gpus nproc nnodes=${NNODES:-1} nodes=(--standalone)
  shift
  gpus=$("$python" -c 'import torch; n = torch.cuda.device_count(); print(max(p for p in (0, 1, 2, 4, 8) if p <= n))')
  nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
  case " $* " in
    *" --train_files"* | *" --help "* | *" -h "*) ;;  # the data is the caller's affair
    *)
      if [ "$gpus" -eq 0 ] || [[ " $* " =~ " --preset"[=\ ]"tiny " ]]; then
        [ "$gpus" -gt 0 ] || echo "no GPU: training the small preset on the built-in sample, on the CPU"
        [ -f data/sample/sample_train_000001.bin ] || "$python" data/sample.py
      elif ! ls data/fineweb10B/fineweb_train_*.bin >/dev/null 2>&1; then
        "$python" data/cached_fineweb.py
      fi ;;
  esac
  [ "$nproc" -gt 1 ] || [ "$nnodes" -gt 1 ] || exec "$python" "$script" "$@"
  if [ "$nnodes" -gt 1 ]; then
    nodes=(--nnodes "$nnodes" --node-rank "${NODE_RANK:?which node is this, 0 to NNODES - 1}"
      --master-addr "${MASTER_ADDR:?the address of node 0}" --master-port "${MASTER_PORT:-29500}")
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # of each process
  exec "$python" -c "$torchrun" "${nodes[@]}" --nproc-per-node "$nproc" "$script" "$@"
}

case ${1:-} in
  help | -h) echo "$usage" ;;
  test) set_up; shift; "$python" -m ruff check . && "$python" -m ruff format --check . && exec "$python" -m pytest -n 2 --dist loadfile tests "$@" ;;
  record | reproduce | compare | history) set_up; exec "$python" records/report.py "$@" ;;
  ablate) set_up; shift; exec "$python" records/ablate.py "$@" ;;
  check) set_up; shift; exec "$python" records/check.py "$@" ;;
  eval) set_up; shift; exec "$python" records/hellaswag.py "$@" ;;
  generate) set_up; shift; exec "$python" records/generate.py "$@" ;;
  bench) set_up; shift; exec "$python" records/bench.py "$@" ;;
  profile) set_up; shift; launch records/profiler.py "$@" ;;
  "" | --*) set_up; launch train_gpt.py "$@" ;;
  *) echo "run.sh: '$1' is not understood; ./run.sh help lists the commands" >&2; exit 2 ;;
esac

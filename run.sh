#!/usr/bin/env bash
# Sets up on first use, then trains or tests. `./run.sh help` says how.
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)

usage() {
  cat <<'EOF'
./run.sh [--option value ...]  train; the options are those of train_gpt.py (--help lists them)
./run.sh test [pytest args]    lint and tests, on a CPU; with a GPU also the tests that need one
./run.sh help                  this text

On first use it makes .venv and installs requirements.txt (PYTHON=python3 uses that interpreter as it is).
GPUs: the largest of 8, 4, 2, 1 that the machine has; NPROC overrides. Data: FineWeb, fetched if missing.
Without a GPU it trains the small preset on the built-in sample, in about two minutes.
Several nodes: on each one NNODES=2 NODE_RANK=0 MASTER_ADDR=host [MASTER_PORT=29500] ./run.sh
EOF
}

set_up() {  # sets $python; installs again when requirements.txt has changed
  python=${PYTHON:-$root/.venv/bin/python}
  [ -n "${PYTHON:-}" ] && return
  cmp -s "$root/requirements.txt" "$root/.venv/requirements.txt" && return
  echo "installing requirements.txt in .venv (once, a minute or two)"
  python3 -m venv "$root/.venv"
  "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"
  cp "$root/requirements.txt" "$root/.venv/requirements.txt"
}

# torchrun, but silent about processes that have said themselves why they ended (exit codes 1, 2, 130)
torchrun='
import logging, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    run.main()
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code in (1, 2, 130) else str(error))
except SignalException:
    sys.exit(130)
'

train() {
  local gpus nproc nnodes=${NNODES:-1} launch
  gpus=$("$python" -c 'import torch; n = torch.cuda.device_count(); print(max(p for p in (0, 1, 2, 4, 8) if p <= n))')
  nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
  case " $* " in
    *" --train_files"* | *" --sample"* | *" --help "* | *" -h "*) ;;  # the data is the caller's affair
    *)
      if [ "$gpus" -eq 0 ] || [[ " $* " =~ " --preset"[=\ ]"tiny " ]]; then
        [ "$gpus" -gt 0 ] || echo "no GPU: training the small preset on the built-in sample, on the CPU"
        [ -f data/sample/sample_train_000001.bin ] || "$python" data/sample.py
      elif ! ls data/fineweb10B/fineweb_train_*.bin >/dev/null 2>&1; then
        "$python" data/cached_fineweb.py
      fi ;;
  esac
  if [ "$nnodes" -gt 1 ]; then
    launch=(--nnodes "$nnodes" --node-rank "${NODE_RANK:?which node is this, 0 to NNODES - 1}"
      --master-addr "${MASTER_ADDR:?the address of node 0}" --master-port "${MASTER_PORT:-29500}")
  else
    launch=(--standalone)
  fi
  if [ "$nproc" -eq 1 ] && [ "$nnodes" -eq 1 ]; then
    exec "$python" train_gpt.py "$@"
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # of each process
  exec "$python" -c "$torchrun" "${launch[@]}" --nproc-per-node "$nproc" train_gpt.py "$@"
}

cd "$root"
case ${1:-} in
  help | -h) usage ;;
  test) set_up; shift; "$python" -m ruff check . && "$python" -m ruff format --check . && exec "$python" -m pytest tests "$@" ;;
  "" | --*) set_up; train "$@" ;;
  *) echo "run.sh: '$1' is not understood; ./run.sh help lists the commands" >&2; exit 2 ;;
esac

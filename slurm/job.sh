# shellcheck shell=bash
# What every job script needs first: words, this cluster's settings, the environment. Sourced in the repository.

say() { echo "slurm: $*" >&2; }
stop() {
  echo "error: $*" >&2
  exit 2
}

# Changes whenever the file is replaced; empty where there is none.
stat_of() { stat --format='%i %y' "$1" 2>/dev/null || true; }

# Modules and conda are not written for -e and -u.
if [[ -f slurm/cluster.env ]]; then
  set +eu
  # shellcheck source=/dev/null
  source slurm/cluster.env
  set -eu
fi

python=${DDP_VENV:-.venv}/bin/python
[[ -x $python && -x ${python%python}accelerate ]] ||
  stop "no environment with accelerate in ${DDP_VENV:-.venv} on $(uname -n): run make setup in $PWD, or name another" \
    "by DDP_VENV in slurm/cluster.env"
export PATH="${python%/python}:$PATH"

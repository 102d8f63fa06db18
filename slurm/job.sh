# shellcheck shell=bash
# All scripts in this folder source this file, with the repository as the working directory. It defines helpers, reads
# the settings of this cluster, and finds the Python environment.

say() { echo "slurm: $*" >&2; }
stop() {
  echo "error: $*" >&2
  exit 2
}

# Prints a string that changes whenever the file $1 is replaced; prints nothing if there is no such file.
stat_of() { stat --format='%i %y' "$1" 2>/dev/null || true; }

# Whether $1 is a whole number of at most nine digits. Bash arithmetic on any other text could run code in that text.
is_number() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }

if [[ -f slurm/cluster.env ]]; then
  ! grep -q $'\r' slurm/cluster.env ||
    stop "slurm/cluster.env has Windows line endings, which would become part of its values;" \
      "fix: sed -i 's/\r\$//' slurm/cluster.env"
  set +eu # the scripts of environment modules and conda fail under -e and -u
  # shellcheck source=/dev/null
  source slurm/cluster.env
  set -eu
fi

python=${DDP_VENV:-.venv}/bin/python
[[ -x $python && -x ${python%python}accelerate ]] ||
  stop "no Python environment with accelerate in ${DDP_VENV:-.venv} on $(uname -n); run make setup in $PWD, or set" \
    "DDP_VENV in slurm/cluster.env"
export PATH="${python%/python}:$PATH"

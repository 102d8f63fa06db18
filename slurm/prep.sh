#!/usr/bin/env bash
# A job that prepares a dataset. A training job can wait for it. Submit both in the repository:
#   job=$(sbatch --parsable slurm/prep.sh --source cifar10)
#   sbatch --dependency=afterok:$job slurm/train.sh baseline
# The arguments are those of python -m data_prep. If compute nodes have no network, see docs/slurm.md.
#SBATCH --job-name=prep
#SBATCH --output=logs/%x_%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=01:00:00
set -euo pipefail

if [[ ! -f slurm/job.sh ]]; then
  echo "error: $PWD on $(uname -n) is not the repository; run sbatch slurm/prep.sh in the repository, or name" \
    "the repository with sbatch --chdir; every node must see that folder" >&2
  exit 2
fi
source slurm/job.sh

out=()
[[ -z ${DDP_DATA_DIR:-} ]] || out=(--out "$DDP_DATA_DIR")
exec "$python" -m data_prep "${out[@]}" "$@"

#!/usr/bin/env bash
# A sweep: a job array with one training for each line of a file, and a table of the results when all have ended.
# Run it (no sbatch) in the repository, on the machine where you would call sbatch:
#   bash slurm/sweep.sh SETTINGS.txt [sbatch flags]
# A line holds what would follow slurm/train.sh: `baseline --seed 1 --peak-lr 0.3`. Empty lines and # comments are skipped.
set -euo pipefail

if [[ ! -f slurm/job.sh ]]; then
  echo "error: $PWD is not the repository: go there, and run bash slurm/sweep.sh" >&2
  exit 2
fi
source slurm/job.sh
[[ -z ${SLURM_JOB_ID:-} ]] || stop "this submits the jobs itself: run it without sbatch, bash slurm/sweep.sh SETTINGS.txt"
[[ ${1:-} && $1 != -* ]] || stop "name the file of settings: bash slurm/sweep.sh SETTINGS.txt [sbatch flags]"
settings=$1
shift

tasks=$("$python" -m slurm.sweep check "$settings")
sweep=${DDP_RUNS_DIR:-runs}/sweep-$(date +%Y%m%d-%H%M%S)
mkdir -p "$(dirname "$sweep")"
mkdir "$sweep" || stop "a sweep of this second is there already: run it again"
cp "$settings" "$sweep/settings.txt" # what runs is what was submitted, whatever becomes of the file

export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-${sweep##*/}}
array=$(sbatch --parsable --job-name=sweep --output=logs/%x_%A_%a.out "$@" --array="1-$tasks" \
  slurm/train.sh --sweep "$sweep")
array=${array%%;*} # the name of the cluster follows on some sites
say "job $array: $tasks trainings in $sweep"
by_hand=$(printf '%q -m slurm.sweep table %q' "$python" "$sweep")
table=$(sbatch --parsable --job-name=sweep-table --output=logs/%x_%j.out --nodes=1 --ntasks=1 --time=00:10:00 \
  --dependency="afterany:$array" --wrap="$by_hand") ||
  stop "the job for the table was refused; when the trainings have ended: $by_hand"
say "job ${table%%;*}: the table, into $sweep/table.md when all have ended; before that: $by_hand"

#!/usr/bin/env bash
# Submits a sweep: a job array with one run per task, and a job that writes the table when all tasks have ended.
# Run it (without sbatch) in the repository, on the machine where you would call sbatch:
#   bash slurm/sweep.sh [RECIPE] [--seeds N] [--set FLAG=V1,V2] [--out DIR] [--flag value ...] [-- sbatch flags]
# python -m ddp_trainer.sweep --help describes everything before the --.
# Default of --out: sweep-TIME-PID in $DDP_RUNS_DIR (default: runs).
set -euo pipefail

if [[ ! -f slurm/job.sh ]]; then
  echo "error: $PWD is not the repository; run bash slurm/sweep.sh in the repository" >&2
  exit 2
fi
source slurm/job.sh
[[ -z ${SLURM_JOB_ID:-} ]] ||
  stop "this script submits jobs itself; leave job $SLURM_JOB_ID and run bash slurm/sweep.sh ... on the login node"

# The flags for DDP_RUNS_DIR and DDP_DATA_DIR come before the user's: if a flag is given twice, the last one counts.
words=()
if [[ $# -gt 0 && $1 != -* ]]; then
  words+=("$1")
  shift
fi
sweep=${DDP_RUNS_DIR:-runs}/sweep-$(date +%Y%m%d-%H%M%S)-$$ # $$: two calls in the same second differ
words+=(--out "$sweep")
[[ -z ${DDP_DATA_DIR:-} ]] || words+=(--data-dir "$DDP_DATA_DIR")
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    -h | --help) exec "$python" -m ddp_trainer.sweep --help ;;
    --out) sweep=${2:-} ;;
    --out=*) sweep=${1#--out=} ;;
    --list | --table | --launcher*) stop "$1 works only with python -m ddp_trainer.sweep; leave it out" ;;
  esac
  words+=("$1")
  shift
done
shift $(($# > 0)) # drops the --

lines=$("$python" -m ddp_trainer.sweep "${words[@]}" --list) || exit 2
mkdir -p "$sweep"
list=$(mktemp "$sweep/runs-XXXXXXXX.txt") # tasks of an earlier array in this folder still need their own list
echo "$lines" >"$list"
tasks=$(wc -l <"$list")

unset WANDB_RUN_ID # otherwise, all runs would get the same id
array=$(sbatch --parsable --job-name=sweep --output=logs/%x_%A_%a.out "$@" --array="1-$tasks" \
  slurm/train.sh --sweep "$list" --resume)
array=${array%%;*} # some sites append the name of the cluster
say "job $array: $tasks runs in $sweep"
by_hand=$(printf '%q ' "$python" -m ddp_trainer.sweep "${words[@]}" --table)
table=$(sbatch --parsable --job-name=sweep-table --output=logs/%x_%j.out --nodes=1 --ntasks=1 --time=00:10:00 \
  --dependency="afterany:$array" <<END
#!/usr/bin/env bash
source slurm/job.sh
$by_hand
END
) || stop "the job for the table was rejected; when the runs have ended, use: $by_hand"
say "job ${table%%;*}: writes $sweep/table.md when all runs have ended; to write it earlier, use: $by_hand"

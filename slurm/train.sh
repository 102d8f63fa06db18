#!/usr/bin/env bash
# The training job, on one node or several. Submit it in the repository:
#   sbatch [sbatch flags] slurm/train.sh [RECIPE] [--flag value ...]
# A flag of sbatch overrides the line below with its name: sbatch --nodes=2 --gpus-per-node=8 slurm/train.sh baseline
# What is true of one cluster only stands in slurm/cluster.env. Without --out the run directory is RUNS/NAME-JOBID.
#SBATCH --job-name=train
#SBATCH --output=logs/%x_%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
# To the processes of the step, not to this script (that would be B:USR2), three minutes before the time is up.
#SBATCH --signal=USR2@180
set -euo pipefail

# sbatch runs a copy of this file, so its own path says nothing: the job's folder does.
if [[ ! -f slurm/job.sh ]]; then
  echo "error: $PWD on $(uname -n) is not the repository: go there and sbatch slurm/train.sh, or name it by" \
    "sbatch --chdir; every node has to see that folder" >&2
  exit 2
fi
source slurm/job.sh

[[ ${SLURM_NTASKS_PER_NODE:-1} == 1 ]] ||
  stop "leave --ntasks-per-node at 1: the one launcher on each node starts a process for each GPU"

given=
(($# == 0)) || given=$(printf ' %q' "$@")

# A task of a sweep takes its arguments from a line of the sweep's file.
if [[ ${1:-} == --sweep ]]; then
  mapfile -d '' -t line < <("$python" -m slurm.sweep arguments "$2" "$SLURM_ARRAY_TASK_ID")
  ((${#line[@]})) || exit 2
  set -- "${line[@]}" "${@:3}"
fi

# Of an array, one task's SLURM_JOB_ID is the number of them all.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# This cluster's settings stand before the user's: of a flag that is given twice, the last one counts.
arguments=()
if [[ $# -gt 0 && $1 != -* ]]; then
  arguments+=("$1")
  shift
fi
arguments+=(--out "${DDP_RUNS_DIR:-runs}/${SLURM_JOB_NAME//[^[:alnum:]._-]/-}-$SLURM_JOB_ID")
[[ -z ${DDP_DATA_DIR:-} ]] || arguments+=(--data-dir "$DDP_DATA_DIR")
arguments+=("$@")
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
((attempt == 1)) || arguments+=(--resume)

# Says in one line what is wrong, before any node is kept busy.
{ IFS= read -r out && IFS= read -r data_dir && read -r processes; } < <(
  "$python" -m slurm.preflight "${arguments[@]}"
) || exit 2

export STATUS=$out/status.json
go_on="go on by: sbatch [the same flags] ${SLURM_ARRAY_TASK_ID:+--array=$SLURM_ARRAY_TASK_ID }slurm/train.sh$given"
go_on+=" --out $(printf %q "$out") --resume"
state_of_run() { sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$STATUS" 2>/dev/null || true; }
newest_checkpoint() {
  local found=("$out"/checkpoints/step-*) # sorted, as the numbers have leading zeros
  [[ ! -d ${found[-1]} ]] || basename "${found[-1]}"
}

if ((attempt > 1)) && [[ $(state_of_run) == "done" ]]; then
  say "$out is complete"
  exit 0
fi

# `attempts` in the run directory: the checkpoint that the last attempt began with, and how many attempts in a row
# before it had ended where they began. SLURM's own requeues, after a preemption or a lost node, count as ours do.
began_with=$(newest_checkpoint) stalled=0
if [[ $attempt -gt 1 && -f $out/attempts ]]; then
  IFS=, read -r before stalled <"$out/attempts"
  if [[ $before == "$began_with" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
fi
stop_if_stalled() {
  (($1 >= ${DDP_MAX_STALLED:-5})) || return 0
  rm -f "$out/attempts"
  stop "$1 attempts in a row saved nothing new (newest checkpoint: ${began_with:-none}): not requeued; find the cause," \
    "then $go_on"
}
stop_if_stalled "$stalled"
mkdir -p "$out"
echo "$began_with,$stalled" >"$out/attempts"

requeue() {
  # A job that is being cancelled must not come back, and one that SLURM requeues comes back by itself.
  local state
  state=$(squeue --noheader --jobs="$job" --format=%T) || stop "SLURM does not say how this job stands; $go_on"
  [[ $state == RUNNING ]] || exit 0
  [[ $(newest_checkpoint) != "$began_with" ]] || stop_if_stalled $((stalled + 1))
  say "asked to stop: back into the queue, to go on in $out"
  scontrol requeue "$job" || stop "SLURM does not take the job back; $go_on"
}

IFS= read -r RENDEZVOUS_HOST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
RENDEZVOUS_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that the system hands out
STATUS_BEFORE=$(stat_of "$STATUS")
export RENDEZVOUS_HOST RENDEZVOUS_PORT STATUS_BEFORE DATA_DIR=$data_dir PROCESSES=$processes
say "job $SLURM_JOB_ID, attempt $attempt: $SLURM_JOB_NUM_NODES x $processes processes on $SLURM_JOB_NODELIST, in $out"
((attempt > 1)) || say "should it fail or be cancelled, $go_on"

# --export and --wait undo what an sbatch flag or the site may have set otherwise.
result=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1 --wait=0 \
  bash slurm/node.sh "${arguments[@]}" || result=$?

# The launchers flatten every failure to 1: status.json knows what happened. Written on another node, it may be seen late.
# `none`: nothing was written in this attempt. With an exit status of 0 it was asked to stop before the training had begun.
for ((waited = 0; waited < 30; waited++)); do
  state=$(state_of_run)
  [[ $(stat_of "$STATUS") != "$STATUS_BEFORE" || $state:$result == done:0 ]] || state=none # done:0: complete already
  [[ $result == 0 && $state =~ ^(none|running)$ ]] || break
  sleep 1
done
case $state:$result in
  done:*) say "complete: $out" ;;
  preempted:* | none:0) requeue ;;
  *)
    echo "error: the training failed (state: $state, exit status: $result) and is not requeued; once mended, $go_on" >&2
    exit 1
    ;;
esac

#!/usr/bin/env bash
# The training job, on one or several nodes. Submit it in the repository:
#   sbatch [sbatch flags] slurm/train.sh [RECIPE] [--flag value ...]
# A flag of sbatch overrides the #SBATCH line of the same name:
#   sbatch --nodes=2 --gpus-per-node=8 slurm/train.sh baseline
# The settings of your cluster belong in slurm/cluster.env.
# Default of --out: NAME-JOBID in $DDP_RUNS_DIR (default: runs), where NAME is the name of the job.
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
# Three minutes before the time limit, send USR2 to the processes that srun started. B:USR2 would signal only this
# script.
#SBATCH --signal=USR2@180
set -euo pipefail

# sbatch runs a copy of this file in another folder, so the repository can be found only as the working directory.
if [[ ! -f slurm/job.sh ]]; then
  echo "error: $PWD on $(uname -n) is not the repository; run sbatch slurm/train.sh in the repository, or name" \
    "the repository with sbatch --chdir; every node must see that folder" >&2
  exit 2
fi
source slurm/job.sh

[[ -n ${SLURM_JOB_ID:-} ]] ||
  stop "this is a job script; submit it: sbatch slurm/train.sh ... (without SLURM: accelerate launch -m ddp_trainer.train)"
[[ ${SLURM_STEP_NUM_TASKS:-1} == 1 ]] ||
  stop "srun started $SLURM_STEP_NUM_TASKS copies of this script; submit it once: sbatch slurm/train.sh ..."
[[ ${SLURM_NTASKS_PER_NODE:-1} == 1 ]] ||
  stop "leave --ntasks-per-node at 1: one launcher on each node starts a process for each GPU"
max_stalled=${DDP_MAX_STALLED:-5}
{ is_number "$max_stalled" && ((max_stalled >= 1)); } ||
  stop "DDP_MAX_STALLED must be a whole number of at least 1, got $max_stalled"

given=
(($# == 0)) || given=$(printf ' %q' "$@")

# --sweep FILE: the arguments of task N are on line N of FILE, as `python -m ddp_trainer.sweep --list` prints them.
if [[ ${1:-} == --sweep ]]; then
  [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || stop "--sweep needs an array job; submit the sweep with bash slurm/sweep.sh"
  line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "${2:-}") || stop "--sweep needs the file of a sweep, such as SWEEP/runs-XXXXXXXX.txt"
  [[ -n $line ]] || stop "$2 has no line $SLURM_ARRAY_TASK_ID, which is the number of this array task"
  mapfile -t line < <(xargs printf '%s\n' <<<"$line") # xargs removes the quotes, and expands nothing
  export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$(basename -- "$(dirname -- "$2")")}
  set -- "${line[@]}" "${@:3}"
fi

# In exactly one task of a job array, SLURM_JOB_ID is the id of the whole array. ARRAYID_TASKID always means one task.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# The flags for DDP_RUNS_DIR and DDP_DATA_DIR come before the user's: if a flag is given twice, the last one counts.
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

# Reports wrong input in one line, before srun starts anything.
{ IFS= read -r out && IFS= read -r data_dir && read -r processes && read -r is_finished; } < <(
  "$python" -m slurm.preflight "${arguments[@]}"
) || exit 2

export STATUS=$out/status.json
to_resume=" --out $(printf %q "$out") --resume"
resume="resume with: sbatch [the same flags] ${SLURM_ARRAY_TASK_ID:+--array=$SLURM_ARRAY_TASK_ID }slurm/train.sh"
resume+=${given%"$to_resume"}$to_resume
state_of_run() { sed -n 's/.*"state": "\([a-z]*\)".*/\1/p' "$STATUS" 2>/dev/null || true; }
newest_checkpoint() {
  local found=("$out"/checkpoints/step-[0-9]*) # sorted, because the numbers have leading zeros
  [[ ! -d ${found[-1]} ]] || basename "${found[-1]}"
}

if ((attempt > 1)) && [[ $is_finished:$(state_of_run) == yes:done ]]; then
  say "$out is finished"
  exit 0
fi

# Each attempt writes two values to the file `attempts` in the run directory: the newest checkpoint at its start, and
# the number of attempts directly before it that saved no new checkpoint. Attempts that SLURM itself requeued
# (preemption, lost node) count, too.
began_with=$(newest_checkpoint) stalled=0
if [[ $attempt -gt 1 && -f $out/attempts ]]; then
  IFS=, read -r before stalled <"$out/attempts" || true
  is_number "$stalled" || stalled=0
  if [[ $before == "$began_with" ]]; then stalled=$((stalled + 1)); else stalled=0; fi
fi
stop_if_stalled() {
  (($1 >= max_stalled)) || return 0
  rm -f "$out/attempts"
  stop "$1 attempts in a row saved nothing new (newest checkpoint: ${began_with:-none}); not requeued. Find the cause," \
    "then $resume"
}
stop_if_stalled "$stalled"
mkdir -p "$out"
echo "$began_with,$stalled" >"$out/attempts"

requeue() {
  # A job that is being cancelled must not be requeued, and a job that SLURM is requeuing need not be.
  local state
  state=$(repeated squeue --states=all --noheader --jobs="$job" --format=%T) ||
    stop "squeue does not report the state of this job; $resume"
  [[ $state == RUNNING || $state == SIGNALING ]] || exit 0 # SIGNALING: a node has not answered to a signal yet
  [[ $(newest_checkpoint) != "$began_with" ]] || stop_if_stalled $((stalled + 1))
  say "stopped by a signal; requeued to resume $out"
  repeated scontrol requeue "$job" || stop "SLURM does not requeue the job; $resume"
}

# Calls a command up to five times, because SLURM's controller may be too busy to answer.
repeated() {
  local tries
  for ((tries = 1; tries < 5; tries++)); do
    if "$@"; then return 0; fi
    sleep "$tries"
  done
  "$@"
}

IFS= read -r RENDEZVOUS_HOST < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# On several nodes, the port is below the range from which the system assigns ports. On a single node, it is 0 (any free
# port): if a chosen port were in use, Accelerate would switch to c10d, which is unsafe (docs/security.md).
RENDEZVOUS_PORT=$((SLURM_JOB_NUM_NODES == 1 ? 0 : 10000 + SLURM_JOB_ID % 20000))
STATUS_BEFORE=$(stat_of "$STATUS")
export RENDEZVOUS_HOST RENDEZVOUS_PORT STATUS_BEFORE DATA_DIR=$data_dir PROCESSES=$processes
say "job $SLURM_JOB_ID, attempt $attempt: $SLURM_JOB_NUM_NODES x $processes processes on $SLURM_JOB_NODELIST, in $out"
((attempt > 1)) || say "if the run fails or is cancelled, $resume"

# --export and --wait override values that an sbatch flag or the site may have set. --gpus-per-node is needed for jobs
# that were submitted with --gres, because srun would otherwise use the script's own --gpus-per-node=1.
result=0
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  ${SLURM_GPUS_ON_NODE:+--gpus-per-node="$SLURM_GPUS_ON_NODE"} --kill-on-bad-exit=1 --wait=0 \
  bash slurm/node.sh "${arguments[@]}" || result=$?

# The launchers turn every failure into exit status 1, but status.json says what happened. If another node wrote this
# file, its new content may become visible late. If this attempt did not write the file, `state` becomes `none`, unless
# the run was already finished and the exit status is 0: then it stays `done`. State `none` or `running` with exit status
# 0 (none:0 and running:0 below) means that this attempt was stopped before the first step.
for ((waited = 0; waited < 30; waited++)); do
  state=$(state_of_run)
  [[ $(stat_of "$STATUS") != "$STATUS_BEFORE" || $state:$result:$is_finished == done:0:yes ]] || state=none
  [[ $result == 0 && $state =~ ^(none|running)$ ]] || break
  sleep 1
done
case $state:$result in
  done:*) say "finished: $out" ;;
  preempted:* | none:0 | running:0) requeue ;;
  *)
    echo "error: the run failed (state: $state, exit status: $result) and is not requeued; fix the cause, then $resume" >&2
    exit 1
    ;;
esac

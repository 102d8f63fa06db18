#!/usr/bin/env bash
# The part of a training job that runs on each node: copies the data, starts the launcher, cleans up. train.sh exports
# the settings of this script and starts it with srun, once per node, with the trainer's arguments.
set -euo pipefail
if [[ ! -f slurm/job.sh || -z ${STATUS:-} || -z ${DATA_DIR:-} || -z ${PROCESSES:-} ]]; then
  echo "error: slurm/node.sh is a part of the training job; submit the job with: sbatch slurm/train.sh ..." >&2
  exit 2
fi

stop_requested='' ended_early='' child='' interrupted=''

# Handles a signal from SLURM. On most clusters, SLURM signals only this script, so this function signals the training
# processes, which are the children of the launcher. On some clusters, SLURM also signals the training processes
# directly. The two signals then count as one request to stop. Until the trainer has written status.json in this
# attempt, it has nothing to save, and perhaps does not handle TERM and USR2 yet. Until then, this function instead ends
# the trainer and the launcher with HUP.
on_request() {
  local status
  stop_requested=yes interrupted=yes
  [[ $child ]] || return 0
  # If the output of `stat` is empty although the file exists, a signal has ended `stat`, so it is run again.
  until status=$(stat_of "$STATUS") && [[ $status || ! -e $STATUS ]]; do :; done
  if [[ $status == "$STATUS_BEFORE" ]]; then
    ended_early=yes # even if the trainer still writes status.json before it ends
    # Just after its start, the child has no process group of its own yet.
    kill -HUP -- "-$child" 2>/dev/null || kill -HUP "$child" 2>/dev/null || true
  else
    # shellcheck disable=SC2046 # the process ids are separate words
    kill -USR2 $(cat /proc/"$child"/task/*/children 2>/dev/null) 2>/dev/null || true
  fi
}
trap on_request TERM USR2 # before job.sh is read, because loading modules in slurm/cluster.env may take a while
source slurm/job.sh

# Runs a command in a process group of its own, with TERM and USR2 ignored. They must not reach torchrun: TERM would
# make it kill the trainer after TORCH_ELASTIC_SHUTDOWN_TIMEOUT, and USR2 would end torchrun itself.
run() {
  local status=0
  [[ -z $stop_requested ]] || return 0
  (
    trap '' TERM USR2
    exec setsid "$@"
  ) &
  child=$!
  [[ -z $stop_requested ]] || on_request # for a signal that arrived before `child` was set
  while true; do
    interrupted='' status=0
    wait "$child" || status=$?
    [[ $interrupted ]] || break # a signal ends `wait`, but not the child, so wait again
  done
  child=''
  if [[ $ended_early || ($stop_requested && $(stat_of "$STATUS") == "$STATUS_BEFORE") ]]; then status=0; fi
  return "$status"
}

[[ -z $stop_requested ]] || exit 0
if [[ -n ${DDP_STAGE_DIR:-} ]]; then
  folder=$DDP_STAGE_DIR
  [[ $folder != tmpdir ]] || folder=${TMPDIR:-/tmp}
  # mktemp gives the copy a name that nobody else can guess, and the mode 0700, so that nobody else can read it. A copy
  # that a killed attempt of this job left behind is removed.
  prefix=ddp-trainer-$SLURM_JOB_ID-$SLURMD_NODENAME # not SLURM_NODEID, which may differ in the next attempt
  mkdir -p "$folder" || true # mktemp reports the problem
  find "$folder" -maxdepth 1 -type d -user "$(id -u)" -name "$prefix-????????" -exec rm -rf {} + || true
  staged=$(mktemp -d "$folder/$prefix-XXXXXXXX") ||
    stop "no folder can be created in $folder on $(uname -n); set DDP_STAGE_DIR to another folder, or unset it"
  trap 'rm -rf "$staged"' EXIT
  run "$python" -m slurm.stage "$DATA_DIR" "$staged"
  set -- "$@" --data-dir "$staged"
  export DDP_STAGED_FROM=$DATA_DIR # recorded by the run, because the copy is removed at the end of the job
fi

world_size=$((SLURM_JOB_NUM_NODES * PROCESSES))
if ((world_size == 1)); then
  launcher=(accelerate launch --config_file launch/one_gpu.yaml)
  unset MASTER_ADDR
else
  launcher=(accelerate launch --config_file launch/multi_node.yaml
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$world_size" --machine_rank "$SLURM_NODEID"
    --main_process_ip "$RENDEZVOUS_HOST" --main_process_port "$RENDEZVOUS_PORT"
    --rdzv_backend static --rdzv_conf timeout=600) # c10d would unpickle what it receives: docs/security.md
  # Accelerate has no flags for these two settings. The first makes torchrun handle HUP, but not TERM. The second is the
  # name by which other nodes know this node.
  export PET_SIGNALS_TO_HANDLE=SIGHUP PET_LOCAL_ADDR=$SLURMD_NODENAME
  # If the job is stopped before the trainer has written status.json, the launcher gives the workers this many seconds to
  # end, and then kills them. A short time is enough, because they have nothing to save.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=10
fi
run "${launcher[@]}" -m ddp_trainer.train "$@"

#!/usr/bin/env bash
# What a training job does on each of its nodes: stage the data, start the launcher, tidy up. srun starts it once per
# node, with the trainer's arguments; train.sh exports the other settings.
set -euo pipefail
source slurm/job.sh
: "${STATUS?}" "${DATA_DIR?}" "${PROCESSES?}" # from train.sh

asked='' child='' interrupted=''

# SLURM signals every process of the step, so the trainer has heard of it too. Before it is at work there is nothing to
# save, and nobody listens: that is ended here.
on_request() {
  asked=yes interrupted=yes
  if [[ $child && $(stat_of "$STATUS") == "$STATUS_BEFORE" ]]; then kill -HUP -- "-$child" 2>/dev/null || true; fi
}
trap on_request TERM USR2

# Runs a command in a process group of its own that takes no notice of the signals. For the launcher this is essential:
# torchrun would pass them on, a second request to the trainer, and would kill it after half a minute.
run() {
  local status=0
  [[ -z $asked ]] || return 0
  (
    trap '' TERM USR2
    exec setsid "$@"
  ) &
  child=$!
  while true; do
    interrupted='' status=0
    wait "$child" || status=$?
    [[ $interrupted ]] || break # else it was the signal that ended the waiting
  done
  child=''
  if [[ $asked && $(stat_of "$STATUS") == "$STATUS_BEFORE" ]]; then status=0; fi
  return "$status"
}

staged=''
if [[ -n ${DDP_STAGE_DIR:-} ]]; then
  folder=$DDP_STAGE_DIR
  [[ $folder != tmpdir ]] || folder=${TMPDIR:-/tmp}
  staged=$folder/ddp-trainer-$SLURM_JOB_ID
  trap 'rm -rf "$staged"' EXIT
  run "$python" -m slurm.stage "$DATA_DIR" "$staged"
  set -- "$@" --data-dir "$staged"
  export DDP_STAGED_FROM=$DATA_DIR # what the run's record names: the copy goes with the job
fi

world_size=$((SLURM_JOB_NUM_NODES * PROCESSES))
if ((world_size == 1)); then
  launcher=(accelerate launch --config_file launch/one_gpu.yaml)
  unset MASTER_ADDR
else
  launcher=(accelerate launch --config_file launch/multi_node.yaml
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$world_size" --machine_rank "$SLURM_NODEID"
    --main_process_ip "$RENDEZVOUS_HOST" --main_process_port "$RENDEZVOUS_PORT"
    --rdzv_backend static --rdzv_conf timeout=600) # c10d would unpickle what it is sent: docs/security.md
  # torchrun's own flags that Accelerate does not pass on: let TERM be, name this node as the others know it, and on a
  # single node where to meet, which would be a port that all jobs share.
  export PET_SIGNALS_TO_HANDLE=SIGHUP PET_LOCAL_ADDR=$SLURMD_NODENAME
  export PET_RDZV_ENDPOINT=$RENDEZVOUS_HOST:$RENDEZVOUS_PORT
  # Seconds for the other workers of a node after one has died: there is nothing that they could save.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=10
fi
run "${launcher[@]}" -m ddp_trainer.train "$@"

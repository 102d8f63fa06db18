"""A folder from which jobs are submitted to a real SLURM, with a fake launcher in place of `accelerate`.

The launcher records how it was called and writes the status.json that the test needs, so a job takes seconds.
Environment variables control the launcher: ENDS_AS (the states that successive attempts write), STARTS_FOR (seconds
that the first attempt waits), SAVES (each attempt saves a checkpoint), TRAINS (the first attempt starts a training
process) and EXIT_STATUS.
"""

import shutil
import sys
from pathlib import Path

from tests.support.slurm_cluster import Cluster, Job
from tests.support.trainer import REPOSITORY

LAUNCHER = """#!/usr/bin/env bash
printf '%s\\0' "${CUDA_VISIBLE_DEVICES:-}" "$@" >"$RECORDS/$SLURM_JOB_ID-$SLURM_NODEID"
attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
if ((attempt == 1)); then sleep "${STARTS_FOR:-0}"; fi
if ((SLURM_NODEID == 0)); then
  run=$(dirname "$STATUS")
  if [[ ${SAVES:-} ]]; then mkdir -p "$run/checkpoints/step-0000000$attempt"; fi
  states=($ENDS_AS)
  state=${states[attempt - 1]:-${states[-1]}}
  if [[ $state == done ]]; then
    echo '{"steps": 1000000}' >"$run/summary.json"
    touch "$run/model.safetensors" "$run/model.json"
  fi
  echo "{\\"state\\": \\"$state\\"}" >"$STATUS.new"
  mv "$STATUS.new" "$STATUS"
fi
if [[ ${TRAINS:-} && $attempt == 1 ]]; then # starts a training process, which SLURM does not signal
  python -c 'import os, signal, sys, time
def stop(*_):
    open(os.environ["STATUS"], "w").write("{\\"state\\": \\"preempted\\"}")
    sys.exit()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR2, stop)
open(sys.argv[1], "w").close()
time.sleep(300)' "$RECORDS/$SLURM_JOB_ID-child" &
  wait $!
fi
exit "${EXIT_STATUS:-0}"
"""
# The real Python, except that torch reports the number of GPUs that SLURM has assigned.
PYTHON = """#!/usr/bin/env bash
[[ $* == "-m slurm.preflight "* ]] || exec REAL "$@"
exec REAL -c 'import os, sys, torch
torch.cuda.device_count = lambda: int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
from slurm.preflight import main
sys.exit(main(sys.argv[1:]))' "${@:3}"
"""


class Desk:
    """The folder from which jobs are submitted, with the scripts of the repository and a fake Python environment."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.records = cluster, folder, folder / "records"
        shutil.copytree(REPOSITORY / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("cluster.env"))
        for name in ("ddp_trainer", "data_prep", "launch"):
            (folder / name).symlink_to(REPOSITORY / name)
        for name in ("logs", "records", "fake/bin"):
            (folder / name).mkdir(parents=True)
        for name, text in (("accelerate", LAUNCHER), ("python", PYTHON.replace("REAL", sys.executable))):
            (folder / "fake" / "bin" / name).write_text(text)
            (folder / "fake" / "bin" / name).chmod(0o755)
        self.settings = {"DDP_VENV": "fake", "DDP_DATA_DIR": str(data), "RECORDS": str(self.records)}

    def submit(self, *flags: str, arguments: tuple[str, ...] = ("smoke",), **settings: str) -> Job:
        script = ("slurm/train.sh", *arguments)
        return self.cluster.submit(
            "--cpus-per-task=1", *flags, *script, cwd=self.folder, **{**self.settings, **settings}
        )

    def launched(self, job: Job, node: int = 0) -> list[str]:
        """Returns what the launcher of a node recorded: CUDA_VISIBLE_DEVICES, then its arguments."""
        return (self.records / f"{job.number}-{node}").read_text().split("\0")[:-1]

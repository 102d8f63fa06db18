"""Joins the launcher's process group on the CPU. Prints rank, world size and how many processes it reached, as JSON."""

import json
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState


def main() -> None:
    state = PartialState(cpu=True)
    total = torch.ones(1)
    if state.num_processes > 1:
        dist.all_reduce(total)  # counts the processes that can really talk to each other
    world = {"rank": state.process_index, "world_size": state.num_processes, "reached": int(total.item())}
    sys.stdout.write(json.dumps(world) + "\n")  # one write, so that the lines of several processes do not mix
    sys.stdout.flush()
    state.destroy_process_group()


if __name__ == "__main__":
    main()

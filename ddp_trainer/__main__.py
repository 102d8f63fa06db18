"""`python -m ddp_trainer` lists the commands: the package itself is not a command."""

import sys

COMMANDS = ("train", "evaluate", "predict", "export", "lr_find", "sweep", "report", "model_card", "doctor")

if __name__ == "__main__":
    words = ", ".join(f"ddp_trainer.{name}" for name in COMMANDS)
    print(f"error: ddp_trainer is not a command; run python -m with one of {words}", file=sys.stderr)
    sys.exit(2)

"""`python -m ddp_trainer` prints an error that lists the commands, because the package itself is not a command."""

import sys

COMMANDS = ("train", "evaluate", "predict", "export", "lr_find", "sweep", "report", "model_card", "doctor")

if __name__ == "__main__":
    words = ", ".join(f"ddp_trainer.{name}" for name in COMMANDS)
    print(f"error: ddp_trainer is not a command; run one of these with python -m: {words}", file=sys.stderr)
    sys.exit(2)

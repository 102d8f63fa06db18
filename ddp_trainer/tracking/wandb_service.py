"""Decides whether a W&B run goes online and which id it has, and ends long waits for W&B. Does not import wandb."""

import contextlib
import netrc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_prep.errors import require, warn
from data_prep.files import read_text, replace_file

# Modes that WANDB_MODE and W&B's settings files may name, each with the mode that it stands for. The last two names are
# older. The mode `shared`, in which several processes write to one run, is left out: a shared run has no step number.
MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}


def mode_from_environment() -> str | None:
    """The mode in WANDB_MODE, or None if it is not set. Raises InputError if W&B has no such mode."""
    name = os.environ.get("WANDB_MODE")
    return _mode_named(name, "WANDB_MODE") if name else None


def _mode_named(name: str, origin: str) -> str:
    require(name in MODES, f"{origin} must be one of {', '.join(MODES)}, got {name}")
    return MODES[name]


def resolve_mode(wanted: str, load_settings: Callable[[], Any]) -> str:
    """The mode (online, offline or disabled) for `wanted`, the value of --wandb.

    For auto, the first of these that applies:
    - the mode in WANDB_MODE
    - the mode in W&B's settings files, such as the one that `wandb offline` writes, unless that mode is online
    - online if there is an API key or another credential, offline if not

    `load_settings` returns a `wandb.Settings`.
    """
    if wanted != "auto":
        return wanted
    named = mode_from_environment()
    if named:
        return named
    settings = load_settings()
    mode = _mode_named(settings.mode, "the mode in W&B's settings file")
    if mode != "online":  # online is W&B's default, so the user may not have chosen it
        return mode
    return "online" if settings.api_key or has_credentials(settings.base_url) else "offline"


def has_credentials(base_url: str | None = None) -> bool:
    """True if the environment has a key or a token file, or if the netrc file has a login for W&B's server.

    W&B itself is not asked, because some of its versions would start its background service and ask for a
    key on the terminal.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or base_url or "https://api.wandb.ai").netloc
        file = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, RuntimeError, ValueError, netrc.NetrcParseError):  # ValueError: invalid URL, or file not UTF-8
        return False
    hosts = ["api.wandb.ai", "api.forge.coreweave.com"] if host == "api.wandb.ai" else [host]
    return any(file.authenticators(each) for each in hosts)


def choose_run_id(run_dir: Path, saved: str | None) -> str:
    """The id in the checkpoint (`saved`), else the id stored in `run_dir`, else WANDB_RUN_ID, else a new id.

    An id belongs to one run directory: WANDB_RUN_ID is not used if a directory next to this one already has it.
    """
    return saved or _read_id(_id_file(run_dir)) or _unused_id_from_environment(run_dir) or os.urandom(4).hex()


def keep_run_id(run_dir: Path, run_id: str) -> None:
    """Stores an id that W&B accepted, so that a run that dies before its first checkpoint keeps its id when resumed.

    Raises OSError if the file cannot be written.
    """
    replace_file(_id_file(run_dir), f"{run_id}\n".encode())


def _id_file(run_dir: Path) -> Path:
    return run_dir / "wandb" / "run-id"


def _read_id(file: Path) -> str | None:
    """The id stored in `file`; None if there is no such file or it cannot be read."""
    try:
        return read_text(file).strip()
    except (OSError, ValueError):
        return None


def _unused_id_from_environment(run_dir: Path) -> str | None:
    run_id = os.environ.get("WANDB_RUN_ID")
    for file in run_dir.resolve().parent.glob("*/wandb/run-id") if run_id else ():
        if _read_id(file) == run_id:
            owner = file.parents[1]
            warn(f"WANDB_RUN_ID={run_id} belongs to {owner}; using a new id")
            return None
    return run_id


def bounded(work: Callable[[], None], seconds: float) -> None:
    """Runs `work` and raises what it raises. After `seconds`, kills W&B's service and raises TimeoutError.

    W&B's own limits, such as finish_timeout, are enforced by its service. If the service hangs, W&B's `finish` waits
    forever, and so does its `log` after a few hundred records.
    """
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        kill_service()
        raise TimeoutError(f"no answer after {seconds:.0f} s")
    if raised:
        raise raised[0]


def kill_service() -> None:
    """Kills W&B's service, a child of this process. Otherwise, W&B would wait for it when Python exits."""
    import psutil  # here, because ddp_trainer.doctor imports this module and must work without installed packages

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "wandb-core":
                child.kill()

"""What surrounds a W&B run: whether to go online, under which id, and for how long to wait. Needs nothing of wandb."""

import netrc
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit


def choose_run_id(path: Path, saved: str | None) -> str:
    """The id in the checkpoint, else that of an attempt that died before its first checkpoint, else a new one."""
    run_id = saved or (path.read_text().strip() if path.exists() else None) or os.environ.get("WANDB_RUN_ID")
    if not run_id:
        run_id = os.urandom(4).hex()
    path.parent.mkdir(exist_ok=True)
    path.write_text(run_id + "\n")
    return run_id


def resolve_mode(wanted: str) -> str:
    """-> online, offline or disabled; auto takes WANDB_MODE, else online where there is a key to use."""
    if wanted != "auto":
        return wanted
    named = os.environ.get("WANDB_MODE", "").lower()
    named = {"dryrun": "offline", "run": "online"}.get(named, named)
    return named or ("online" if has_credentials() else "offline")


def has_credentials() -> bool:
    """A key in the environment, or a login in the netrc file, for the server that W&B would talk to."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(base).netloc] if base else ["api.wandb.ai", "api.forge.coreweave.com"]
    try:
        file = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, RuntimeError, netrc.NetrcParseError):
        return False
    return any(file.authenticators(host) for host in hosts)


def bounded(work: Callable[[], None], seconds: float) -> None:
    """Runs `work`, and raises what it raises. One that takes longer is left behind, and W&B's service is ended."""
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
        end_service()
        raise TimeoutError(f"no end after {seconds:.0f} s")
    if raised:
        raise raised[0]


def end_service() -> None:
    """Kills W&B's service among our own children: its clean-up at exit would wait for it for ever."""
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core":
                os.kill(int(pid), signal.SIGKILL)

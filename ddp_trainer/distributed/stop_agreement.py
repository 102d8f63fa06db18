"""Makes all ranks stop after the same step, no matter which rank was asked to stop."""

import torch
import torch.distributed as dist

from ddp_trainer.distributed.signals import Preempted, StopRequest


class StopAgreement:
    """Tells all ranks whether any rank was asked to stop.

    `announce` starts a collective exchange, and `agreed` waits for its end. Work between the two calls overlaps with
    the exchange.

    `group`: the process group of all ranks; None if there is only one rank.
    """

    def __init__(self, request: StopRequest, group: dist.ProcessGroup | None) -> None:
        self._request, self._group = request, group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._exchange: dist.Work | None = None

    def announce(self) -> None:
        """Starts an exchange that tells all ranks whether this rank was asked to stop."""
        if self._group is not None:
            self._flag.fill_(int(self._request.pending))
            self._exchange = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop before the last `announce` (with only one rank: before this call).

        The answer is the same on every rank.
        """
        if self._group is None:
            return self._request.pending
        assert self._exchange is not None, "call announce before agreed"
        self._exchange.wait()
        return bool(self._flag.item())

    def raise_if_asked(self) -> None:
        """Raises Preempted on every rank if any rank was asked to stop. A collective operation."""
        self.announce()
        if self.agreed():
            raise Preempted

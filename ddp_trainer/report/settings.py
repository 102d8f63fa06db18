"""Which recorded settings distinguish two runs, derived from those that a resumed run may change."""

from ddp_trainer.config import FREE_ON_RESUME

# Two runs that differ only in these learn the same weights. `max_steps` ends a run early, so it counts.
NO_DIFFERENCE = FREE_ON_RESUME - {"max_steps"}

# The report leaves these out when it compares runs or says how to repeat one: they decide where a run is stored, how
# it is tracked and how fast it loads data. `device` and `compile` change the last digits of a result.
LEFT_OUT = NO_DIFFERENCE - {"device", "compile"}

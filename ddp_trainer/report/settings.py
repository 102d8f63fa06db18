"""Which recorded settings tell two runs apart, derived from those that a resumed run may change."""

from ddp_trainer.config import FREE_ON_RESUME

# Two runs that differ in these only have learned the same. `max_steps` ends a run early, so it counts.
NO_DIFFERENCE = FREE_ON_RESUME - {"max_steps"}

# Of these the report does not speak when it compares runs or says how to repeat one: they decide where a run is, how
# it is watched and how fast it loads. `device` and `compile` change the last digits of a result.
LEFT_OUT = NO_DIFFERENCE - {"device", "compile"}

"""Lists the settings that do not affect what a run learns. All of them are settings that may change on --resume."""

from ddp_trainer.config import CHANGEABLE_ON_RESUME

# Two runs that differ only in these settings learn the same weights, up to rounding, if their `data_dir` has the same
# images. `max_steps` is not one of these settings, because it can end a run early.
NO_DIFFERENCE = CHANGEABLE_ON_RESUME - {"max_steps"}

# The report leaves these settings out when it compares runs. They decide, for example, where a run is stored, how it is
# tracked and how fast it runs. The command for repeating a run leaves out the same settings, except `data_dir` and
# `out`. The report shows `device` and `compile`, because they change the last digits of a result.
LEFT_OUT = NO_DIFFERENCE - {"device", "compile"}

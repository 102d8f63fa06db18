"""The result of a learning rate range test: the loss at each rate, when to stop, what to suggest, and a picture."""

DIVERGED = 4.0  # the smoothed loss has diverged if it exceeds this multiple of its lowest value, as in fastai
# The smoothed loss is an average over this share of the steps. The "first steps" below are that many steps.
SHARE = 0.1


class LossCurve:
    """Losses by learning rate, raw and smoothed by an exponential average with bias correction.

    The average lags behind the loss by a fixed share of all steps. During this lag, the learning rate rises by a factor
    that does not depend on the number of steps.
    """

    def __init__(self, steps: int) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.diverged = False
        self._first = max(round(SHARE * steps), 1)
        self._keep = 1 - 1 / self._first
        self._average = 0.0

    def add(self, rate: float, loss: float) -> None:
        """Adds a step. Sets `diverged` if the smoothed loss is far above its lowest value."""
        self.rates.append(rate)
        self.losses.append(loss)
        self._average = self._keep * self._average + (1 - self._keep) * loss
        self.smoothed.append(self._average / (1 - self._keep ** len(self.losses)))
        self.diverged = self.smoothed[-1] > DIVERGED * min(self.smoothed)

    @property
    def lowest(self) -> int | None:
        """The step with the lowest smoothed loss after the first steps.

        None if there are no later steps, or if this loss is not below the mean loss of the first steps, because the
        minimum would then be meaningless.
        """
        later = range(self._first, len(self.smoothed))
        if not later:
            return None
        step = min(later, key=self.smoothed.__getitem__)
        return step if self.smoothed[step] < sum(self.losses[: self._first]) / self._first else None

    def suggestion(self) -> float | None:
        """A tenth of the rate with the lowest smoothed loss (two significant digits); None if the loss did not fall."""
        return None if self.lowest is None else float(f"{self.rates[self.lowest] / 10:.2g}")

    def advice(self) -> str:
        """What to do next, in one line."""
        if self.lowest is None:
            return "the loss did not fall, so there is no suggestion; try a lower --start-lr or more --steps"
        if not self.diverged and self.lowest == len(self.rates) - 1:
            return f"suggested: --peak-lr {self.suggestion():g}; the loss was still falling, so try a higher --end-lr"
        return f"suggested: --peak-lr {self.suggestion():g}"

    def draw(self, title: str) -> bytes:
        """PNG of the loss over the learning rate, with the suggestion marked."""
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        from ddp_trainer.report.figures import INK, LINE, MUTED, SERIES, new_figure, style, to_png

        suggested = self.suggestion()
        figure = new_figure(8, 4.5)
        axes = figure.add_subplot()
        style(axes, title=title, x="learning rate", y="training loss of the global batch")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.plot(self.rates, self.losses, color=MUTED, linewidth=0.9, alpha=0.6, label="each step")
        axes.plot(self.rates, self.smoothed, color=SERIES[0], linewidth=2, label="smoothed")
        if self.smoothed:
            # Without limits, the high losses at the end of a diverging test would flatten the rest of the curve.
            low, first = min(self.losses), max(self.losses[: self._first])
            axes.set_ylim(low - 0.1 * (first - low), first + 0.5 * max(first - low, 0.1))
        if suggested is not None:
            axes.axvline(suggested, color=SERIES[1], linestyle="--", label=f"suggested: {suggested:g}")
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        return to_png(figure)

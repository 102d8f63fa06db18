"""What a learning rate range test has measured: losses by rate, when to stop, what to suggest, and a picture of it."""

import math

DIVERGED = 4.0  # times the lowest smoothed loss, as in fastai
SHARE = 0.1  # of all steps: what is averaged over, and what the first steps are


class LossCurve:
    """Losses by learning rate, raw and smoothed: an exponential average without the bias of its start.

    It averages over a share of the steps, so it lags behind by the same factor of the rate at any number of steps.
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
        """Sets `diverged` where the loss is far above its lowest, or no number any more, which is not kept."""
        if not math.isfinite(loss):
            self.diverged = True
            return
        self.rates.append(rate)
        self.losses.append(loss)
        self._average = self._keep * self._average + (1 - self._keep) * loss
        self.smoothed.append(self._average / (1 - self._keep ** len(self.losses)))
        self.diverged = self.smoothed[-1] > DIVERGED * min(self.smoothed)

    @property
    def lowest(self) -> int | None:
        """The step with the lowest smoothed loss after the first steps. None where the loss did not fall below theirs:
        where it is lowest is chance then."""
        later = range(self._first, len(self.smoothed))
        if not later:
            return None
        step = min(later, key=self.smoothed.__getitem__)
        return step if self.smoothed[step] < sum(self.losses[: self._first]) / self._first else None

    def suggestion(self) -> float | None:
        """A tenth of the rate with the lowest smoothed loss, to two digits, which is more than the method knows."""
        return None if self.lowest is None else float(f"{self.rates[self.lowest] / 10:.2g}")

    def advice(self) -> str:
        """One line for the user."""
        if self.lowest is None:
            return "the loss did not fall, so nothing is suggested: try a lower --start-lr, or more --steps"
        if not self.diverged and self.lowest == len(self.rates) - 1:
            return f"suggested: --peak-lr {self.suggestion():g}; the loss was still falling, so try a higher --end-lr"
        return f"suggested: --peak-lr {self.suggestion():g}"

    def draw(self, title: str) -> bytes:
        """A PNG: loss over learning rate, the suggestion marked."""
        from matplotlib.ticker import NullFormatter, StrMethodFormatter

        from ddp_trainer.report.charts import THEMES, new_figure, style, to_png

        theme, suggested = THEMES["light"], self.suggestion()
        figure = new_figure(8, 4.5, theme)
        axes = figure.add_subplot()
        style(axes, theme, title=title, x="learning rate", y="training loss of the global batch")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", color=theme.line, linewidth=0.8)
        axes.plot(self.rates, self.losses, color=theme.muted, linewidth=0.9, alpha=0.6, label="each step")
        axes.plot(self.rates, self.smoothed, color=theme.series[0], linewidth=2, label="smoothed")
        if self.smoothed:  # the last steps of a loss that diverges would press the rest of the curve flat
            low, first = min(self.losses), max(self.losses[: self._first])
            axes.set_ylim(low - 0.1 * (first - low), first + 0.5 * max(first - low, 0.1))
        if suggested is not None:
            axes.axvline(suggested, color=theme.series[1], linestyle="--", label=f"suggested: {suggested:g}")
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8)
        return to_png(figure)

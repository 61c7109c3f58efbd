"""Numbers and verdicts of a report in words: what to ship, what it costs, how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.reporting.advice import KEEP_QUALITY, Advice, BudgetAdvice, value_of
from pipeline.reporting.comparison import Comparison
from pipeline.reporting.groups import Group
from pipeline.reporting.guideline import Fit, Guideline
from pipeline.reporting.methods import METHOD_NAMES
from pipeline.reporting.pareto import Budget, Cost, cost_of
from pipeline.reporting.scores import HELD_OUT
from pipeline.statistics import Interval

if TYPE_CHECKING:
    from pipeline.reporting.report import Report

NOTHING = "–"
COST_NAMES: dict[Cost, str] = {"tpot_s": "TPOT", "memory_bytes": "memory"}
OPTIONS: dict[Cost, str] = {"tpot_s": "--max-tpot", "memory_bytes": "--max-memory"}


@dataclass(frozen=True)
class Verdict:
    """One answer: what to ship, and in lines of a label and a text what that rests on."""

    ship: str
    lines: tuple[tuple[str, str], ...] = ()
    sure: bool | None = None
    """Whether nothing that it rests on is within noise; None where nothing was tested."""

    @property
    def markdown(self) -> str:
        """In bold what to ship, in a list what that rests on."""
        return "\n".join([f"**{self.ship}**", *([""] if self.lines else []), *(f"- {a}: {b}" for a, b in self.lines)])


def verdicts(report: Report) -> list[Verdict]:
    """The answers of a report, the one that was asked for first."""
    found = [] if report.budget is None else [_within(report.budget)]
    if report.budget is None or report.budget.best is None:
        found += [_ship(teacher, advice, report) for teacher, advice in report.to_ship.items()]
        found += _between_teachers(list(report.to_ship.values()))
    return [*found, *headline(report)]


def headline(report: Report) -> list[Verdict]:
    """The paper's: relative improvement of OverFill over pruned-only, averaged over tasks."""
    found = report.improvement
    what = "Relative improvement of OverFill over pruned-only, averaged over tasks"
    if found is None:
        return [Verdict(f"{what}: none can be given, pruned-only has too little right.")] if report.duels else []
    tasks = "1 task" if found.tasks == 1 else f"{found.tasks} tasks"
    over = "1 configuration" if found.configurations == 1 else f"{found.configurations} configurations"
    value = f"{signed_percent(found.relative)} ({tasks}, {over})"
    noise = found.relative.contains(0.0)
    text = f"{what}: {value}."
    return [Verdict(text + (" This is within noise." if noise else ""), sure=not noise)]


def _ship(teacher: str, advice: Advice, report: Report) -> Verdict:
    best, share = advice.best, f"{KEEP_QUALITY:.0%} of the full model's {quality_name(advice.best)}"
    if not advice.is_faster:
        what = f"ship the full model; no student decodes faster on this device (best: {describe(best)})"
    elif advice.keeps_quality:
        what = f"ship {describe(best)}, the fastest that keeps {share}"
    else:
        what = f"nothing faster keeps {share}; the best is {describe(best)}"
    shipped = best if advice.is_faster else advice.full_group
    lines = (("costs", costs(shipped)), ("sure", "; ".join([*_sure(advice), *_rival(best, report)])))
    tested = advice.is_faster and advice.keeps_quality
    sure = advice.surely_keeps and advice.surely_faster is not False if tested else None
    return Verdict(f"{teacher}: {what}.", lines, sure)


def _sure(advice: Advice) -> Iterator[str]:
    result = advice.against_full
    yield f"{quality_name(advice.best)} {percent(advice.best.quality)} % against {100 * advice.full:.1f} %"
    if result is not None and result.share is not None:
        held = "surely" if advice.surely_keeps else "surely not" if result.share.high < KEEP_QUALITY else "not surely"
        yield f"on the same samples it keeps {_kept(result.share)}, {held} {KEEP_QUALITY:.0%}"
    if advice.surely_faster is not None:
        every = "every repetition decoded" if advice.surely_faster else "not every repetition decoded"
        yield f"{every} faster than the full model's fastest"


def _kept(share: Interval) -> str:
    return f"{100 * share.value:.1f}% {span(share, 1, 100)}"


def _rival(best: Group, report: Report) -> Iterator[str]:
    """How the method without the full model's prefill does at the same ratio."""
    for duel in report.duels:
        if best.method == "overfill" and (duel.teacher, duel.ratio, duel.variant) == _place(best):
            yield f"against pruned only {points(duel.comparison.difference)} points, {verdict(duel.comparison)}"


def _place(group: Group) -> tuple[str, float, str]:
    return group.teacher, group.ratio, group.variant


def _between_teachers(advices: Sequence[Advice]) -> Iterator[Verdict]:
    """Whether one full model's choice is nowhere worse than any other's."""
    if len(advices) < 2 or len({advice.best.conditions for advice in advices}) > 1:
        return
    shipped = [advice.best for advice in advices if advice.is_faster and advice.keeps_quality]
    for best in shipped:
        others = [other for other in shipped if other is not best]
        if others and all(
            value_of(best) >= value_of(other) and (cost_of(best, "tpot_s") or 0) <= (cost_of(other, "tpot_s") or 0)
            for other in others
        ):
            yield Verdict(f"Of these {best.teacher}'s is both the most accurate and the fastest.")
            return
    if len(shipped) > 1:
        yield Verdict("Between the full models it is accuracy against speed: --max-tpot names what a token may take.")


def _within(advice: BudgetAdvice) -> Verdict:
    limits, best = _limits(advice.budget), advice.best
    if best is None and advice.cheapest is None:
        return Verdict(
            f"Nothing can be said about {limits}: no configuration has both its accuracy and that cost measured."
        )
    if best is None:
        assert advice.cheapest is not None
        close = ", ".join(
            f"{COST_NAMES[cost]} {amount(cost, cost_of(advice.cheapest, cost))}" for cost in advice.budget.limits
        )
        return Verdict(f"Nothing fits {limits}; the closest is {_named(advice.cheapest)} with {close}.")
    lines = [("costs", costs(best)), ("sure", "; ".join(_lead(advice, best)))]
    sure = None if advice.lead is None else not advice.lead.within_noise
    return Verdict(f"Within {limits}: ship {_named(best)}, the most accurate that fits.", tuple(lines), sure)


def _limits(budget: Budget) -> str:
    return " and ".join(f"{OPTIONS[cost]} {amount(cost, limit)}" for cost, limit in budget.limits.items())


def _lead(advice: BudgetAdvice, best: Group) -> Iterator[str]:
    yield f"{quality_name(best)} {percent(best.quality)} %"
    other, lead = advice.runner_up, advice.lead
    if other is None:
        yield "nothing else fits"
        return
    cost = ", ".join(f"{COST_NAMES[cost]} {amount(cost, cost_of(other, cost))}" for cost in advice.budget.limits)
    if lead is None:
        yield f"the next is {_named(other)} ({percent(other.quality)} %, {cost})"
    else:
        told = "within noise" if lead.within_noise else f"p {p_value(lead.p_value)}"
        yield f"ahead of {_named(other)} ({cost}) by {points(lead.difference)} points, {told}"


def costs(group: Group) -> str:
    """What decoding with a configuration costs, and what making it did."""
    full = next((member["full"] for member in group.members if member.get("full")), {})
    said = [f"TPOT {seconds(group.mean('tpot_s'))}"]
    if group.method != "full" and group.mean("speed_up"):
        said[0] += f", {times(group.mean('speed_up'))} the full model's speed"
        said.append(f"TTFT {seconds(group.mean('ttft_s'))} (full model {seconds(full.get('ttft_s'))})")
    else:
        said.append(f"TTFT {seconds(group.mean('ttft_s'))}")
    if (memory := cost_of(group, "memory_bytes")) is not None:
        said.append(
            f"memory {size(memory)}"
            + (f" (full model {size(full.get('peak_bytes'))})" if full.get("peak_bytes") else "")
        )
    if group.method != "full" and (kept := group.mean("parameters_kept")):
        said.append(f"{kept:.1%} of the parameters")
    if tokens := group.mean("train_tokens"):
        spent = group.mean("train_s")
        said.append(f"trained on {tokens:,.0f} tokens" + ("" if spent is None else f" in {duration(spent)}"))
    return "; ".join(said)


def guideline_sentence(found: Guideline) -> str:
    """The formulas with their errors; why there are none; that they are of no use."""
    method = METHOD_NAMES[found.method] + (f" ({found.variant})" if found.variant else "")
    if not found.fits:
        lacking = f"{found.configurations} of at least {found.needed} configurations are measured"
        return f"No guideline for {method}: {lacking}."
    low, high = found.parameters
    sizes = f"full models of {count(low)}" + (f" to {count(high)}" if high > low else "") + " parameters"
    kept = f"{found.kept[0]:.0%} to {found.kept[1]:.0%} of them kept"
    formulas = "; ".join(formula(fit) for fit in found.fits)
    return f"Guideline for {method} ({found.configurations} configurations; {sizes}, {kept}): {formulas}."


def formula(fit: Fit) -> str:
    """`quality = logistic(-1.20 +0.31 ln P +1.90 ln k), off by 3.1 points …`."""
    by, mean = (_missed(fit, error) for error in (fit.error, fit.error_of_mean))
    name = "quality" if fit.target == "quality" else "TPOT"
    if not fit.is_useful:
        return f"none for {name}: a fit misses a configuration left out by {by}, the others' mean by {mean}"
    found = fit.coefficients
    if fit.target == "quality":
        size = f" {found['ln_p']:+.3g} ln P" if "ln_p" in found else ""
        right = f"logistic({found['constant']:.3g}{size} {found['ln_k']:+.3g} ln k)"
    else:
        right = f"{seconds(found['constant'])} + {seconds(1e6 * found['p_k'])} per million parameters that decode"
    return f"{name} = {right}, off by {by} on a configuration left out (the others' mean {mean})"


def _missed(fit: Fit, error: float) -> str:
    return f"{100 * error:.1f} points" if fit.target == "quality" else f"{error:.1%}"


# --- names and numbers


def describe(group: Group) -> str:
    """`OverFill at ratio 0.6 (learning_rate=0.001)`."""
    ratio = f" at ratio {group.ratio:g}" if group.is_pruned else ""
    return METHOD_NAMES[group.method] + ratio + (f" ({group.variant})" if group.variant else "")


def _named(group: Group) -> str:
    return f"{group.teacher}: {describe(group)}"


def task_name(task: str) -> str:
    """A task as a column is called."""
    return "exact match" if task == HELD_OUT else task


def quality_name(group: Group) -> str:
    """What configurations are ranked by."""
    tasks = group.quality_tasks
    return task_name(tasks[0]) if len(tasks) == 1 else f"average over {len(tasks)} tasks"


def verdict(result: Comparison) -> str:
    """`better`, `worse`, or `within noise` (see `Comparison.within_noise`)."""
    return "within noise" if result.within_noise else "better" if result.difference.low > 0 else "worse"


def p_value(value: float) -> str:
    """Two digits."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def span(interval: Interval, digits: int, scale: float = 1.0) -> str:
    """The interval alone."""
    return f"[{scale * interval.low:.{digits}f}, {scale * interval.high:.{digits}f}]"


def points(difference: Interval) -> str:
    """A difference of shares in points, with its interval."""
    return f"{100 * difference.value:+.1f} {span(difference, 1, 100)}"


def percent(share: Interval | None) -> str:
    """A share in per cent, with half of its interval."""
    return NOTHING if share is None else f"{100 * share.value:.1f} ± {100 * share.half_width:.1f}"


def signed_percent(share: Interval) -> str:
    """`+44.1 % [41.0, 47.9]`."""
    return f"{100 * share.value:+.1f} % {span(share, 1, 100)}"


def seconds(value: float | None) -> str:
    """A latency."""
    if value is None:
        return NOTHING
    if value < 1e-4:  # or an overhead that a fit puts below zero
        return f"{1e6 * value:.3g} µs"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms" if value >= 0.01 else f"{1000 * value:.2f} ms"


def duration(value: float) -> str:
    """How long a training took."""
    if value < 60:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def times(value: float | None) -> str:
    """A factor."""
    return NOTHING if value is None else f"{value:.2f}x"


def size(value: float | None) -> str:
    """Bytes, in decimal units, three digits."""
    return NOTHING if value is None else f"{count(value)}B" if value >= 1000 else f"{value:.0f} B"


def count(value: float) -> str:
    """`1.24 M`, `3.21 G`."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} "


def amount(cost: Cost, value: float | None) -> str:
    """A cost in its unit."""
    return seconds(value) if cost == "tpot_s" else size(value)

"""Probes in numbers: what followed the words, what ignored them, paired comparisons with `asked`, and the tables of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from diffpolicy.ablation_table import ALPHA, p_value, points
from diffpolicy.metrics import (
    bootstrap_interval,
    episodes_needed,
    holm,
    mcnemar_exact,
    paired_difference_interval,
    sign_flip_sampled,
)
from diffpolicy.probes import PROBES, Probes, Row
from diffpolicy.rollout import counted

MAX_GOALS = 12
"""Goals up to which the break-down by goal is shown."""


def summarise(probes: Probes) -> list[dict]:
    """One dict per row: rates as {count, trials, rate, interval_95}, scores as {mean, interval_95}.

    follows: the goal that the words name was fulfilled; None where no scene of the row could judge it.
    ignores: the goal that the same seed asks without swap was fulfilled although the words name another; `swapped` only.
    other: a third goal of the scene was fulfilled.
    score, ignored_score, other_score: mean over episodes of the largest reward at the named goal, at the goal that the same
        seed asks without swap (`swapped` only), and at the goal among all that are not named where it is largest.
    """
    natural = {e.seed: e.goal for e in probes["asked"].episodes}
    return [_summary(row, natural if row.name == "swapped" else {}) for row in probes.rows]


def _summary(row: Row, natural: dict[int, str]) -> dict:
    episodes = row.episodes
    judged = [e for e in episodes if e.goal in e.goal_scores]
    unnamed = {e.seed: natural.get(e.seed) for e in episodes}  # seed -> the goal that its words hide; None: nothing is
    third = [any(name != unnamed[e.seed] for name in e.other_goals_reached) for e in episodes]
    at_unnamed = [e.goal_scores[g] for e in episodes if (g := unnamed[e.seed]) in e.goal_scores]
    at_others = [score for e in episodes if (score := e.best_other_score) is not None]
    return {
        "probe": row.name,
        "how": row.how,
        "n": len(episodes),
        "planned": row.result.planned,
        "follows": counted(sum(e.goal in e.goals_reached for e in judged), len(judged)) if judged else None,
        "ignores": counted(sum(unnamed[e.seed] in e.goals_reached for e in episodes), len(episodes))
        if row.name == "swapped"
        else None,
        "other": counted(sum(third), len(episodes)),
        "score": _mean([e.goal_scores[e.goal] for e in judged]),
        "ignored_score": _mean(at_unnamed),
        "other_score": _mean(at_others),
    }


def _mean(scores: Sequence[float]) -> dict | None:
    if not scores:
        return None
    return {"mean": float(np.mean(scores)), "interval_95": list(bootstrap_interval(np.array(scores)))}


def share_following(probes: Probes) -> dict | None:
    """Of the episodes of asked and swapped that fulfilled any goal, how many fulfilled the named one and no other.

    None before both are whole. A policy that does the same whatever is said reaches the same goals in both rows, and so has
    at most 0.5: that much if it reads the task off the scene.
    """
    if not all(name in probes and probes[name].complete for name in ("asked", "swapped")):
        return None
    some = [e for name in ("asked", "swapped") for e in probes[name].episodes if e.goals_reached]
    return counted(sum(e.goals_reached == (e.goal,) for e in some), len(some))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A number of a row minus that of asked, on the same seeds."""

    value: float
    interval: tuple[float, float]
    """95 %, paired bootstrap: this network on other start states."""
    p: float
    """Of equality: McNemar's exact test for rates, sign flips for scores."""
    holm_p: float
    """Corrected for the number of all tests of the table."""
    needed: int | None
    """Paired episodes that would tell the two apart with power 0.8, were the true difference the one seen; None: no
    difference was seen."""

    def verdict(self, num_pairs: int) -> str:
        """What may be said; that two numbers are the same never may."""
        if self.holm_p < ALPHA and not self.interval[0] <= 0 <= self.interval[1]:
            return "higher" if self.value > 0 else "lower"
        if self.needed is None:
            return "not told apart (no difference seen, so no number of episodes can be named)"
        if self.needed <= num_pairs:
            return "not told apart, narrowly: play other seeds"
        return f"not told apart: {self.needed - num_pairs:,} more episodes would be needed, were the difference the one seen"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row against asked."""

    probe: str
    num_pairs: int
    follows: Difference
    score: Difference
    """Of the largest reward at the named goal: more sensitive than the rate where goals are hard to reach."""


def compare(probes: Probes) -> list[Comparison]:
    """Every whole row that can be judged against asked, in pairs of equal seeds; all p corrected together (Holm)."""
    measured = {
        row.name: (
            np.array([e.goal in e.goals_reached for e in row.episodes]),
            np.array([e.goal_scores[e.goal] for e in row.episodes]),
        )
        for row in probes.rows
        if row.complete and all(e.goal in e.goal_scores for e in row.episodes)
    }
    asked = measured.pop("asked", None)
    if asked is None or not measured:
        return []
    rate_p = [mcnemar_exact(reached, asked[0]) for reached, _ in measured.values()]
    score_p = [sign_flip_sampled(scores, asked[1]) for _, scores in measured.values()]
    p_values = [*rate_p, *score_p]
    corrected, count = holm(p_values), len(measured)

    def difference(values: np.ndarray, reference: np.ndarray, test: int) -> Difference:
        needed = episodes_needed(values, reference, alpha=ALPHA, comparisons=len(p_values))
        return Difference(
            value=float(values.mean() - reference.mean()),
            interval=paired_difference_interval(values, reference),
            p=p_values[test],
            holm_p=corrected[test],
            needed=int(needed) if math.isfinite(needed) else None,
        )

    return [
        Comparison(
            probe=name,
            num_pairs=len(reached),
            follows=difference(reached, asked[0], i),
            score=difference(scores, asked[1], count + i),
        )
        for i, (name, (reached, scores)) in enumerate(measured.items())
    ]


def by_goal(probes: Probes) -> list[dict]:
    """One dict per goal: of asked and of swapped the episodes that name it, their success and mean score, and the mean
    score at this goal in episodes of both that name another."""
    both = [probes[name] for name in ("asked", "swapped") if name in probes]
    goals = sorted({name for row in both for e in row.episodes for name in (e.goal, *e.goal_scores)})
    table = []
    for goal in goals:
        line: dict = {"goal": goal}
        for row in both:
            named = [e for e in row.episodes if e.goal == goal and goal in e.goal_scores]
            line[row.name] = {
                "success": counted(sum(goal in e.goals_reached for e in named), len(named)),
                "score": _mean([e.goal_scores[goal] for e in named]),
            }
        unnamed = [
            e.goal_scores[goal] for row in both for e in row.episodes if e.goal != goal and goal in e.goal_scores
        ]
        table.append({**line, "score_when_not_named": _mean(unnamed)})
    return table


def to_dict(probes: Probes) -> dict:
    """Plain data for probes.json: rows, comparisons, the share, goals, and every episode."""
    return {
        "rows": summarise(probes),
        "left_out": probes.left_out,
        "share_following": share_following(probes),
        "compared_with_asked": [dataclasses.asdict(c) | _verdicts(c) for c in compare(probes)],
        "goals": by_goal(probes),
        "episodes": {row.name: [e.to_dict() for e in row.episodes] for row in probes.rows},
    }


def csv_rows(probes: Probes) -> list[dict]:
    """One flat row per probe, those that were left out among them: the columns of probes.csv. Unknown is None."""
    compared = {c.probe: c for c in compare(probes)}
    rows = []
    for s in summarise(probes):
        flat = {key: s[key] for key in ("probe", "how", "n", "planned")}
        for key in ("follows", "ignores", "other"):
            flat |= _flat(key, s[key], "rate") | {f"{key}_count": s[key] and s[key]["count"]}
        for key in ("score", "ignored_score", "other_score"):
            flat |= _flat(key, s[key], "mean")
        if c := compared.get(s["probe"]):
            flat |= {"num_pairs": c.num_pairs, **_verdicts(c)}
            for key, d in (("follows", c.follows), ("score", c.score)):
                flat |= _flat(f"{key}_difference", {"mean": d.value, "interval_95": d.interval}, "mean")
                flat |= {f"{key}_p": d.p, f"{key}_holm_p": d.holm_p, f"{key}_needed": d.needed}
        rows.append(flat | {"left_out": None})
    rows += [{"probe": name, "left_out": why} for name, why in probes.left_out.items()]
    columns = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row)
    return [columns | row for row in rows]


def _verdicts(c: Comparison) -> dict:
    return {"follows_verdict": c.follows.verdict(c.num_pairs), "score_verdict": c.score.verdict(c.num_pairs)}


def _flat(name: str, value: dict | None, key: str) -> dict:
    low, high = (value or {}).get("interval_95") or (None, None)
    return {name: value and value[key], f"{name}_low": low, f"{name}_high": high}


# -------------------------------------------------------------------------------------------------------------- shown


def probe_table(probes: Probes, title: str) -> Table:
    """One row per probe, those that were left out among them."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)  # fits 80 columns
    table.add_column("probe", no_wrap=True)
    for header in ("n", "follows", "ignores", "other", "score", "best other"):
        table.add_column(header, justify="right", min_width=12 if header == "score" else None)
    for s in summarise(probes):
        cut = s["n"] < s["planned"]
        table.add_row(
            s["probe"],
            f"{s['n']} of {s['planned']}, biased" if cut else str(s["n"]),
            *(_rate(s[key]) for key in ("follows", "ignores", "other")),
            _score(s["score"]),
            _mean_only(s["other_score"]),
        )
    for name in probes.left_out:
        table.add_row(name, *["-"] * 6, style="dim")
    return table


def goal_table(probes: Probes) -> Table | None:
    """The break-down by goal; None where there are too many goals to read."""
    lines = by_goal(probes)
    if len(lines) > MAX_GOALS:
        return None
    table = Table(title="by goal", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("goal")
    names = [name for name in ("asked", "swapped") if name in probes]
    for name in names:
        table.add_column(f"{name} n", justify="right")
        table.add_column("success", justify="right")
        table.add_column("score", justify="right")
    table.add_column("score unnamed", justify="right")
    for line in lines:
        cells = [
            (str(line[n]["success"]["trials"]), _rate(line[n]["success"]), _mean_only(line[n]["score"])) for n in names
        ]
        table.add_row(line["goal"], *(c for group in cells for c in group), _mean_only(line["score_when_not_named"]))
    return table


def explanation(probes: Probes) -> list[str]:
    """What stands under the table: the columns, the rows, what was left out, what the numbers say."""
    lines = [
        "follows: reached the goal that the words name. ignores: reached the one that the seed asks without swap, though the "
        "words name another. other: reached any further goal of the scene. Rates with Wilson, scores with bootstrap 95 % intervals.",
        "score: mean of an episode's largest reward at the named goal. best other: at the unnamed goal where it is largest, so "
        "well above 0 by chance where there are many. Goals fulfilled from the start do not count.",
    ]
    lines += [f"{row.name}: {PROBES[row.name].about}{f' - {row.how}' if row.how else ''}" for row in probes.rows]
    lines += [f"{name}: {why}" for name, why in probes.left_out.items()]
    unjudged = [s["probe"] for s in summarise(probes) if s["follows"] is None]
    lines += [
        f"{name}: these scenes do not allow the goal that is named, so it cannot be followed" for name in unjudged
    ]
    share = share_following(probes)
    if share:
        lines.append(
            f"Of all {share['trials']} episodes of asked and swapped that reached a goal, {share['count']} "
            f"({_rate(share)}) reached the named one and no other. A policy that does the same whatever is said has at most 50 %."
            if share["trials"]
            else "No episode of asked and swapped reached any goal, so nothing can be said about following."
        )
    for c in compare(probes):
        low, high = (points(end) for end in c.follows.interval)
        lines.append(
            f"{c.probe} minus asked, {c.num_pairs} pairs. follows: {points(c.follows.value)} points [{low}, {high}], McNemar p "
            f"{_p(c.follows.p)}, Holm p {_p(c.follows.holm_p)}, {c.follows.verdict(c.num_pairs)}. score: {c.score.value:+.3f} "
            f"[{c.score.interval[0]:+.3f}, {c.score.interval[1]:+.3f}], sign-flip p {_p(c.score.p)}, Holm p "
            f"{_p(c.score.holm_p)}, {c.score.verdict(c.num_pairs)}."
        )
    return lines


def _p(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _rate(value: dict | None) -> str:
    if value is None or value["rate"] is None:
        return "-"
    low, high = value["interval_95"]
    return f"{value['rate']:.0%} ({100 * low:.0f}..{100 * high:.0f})"


def _mean_only(value: dict | None) -> str:
    return "-" if value is None else f"{value['mean']:.2f}"


def _score(value: dict | None) -> str:
    if value is None:
        return "-"
    low, high = value["interval_95"]
    return f"{value['mean']:.2f} ({low:.2f}..{high:.2f})"

"""One results table, one set of figures and one self-contained page from a finished (or interrupted) ablation.

results.csv, results.parquet    one row per cell
episodes.parquet                one row per cell x training seed x environment seed
figures/*.png, *.pdf
report.html                     everything in one file: images inside, no script, no outside resource
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffpolicy.ablation_axes import problem_letters
from diffpolicy.ablation_cells import AblationResult
from diffpolicy.ablation_plots import draw_figures
from diffpolicy.ablation_table import (
    ALPHA,
    BETTER,
    UNPAIRED,
    UNTOLD,
    WORSE,
    CellSummary,
    Comparison,
    Interval,
    difference_table,
    episode_rows,
    main_table,
    p_value,
    percent,
    points,
    summarise,
    table_rows,
)


def write_report(result: AblationResult, out: Path) -> Path:
    """Writes tables, figures and page into the folder `out`; the same result writes the same page.

    Returns:
        Path of report.html.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    summaries = summarise(result)
    rows = table_rows(result, summaries)
    (out / "results.csv").write_text(_csv(rows), encoding="utf-8")
    _write_parquet(out / "results.parquet", rows)
    _write_parquet(out / "episodes.parquet", episode_rows(result))
    for stem in ("cells", "curves*", "diversity*", "heat_map", "differences"):  # of an earlier report with other cells
        for file in (out / "figures").glob(f"{stem}.p[nd][gf]"):
            file.unlink()
    figures = draw_figures(result, summaries, out / "figures")
    page = out / "report.html"
    page.write_text(_page(result, summaries, figures), encoding="utf-8")
    return page


def markdown_table(result: AblationResult) -> str:
    """The main table for a README: oracle first, trained policies second, every rate with its interval."""
    headers, rows = main_table(result, summarise(result))
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |\n" for line in lines)


def conclusions(result: AblationResult, summaries: tuple[CellSummary, ...]) -> dict[str, list[str]]:
    """What the data say, in plain sentences: heading -> sentences, supported differences first. No HTML in them."""
    base = next(s for s in summaries if s.is_baseline)
    compared = [(s.cell.label, s.comparison) for s in summaries if s.comparison]
    supported = sorted((x for x in compared if x[1].supported), key=lambda x: -abs(x[1].difference))
    said: dict[str, list[str]] = {}
    if not compared:
        said["One setting"] = [
            f'Only "{base.cell.label}" has results, so there is nothing to compare: success {percent(base.success)} % '
            f"[{percent(base.success_interval[0])}, {percent(base.success_interval[1])}], score {base.score:.3f} "
            f"[{base.score_interval[0]:.3f}, {base.score_interval[1]:.3f}]."
        ]
    else:
        said["In short"] = [
            f"{_against(result, base.cell.label)}, success: {_tally([c.verdict for _, c in compared])}; "
            f"score: {_tally([c.score_verdict for _, c in compared])}; of {len(compared)} settings."
        ]
        said["Supported differences"] = [_supported(label, c.reference, c) for label, c in supported] or [
            "No difference in success is supported."
        ]
        by_score = sorted((x for x in compared if x[1].score_supported), key=lambda x: -abs(x[1].score_difference))
        said["Supported differences in score"] = [_score_supported(label, c.reference, c) for label, c in by_score]
    said["Not told apart"] = [_untold(label, c.reference, c) for label, c in compared if c.verdict == UNTOLD]
    said["Not told apart in score"] = [
        _score_untold(label, c.reference, c) for label, c in compared if c.score_verdict == UNTOLD
    ]
    said["Not paired"] = [
        f'"{label}" and "{c.reference}" share no training seed or differ in start states, so no pairing is claimed and '
        f"no test is made: difference {_points_with(c.difference, c.interval)}, each side's episodes resampled alone."
        for label, c in compared
        if not c.paired
    ]
    said["What is not known"] = _unknown(summaries)
    return {heading: sentences for heading, sentences in said.items() if sentences}


def _against(result: AblationResult, baseline: str) -> str:
    """`Against "cosine"`, or what the sweep compares with."""
    others = {result.references.get(cell.label, baseline) for cell in result.cells}
    return f'Against "{baseline}"' if others == {baseline} else "Against the setting named with each"


def _tally(verdicts: list[str]) -> str:
    count = Counter(verdicts)
    return ", ".join(f"{count[v]} {v}" for v in (BETTER, WORSE, UNTOLD, UNPAIRED) if count[v])


def _score_supported(label: str, baseline: str, c: Comparison) -> str:
    sentence = (
        f'"{label}" scores {"higher" if c.score_difference > 0 else "lower"} than "{baseline}": {_score_with(c)} over '
        f"{_played(c)}, corrected p {_equals(c.score_holm_p)}."
    )
    if c.score_anew and c.score_anew[0] <= 0 <= c.score_anew[1]:
        low, high = c.score_anew
        sentence += (
            f" It holds for these networks; networks trained anew could turn it round ({low:+.3f} .. {high:+.3f})."
        )
    return sentence


def _score_untold(label: str, baseline: str, c: Comparison) -> str:
    n = c.num_starts * len(c.train_seeds)
    sentence = f'n = {n:,} paired episodes cannot tell the scores of "{label}" and "{baseline}" apart (difference {_score_with(c)})'
    if c.score_needed is not None and math.isfinite(c.score_needed) and c.score_needed > n:
        sentence += f"; about {c.score_needed:,.0f} would, were the true difference the one seen"
    return sentence + "."


def _score_with(c: Comparison) -> str:
    return f"{c.score_difference:+.3f} [{c.score_interval[0]:+.3f}, {c.score_interval[1]:+.3f}]"


def _supported(label: str, baseline: str, c: Comparison) -> str:
    more = "more" if c.difference > 0 else "less"
    sentence = (
        f'"{label}" succeeds {more} often than "{baseline}": {_points_with(c.difference, c.interval)} over {_played(c)}, '
        f"corrected p {_equals(c.holm_p)}."
    )
    if c.anew:
        holds = not c.anew[0] <= 0 <= c.anew[1]
        sentence += (
            f" This holds for networks trained anew as well ({_range(c.anew)})."
            if holds
            else f" It holds for these networks; networks trained anew could turn it round ({_range(c.anew)})."
        )
    return sentence


def _untold(label: str, baseline: str, c: Comparison) -> str:
    n = c.num_starts * len(c.train_seeds)
    sentence = (
        f'n = {n:,} paired episodes cannot tell "{label}" and "{baseline}" apart '
        f"(difference {100 * c.difference:.1f} points, {_range(c.interval)})"
    )
    if c.needed is not None and math.isfinite(c.needed) and c.needed > n:
        starts = c.needed / len(c.train_seeds)
        means = f" ({len(c.train_seeds)} networks on {starts:,.0f} start states)" if len(c.train_seeds) > 1 else ""
        sentence += f"; about {c.needed:,.0f} would{means}, were the true difference the one seen"
    elif c.needed is not None and math.isfinite(c.needed):
        sentence += f"; it is at the edge (corrected p {_equals(c.holm_p)})"
    else:
        sentence += "; they succeeded equally often"
    if not c.interval[0] <= 0 <= c.interval[1]:
        sentence += f". The interval of this one comparison leaves out zero, but the corrected p is {p_value(c.holm_p)}"
    if c.shown is not None:
        sentence += f". These episodes would show a difference of {100 * c.shown:.1f} points"
    return sentence + "."


def _unknown(summaries: tuple[CellSummary, ...]) -> list[str]:
    """Training runs that are too few, or that some cells lack."""
    sentences = []
    once = [f'"{s.cell.label}"' for s in summaries if len(s.cell.train_seeds) == 1]
    if once:
        which = "Every setting was" if len(once) == len(summaries) else f"{_listed(once)}: each was"
        sentences.append(
            f"{which} trained once, so the variation between training runs is unknown: every interval and p value is about "
            "these networks, and a network trained anew may rank differently."
        )
    every = sorted({seed for s in summaries for seed in s.cell.train_seeds})
    lacking = [s for s in summaries if set(s.cell.train_seeds) != set(every)]
    sentences += [
        f'"{s.cell.label}" has training seeds {_listed(s.cell.train_seeds)} of {_listed(every)}; '
        "settings are compared on the training seeds that both have."
        for s in lacking
    ]
    return sentences


def _page(result: AblationResult, summaries: tuple[CellSummary, ...], figures: list[tuple[Path, str]]) -> str:
    parts = [f"<h1>{_text(result.name)}</h1>", f'<p class="question">{_text(result.question)}</p>']
    if any(str(key).lower() == "smoke" and value for key, value in result.described.items()):
        parts.append(
            '<p class="banner">SMOKE run: it shows that the sweep works. Its numbers say nothing of the settings.</p>'
        )
    if result.failed:
        parts.append(f'<p class="banner">Incomplete: {len(result.failed)} failed or missing, listed below.</p>')
    parts.append("<h2>What the data say</h2>")
    for heading, sentences in conclusions(result, summaries).items():
        parts += [f"<h3>{_text(heading)}</h3>", _bullets(_text(sentence) for sentence in sentences)]
    parts += ["<h2>How it was run</h2>", _html_table(["", ""], _setting(result, summaries))]
    parts += ["<h2>Results</h2>", _html_table(*main_table(result, summaries))]
    parts.append(
        "<p class=note>NFE: network calls per chunk, counted. ms per call: median of a batched policy call. "
        "Sampler alone: the exact denoiser of a known problem in place of the network. "
        f"{_text(_columns(summaries))}{_text(_method(summaries))}</p>"
    )
    headers, rows = difference_table(result, summaries)
    if rows:
        against = _against(result, result.cells[result.baseline].label)
        parts += [f"<h2>Differences {_text(against.replace('Against', 'to', 1))}</h2>", _html_table(headers, rows)]
        parts.append(f"<p class=note>{_text(TEST_METHOD)}</p>")
    parts.append("<h2>Figures</h2>")
    for file, caption in figures:
        image = base64.b64encode(file.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{_text(caption)} <code>figures/{file.stem}.pdf</code></figcaption></figure>"
        )
    if letters := problem_letters([s.cell for s in summaries]):
        rows = [
            [f"[{letter}] {problem}", "; ".join(s.cell.label for s in summaries if problem in s.cell.labels)]
            for problem, letter in letters.items()
        ]
        parts += ["<h2>Settings with known problems</h2>", _html_table(["problem", "settings"], rows)]
    if result.failed:
        parts += ["<h2>Failed or missing</h2>", _html_table(["what", "why"], result.failed.items())]
    if result.duplicates:
        parts += ["<h2>Settings that are the same as another</h2>"]
        parts.append(_html_table(["setting", "same as"], result.duplicates.items()))
    if runs := _training_runs(summaries):
        parts += ["<h2>Training runs</h2>", _html_table(*runs)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_text(result.name)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


TEST_METHOD = (
    "Cells are compared on the same start states with the same initial noise. The primary interval resamples start states "
    "and keeps the networks of one start together: it is about these networks. The interval for networks trained anew treats "
    "training seeds and start states as crossed random effects. McNemar p pools networks and starts as if pairs were "
    "independent; p by start state counts a start once and is the one that is corrected for the number of comparisons (Holm). "
    f"A difference is supported when its corrected p is below {ALPHA} and its primary interval leaves out zero. Intervals are "
    "not corrected. Episodes needed: power 0.8, were the true difference the one seen. "
    "Scores are tested in the same way, with random sign flips; success and score are corrected "
    "together. ms per call is measured while other jobs share the machine."
)

CSS = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;margin:0}
main{max-width:1100px;margin:0 auto;padding:24px}
h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #ccc}h3{margin-bottom:.2em}
.question{font-size:1.2em;font-style:italic}
.banner{border:2px solid #8a3a00;padding:.6em 1em;font-weight:600}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.3em .7em .3em 0;border-bottom:1px solid #ddd}
th{border-bottom:2px solid #444}
td{overflow-wrap:break-word;max-width:34em}
figure{margin:1.5em 0;break-inside:avoid}img{max-width:100%;height:auto}
figcaption,.note{font-size:13px;color:#444}
li{margin:.25em 0}
@media print{main{max-width:none;padding:0}body{font-size:10pt}table{font-size:7.5pt}.wide{overflow:visible}img{max-height:160mm}
h2,h3{break-after:avoid}tr{break-inside:avoid}thead{display:table-header-group}@page{size:A4 landscape;margin:14mm}}
"""


def _columns(summaries: tuple[CellSummary, ...]) -> str:
    """What the columns mean that only some sweeps have."""
    said = ""
    if any(s.ignores is not None for s in summaries):
        said += "Ignores: episodes that fulfilled a goal which the words did not name. "
    if any(s.diversity is not None for s in summaries):
        said += (
            "Diversity: mean distance between two chunks that a policy answers to the same start observation, over the "
            "executed steps, per step and dimension, in normalised action units (0: it always answers alike). "
        )
        if any(s.diversity is None for s in summaries):
            said += "A dash: not measured (an earlier version played that setting), or a chunk was not finite. "
    if any(weight != 1 for s in summaries for weight in s.cell.guidance.values()):
        said += "A guided network call holds one more row for each guided part, so that it costs more, not more NFE. "
    return said


def _method(summaries: tuple[CellSummary, ...]) -> str:
    several = any(len(s.cell.train_seeds) > 1 for s in summaries)
    clustered = ", with the trials discounted for start states that several networks share" if several else ""
    rates = "success and ignores" if any(s.ignores is not None for s in summaries) else "success"
    means = "score and diversity" if any(s.diversity is not None for s in summaries) else "score"
    return (
        f"Intervals are 95 %, for these networks on other start states: {rates} by Wilson{clustered}; {means} by bootstrap "
        "over start states."
    )


def _setting(result: AblationResult, summaries: tuple[CellSummary, ...]) -> list[tuple[str, str]]:
    """What was described, and the seeds and episodes counted from the cells."""
    seeds = {s.cell.train_seeds for s in summaries}
    starts = {s.cell.env_seeds for s in summaries}
    episodes = sum(s.cell.successes.size for s in summaries)
    rows = [(str(key).replace("_", " "), _said(value)) for key, value in result.described.items()]
    rows.append(("finished", f"{episodes:,} episodes in {len(summaries)} cells"))
    rows.append(("finished training seeds", " | ".join(_listed(group) for group in sorted(seeds))))
    rows.append(("finished environment seeds", " | ".join(_seed_range(group) for group in sorted(starts))))
    rows.append(("files beside this page", "results.csv, results.parquet, episodes.parquet, figures/"))
    return rows


def _training_runs(summaries: tuple[CellSummary, ...]) -> tuple[list[str], list[list[str]]] | None:
    """(headers, rows) of what is known of each network; cells that share a run folder share its row."""
    runs: dict[Any, tuple[list[str], str, dict[str, Any]]] = {}
    for s in summaries:
        for seed, run in s.cell.train.items():
            if isinstance(run, dict) and run:
                folder = run.get("run")
                key = str(folder) if folder is not None else (s.cell.label, seed)
                runs.setdefault(key, ([], str(seed), run))[0].append(s.cell.label)
    if not runs:
        return None
    known = list(dict.fromkeys(name for _, _, run in runs.values() for name in run))
    rows = [[", ".join(labels), seed, *(_said(run.get(name)) for name in known)] for labels, seed, run in runs.values()]
    return ["settings", "training seed", *(name.replace("_", " ") for name in known)], rows


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as nothing
    return text.getvalue()


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in rows[0]:
        column = pa.array([row[name] for row in rows])
        columns[name] = column.cast(pa.float64()) if pa.types.is_null(column.type) else column
    pq.write_table(pa.table(columns), path)


def _html_table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headers = list(headers)
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in headers)
    body = "".join(f"<tr>{''.join(f'<td>{_unbroken(_text(cell))}</td>' for cell in row)}</tr>\n" for row in rows)
    thead = f"<thead><tr>{head}</tr></thead>\n" if any(headers) else ""
    return f'<div class="wide"><table>\n{thead}<tbody>\n{body}</tbody></table></div>'


def _unbroken(text: str) -> str:
    """No line break inside an interval."""
    return re.sub(r"\[([^\[\], ]+), ([^\[\], ]+)\]", "[\\1,&nbsp;\\2]", text)


def _bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>\n" for item in items) + "</ul>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _said(value: object) -> str:
    """A described value in words: {"torch": "2.9"} reads `torch 2.9`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_said(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def _seed_range(seeds: tuple[int, ...]) -> str:
    """Start states in few characters: `100000 .. 100199 (200)`."""
    unbroken = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} .. {seeds[-1]} ({len(seeds)})" if unbroken else _listed(seeds)


def _played(c: Comparison) -> str:
    networks, n = len(c.train_seeds), c.num_starts * len(c.train_seeds)
    return f"{n:,} paired episodes ({networks} network{'s' * (networks > 1)} x {c.num_starts} start states)"


def _points_with(difference: float, interval: Interval) -> str:
    return f"{points(difference)} points [{points(interval[0])}, {points(interval[1])}]"


def _range(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} .. {100 * interval[1]:.1f}"


def _equals(p: float | None) -> str:
    return p_value(p) if p is not None and p < 1e-4 else f"= {p_value(p)}"

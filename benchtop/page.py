"""One HTML page about some runs: tables, conclusions, curves, samples side by side.

It needs no network and no other file: curves are inline SVG, and a few lines of script sort the tables. Text
from runs (names, samples) is escaped.
"""

import re
from collections.abc import Sequence
from html import escape
from statistics import fmean

from benchtop.command_line import counted
from benchtop.curves import as_bytes, draw, draw_differences
from benchtop.groups import Group, SavedRun
from benchtop.progress import AXES
from benchtop.tables import groups_table, used_columns

# characters that samples may hold but HTML may not: control characters and lone surrogates
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")

STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #dde3ea; --back: #ffffff; --tint: #f4f7fa;
        --mark: #0072B2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #9aa7b5; --line: #333d49; --back: #12171d; --tint: #1b222b;
          --mark: #56B4E9; }
  svg { background: #ffffff; border-radius: 6px; }
}
body { margin: 2rem auto; max-width: 75rem; padding: 0 1.5rem; color: var(--ink); background: var(--back);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { color: var(--soft); margin-top: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .runs :is(th, td):nth-child(2) { text-align: left; }
th { color: var(--soft); font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button:focus-visible, .axes label:focus-within, .wide:focus-visible, .samples:focus-visible {
  outline: 2px solid var(--mark); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: var(--tint); }
.axes { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: .6rem; border: 0; padding: 0; }
.axes label { padding: .2rem .8rem; border: 1px solid var(--line); border-radius: 1rem; cursor: pointer; }
.axes label:has(:checked) { background: var(--mark); border-color: var(--mark); color: var(--back); }
.axes input { position: absolute; opacity: 0; }
figure { margin: 0; max-width: 46rem; } figure svg { width: 100%; height: auto; }
.samples { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(18rem, 1fr); gap: 1rem;
           overflow-x: auto; }
.samples h3 { font-size: .85rem; margin: .2rem 0; color: var(--soft); overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .8rem; border-radius: 6px; font-size: .8rem; white-space: pre-wrap;
      overflow-wrap: anywhere; margin: 0; }
pre b { color: var(--mark); font-weight: inherit; }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], place = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending", key = row => row.cells[place].dataset.value;
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");   // what was not measured stays below
    const numbers = !isNaN(x) && !isNaN(y);
    return (up ? 1 : -1) * (numbers ? x - y : x.localeCompare(y));
  };
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...[...body.rows].sort(order));
});
for (const input of document.querySelectorAll(".axes input")) input.addEventListener("change", () => {
  for (const figure of document.querySelectorAll("figure"))
    figure.hidden = figure.dataset.axis !== input.value;
});
"""


def page(groups: list[Group], metric: str, said: list[str], is_comparable: bool = True,
         compared: Sequence[Group] = ()) -> str:
    """The HTML of the page.

    said           lines of conclusions
    is_comparable  whether the means of the groups are meaningful
    compared       groups whose differences are also drawn
    """
    title = " and ".join(group.name for group in groups[:3]) + (" and others" if len(groups) > 3 else "")
    runs = [run for group in groups for run in group.runs]
    finished = [run for run in runs if run.is_finished]
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{len(finished)} of {counted(len(runs), 'run')} finished</p>"]
    if is_comparable and any(len(group.runs) > 1 for group in groups):
        parts += ["<h2>Groups</h2>", _groups_table(groups)]
    parts += ["<h2>Runs</h2>", _runs_table(groups)]
    if said:
        parts += ["<h2>Conclusions</h2>", f"<pre>{escape(chr(10).join(said).strip())}</pre>"]
    parts += [_curves(groups, compared, metric), _samples(groups)]
    return document(title, "\n".join(parts), script=SCRIPT)


def document(title: str, body: str, more_style: str = "", script: str = "") -> str:
    """A whole HTML file around its body."""
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>{escape(title)}</title><style>{STYLE}{more_style}</style></head>\n"
            f"<body><main>\n{NO_TEXT.sub(chr(0xfffd), body)}\n</main>"
            f"{f'<script>{script}</script>' if script else ''}</body></html>\n")


def wide(label: str, table: str) -> str:
    """A table that scrolls sideways on a narrow screen, also by keyboard, under a name for screen readers."""
    return f"<div class=\"wide\" role=\"region\" aria-label=\"{label}\" tabindex=\"0\">{table}</div>"


def picture(label: str, svg: str) -> str:
    """An SVG as one picture with a name, so that a screen reader does not read each of its labels."""
    return svg[svg.index("<svg"):].replace("<svg", f"<svg role=\"img\" aria-label=\"{escape(label)}\"", 1)


def _groups_table(groups: list[Group]) -> str:
    head, *lines = [[escape(cell) for cell in line] for line in groups_table(groups)]
    return wide("Groups", "<table class=\"groups\"><thead><tr>"
                + "".join(f"<th scope=\"col\">{cell}</th>" for cell in head) + "</tr></thead>\n<tbody>"
                + "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
                + "</tbody></table>")


def _runs_table(groups: list[Group]) -> str:
    """The runs table; a click on a column's title sorts it."""
    columns = used_columns(groups)
    head = "".join(f"<th scope=\"col\"><button>{escape(title)}</button></th>"
                   for title in ["group", *(column.title for column in columns)])
    lines = []
    for name, run in [(group.name, run) for group in groups for run in group.runs]:
        cells = [f"<td data-value=\"{escape(name)}\">{escape(name)}</td>"]
        for column in columns:
            value = column.value(run)
            key = value["value"] if isinstance(value, dict) else "" if value is None else value
            cells.append(f"<td data-value=\"{escape(str(key))}\">"
                         f"{'' if value is None else escape(column.text(value))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return wide("Runs", f"<table class=\"runs\"><thead><tr>{head}</tr></thead>\n<tbody>"
                + "\n".join(lines) + "</tbody></table>")


def _curves(groups: list[Group], compared: Sequence[Group], metric: str) -> str:
    """Figures for each axis that the runs have; only those of the selected axis are visible."""
    labels, figures = [], []
    for axis, (name, _) in AXES.items():
        curves, differences = (as_bytes(drawn, axis, metric, "svg", of).decode()
                               for drawn, of in ((groups, draw), (compared, draw_differences)))
        if not curves:
            continue
        checked, hidden = ("", " hidden") if figures else (" checked", "")
        labels.append(f"<label><input type=\"radio\" name=\"axis\" value=\"{axis}\"{checked}>"
                      f"{escape(name)}</label>")
        for kind, svg in (("by", curves), ("difference-by", differences)):
            if svg:
                what = f"{metric if kind == 'by' else f'difference of {metric}'} by {name}"
                figures.append(f"<figure id=\"{kind}-{axis}\" data-axis=\"{axis}\"{hidden}>"
                               f"{picture(what, svg)}</figure>")
    if not figures:
        return ""
    return (f"<h2>Curves</h2>\n<fieldset class=\"axes\" aria-label=\"x axis\">{''.join(labels)}</fieldset>\n"
            + "\n".join(figures))


def _samples(groups: list[Group]) -> str:
    """Continuations of each prompt side by side, from one run of each group."""
    shown, which = _sampled_runs(groups)
    prompts = list(dict.fromkeys(sample["prompt"] for _, run in shown for sample in run.samples))
    parts = []
    for prompt in prompts:
        cells = []
        for name, run in shown:
            text = next((sample["text"] for sample in run.samples if sample["prompt"] == prompt), None)
            body = "" if text is None else f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>"
            cells.append(f"<div><h3>{escape(name)}: {escape(run.name)}</h3>{body}</div>")
        parts.append("<div class=\"samples\" role=\"region\" aria-label=\"Samples\" tabindex=\"0\">"
                     f"{''.join(cells)}</div>")
    return f"<h2>Samples of {which}</h2>\n" + "\n".join(parts) if parts else ""


def _sampled_runs(groups: list[Group]) -> tuple[list[tuple[str, SavedRun]], str]:
    """One run with samples per group, of a common seed if there is one; and a description of the choice."""
    sampled = [(group, {run.summary["seed"]: run for run in reversed(group.finished) if run.samples})
               for group in groups]
    sampled = [(group, runs) for group, runs in sampled if runs]
    shared = set.intersection(*(set(runs) for _, runs in sampled)) if sampled else set()
    if shared:
        return [(group.name, runs[min(shared)]) for group, runs in sampled], f"seed {min(shared)}"
    return ([(group.name, _nearest_to_mean(group)) for group, _ in sampled],
            "the run nearest to each group's mean, since no seed is in all groups")


def _nearest_to_mean(group: Group) -> SavedRun:
    mean = fmean(group.values("val_bpb"))
    with_samples = [run for run in group.finished if run.samples]
    return min(with_samples, key=lambda run: abs(run.summary["val_bpb"] - mean))

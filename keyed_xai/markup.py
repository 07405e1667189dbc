"""What a report is made of: markup that escapes, figures in words, and fields of documents that may lack them.

Every element is built by `element`, which escapes whatever is not `Html` already. A figure that is missing becomes an
empty string, and empty cells, rows, tables and sections vanish.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from keyed_xai.artifacts.documents import printable

Answer = Literal["yes", "in part", "no"]
_LARGEST = 1e300
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#57606a;--line:#d0d7de;--card:#f6f8fa;
--yes:#116329;--part:#7d4e00;--no:#a40e26}
@media (prefers-color-scheme:dark){:root{--page:#0f1216;--text:#e6e9ee;--soft:#9aa4b2;--line:#313943;--card:#191e25;
--yes:#5fd38a;--part:#f0b64a;--no:#ff8a8a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.25rem 1rem 3rem;max-width:58rem;background:var(--page);color:var(--text);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.05rem;font-weight:600;color:var(--soft);margin:0 0 .5rem}
h2{font-size:1.3rem;line-height:1.3;margin:2.5rem 0 .5rem}
h3{font-size:1.05rem;margin:1.5rem 0 .25rem}
p{margin:.4rem 0 .8rem;max-width:44rem}
.headline{font-size:1.45rem;line-height:1.35;font-weight:650;margin:.25rem 0 1rem;text-wrap:pretty}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(13.5rem,1fr));gap:.75rem;margin:1rem 0}
.card{border:1px solid var(--line);border-left:.3rem solid var(--soft);border-radius:.5rem;background:var(--card);
padding:.7rem .9rem}
.card p{margin:.15rem 0}.card .answer{font-size:1.2rem;font-weight:700}
.yes{border-left-color:var(--yes)}.yes .answer{color:var(--yes)}
.part{border-left-color:var(--part)}.part .answer{color:var(--part)}
.no{border-left-color:var(--no)}.no .answer{color:var(--no)}
.scroll{overflow-x:auto;margin:.6rem 0 1rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
caption{text-align:left;padding:.2rem 0 .4rem}
.scroll th{overflow-wrap:normal}.scroll td{white-space:nowrap}
th,td{padding:.38rem .8rem .38rem 0;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th:last-child,td:last-child{padding-right:0}
th:first-child{text-align:left}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500}
table.facts td{text-align:left}
table.facts th{width:38%}
figure{margin:1rem 0 1.5rem}
figure .paper{background:#fff;border:1px solid var(--line);border-radius:.5rem;padding:.5rem;overflow-x:auto}
figure img{display:block;max-width:100%;height:auto;margin:0 auto}
figcaption{margin-top:.4rem;max-width:44rem}
ul{padding-left:1.2rem;max-width:44rem}li{margin:.5rem 0}
details{border-top:1px solid var(--line);padding:.6rem 0}summary{cursor:pointer;font-weight:600}
@media (max-width:34rem){th,td{padding-right:.5rem}table{font-size:.88rem}.headline{font-size:1.25rem}
figure img.wide{max-width:none;width:40rem}}
@media print{:root{color-scheme:light;--page:#fff;--text:#000;--soft:#444;--line:#bbb;--card:#fff;--yes:#116329;
--part:#7d4e00;--no:#a40e26}body{max-width:none;padding:0;font-size:10.5pt}h2,h3{break-after:avoid}
figure,.card,tr{break-inside:avoid}.scroll,figure .paper{overflow:visible}
details::details-content{content-visibility:visible;block-size:auto}}
"""


class Html(str):
    """Text that is markup already; made in this module alone."""

    __slots__ = ()


NOTHING = Html()


def page(title: str, *sections: Html) -> str:
    """Return a whole page that loads nothing and runs nothing."""
    main = element("main", join(sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{main}\n</body>\n</html>\n"
    )


def element(tag: str, *children: str, kind: str = "") -> Html:
    """Return an element whose children are escaped unless they are markup already."""
    inner = "".join(child if isinstance(child, Html) else _escape(child) for child in children)
    attribute = f' class="{kind}"' if kind else ""
    return Html(f"<{tag}{attribute}>{inner}</{tag}>")


def _escape(text: str) -> str:
    """Return text that is safe in elements and attributes, on one line, its control characters replaced."""
    return html.escape(printable(text))


def join(parts: Iterable[Html]) -> Html:
    """Return elements one after the other."""
    return Html("\n".join(part for part in parts if part))


def image(png: bytes, alt: str, *, kind: str = "") -> Html:
    """Return a PNG file as an element of the page itself."""
    data = base64.b64encode(png).decode()
    return Html(f'<img class="{_escape(kind)}" alt="{_escape(alt)}" src="data:image/png;base64,{data}">')


def section(title: str, content: Html, *, about: str = "") -> Html:
    """Return content under a heading; nothing where there is no content."""
    if not content:
        return NOTHING
    words = element("p", about) if about else NOTHING
    return element("section", join([element("h2", title), words, content]))


def card(title: str, answer: Answer | None, said: str, *, alarm: bool = False) -> Html:
    """Return an answer in its colour; nothing where there is none.

    Args:
        title: The question.
        answer: To it.
        said: What it rests on.
        alarm: Whether yes is the bad answer.
    """
    if answer is None:
        return NOTHING
    good, bad = ("no", "yes") if alarm else ("yes", "no")
    kind = {good: "yes", "in part": "part", bad: "no"}[answer]
    words = [element("p", title, kind="soft"), element("p", answer.capitalize(), kind="answer"), element("p", said)]
    return element("div", *words, kind=f"card {kind}")


def table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> Html:
    """Return a table without the rows and columns that are empty."""
    kept = [(label, cells) for label, cells in rows if any(cells)]
    if not kept:
        return NOTHING
    columns = [column for column in range(len(header) - 1) if any(cells[column] for _, cells in kept)]
    titles = [element("th", title) for title in (header[0], *(header[1 + column] for column in columns))]
    body = [
        element("tr", element("th", label), *(element("td", cells[column]) for column in columns))
        for label, cells in kept
    ]
    table = element("table", element("thead", element("tr", *titles)), element("tbody", *body))
    return element("div", table, kind="scroll")


def fact_table(facts: Iterable[tuple[str, str]]) -> Html:
    """Return labels and values, without the values that are empty."""
    rows = [element("tr", element("th", label), element("td", value)) for label, value in facts if value]
    return element("table", element("tbody", *rows), kind="facts") if rows else NOTHING


def plain_facts(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the names and values of an object for `fact_table`, as they are."""
    return [
        (name, value if isinstance(value, str) else json.dumps(value, default=str)) for name, value in values.items()
    ]


def fold(title: str, content: Html) -> Html:
    """Return content that is shown on request, and in print."""
    return element("details", element("summary", title), content) if content else NOTHING


# Figures in words


def as_p_value(p_value: float | None, log2_p: float | None = None) -> str:
    """Return "2^-60.7 (5.3e-19)"; the logarithm counts, as the p-value may be too small for a float."""
    if log2_p is None and p_value is not None and p_value > 0:
        log2_p = math.log2(p_value)
    if log2_p is None:
        return ""
    log10_p = log2_p * math.log10(2)
    exponent = math.floor(log10_p)
    if exponent >= -4:
        decimal = f"{10 ** min(0.0, log10_p):.3g}"
        return decimal if log2_p > -1 else f"2^{log2_p:.1f} ({decimal})"
    return f"2^{log2_p:.1f} ({min(9.9, 10 ** (log10_p - exponent)):.1f}e{exponent})"


def as_decimal(value: float | None) -> str:
    """Return three decimals, as suits correlations."""
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no negative zero


def as_plain(value: float | None) -> str:
    """Return three significant digits, or all digits before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def as_share(value: float | None) -> str:
    """Return a fraction as percent with one decimal."""
    return "" if value is None else as_percent(100 * value)


def as_percent(value: float | None) -> str:
    """Return percent with one decimal."""
    return "" if value is None else f"{value:.1f} %"


def with_unit(value: float | None, unit: str) -> str:
    """Return a figure and its unit."""
    return "" if value is None else f"{as_plain(value)} {unit}"


def as_duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    if seconds < 120:
        return f"{as_plain(seconds)} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def describe_data(data: object, inputs: str = "images") -> str:
    """Return how many inputs of which source a report's `train`, `held_out` or `probe` is about."""
    count, source = get_number(data, "images"), get_string(data, "source")
    return f"{count:,.0f} {inputs} of {source}" if count is not None and source else source


def overall(answers: Sequence[Answer | None], done: str) -> str:
    """Return what several answers come to: `done`, `done` in part or not `done`; what is not known is in part."""
    if "no" in answers:
        return f"not {done}"
    return done if all(answer == "yes" for answer in answers) else f"{done} in part"


# Fields of documents


def _look(document: object, *path: str) -> object:
    for name in path:
        document = document.get(name) if isinstance(document, Mapping) else None
    return document


def get_mapping(document: object, *path: str) -> Mapping[str, object]:
    """Return the object at a path, empty where there is none."""
    value = _look(document, *path)
    return value if isinstance(value, Mapping) else {}


def get_list(document: object, *path: str) -> list[object]:
    """Return the list at a path, empty where there is none."""
    value = _look(document, *path)
    return value if isinstance(value, list) else []


def get_strings(document: object, *path: str) -> list[str]:
    """Return the texts in the list at a path."""
    return [each for each in get_list(document, *path) if isinstance(each, str)]


def get_string(document: object, *path: str) -> str:
    """Return the text at a path, empty where there is none."""
    value = _look(document, *path)
    return value if isinstance(value, str) else ""


def get_number(document: object, *path: str) -> float | None:
    """Return the finite number at a path, None where there is none."""
    value = _look(document, *path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # NaN is not less either

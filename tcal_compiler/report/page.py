"""A report as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from html import escape

from .blocks import Block, Code, Paragraph, Plot, Section, Table
from .svg import draw

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #5b6570; --line: #d5dae0; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e8ec; --faint: #9aa5b1; --line: #363d45; --tint: #1c2127; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; overflow-wrap: anywhere; }
p { max-width: 46rem; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
.part { container-type: inline-size; min-width: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 2rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
th, td { overflow-wrap: anywhere; min-width: 3rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 1rem 0 0; }
figcaption { font-size: .9rem; font-weight: 600; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
@container (max-width: 34rem) {
  .wide thead { display: none; }
  .wide tr { display: block; border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .wide td { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .6rem; border: 0; padding: .1rem 0; }
  .wide td:empty { display: none; }
  .wide td::before { content: attr(data-label); color: var(--faint); }
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # matplotlib's colour bars are data URIs


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in table.head)
    rows = [
        "".join(f'<td data-label="{escape(h)}">{escape(c)}</td>' for h, c in zip(table.head, r, strict=True))
        for r in table.rows
    ]
    body = "\n".join(f"<tr>{r}</tr>" for r in rows)
    wide = ' class="wide"' if len(table.head) > 3 else ""  # on a narrow screen each row becomes a list
    return f"<table{wide}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _plot(plot: Plot) -> str:
    title = escape(plot.title)
    svg = draw(plot).replace("<svg ", f'<svg aria-label="{title}" ', 1)
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>"


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Code(text):
            return f"<pre>{escape(text.strip())}</pre>"
        case Table():
            return _table(block)
        case Plot():
            return _plot(block)


def _blocks(blocks: list[Block]) -> str:
    plots = [_block(b) for b in blocks if isinstance(b, Plot)]
    rest = [_block(b) for b in blocks if not isinstance(b, Plot)]
    return "\n".join(rest + (['<div class="plots">', *plots, "</div>"] if plots else []))


def section(title: str, parts: list[tuple[str, list[Block]]]) -> str:
    """One heading over several runs' blocks, each under its own name when there are several."""
    named = [(f"<h3>{escape(name)}</h3>\n" if len(parts) > 1 else "") + _blocks(blocks) for name, blocks in parts]
    inner = "\n".join(f'<div class="part">\n{p}\n</div>' for p in named)
    inner = f'<div class="pair">\n{inner}\n</div>' if len(parts) > 1 else inner
    return f"<section>\n<h2>{escape(title)}</h2>\n{inner}\n</section>"


def page(title: str, sections: list[str]) -> str:
    """The whole page around sections that are HTML already."""
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    body = [f"<body><main><h1>{escape(title)}</h1>", *sections, "</main></body>"]
    return "\n".join(["<!doctype html>", '<html lang="en"><head>', *head, "</head>", *body, "</html>", ""])


def write(title: str, sections: list[Section]) -> str:
    """The page of one run. Needs matplotlib."""
    return page(title, [section(s.title, [("", s.blocks)]) for s in sections])

"""Pieces of HTML: whatever goes in as text comes out escaped."""

from collections.abc import Sequence
from html import escape


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str, marked: str | None = None) -> str:
    """A table whose first column heads its rows; cells that begin with `marked` stand out, without it."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = ""
    for first, *cells in rows:
        body += f'<tr><th scope="row">{escape(first)}</th>{"".join(_cell(cell, marked) for cell in cells)}</tr>\n'
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _cell(text: str, marked: str | None) -> str:
    if marked is not None and text.startswith(marked):
        return f'<td class="least">{escape(text.removeprefix(marked))}</td>'
    return f"<td>{escape(text)}</td>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def figure(svg: str, caption: str, wide: bool = True) -> str:
    """A figure that scrolls by itself where the page is narrower."""
    label = escape(caption)
    return (
        f'<figure class="{"wide" if wide else "narrow"}">'
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">{svg}</div>'
        f"<figcaption>{label}</figcaption></figure>\n"
    )


def details(summary: str, content: str) -> str:
    """What opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def section(name: str, heading: str, content: str) -> str:
    """A section that the page's list of contents can lead to."""
    head = f'<h2 id="{name}-h">{escape(heading)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-h">\n{head}\n{content}</section>\n'


def numbers(items: Sequence[tuple[str, str, str]]) -> str:
    """Big numbers: what it is, the number, what is to be said of it."""
    rows = "".join(
        f"<div><dt>{escape(what)}</dt><dd><strong>{escape(number)}</strong>{escape(more)}</dd></div>\n"
        for what, number, more in items
    )
    return f'<dl class="numbers">\n{rows}</dl>\n'

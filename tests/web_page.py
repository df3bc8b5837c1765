"""Reads an HTML page as a strict reader would: tags in balance, ids once; tables by caption; what it refers to."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from xml.etree import ElementTree

_VOID = {"meta", "link", "br", "img", "hr", "input"}
_REFERS = {"src", "href", "srcset", "data", "action", "poster", "xlink:href", "background", "formaction"}


@dataclass
class Page(HTMLParser):
    """A page that was read.

    Attributes:
        text: the page.
        tables: caption -> rows of cells, the headings first; of tables of one caption the first.
        ids: each once.
        references: values of attributes that could load or lead to something.
        tags: how often each stands in it.
        prose: all text outside of style sheets and figures.
    """

    text: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    tags: dict[str, int] = field(default_factory=dict)
    attributes: list[tuple[str, str | None]] = field(default_factory=list)
    prose: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(self.text)
        self.close()
        assert not self._open, self._open
        assert len(set(self.ids)) == len(self.ids), "an id stands twice"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [value or "" for name, value in attrs if name in _REFERS]
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes something else"
        if tag == "table":
            assert self._caption
            self.tables.setdefault(self._caption, self._rows)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        if self._open and self._open[-1] == "caption":
            self._caption += data
        if "style" not in self._open and "svg" not in self._open:
            self.prose += data

    @property
    def figures(self) -> list[ElementTree.Element]:
        """The SVGs, each read as XML."""
        parts = self.text.split("<svg ")[1:]
        return [ElementTree.fromstring("<svg " + part.split("</svg>")[0] + "</svg>") for part in parts]

    def column(self, caption: str, heading: str) -> list[str]:
        """The cells below a heading."""
        headings, *rows = self.tables[caption]
        return [row[headings.index(heading)] for row in rows]

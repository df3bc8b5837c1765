"""A hook of mkdocs: the site is made of the repository's own pages, where they lie, so that their links hold."""

from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.md", "benchmarks/**/*.md", "benchmarks/**/*.svg", "recipes/*.md", "examples/**/*.md")
PATTERNS += ("examples/*.ipynb",)


class _PlainBrackets(Extension):
    """Our pages write `NAME[:CONFIG][@SPLIT]` and mean no link."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.deregister("mkdocs-autorefs", strict=False)


@event_priority(-100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """After the plugins have added theirs."""
    config.markdown_extensions.append(_PlainBrackets())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to those of docs/site."""
    for path in sorted(found for pattern in PATTERNS for found in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files

"""Adds to the site what MkDocs does not find in `docs`.

As a hook of MkDocs, it makes pages of files outside of `docs`: the README, the
tutorials, and others. As an extension of Griffe, it finds the examples in docstrings.
"""

import re
import textwrap
from pathlib import Path

import griffe
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/PROFILE.md": "profile.md",
    "notebooks": "notebooks/01_quickstart.ipynb",
}


@event_priority(100)  # Before the plugin that looks for notebooks.
def on_files(files, config):
    """Adds the pages of `PAGES` and the tutorials to the files of the site."""
    for source, page in PAGES.items():
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=relinked(text)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        path = notebook.relative_to(ROOT).as_posix()
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def relinked(text):
    """Points the links of a file outside of `docs` to the pages of the site."""

    def page(link):
        target = link[1].removeprefix("../")
        return f"]({PAGES.get(target, target.removeprefix('docs/'))}"

    return re.sub(r"\]\(([^)#:]+)", page, text)


def on_page_markdown(markdown, page, config, files):
    """Points links from `docs` to files outside of it to the pages of the site."""

    def inside(link):
        return f"]({PAGES[link[1]]}" if link[1] in PAGES else link[0]

    return re.sub(r"\]\(\.\./([^)#:]+)", inside, markdown)


class Examples(griffe.Extension):
    """Reads examples in Keras's style of docstrings as examples in Google's style."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrites the docstring of an object if it ends in an example."""
        if obj.docstring is not None:
            text, heading, example = obj.docstring.value.partition("\nExample:\n")
            if heading:
                example = textwrap.indent(example, "    ")
                obj.docstring.value = f"{text}\nExamples:\n{example}"

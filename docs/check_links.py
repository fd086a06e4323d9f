# SPDX-License-Identifier: BSD-3-Clause
"""Does every internal link of the built site lead to a page and an anchor that exist?

``python docs/check_links.py build/site``. Looks at the HTML, so that it also sees what Sphinx
does not check: links in generated pages, and anchors. Needs no connection.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of a page, and whether it loads anything from elsewhere."""

    def __init__(self, file):
        super().__init__()
        self.links, self.anchors, self.foreign = [], {"", "top"}, []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        """Note what a tag links to, and its anchors."""
        found = dict(attributes)
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        target = found.get("href") or found.get("src")
        if target is None:
            return
        if urlsplit(target).scheme or target.startswith("//"):
            if tag != "a" and not target.startswith("data:"):
                self.foreign.append(target)
        else:
            self.links.append(target)


def faults(site):
    """Yield what is wrong, a line each."""
    files = [file for file in site.rglob("*.html") if "_static" not in file.parts]
    pages = {file.resolve(): Page(file) for file in files}
    for file, page in pages.items():
        name = file.relative_to(site.resolve())
        for target in page.foreign:
            yield f"{name}: loads {target}"
        for target in page.links:
            parts = urlsplit(target)
            aim = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not aim.exists():
                yield f"{name}: no file {target}"
            elif aim in pages and unquote(parts.fragment) not in pages[aim].anchors:
                yield f"{name}: no anchor {target}"


if __name__ == "__main__":
    found = sorted(set(faults(Path(sys.argv[1]))))
    print("\n".join(found) if found else "all links lead somewhere; nothing comes from elsewhere")
    sys.exit(bool(found))

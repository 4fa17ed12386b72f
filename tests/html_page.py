"""A page of HTML, read as a browser does: what is open, what it says, what it leads to."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags as they open and close, the text, the cells of the tables, ids and where links lead."""

    VOID = ("meta", "br", "link", "img", "image", "use", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.rows, self.tags = [], [], [], set()
        self.ids, self.links, self.pictures = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self._seen(tag, dict(attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._seen(tag, dict(attributes))

    def _seen(self, tag, attributes):
        self.tags.add(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[name] for name in ("href", "src", "xlink:href") if name in attributes]
        if tag == "svg":
            self.pictures.append(attributes)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if set(self.open) & {"td", "th"}:
            self.rows[-1][-1] += data

    def stands_alone(self):
        """Nothing from outside and nothing to run; every id is there once, and every link within leads to one."""
        assert not self.tags & {"script", "link", "img", "iframe", "object"}
        assert len(self.ids) == len(set(self.ids))
        assert {link[1:] for link in self.links if link.startswith("#")} <= set(self.ids)
        assert not [link for link in self.links if "//" in link], self.links
        assert all(each["role"] == "img" and each["aria-label"] for each in self.pictures)

"""The site: it is made without a warning, and has what a user looks for. Notebooks run in ``make docs`` alone."""

from __future__ import annotations

import re
import sys

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import public

sys.path.remove(str(ROOT / "docs"))

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages read and all links resolved, as in ``make docs``, without HTML: the application, and what it said."""
    from io import StringIO

    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    out, said, path = tmp_path_factory.mktemp("site"), StringIO(), list(sys.path)
    settings = {"nb_execution_mode": "off"}
    with patch_docutils(ROOT / "docs"), docutils_namespace():
        app = Sphinx(
            ROOT / "docs", ROOT / "docs", out, out / "doctrees", "dummy", settings, status=None, warning=said,
            freshenv=True,
        )  # fmt: skip
        app.build()
    sys.path[:] = path
    return app, said.getvalue()


def test_the_site_is_made_without_a_warning(site):
    _, said = site
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in said.splitlines()]
    problems = [line for line in lines if line.strip()]
    assert not problems, "\n".join(problems)


def test_every_page_is_in_a_table_of_contents(site):
    app, _ = site
    reached, waiting = set(), ["index"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += app.env.toctree_includes.get(page, [])
    assert reached == set(app.env.found_docs)
    assert {"cli", "api/nn", "api/train", "api/data"} <= reached


def test_every_public_name_has_an_entry(site):
    """Also the methods of a class: with the class, or with the public one that they come from."""
    app, _ = site
    entries, names = app.env.domaindata["py"]["objects"], public.names()
    known = {id(names[name]) for name in entries if name in names}
    missing = [name for name, value in names.items() if name not in entries and id(value) not in known]
    shown = set()
    for name, value in names.items():
        if isinstance(value, type):
            shown |= {id(each) for method, each in public.own(value).items() if f"{name}.{method}" in entries}
    for name, value in names.items():
        if isinstance(value, type) and not issubclass(value, BaseException):
            missing += [f"{name}.{method}" for method, each in public.own(value).items() if id(each) not in shown]
    assert not missing, missing


def test_every_command_has_its_section(site):
    app, _ = site
    from pages import commands

    headings = re.findall(r"^##+ (trtkern .+)$", commands(), flags=re.MULTILINE)
    text = app.env.get_doctree("cli").astext()
    assert len(headings) > 15 and all(heading in text for heading in headings)

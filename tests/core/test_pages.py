"""What the pages of reports, audits and grids share."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError

import nrat_scale
from nrat_scale.core.errors import UserError
from nrat_scale.core.pages import as_data, check_page_name, environment

PAGES = sorted(Path(nrat_scale.__file__).parent.glob("*/templates/page.html"))


def test_every_page_extends_the_base() -> None:
    """Head, policy and style stand in base.html alone, so that a change there reaches every page."""
    assert [page.parts[-3] for page in PAGES] == ["audit", "report", "reproduce"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.startswith('{% extends "base.html" %}\n{% from "macros.html" import ')
        assert "<head>" not in text and "Content-Security-Policy" not in text and '<div class="scroll"' not in text


def test_a_page_has_the_style_its_title_and_what_it_adds() -> None:
    """The blocks of a page stand in its order: policy, style, content; without them the base is a whole page."""
    templates = environment("nrat_scale.report", autoescape=True)
    page = templates.get_template("base.html").render(title="<T>")
    assert page.startswith("<!DOCTYPE html>\n") and page.endswith("</html>\n")
    assert page.count("&lt;T&gt;") == 2 and ":root {" in page and "script-src" not in page
    added = """{% extends "base.html" %}{% from "macros.html" import chart, facts_of, table_region %}
{% block allowed %}; script-src 'none'{% endblock %}{% block style %}b {}{% endblock %}{% block content %}
{% call table_region("plain", "C", true, "here") %}<tr><td>1</td></tr>{% endcall %}
{% call chart("data:,", "Caption", "What") %}, more{% endcall %}
{% call facts_of({"a": "<"}) %}<dt>first</dt>{% endcall %}{% endblock %}"""
    page = templates.from_string(added).render(title="T")
    parts = ["; script-src 'none'\">", ":root {", "b {}", "<h1>T</h1>", 'class="plain" id="here"', "Scrolls sideways.", "<td>1</td>"]  # fmt: skip
    parts += ['alt="What. Caption"', "<figcaption>Caption, more<", "<dt>first</dt>", "<dt>a</dt><dd>&lt;</dd>", "</dl>"]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)


def test_values_are_escaped_and_have_no_control_characters() -> None:
    """Also in Markdown, which is not escaped; a value that is not given is an error."""
    html, markdown = (environment("nrat_scale.release", autoescape=escape) for escape in (True, False))
    assert html.from_string("{{ value }}").render(value="<\x1b>") == "&lt;?&gt;"
    assert markdown.from_string("{{ value }}").render(value="<\x1b>") == "<?>"
    assert html.from_string("{{ image | data }}").render(image=b"1") == as_data(b"1") == "data:image/png;base64,MQ=="
    with pytest.raises(UndefinedError):
        html.from_string("{{ value }}").render()


def test_a_page_is_an_html_file() -> None:
    """Another suffix would overwrite what is no page."""
    for name in ("a.html", "b.HTM"):
        check_page_name(Path(name), "report")
    with pytest.raises(UserError, match=r"The report results\.json must be an \.html file\."):
        check_page_name(Path("results.json"), "report")

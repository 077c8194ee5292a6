"""What HTML pages share: `templates/base.html`, which each extends, with `macros.html` and `style.css`.

A page loads nothing and contains its figures; Jinja escapes every value.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nrat_scale.core.errors import UserError, printable


def environment(package: str, *, autoescape: bool) -> Environment:
    """The templates of a package and those of this one; values are printed without control characters, unless `Markup`."""
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("nrat_scale.core")]),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["data"] = as_data
    return templates


def as_data(image: bytes, kind: str = "png") -> Markup:
    """An image of the media type image/`kind` as the address of an <img>."""
    return Markup(f"data:image/{kind};base64,") + base64.b64encode(image).decode()


@dataclass(frozen=True)
class Figure:
    """A chart and its caption, which is its alternative text too."""

    png: bytes
    caption: str


def check_page_name(out: Path, what: str) -> None:
    """Raise `UserError` if the file of a page, called `what` in messages, is not an .html file."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"The {what} {out} must be an .html file. Choose another name with --out.")
